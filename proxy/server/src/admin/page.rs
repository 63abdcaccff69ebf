//! The page at `/`: every endpoint with its parameters, usable without scripts.

use std::fmt::Write as _;

use bytes::Bytes;

use super::endpoints::ENDPOINTS;

const HEAD: &str = "<!DOCTYPE html>
<html lang='en'>
<head>
<meta charset='utf-8'>
<meta name='viewport' content='width=device-width, initial-scale=1'>
<title>Waystation admin</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; }
p.sub { margin-top: .2rem; opacity: .75; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid color-mix(in srgb, currentColor 20%, transparent); padding: .5rem .75rem .5rem 0;
     vertical-align: top; }
td:first-child { white-space: nowrap; font-family: ui-monospace, monospace; }
label { display: inline-flex; gap: .4rem; align-items: center; margin: .15rem .9rem .15rem 0; font-size: .85rem; }
input[type=text] { width: 11rem; }
button { font: inherit; font-family: ui-monospace, monospace; cursor: pointer; }
</style>
</head>
<body>
<h1>Waystation admin</h1>
<p class='sub'>Commands that change something are sent by POST. Text and JSON are Envoy's.</p>
<table>
";

/// Parameters that are switches rather than values.
const SWITCHES: &[&str] =
    &["graceful", "inboundonly", "include_eds", "invert_filter", "skip_exit", "text_readouts", "usedonly"];

/// The end of the page of `/stats?format=html`.
pub(super) const STATS_TAIL: &[u8] = b"</pre>\n</body>\n</html>\n";

/// The beginning of the page of `/stats?format=html`: a form that asks anew, and an open `pre` for the stats. One that is
/// `active` asks by itself, every five seconds.
pub(super) fn stats_head<'a>(
    query: impl Iterator<Item = (&'a str, &'a str)> + Clone,
    active: bool,
) -> String {
    let mut page = String::from(HEAD.split_once("<h1>").map_or(HEAD, |(head, _)| head));
    if active {
        page.push_str("<meta http-equiv='refresh' content='5'>\n");
    }
    page.push_str("<h1><a href='/'>Waystation admin</a> /stats</h1>\n<form action='stats' method='get'>\n");
    let value = |wanted: &str| query.clone().find(|(name, _)| *name == wanted).map(|(_, value)| value);
    for name in ["usedonly", "invert_filter"] {
        let checked = if value(name).is_some() { " checked" } else { "" };
        // Writing to a string does not fail.
        let _ =
            writeln!(page, "<label>{name} <input type='checkbox' name='{name}' value='on'{checked}></label>");
    }
    for name in ["filter", "type", "histogram_buckets", "format"] {
        let shown = escaped(value(name).unwrap_or_default().as_bytes());
        let shown = String::from_utf8_lossy(&shown);
        let _ = writeln!(page, "<label>{name} <input type='text' name='{name}' value='{shown}'></label>");
    }
    page.push_str("<button>/stats</button>\n</form>\n<pre>\n");
    page
}

/// `text` as a page shows it.
pub(super) fn escaped(text: &[u8]) -> Bytes {
    let mut shown = Vec::with_capacity(text.len());
    for &byte in text {
        match byte {
            b'&' => shown.extend_from_slice(b"&amp;"),
            b'<' => shown.extend_from_slice(b"&lt;"),
            b'>' => shown.extend_from_slice(b"&gt;"),
            b'\'' => shown.extend_from_slice(b"&#39;"),
            other => shown.push(other),
        }
    }
    shown.into()
}

pub(super) fn home() -> String {
    let mut page = String::from(HEAD);
    for endpoint in ENDPOINTS.iter().filter(|endpoint| endpoint.path != "/") {
        let path = endpoint.path;
        let method = if endpoint.post { "post" } else { "get" };
        // Writing to a string does not fail.
        let _ = write!(
            page,
            "<tr><td><form id='{path}' action='{}' method='{method}'><button>{path}</button></form></td><td>{}",
            &path[1..],
            endpoint.help
        );
        if !endpoint.parameters.is_empty() {
            page.push_str("<div>");
        }
        for (name, help) in endpoint.parameters {
            let input = if SWITCHES.contains(name) {
                format!("<input form='{path}' type='checkbox' name='{name}' value='on'>")
            } else {
                format!("<input form='{path}' type='text' name='{name}'>")
            };
            let _ = write!(page, "<label title='{help}'>{name} {input}</label>");
        }
        if !endpoint.parameters.is_empty() {
            page.push_str("</div>");
        }
        page.push_str("</td></tr>\n");
    }
    page.push_str("</table>\n</body>\n</html>\n");
    page
}

//! The page at `/`: every endpoint with its parameters, usable without scripts.

use std::fmt::Write as _;

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

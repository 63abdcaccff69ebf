//! `envoy.filters.listener.http_inspector`: whether a plaintext connection speaks HTTP, and which version.

use waystation_filter_api::connection::ConnectionInfo;
use waystation_stats::{Scope, stats_group};

use crate::Verdict;

/// The client's connection preface (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The longest request line that is waited for.
const MAX_LINE: usize = 64 * 1024;

/// The methods that Envoy's parser knows: other words at the start of a connection are not HTTP.
const METHODS: &[&[u8]] = &[
    b"ACL",
    b"BIND",
    b"CHECKOUT",
    b"CONNECT",
    b"COPY",
    b"DELETE",
    b"GET",
    b"HEAD",
    b"LINK",
    b"LOCK",
    b"MERGE",
    b"MKACTIVITY",
    b"MKCALENDAR",
    b"MKCOL",
    b"MOVE",
    b"M-SEARCH",
    b"NOTIFY",
    b"OPTIONS",
    b"PATCH",
    b"POST",
    b"PROPFIND",
    b"PROPPATCH",
    b"PURGE",
    b"PUT",
    b"QUERY",
    b"REBIND",
    b"REPORT",
    b"SEARCH",
    b"SOURCE",
    b"SUBSCRIBE",
    b"TRACE",
    b"UNBIND",
    b"UNLINK",
    b"UNLOCK",
    b"UNSUBSCRIBE",
];

stats_group! {
    /// `http_inspector.` It is the listener that reads: a read that fails counts as its
    /// `downstream_listener_filter_remote_close`, and nothing writes `read_error`.
    pub(crate) struct Stats {
        counters { http10_found, http11_found, http2_found, http_not_found, read_error }
        gauges {}
        histograms {}
    }
}

#[derive(Debug)]
pub(crate) struct HttpInspector {
    stats: Stats,
}

impl HttpInspector {
    pub(crate) fn new(scope: &Scope) -> Self {
        Self { stats: scope.scope("http_inspector").group() }
    }

    pub(crate) fn inspect(&self, buffer: &[u8], end: bool, info: &mut ConnectionInfo) -> Verdict {
        // Behind TLS there is nothing to see; ALPN says it.
        if info.transport_protocol == "tls" {
            return Verdict::PASS;
        }
        let found: &[u8] = match classify(buffer) {
            Guess::Http2 => {
                self.stats.http2_found().inc();
                b"h2c"
            }
            Guess::Http11 => {
                self.stats.http11_found().inc();
                b"http/1.1"
            }
            Guess::Http10 => {
                self.stats.http10_found().inc();
                b"http/1.0"
            }
            Guess::Unclear if !end && buffer.len() < MAX_LINE => return Verdict::NeedMore,
            Guess::Unclear | Guess::Other => {
                self.stats.http_not_found().inc();
                return Verdict::PASS;
            }
        };
        info.application_protocols = vec![found.into()];
        Verdict::PASS
    }
}

#[derive(Debug, Eq, PartialEq)]
enum Guess {
    Http2,
    Http11,
    Http10,
    Unclear,
    Other,
}

fn classify(buffer: &[u8]) -> Guess {
    if buffer.starts_with(PREFACE) {
        return Guess::Http2;
    }
    if PREFACE.starts_with(buffer) {
        return Guess::Unclear;
    }
    let method = buffer.iter().position(|byte| *byte == b' ');
    let Some(space) = method else {
        let possible = METHODS.iter().any(|known| known.starts_with(buffer));
        return if possible { Guess::Unclear } else { Guess::Other };
    };
    if !METHODS.contains(&&buffer[..space]) {
        return Guess::Other;
    }
    let Some(end) = buffer.iter().position(|byte| *byte == b'\n') else {
        return Guess::Unclear;
    };
    let line = buffer[..end].strip_suffix(b"\r").unwrap_or(&buffer[..end]);
    match line.rsplit(|byte| *byte == b' ').next() {
        Some(b"HTTP/1.1") => Guess::Http11,
        Some(b"HTTP/1.0") => Guess::Http10,
        _ => Guess::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::{Guess, PREFACE, classify};

    #[test]
    fn versions_are_told_apart() {
        for (bytes, guess) in [
            (&b""[..], Guess::Unclear),
            (b"G", Guess::Unclear),
            (b"GET /a b", Guess::Unclear),
            (b"GET / HTTP/1.1\r\n", Guess::Http11),
            (b"POST /x HTTP/1.0\n", Guess::Http10),
            (b"GET / HTTP/0.9\r\n", Guess::Other),
            (b"HELO smtp\r\n", Guess::Other),
            (b"\x16\x03\x01", Guess::Other),
            (b"PRI * HT", Guess::Unclear),
            (PREFACE, Guess::Http2),
        ] {
            assert_eq!(classify(bytes), guess, "{}", bytes.escape_ascii());
        }
    }
}

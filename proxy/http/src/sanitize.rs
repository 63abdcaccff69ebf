//! Hop-by-hop headers: what must not travel from one connection to the next.

use crate::h1::Error;
use crate::headers::{Headers, KnownSet};
use crate::known::Known;
use crate::name::Name;

/// More nominations than this are not honest (Envoy's `MAX_ALLOWED_NOMINATED_HEADERS`).
const MAX_NOMINATED: usize = 10;

/// A longer `te` is refused (Envoy's `MAX_ALLOWED_TE_VALUE_SIZE`).
const MAX_TE: usize = 256;

/// Removes the headers of a request that `connection` nominates, as Envoy's `sanitizeConnectionHeader`.
///
/// Forwarding headers and pseudo-headers can't be nominated: their removal would hide where the request comes from.
/// Nominating `host` does remove it, which the caller then answers as a request without one.
pub fn remove_nominated(headers: &mut Headers) -> Result<(), Error> {
    let Some(connection) = headers.get(Known::Connection) else { return Ok(()) };
    let connection = connection.to_ascii_lowercase();
    let tokens = || connection.split(|byte| *byte == b',').filter(|token| !token.is_empty());
    if tokens().count() >= MAX_NOMINATED {
        return Err(Error::ConnectionHeaderRejected);
    }
    let mut removed = false;
    for token in tokens().map(<[u8]>::trim_ascii) {
        if matches!(token, b"" | b"close" | b"http2-settings" | b"keep-alive" | b"upgrade" | b"connection") {
            continue;
        }
        if token[0] == b':' {
            return Err(Error::ConnectionHeaderRejected);
        }
        let name = match Name::from(token) {
            Name::Known(Known::XForwardedFor | Known::XForwardedHost | Known::XForwardedProto) => {
                return Err(Error::ConnectionHeaderRejected);
            }
            Name::Known(Known::Host) => Name::Known(Known::Authority),
            name => name,
        };
        if name == Name::Known(Known::Te) {
            if headers.get(Known::Te).is_some_and(|te| te.len() >= MAX_TE) {
                return Err(Error::ConnectionHeaderRejected);
            }
            if reduce_te(headers) {
                continue;
            }
        }
        headers.remove(name);
        removed = true;
    }
    if removed {
        let kept = filter_tokens(&connection, |token| {
            matches!(token, b"close" | b"http2-settings" | b"keep-alive" | b"upgrade" | b"connection" | b"te")
        });
        if kept.is_empty() {
            headers.remove(Known::Connection);
        } else {
            headers.set(Known::Connection, kept);
        }
    }
    Ok(())
}

/// What belongs to one connection.
const HOP_BY_HOP: KnownSet =
    KnownSet::of(&[Known::KeepAlive, Known::ProxyConnection, Known::TransferEncoding]);

/// And what asks to make the connection something else.
const SWITCHING: KnownSet = KnownSet::of(&[Known::Connection, Known::Upgrade]);

/// Removes the hop-by-hop headers of a request on its way upstream. `upgrade`: the request is an upgrade that the
/// configuration allows, so `connection: upgrade` and `upgrade` stay.
pub fn sanitize_request(headers: &mut Headers, upgrade: bool) {
    remove_hop_by_hop(headers, upgrade);
    reduce_te(headers);
}

/// Removes the hop-by-hop headers of a response on its way downstream; those that its `connection` nominates stay,
/// as they do with Envoy. `upgrade`: it is a 101.
pub fn sanitize_response(headers: &mut Headers, upgrade: bool) {
    remove_hop_by_hop(headers, upgrade);
}

fn remove_hop_by_hop(headers: &mut Headers, upgrade: bool) {
    headers.remove_all(&HOP_BY_HOP);
    // Envoy leaves `connection` of an upgrade as the peer wrote it.
    if !upgrade {
        headers.remove_all(&SWITCHING);
    }
}

/// Leaves of `te` what may be forwarded: `trailers`, or nothing. Tells whether it is still there.
fn reduce_te(headers: &mut Headers) -> bool {
    let Some(te) = headers.get(Known::Te) else { return false };
    if te == b"trailers" {
        return true;
    }
    if te.split(|byte| *byte == b',').any(|token| token.trim_ascii() == b"trailers") {
        headers.set(Known::Te, "trailers");
        true
    } else {
        headers.remove(Known::Te);
        false
    }
}

/// The comma-separated tokens of `value` that `keep` keeps, joined with commas.
pub(crate) fn filter_tokens(value: &[u8], mut keep: impl FnMut(&[u8]) -> bool) -> Vec<u8> {
    let mut kept = Vec::with_capacity(value.len());
    for token in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
        if !token.is_empty() && keep(token) {
            if !kept.is_empty() {
                kept.push(b',');
            }
            kept.extend_from_slice(token);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(entries: &[(&str, &str)]) -> Headers {
        [(":method", "GET"), (":authority", "a"), (":path", "/")].iter().chain(entries).copied().collect()
    }

    #[test]
    fn nominated_headers_go() {
        let mut headers = request(&[
            ("connection", "close, X-Hop, keep-alive"),
            ("x-hop", "1"),
            ("cookie", "c"),
            ("x-b", "2"),
        ]);
        remove_nominated(&mut headers).unwrap();
        assert!(!headers.contains("x-hop"));
        assert!(headers.contains(Known::Cookie) && headers.contains("x-b"));
        assert_eq!(headers.get(Known::Connection), Some(&b"close,keep-alive"[..]));

        let mut headers = request(&[("connection", "cookie"), ("cookie", "c")]);
        remove_nominated(&mut headers).unwrap();
        assert!(!headers.contains(Known::Cookie) && !headers.contains(Known::Connection));

        let mut headers = request(&[("connection", "host")]);
        remove_nominated(&mut headers).unwrap();
        assert_eq!(headers.authority(), None);
    }

    #[test]
    fn some_nominations_are_refused() {
        for bad in ["x-forwarded-for", "X-Forwarded-Host", "close, x-forwarded-proto", ":path", ":x"] {
            let mut headers = request(&[("connection", bad)]);
            assert_eq!(remove_nominated(&mut headers), Err(Error::ConnectionHeaderRejected), "{bad}");
        }
        for good in ["x-forwarded-foo", "x-missing", "x y", "\"q\"", ",,", "x-forwarded-client-cert"] {
            assert_eq!(remove_nominated(&mut request(&[("connection", good)])), Ok(()), "{good}");
        }
        let many = ["a"; 10].join(",");
        assert!(remove_nominated(&mut request(&[("connection", &many)])).is_err());
        assert!(remove_nominated(&mut request(&[("connection", &many[2..])])).is_ok());
        let long = "x".repeat(256);
        assert!(remove_nominated(&mut request(&[("connection", "te"), ("te", &long)])).is_err());
    }

    #[test]
    fn te_is_reduced_to_trailers() {
        for (te, want) in [
            ("trailers", Some("trailers")),
            ("gzip, trailers", Some("trailers")),
            ("gzip,trailers", Some("trailers")),
            ("Trailers, deflate", None),
            ("gzip, trailers;q=0.5", None),
            ("gzip", None),
        ] {
            let mut headers = request(&[("te", te)]);
            sanitize_request(&mut headers, false);
            assert_eq!(headers.get(Known::Te), want.map(str::as_bytes), "{te}");
        }
        let mut headers = request(&[("connection", "TE, close"), ("te", "trailers")]);
        remove_nominated(&mut headers).unwrap();
        assert_eq!(headers.get(Known::Te), Some(&b"trailers"[..]));
    }

    #[test]
    fn hop_by_hop_headers_do_not_travel() {
        let hop = [
            ("connection", "upgrade, x-hop"),
            ("upgrade", "websocket"),
            ("keep-alive", "5"),
            ("proxy-connection", "close"),
            ("transfer-encoding", "chunked"),
            ("x-hop", "1"),
        ];
        let mut headers = request(&hop);
        sanitize_request(&mut headers, false);
        let left: Vec<_> = headers.iter_regular().map(|(name, _)| name.to_string()).collect();
        assert_eq!(left, ["x-hop"]);

        let mut headers = request(&hop);
        sanitize_request(&mut headers, true);
        assert_eq!(headers.get(Known::Connection), Some(&b"upgrade, x-hop"[..]));
        assert!(headers.contains(Known::Upgrade));

        let mut headers = request(&hop);
        sanitize_response(&mut headers, false);
        let left: Vec<_> = headers.iter_regular().map(|(name, _)| name.to_string()).collect();
        assert_eq!(left, ["x-hop"]);
    }
}

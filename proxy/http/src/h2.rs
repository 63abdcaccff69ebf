//! Between [`Headers`] and the types of the `http` crate, which the HTTP/2 library speaks.
//!
//! Outwards, a head costs one allocation for all its values, which share one copy of the arena.

mod frames;

pub use frames::{Flood, Frame, FrameGuard, FrameLimits, Refusing};

use std::ops::Range;
use std::sync::LazyLock;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri, request, response, uri};

use crate::h1::is_valid_authority;
use crate::headers::Headers;
use crate::known::Known;
use crate::name::Name;

/// A head that HTTP/2 can't carry: a pseudo-header is missing or malformed, or a name or value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("head cannot be sent over HTTP/2: invalid {0}")]
pub struct InvalidHead(&'static str);

/// Fills `headers` from a request; `protocol` is the `:protocol` of an extended CONNECT.
///
/// As Envoy does, cookie crumbs are joined with `; ` (RFC 9113 section 8.2.3), and `host` is dropped beside
/// `:authority`, or takes its place.
pub fn read_request(parts: &request::Parts, protocol: Option<&str>, headers: &mut Headers) {
    headers.clear();
    headers.append(Known::Method, parts.method.as_str());
    if let Some(scheme) = parts.uri.scheme_str() {
        headers.append(Known::Scheme, scheme);
    }
    if let Some(authority) = parts.uri.authority() {
        headers.append(Known::Authority, authority.as_str());
    } else if let Some(host) = parts.headers.get(http::header::HOST) {
        // One that is no authority is as good as none: the request is refused for want of a host.
        if is_valid_authority(host.as_bytes()) {
            headers.append(Known::Authority, host.as_bytes());
        }
    }
    if let Some(path) = parts.uri.path_and_query() {
        headers.append(Known::Path, path.as_str());
    }
    if let Some(protocol) = protocol {
        headers.append(Known::Protocol, protocol);
    }
    for (name, value) in &parts.headers {
        match Name::from(name.as_str()) {
            Name::Known(Known::Host) => {}
            Name::Known(Known::Cookie) => headers.append_joined(Known::Cookie, "; ", value.as_bytes()),
            name => append_field(name, value, Known::is_inline_in_request, headers),
        }
    }
}

/// Fills `headers` from a response.
pub fn read_response(parts: &response::Parts, headers: &mut Headers) {
    headers.clear();
    headers.append(Known::Status, parts.status.as_str());
    for (name, value) in &parts.headers {
        append_field(Name::from(name.as_str()), value, Known::is_inline_in_response, headers);
    }
}

/// Fills `headers` from trailers.
pub fn read_trailers(trailers: &HeaderMap, headers: &mut Headers) {
    headers.clear();
    append_all(trailers, headers);
}

/// The request of `headers`. `:protocol` is left to the caller, who hands it to the HTTP/2 library separately.
pub fn write_request(headers: &Headers) -> Result<Request<()>, InvalidHead> {
    let mut request = Request::new(());
    let method = headers.method().ok_or(InvalidHead(":method"))?;
    let (fields, mut pseudo) = write_fields(headers)?;
    *request.method_mut() = Method::from_bytes(method).map_err(|_| InvalidHead(":method"))?;
    let mut parts = uri::Parts::default();
    if let Some(authority) = pseudo.take(Known::Authority) {
        parts.authority =
            Some(uri::Authority::from_maybe_shared(authority).map_err(|_| InvalidHead(":authority"))?);
    }
    // A plain CONNECT has neither scheme nor path (RFC 9113 section 8.5).
    if *request.method_mut() != Method::CONNECT || headers.contains(Known::Protocol) {
        let scheme = headers.scheme().unwrap_or(b"http");
        parts.scheme = Some(uri::Scheme::try_from(scheme).map_err(|_| InvalidHead(":scheme"))?);
        let path = pseudo.take(Known::Path).filter(|path| !path.is_empty());
        let path = path.unwrap_or(Bytes::from_static(b"/"));
        parts.path_and_query =
            Some(uri::PathAndQuery::from_maybe_shared(path).map_err(|_| InvalidHead(":path"))?);
        // The `http` crate knows no target with a scheme and no host; the HTTP/2 library sends what it finds.
        if parts.authority.is_none() {
            parts.scheme = None;
        }
    }
    *request.uri_mut() = Uri::from_parts(parts).map_err(|_| InvalidHead("target"))?;
    *request.headers_mut() = fields;
    *request.version_mut() = http::Version::HTTP_2;
    Ok(request)
}

/// The response of `headers`.
pub fn write_response(headers: &Headers) -> Result<Response<()>, InvalidHead> {
    let mut response = Response::new(());
    let status = headers.status().ok_or(InvalidHead(":status"))?;
    *response.status_mut() = StatusCode::from_u16(status).map_err(|_| InvalidHead(":status"))?;
    *response.headers_mut() = write_fields(headers)?.0;
    *response.version_mut() = http::Version::HTTP_2;
    Ok(response)
}

/// The trailers of `headers`.
pub fn write_trailers(headers: &Headers) -> Result<HeaderMap, InvalidHead> {
    Ok(write_fields(headers)?.0)
}

/// As the HTTP/1 codec reads a field: headers of which there is one are joined when they are repeated, so that what is trusted
/// does not depend on the protocol; of lengths only one goes on, which the HTTP/2 library has held the body against.
#[inline]
fn append_field(name: Name<'_>, value: &HeaderValue, joins: fn(Known) -> bool, headers: &mut Headers) {
    // A `HeaderValue` holds no control byte but the tab.
    match name {
        Name::Known(Known::ContentLength) if headers.contains(Known::ContentLength) => {}
        Name::Known(known) if headers.contains(known) && joins(known) => {
            headers.append_joined(known, ",", value);
        }
        name => headers.append_safe(name, value.as_bytes()),
    }
}

fn append_all(map: &HeaderMap, headers: &mut Headers) {
    for (name, value) in map {
        headers.append_safe(Name::from(name.as_str()), value.as_bytes());
    }
}

/// The places of two pseudo-headers in the shared copy.
struct Pseudo {
    shared: Bytes,
    authority: Option<Range<usize>>,
    path: Option<Range<usize>>,
}

impl Pseudo {
    fn take(&mut self, known: Known) -> Option<Bytes> {
        let range = if known == Known::Path { self.path.take() } else { self.authority.take() };
        range.map(|range| self.shared.slice(range))
    }
}

fn write_fields(headers: &Headers) -> Result<(HeaderMap, Pseudo), InvalidHead> {
    let (arena, entries) = headers.parts();
    let shared = Bytes::copy_from_slice(arena);
    let (mut authority, mut path) = (None, None);
    let mut map = HeaderMap::with_capacity(headers.len());
    for (name, range) in entries {
        let unique = is_unique(name);
        let name = match name {
            Name::Known(Known::Authority) => {
                authority = Some(range);
                continue;
            }
            Name::Known(Known::Path) => {
                path = Some(range);
                continue;
            }
            // RFC 9113 section 8.2.2: nothing that belongs to one connection.
            Name::Known(
                Known::Connection
                | Known::KeepAlive
                | Known::ProxyConnection
                | Known::TransferEncoding
                | Known::Upgrade
                | Known::Host,
            ) => continue,
            Name::Known(known) if known.is_pseudo() => continue,
            Name::Known(known) => KNOWN_NAMES[known as usize].clone(),
            Name::Other(bytes) => HeaderName::from_bytes(bytes).map_err(|_| InvalidHead("name"))?,
        };
        let mut value =
            HeaderValue::from_maybe_shared(shared.slice(range)).map_err(|_| InvalidHead("value"))?;
        value.set_sensitive(unique);
        map.try_append(name, value).map_err(|_| InvalidHead("number of headers"))?;
    }
    Ok((map, Pseudo { shared, authority, path }))
}

/// Whether a header has another value in every message. Such a value in HPACK's dynamic table only drives out those that
/// come again, and the library compares a value with all that the table holds under its name: RFC 7541 section 6.2.3 has
/// a representation that stays out of the table.
fn is_unique(name: Name<'_>) -> bool {
    use Known as K;
    matches!(
        name,
        Name::Known(
            K::XRequestId | K::Traceparent | K::B3 | K::XB3TraceId | K::XB3SpanId | K::XB3ParentSpanId
        )
    )
}

/// Cloning one of these copies a pointer; parsing would cost a hash and a look-up each time. Pseudo-headers have a
/// place for the sake of the index, and are never asked for.
static KNOWN_NAMES: LazyLock<Vec<HeaderName>> = LazyLock::new(|| {
    Known::all()
        .iter()
        .map(|known| match known.is_pseudo() {
            true => http::header::HOST,
            false => HeaderName::from_static(known.as_str()),
        })
        .collect()
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_the_round_trip() {
        let headers: Headers = [
            (":method", "POST"),
            (":scheme", "https"),
            (":authority", "a.example:8443"),
            (":path", "/x?y=1"),
            ("accept", "*/*"),
            ("x-custom", "1"),
            ("x-custom", "2"),
            ("x-envoy-attempt-count", "1"),
        ]
        .into_iter()
        .collect();
        let (parts, ()) = write_request(&headers).unwrap().into_parts();
        let mut back = Headers::new();
        read_request(&parts, None, &mut back);
        assert_eq!(back, headers);
    }

    #[test]
    fn connection_headers_stay_behind() {
        let headers: Headers =
            [(":status", "200"), ("connection", "close"), ("upgrade", "x"), ("a", "b")].into_iter().collect();
        let response = write_response(&headers).unwrap();
        assert_eq!(response.headers().len(), 1);
        assert_eq!(response.status(), 200);
    }

    #[test]
    fn cookie_crumbs_are_joined_and_host_gives_way() {
        let request = Request::get("https://a/x")
            .header("cookie", "a=1")
            .header("host", "b")
            .header("cookie", "b=2")
            .body(())
            .unwrap();
        let mut headers = Headers::new();
        read_request(&request.into_parts().0, None, &mut headers);
        assert_eq!(headers.get(Known::Cookie), Some(&b"a=1; b=2"[..]));
        assert_eq!(headers.authority(), Some(&b"a"[..]));
        assert!(!headers.contains(Known::Host));
    }

    #[test]
    fn connect_has_an_authority_only() {
        let headers: Headers = [(":method", "CONNECT"), (":authority", "a:80")].into_iter().collect();
        let request = write_request(&headers).unwrap();
        assert_eq!(request.uri().to_string(), "a:80");
        let extended: Headers = [
            (":method", "CONNECT"),
            (":scheme", "https"),
            (":authority", "a"),
            (":path", "/chat"),
            (":protocol", "websocket"),
        ]
        .into_iter()
        .collect();
        assert_eq!(write_request(&extended).unwrap().uri().to_string(), "https://a/chat");
    }

    #[test]
    fn repeated_fields_are_read_as_http_1_reads_them() {
        let request = Request::builder()
            .uri("https://a/x")
            .header("x-forwarded-for", "10.0.0.1")
            .header("x-forwarded-for", "203.0.113.9")
            .header("x-other", "1")
            .header("x-other", "2")
            .header("content-length", "5")
            .header("content-length", "05")
            .body(())
            .unwrap();
        let mut headers = Headers::new();
        read_request(&request.into_parts().0, Some("web\r\nsocket"), &mut headers);
        assert_eq!(headers.get(Known::XForwardedFor), Some(&b"10.0.0.1,203.0.113.9"[..]));
        assert_eq!(headers.get_all("x-other").count(), 2);
        assert_eq!(headers.get_all(Known::ContentLength).collect::<Vec<_>>(), [b"5"]);
        assert_eq!(headers.get(Known::Protocol), Some(&b"web%0D%0Asocket"[..]));
        let request = Request::builder().uri("/x").header("host", "a b/c").body(()).unwrap();
        read_request(&request.into_parts().0, None, &mut headers);
        assert_eq!(headers.authority(), None);
    }

    #[test]
    fn what_http_refuses_is_an_error() {
        let mut headers: Headers =
            [(":method", "GET"), (":authority", "a b"), (":path", "/")].into_iter().collect();
        assert_eq!(write_request(&headers).unwrap_err(), InvalidHead(":authority"));
        headers.set(Known::Authority, "a");
        headers.append("x", [b'a', 1]);
        assert_eq!(write_request(&headers).unwrap_err(), InvalidHead("value"));
        assert_eq!(write_response(&headers).unwrap_err(), InvalidHead(":status"));
    }
}

//! The name that TLS takes from a request (`UpstreamHttpProtocolOptions`).

use std::net::IpAddr;
use std::str;

use waystation_http::Headers;
use waystation_upstream::cluster::HttpOptions;

/// What connections for a request are made, and verified, by. It is part of the key of their pool, and the pool tells it
/// to who makes a connection: no request gets one that was made by another name.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct TlsName<T> {
    name: T,
    /// It is sent as SNI (`auto_sni`).
    sent: bool,
    /// The certificate must have it (`auto_san_validation`).
    verified: bool,
}

impl<'a> TlsName<&'a str> {
    /// The name that `request` has for a cluster with these options: what `override_auto_sni_header` says, if anything, or
    /// else its authority.
    pub(crate) fn of(http: &HttpOptions, request: &'a Headers) -> Option<Self> {
        if !(http.auto_sni || http.auto_san_validation) {
            return None;
        }
        let stated = http.auto_sni_header.as_deref().and_then(|header| request.get(header));
        let host = stated.filter(|host| !host.is_empty()).or_else(|| request.authority());
        // What is not text is nobody's name, and so is the empty one: a certificate that must have it is refused.
        let host = host.and_then(|host| str::from_utf8(host).ok()).unwrap_or_default();
        let (name, is_address) = without_port(host);
        let verified = http.auto_san_validation;
        // SNI has no addresses (RFC 6066 section 3). As in Envoy, such a request, and one that names nobody, goes by the
        // cluster's own SNI, which `auto_sni_san_validation` then demands of the certificate; where the cluster has none, that
        // demands nothing. A name that must be verified is never exchanged for another: the empty one is nobody's.
        let sent = http.auto_sni && !is_address && (verified || !name.is_empty());
        (sent || verified).then_some(Self { name, sent, verified })
    }

    pub(crate) fn to_owned(self) -> TlsName<Box<str>> {
        let Self { name, sent, verified } = self;
        TlsName { name: name.into(), sent, verified }
    }
}

impl TlsName<Box<str>> {
    /// The SNI, if it is for the request to say.
    pub(crate) fn server_name(&self) -> Option<&str> {
        self.sent.then_some(&self.name)
    }

    /// The name that the certificate must have.
    pub(crate) fn verify_san(&self) -> Option<&str> {
        self.verified.then_some(&self.name)
    }
}

/// An authority without its port, and whether it is an address, which goes without brackets (Envoy `parseAuthority`).
fn without_port(authority: &str) -> (&str, bool) {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if !authority.ends_with(']') && port.parse::<u16>().is_ok() => host,
        _ => authority,
    };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if bare.parse::<IpAddr>().is_ok() { (bare, true) } else { (host, false) }
}

#[cfg(test)]
mod tests {
    use super::{TlsName, without_port};
    use waystation_http::{Headers, Known};
    use waystation_upstream::cluster::HttpOptions;

    #[test]
    fn ports_and_brackets_are_no_part_of_a_name() {
        for (authority, expected) in [
            ("a.test", ("a.test", false)),
            ("a.test:443", ("a.test", false)),
            ("a.test:65536", ("a.test:65536", false)),
            ("a.test:x", ("a.test:x", false)),
            ("127.0.0.1:80", ("127.0.0.1", true)),
            ("[::1]:80", ("::1", true)),
            ("[::1]", ("::1", true)),
            ("[a.test]", ("[a.test]", false)),
            ("", ("", false)),
        ] {
            assert_eq!(without_port(authority), expected, "{authority}");
        }
    }

    #[test]
    fn a_request_cannot_do_without_a_name() {
        let options = |sni, san, header: Option<&str>| HttpOptions {
            auto_sni: sni,
            auto_san_validation: san,
            auto_sni_header: header.map(Into::into),
            ..HttpOptions::default()
        };
        let named = |options: &HttpOptions, authority: Option<&[u8]>, header: Option<&[u8]>| {
            let mut request = Headers::new();
            if let Some(authority) = authority {
                request.set(Known::Authority, authority);
            }
            if let Some(header) = header {
                request.append("x-name", header);
            }
            let name = TlsName::of(options, &request).map(TlsName::to_owned);
            name.map(|name| (name.server_name().map(str::to_owned), name.verify_san().map(str::to_owned)))
        };
        let both = |name: &str| Some((Some(name.to_owned()), Some(name.to_owned())));
        let plain = options(true, true, None);
        assert_eq!(named(&plain, Some(b"a:1"), Some(b"b")), both("a"));
        assert_eq!(named(&plain, None, None), both(""), "verified, and so refused");
        assert_eq!(named(&plain, Some(b"\xff"), None), both(""));
        assert_eq!(named(&plain, Some(b"[::1]:1"), None), Some((None, Some("::1".to_owned()))));
        let overridden = options(true, true, Some("x-name"));
        assert_eq!(named(&overridden, Some(b"a"), Some(b"b:2")), both("b"));
        assert_eq!(named(&overridden, Some(b"a"), None), both("a"));
        assert_eq!(named(&overridden, Some(b"a"), Some(b"")), both("a"));
        assert_eq!(named(&options(true, false, None), Some(b"a"), None), Some((Some("a".to_owned()), None)));
        assert_eq!(named(&options(true, false, None), Some(b"10.0.0.1"), None), None);
        assert_eq!(named(&options(true, false, None), Some(b""), None), None);
        assert_eq!(named(&options(true, false, None), None, None), None);
        assert_eq!(named(&options(false, true, None), Some(b"a"), None), Some((None, Some("a".to_owned()))));
        assert_eq!(named(&options(false, false, None), Some(b"a"), None), None);
    }
}

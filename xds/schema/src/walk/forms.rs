//! The well-known forms of strings that rules ask for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::layout::form;

/// Whether `bytes` have the form. An address in a `bytes` field is its 4 or 16 octets.
pub(super) fn matches(kind: u8, bytes: &[u8], is_string: bool) -> bool {
    match kind {
        form::HEADER_NAME => is_header_name(bytes),
        form::HEADER_VALUE => !bytes.iter().any(|&byte| matches!(byte, 0..=8 | 10..=0x1f | 0x7f)),
        form::HEADER_LOOSE => !bytes.iter().any(|&byte| matches!(byte, 0 | b'\n' | b'\r')),
        _ if !is_string => match kind {
            form::IPV4 => bytes.len() == 4,
            form::IPV6 => bytes.len() == 16,
            _ => matches!(bytes.len(), 4 | 16),
        },
        _ => std::str::from_utf8(bytes).is_ok_and(|text| matches_text(kind, text)),
    }
}

fn matches_text(kind: u8, text: &str) -> bool {
    match kind {
        form::IP => text.parse::<IpAddr>().is_ok(),
        form::IPV4 => text.parse::<Ipv4Addr>().is_ok(),
        form::IPV6 => text.parse::<Ipv6Addr>().is_ok(),
        form::HOSTNAME => is_hostname(text),
        form::ADDRESS => is_hostname(text) || text.parse::<IpAddr>().is_ok(),
        form::EMAIL => text
            .rsplit_once('@')
            .is_some_and(|(local, host)| (1..=64).contains(&local.len()) && is_hostname(host)),
        form::UUID => is_uuid(text),
        form::URI => is_uri_text(text) && has_scheme(text),
        _ => is_uri_text(text),
    }
}

fn is_header_name(bytes: &[u8]) -> bool {
    let name = bytes.strip_prefix(b":").unwrap_or(bytes);
    // The range `+-.` of Envoy's pattern takes in the comma.
    !name.is_empty()
        && name.iter().all(|&byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+,-.^_|~`".contains(&byte))
}

fn is_hostname(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    (1..=253).contains(&text.len())
        && text.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        })
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(index, byte)| match index {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

fn is_uri_text(text: &str) -> bool {
    !text.bytes().any(|byte| byte <= b' ' || byte >= 0x7f || b"<>\"{}|\\^`".contains(&byte))
}

fn has_scheme(text: &str) -> bool {
    text.split_once(':').is_some_and(|(scheme, _)| {
        scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
    })
}

#[cfg(test)]
mod tests {
    use super::matches;
    use crate::layout::form;

    #[test]
    fn forms() {
        let cases = [
            (form::HEADER_NAME, ":path", true),
            (form::HEADER_NAME, "x-a,b", true),
            (form::HEADER_NAME, "", false),
            (form::HEADER_NAME, "a b", false),
            (form::HEADER_VALUE, "a\tb\u{e9}", true),
            (form::HEADER_VALUE, "a\x01", false),
            (form::HEADER_LOOSE, "a\x01", true),
            (form::HEADER_LOOSE, "a\n", false),
            (form::IP, "::1", true),
            (form::IPV4, "::1", false),
            (form::HOSTNAME, "a-b.example.", true),
            (form::HOSTNAME, "-a", false),
            (form::ADDRESS, "10.0.0.1", true),
            (form::EMAIL, "a@b.c", true),
            (form::EMAIL, "@b.c", false),
            (form::UUID, "123e4567-e89b-12d3-a456-426614174000", true),
            (form::UUID, "123e4567", false),
            (form::URI, "https://a/b?c#d", true),
            (form::URI, "/a", false),
            (form::URI_REF, "/a", true),
            (form::URI_REF, "/a b", false),
        ];
        for (kind, text, expected) in cases {
            assert_eq!(matches(kind, text.as_bytes(), true), expected, "{kind} {text:?}");
        }
        assert!(matches(form::IPV4, &[1, 2, 3, 4], false));
        assert!(!matches(form::IP, &[1, 2, 3], false));
    }
}

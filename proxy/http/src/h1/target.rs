//! Request targets and authorities.

/// An absolute-form or authority-form target, taken apart. User information is left out, as Envoy does.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target<'a> {
    /// Empty for the authority form.
    pub(super) scheme: &'a [u8],
    pub(super) authority: &'a [u8],
    /// Path and query; may be empty.
    pub(super) path: &'a [u8],
}

/// `scheme://[user@]host[:port][/path][?query]`
pub(super) fn parse_absolute(url: &[u8]) -> Option<Target<'_>> {
    let colon = memchr::memchr(b':', url)?;
    let (scheme, rest) = (&url[..colon], url[colon..].strip_prefix(b"://")?);
    if scheme.is_empty() || !scheme.iter().all(u8::is_ascii_alphabetic) {
        return None;
    }
    let end = memchr::memchr3(b'/', b'?', b'#', rest).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    // A fragment directly behind the host leaves nothing that could be a path.
    if path.first() == Some(&b'#') {
        return None;
    }
    let authority = match memchr::memrchr(b'@', authority) {
        Some(at) if authority[..at].iter().all(|byte| is_user_byte(*byte)) => &authority[at + 1..],
        Some(_) => return None,
        None => authority,
    };
    split_host_port(authority)?;
    Some(Target { scheme, authority, path })
}

/// `host:port`, the target of CONNECT.
pub(super) fn parse_authority(target: &[u8]) -> Option<Target<'_>> {
    match split_host_port(target)? {
        (_, Some(_)) => Some(Target { scheme: b"", authority: target, path: b"" }),
        (_, None) => None,
    }
}

/// Whether `authority` has only characters that RFC 3986 section 3.2 allows, with `@`.
pub(crate) fn is_valid_authority(authority: &[u8]) -> bool {
    authority.iter().all(|byte| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'%' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')')
            || matches!(byte, b'*' | b'+' | b',' | b';' | b'=' | b':' | b'@' | b'[' | b']')
    })
}

fn split_host_port(authority: &[u8]) -> Option<(&[u8], Option<u16>)> {
    let (host, rest) = if authority.first() == Some(&b'[') {
        let end = memchr::memchr(b']', authority)?;
        let host = &authority[1..end];
        if host.is_empty() || !host.iter().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.'))
        {
            return None;
        }
        (host, &authority[end + 1..])
    } else {
        let end = memchr::memchr(b':', authority).unwrap_or(authority.len());
        let host = &authority[..end];
        let is_host_byte = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if host.is_empty() || !host.iter().all(is_host_byte) {
            return None;
        }
        (host, &authority[end..])
    };
    match rest {
        [] => Some((host, None)),
        [b':', digits @ ..] => {
            let port = crate::headers::parse_decimal(digits)?;
            Some((host, Some(u16::try_from(port).ok()?)))
        }
        _ => None,
    }
}

fn is_user_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'-' | b'_' | b'.' | b'!' | b'~' | b'*' | b'\'' | b'(' | b')')
        || matches!(byte, b'%' | b';' | b':' | b'&' | b'=' | b'+' | b'$' | b',')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_form() {
        let parse = |url: &'static str| {
            let target = parse_absolute(url.as_bytes())?;
            Some([target.scheme, target.authority, target.path].map(|part| str::from_utf8(part).unwrap()))
        };
        for (url, want) in [
            ("http://b.com/x?y", Some(["http", "b.com", "/x?y"])),
            ("http://b.com", Some(["http", "b.com", ""])),
            ("http://b.com?q", Some(["http", "b.com", "?q"])),
            ("HTTP://B.com:80/", Some(["HTTP", "B.com:80", "/"])),
            ("http://u:p@b.com/x", Some(["http", "b.com", "/x"])),
            ("http://[::1]:80/x", Some(["http", "[::1]:80", "/x"])),
            ("http://b.com/x#y", Some(["http", "b.com", "/x#y"])),
            ("ftp://b.com/x", Some(["ftp", "b.com", "/x"])),
            ("http://b.com#q", None),
            ("http://b.com:99999/", None),
            ("http://b.com:x/", None),
            ("http://b.com:/", None),
            ("http:///x", None),
            ("http://[::1/x", None),
            ("http:/x", None),
            ("foo", None),
            ("b.com:80", None),
        ] {
            assert_eq!(parse(url), want, "{url}");
        }
    }

    #[test]
    fn authority_form() {
        for (target, ok) in [
            ("b.com:80", true),
            ("[::1]:80", true),
            ("b.com", false),
            ("/x", false),
            ("http://b.com:80/", false),
            ("b.com:80/x", false),
            ("b.com:999999", false),
            ("u@b.com:80", false),
            ("", false),
        ] {
            assert_eq!(parse_authority(target.as_bytes()).is_some(), ok, "{target}");
        }
    }

    #[test]
    fn authority_characters() {
        for good in ["", "a", "u@a", "a,b", "a:99999", "[::1]:80", "a%41"] {
            assert!(is_valid_authority(good.as_bytes()), "{good}");
        }
        for bad in ["a b", "a/b", "a\\b", "a?b", "a#b", "\"a\"", "\u{e9}", "a<b", "a|b", "a^b", "`"] {
            assert!(!is_valid_authority(bad.as_bytes()), "{bad}");
        }
    }
}

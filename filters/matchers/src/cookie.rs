//! Cookies: `CookieMatcher`, and the value of one cookie.

use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_http::{Headers, Known};
use waystation_schema::{At, ConfigError};

use crate::string::StringMatcher;

/// Compiled `envoy.config.route.v3.CookieMatcher`: looks at the first cookie of its name.
#[derive(Clone, Debug)]
pub struct CookieMatcher {
    name: Box<[u8]>,
    text: StringMatcher,
    invert: bool,
}

impl CookieMatcher {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::CookieMatcher) -> Result<Self, ConfigError> {
        let pb::CookieMatcher { name, string_match, invert_match } = proto;
        if name.is_empty() {
            return Err(ConfigError::field("name", "must not be empty"));
        }
        let text = string_match.as_ref().ok_or_else(|| ConfigError::field("string_match", "is required"))?;
        Ok(Self {
            name: name.as_bytes().into(),
            text: StringMatcher::compile(text).at(|| "string_match")?,
            invert: *invert_match,
        })
    }

    /// Whether the request's cookies match. A missing cookie does not match, and so does match when inverted.
    pub fn is_match(&self, headers: &Headers) -> bool {
        cookie_value(headers, &self.name).is_some_and(|value| self.text.is_match(value)) != self.invert
    }
}

/// The value of the first cookie called `name`, without its surrounding quotes.
pub fn cookie_value<'a>(headers: &'a Headers, name: &[u8]) -> Option<&'a [u8]> {
    headers.get_all(Known::Cookie).flat_map(|line| line.split(|byte| *byte == b';')).find_map(|pair| {
        let pair = pair.trim_ascii();
        let at = memchr::memchr(b'=', pair)?;
        if pair[..at].trim_ascii() != name {
            return None;
        }
        let value = pair[at + 1..].trim_ascii();
        match value {
            [b'"', inner @ .., b'"'] => Some(inner),
            value => Some(value),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::cookie_value;
    use waystation_http::Headers;

    #[test]
    fn the_first_of_its_name_over_all_lines() {
        let headers: Headers = [("cookie", "a=1; b=\"2 3\""), ("cookie", "c=; b=4")].into_iter().collect();
        assert_eq!(cookie_value(&headers, b"b"), Some(&b"2 3"[..]));
        assert_eq!(cookie_value(&headers, b"c"), Some(&b""[..]));
        assert_eq!(cookie_value(&headers, b"d"), None);
    }
}

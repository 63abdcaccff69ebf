//! Headers, paths and query parameters.

use waystation_http::{HeaderName, Headers, Known};
use waystation_matchers::{query_parameters, without_query};

use super::FormatContext;
use super::operator::truncated;

/// `%REQ(main?alternative):N%` and its like.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) source: Source,
    pub(super) main: HeaderName,
    pub(super) alternative: Option<HeaderName>,
    pub(super) max_length: Option<usize>,
    /// Whether to cut the value at a `?` (`%REQ_WITHOUT_QUERY%`).
    pub(super) without_query: bool,
}

/// Which headers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Request,
    Response,
    Trailers,
}

impl Header {
    /// The first value of the header; later ones are not logged, as in Envoy.
    pub(super) fn get<'a>(&self, cx: &FormatContext<'a>) -> Option<&'a [u8]> {
        let headers: &'a Headers = match self.source {
            Source::Request => cx.request,
            Source::Response => cx.response,
            Source::Trailers => cx.trailers,
        }?;
        let value = match headers.get(&self.main) {
            Some(value) => value,
            None => headers.get(self.alternative.as_ref()?)?,
        };
        let value = if self.without_query { without_query(value) } else { value };
        Some(truncated(value, self.max_length))
    }
}

/// Which path `%PATH%` means.
#[derive(Clone, Copy, Debug)]
pub(super) enum PathSource {
    Original,
    Current,
    OriginalOrCurrent,
}

impl PathSource {
    pub(super) fn get<'a>(self, cx: &FormatContext<'a>, query: bool) -> Option<&'a [u8]> {
        let request = cx.request?;
        let original = || request.get(Known::XEnvoyOriginalPath).filter(|path| !path.is_empty());
        let current = || request.path().filter(|path| !path.is_empty());
        let path = match self {
            Self::Original => original(),
            Self::Current => current(),
            Self::OriginalOrCurrent => original().or_else(current),
        }?;
        Some(if query { path } else { without_query(path) })
    }
}

/// Appends the first query parameter called `key`, decoded; tells whether there is one.
pub(super) fn write_query_parameter(
    cx: &FormatContext<'_>,
    key: &str,
    max_length: Option<usize>,
    out: &mut Vec<u8>,
) -> bool {
    let Some(path) = cx.request.and_then(Headers::path) else { return false };
    let found = query_parameters(path).find(|(name, _)| decoded(name).eq(key.bytes()));
    let Some((_, value)) = found else { return false };
    out.extend(decoded(value).take(max_length.unwrap_or(usize::MAX)));
    true
}

/// Appends the whole query; tells whether there is one.
pub(super) fn write_query(
    cx: &FormatContext<'_>,
    decode: bool,
    max_length: Option<usize>,
    out: &mut Vec<u8>,
) -> bool {
    let Some(path) = cx.request.and_then(Headers::path) else { return false };
    let Some(query) = path.get(without_query(path).len() + 1..) else { return false };
    let max_length = max_length.unwrap_or(usize::MAX);
    if decode {
        out.extend(visibly_decoded(query).take(max_length));
    } else {
        out.extend_from_slice(&query[..query.len().min(max_length)]);
    }
    true
}

/// `host:port` without the port, brackets of an IPv6 address kept.
pub(super) fn without_port(host: &[u8]) -> &[u8] {
    let Some(colon) = host.iter().rposition(|byte| *byte == b':') else { return host };
    let (name, port) = (&host[..colon], &host[colon + 1..]);
    let bare_ipv6 = name.contains(&b':') && !name.ends_with(b"]");
    if bare_ipv6 || port.is_empty() || !port.iter().all(u8::is_ascii_digit) { host } else { name }
}

/// Percent-decodes; what is no escape stays as it is.
fn decoded(text: &[u8]) -> impl Iterator<Item = u8> + '_ {
    decoded_if(text, |_| true)
}

/// Percent-decodes what becomes a visible character, so that the text stays one word.
fn visibly_decoded(text: &[u8]) -> impl Iterator<Item = u8> + '_ {
    decoded_if(text, |byte| byte.is_ascii_graphic())
}

/// Percent-decodes what becomes a wanted byte.
pub(crate) fn decoded_if(text: &[u8], wanted: impl Fn(u8) -> bool) -> impl Iterator<Item = u8> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (first, tail) = rest.split_first()?;
        if let [b'%', high, low, after @ ..] = rest
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
            && wanted(high << 4 | low)
        {
            rest = after;
            return Some(high << 4 | low);
        }
        rest = tail;
        Some(*first)
    })
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|digit| digit as u8)
}

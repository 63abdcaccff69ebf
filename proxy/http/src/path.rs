//! Path normalisation, with the results of Envoy 1.40 (RFC 3986 section 6 by way of its URL library).

/// The connection manager's options on `:path`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathOptions {
    /// `normalize_path`: dot segments, backslashes, needless escapes.
    pub normalize: bool,
    /// `merge_slashes`
    pub merge_slashes: bool,
    /// `path_with_escaped_slashes_action`
    pub escaped_slashes: EscapedSlashes,
}

/// `path_with_escaped_slashes_action`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EscapedSlashes {
    /// `%2F` and `%5C` are left alone.
    #[default]
    Keep,
    /// They are refused.
    Reject,
    /// They are decoded, and the client is sent to the result.
    UnescapeAndRedirect,
    /// They are decoded.
    UnescapeAndForward,
}

/// What to do with a request because of its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathOutcome {
    /// The path is as it should be.
    Unchanged,
    /// Go on with this one.
    Changed(Vec<u8>),
    /// Answer 307 with this `location`; details `path_normalization_failed`.
    Redirect(Vec<u8>),
    /// Answer 400 without a body and close; details `path_normalization_failed`.
    Reject,
}

/// Applies `options` to `:path`. The query is never touched; a fragment is refused whatever the options.
pub fn normalize_path(path: &[u8], options: PathOptions) -> PathOutcome {
    let end = memchr::memchr2(b'?', b'#', path).unwrap_or(path.len());
    let (path, query) = path.split_at(end);
    if memchr::memchr(b'#', query).is_some() {
        return PathOutcome::Reject;
    }
    if is_plain(path) {
        return PathOutcome::Unchanged;
    }
    let mut redirect = false;
    let mut result = path.to_vec();
    if options.escaped_slashes != EscapedSlashes::Keep && unescape_slashes(&mut result) {
        match options.escaped_slashes {
            EscapedSlashes::Reject => return PathOutcome::Reject,
            EscapedSlashes::UnescapeAndRedirect => redirect = true,
            EscapedSlashes::UnescapeAndForward | EscapedSlashes::Keep => {}
        }
    }
    if options.normalize {
        match canonicalize(&result) {
            Some(canonical) => result = canonical,
            None => return PathOutcome::Reject,
        }
    }
    if options.merge_slashes {
        merge_slashes(&mut result);
    }
    if result == path {
        return PathOutcome::Unchanged;
    }
    result.extend_from_slice(query);
    if redirect { PathOutcome::Redirect(result) } else { PathOutcome::Changed(result) }
}

/// Whether no option could change `path`: true for most requests, and found in one pass.
fn is_plain(path: &[u8]) -> bool {
    let mut after_slash = false;
    for &byte in path {
        if byte == b'\\' || byte == b'%' || (after_slash && matches!(byte, b'/' | b'.')) || needs_escape(byte)
        {
            return false;
        }
        after_slash = byte == b'/';
    }
    true
}

/// Decodes `%2F` and `%5C`; tells whether there was one.
fn unescape_slashes(path: &mut Vec<u8>) -> bool {
    let mut result = Vec::with_capacity(path.len());
    let mut rest = &path[..];
    while let Some((first, tail)) = rest.split_first() {
        (rest, _) = match rest {
            [b'%', b'2', b'f' | b'F', tail @ ..] => (tail, result.push(b'/')),
            [b'%', b'5', b'c' | b'C', tail @ ..] => (tail, result.push(b'\\')),
            _ => (tail, result.push(*first)),
        };
    }
    let found = result.len() != path.len();
    *path = result;
    found
}

/// Resolves dot segments, turns backslashes, decodes what needs no escape and escapes what does. `None`: the path
/// has an escaped NUL, or does not begin with a slash.
fn canonicalize(path: &[u8]) -> Option<Vec<u8>> {
    let is_slash = |byte: &u8| matches!(byte, b'/' | b'\\');
    let mut segments = path.split(is_slash);
    if segments.next() != Some(b"") {
        return None;
    }
    let mut result = Vec::with_capacity(path.len() + 8);
    let mut segment = Vec::new();
    let mut segments = segments.peekable();
    while let Some(raw) = segments.next() {
        let last = segments.peek().is_none();
        // Path parameters do not hide a dot segment (`strip_dotdot_segments_with_parameters`); only those written
        // plainly are meant.
        let raw = match raw {
            [b'.', b'.', b';', ..] => &raw[..2],
            [b'.', b';', ..] => &raw[..1],
            raw => raw,
        };
        segment.clear();
        decode_segment(raw, &mut segment)?;
        match &segment[..] {
            b"." | b".." => {
                if segment.len() == 2 {
                    let parent = result.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                    result.truncate(parent);
                }
                if last {
                    result.push(b'/');
                }
            }
            segment => {
                result.push(b'/');
                result.extend_from_slice(segment);
            }
        }
    }
    Some(result)
}

fn decode_segment(raw: &[u8], segment: &mut Vec<u8>) -> Option<()> {
    let mut rest = raw;
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first == b'%'
            && let [high, low, after @ ..] = tail
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
        {
            match high << 4 | low {
                0 => return None,
                byte if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') => {
                    segment.push(byte);
                }
                _ => segment.extend_from_slice(&[b'%', tail[0], tail[1]]),
            }
            rest = after;
        } else if needs_escape(first) {
            segment.extend_from_slice(&[b'%', HEX[usize::from(first >> 4)], HEX[usize::from(first & 15)]]);
        } else {
            segment.push(first);
        }
    }
    Some(())
}

/// Runs of slashes become one; the ends are kept apart, so `//` stays what it is.
fn merge_slashes(path: &mut Vec<u8>) {
    if !path.windows(2).any(|pair| pair == b"//") {
        return;
    }
    let mut merged = Vec::with_capacity(path.len());
    if path.starts_with(b"/") {
        merged.push(b'/');
    }
    let segments: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect();
    merged.extend_from_slice(&segments.join(&b'/'));
    if path.ends_with(b"/") {
        merged.push(b'/');
    }
    *path = merged;
}

const HEX: &[u8; 16] = b"0123456789ABCDEF";

fn hex(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|digit| digit as u8)
}

fn needs_escape(byte: u8) -> bool {
    matches!(byte, 0..=b' ' | b'"' | b'<' | b'>' | b'^' | b'`' | b'{' | b'|' | b'}' | 0x7f..)
}

#[cfg(test)]
mod tests;

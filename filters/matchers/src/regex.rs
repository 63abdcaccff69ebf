//! RE2's syntax and semantics on the `regex` crate.

use std::borrow::Cow;
use std::fmt;

use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use regex::bytes;
use regex_syntax::hir::literal::Extractor;
use waystation_schema::{At, ConfigError};

/// The compiled program may take this many bytes: bounds what one pattern can cost in memory. RE2 counts
/// instructions instead, which has no equivalent here.
const MAX_PROGRAM_BYTES: usize = 4 << 20;

/// A pattern that must match a whole value (RE2's `FullMatch`).
#[derive(Clone)]
pub struct Regex {
    regex: bytes::Regex,
    pattern: Box<str>,
    literal_prefix: Box<[u8]>,
}

impl Regex {
    /// Compiles `envoy.type.matcher.v3.RegexMatcher`.
    ///
    /// `google_re2.max_program_size` is deprecated and bounds RE2 instructions; the program's memory is bounded here
    /// in any case.
    pub fn compile(proto: &pb::RegexMatcher) -> Result<Self, ConfigError> {
        let pb::RegexMatcher { regex, engine_type: _ } = proto;
        Self::new(regex).at(|| "regex")
    }

    /// Compiles a pattern of RE2's syntax.
    pub fn new(pattern: &str) -> Result<Self, ConfigError> {
        let translated = translate(pattern);
        let hir = parse(&translated)?;
        let regex = build(&format!(r"\A(?:{translated})\z"))?;
        let prefixes = Extractor::new().extract(&hir);
        let literal_prefix = prefixes.longest_common_prefix().unwrap_or_default().into();
        Ok(Self { regex, pattern: pattern.into(), literal_prefix })
    }

    /// Whether the whole of `value` matches.
    #[inline]
    pub fn is_match(&self, value: &[u8]) -> bool {
        value.starts_with(&self.literal_prefix) && self.regex.is_match(value)
    }

    /// The pattern as configured.
    pub fn as_str(&self) -> &str {
        &self.pattern
    }

    /// What every matching value begins with; possibly empty.
    pub fn literal_prefix(&self) -> &[u8] {
        &self.literal_prefix
    }
}

impl fmt::Debug for Regex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Regex").field(&self.pattern).finish()
    }
}

/// Compiled `RegexMatchAndSubstitute`: replaces every match, wherever it stands (RE2's `GlobalReplace`).
#[derive(Clone)]
pub struct Substitution {
    regex: bytes::Regex,
    pattern: Box<str>,
    /// Nothing when a part refers to a group that the pattern does not have: RE2 then replaces nothing.
    parts: Option<Box<[Part]>>,
}

#[derive(Clone, Debug)]
enum Part {
    Literal(Box<[u8]>),
    Group(usize),
}

impl Substitution {
    /// Compiles the protobuf form. In the substitution `\0` to `\9` stand for groups, `\\` for a backslash.
    pub fn compile(proto: &pb::RegexMatchAndSubstitute) -> Result<Self, ConfigError> {
        let pb::RegexMatchAndSubstitute { pattern, substitution } = proto;
        let pattern = pattern.as_ref().ok_or_else(|| ConfigError::field("pattern", "is required"))?;
        let translated = translate(&pattern.regex);
        let regex = build(&translated).at(|| "regex").at(|| "pattern")?;
        let parts = parse_substitution(substitution);
        let groups = regex.captures_len();
        let known = parts.iter().all(|part| !matches!(part, Part::Group(group) if *group >= groups));
        Ok(Self { regex, pattern: pattern.regex.as_str().into(), parts: known.then_some(parts) })
    }

    /// `value` with every match replaced; borrowed when nothing matches.
    pub fn replace_all<'a>(&self, value: &'a [u8]) -> Cow<'a, [u8]> {
        let Some(parts) = &self.parts else { return Cow::Borrowed(value) };
        self.regex.replace_all(value, |captures: &bytes::Captures<'_>| {
            let mut replacement = Vec::new();
            for part in parts {
                match part {
                    Part::Literal(bytes) => replacement.extend_from_slice(bytes),
                    Part::Group(group) => {
                        replacement.extend_from_slice(
                            captures.get(*group).map_or(&[][..], |found| found.as_bytes()),
                        );
                    }
                }
            }
            replacement
        })
    }
}

impl fmt::Debug for Substitution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Substitution").field("pattern", &self.pattern).field("parts", &self.parts).finish()
    }
}

/// RE2 notices a `\` before anything but a digit or `\` only while it replaces, and writes no more from there on.
fn parse_substitution(text: &str) -> Box<[Part]> {
    let mut parts = Vec::new();
    let mut literal = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            literal.push(byte);
            continue;
        }
        match bytes.next() {
            Some(b'\\') => literal.push(b'\\'),
            Some(digit @ b'0'..=b'9') => {
                if !literal.is_empty() {
                    parts.push(Part::Literal(std::mem::take(&mut literal).into()));
                }
                parts.push(Part::Group(usize::from(digit - b'0')));
            }
            _ => break,
        }
    }
    if !literal.is_empty() {
        parts.push(Part::Literal(literal.into()));
    }
    parts.into()
}

/// RE2's `\d`, `\w`, `\s` and `\b` are ASCII. Matching bytes gives that, at a fraction of the size; only a pattern
/// that itself names characters beyond ASCII needs Unicode mode.
fn needs_unicode(pattern: &str) -> bool {
    !pattern.is_ascii() || pattern.contains("\\p") || pattern.contains("\\P") || pattern.contains("\\x{")
}

fn parse(pattern: &str) -> Result<regex_syntax::hir::Hir, ConfigError> {
    regex_syntax::ParserBuilder::new()
        .unicode(needs_unicode(pattern))
        .utf8(false)
        .build()
        .parse(pattern)
        .map_err(|error| {
            ConfigError::new(format!(
                "invalid regular expression '{pattern}': {}",
                one_line(&error.to_string())
            ))
        })
}

fn build(pattern: &str) -> Result<bytes::Regex, ConfigError> {
    bytes::RegexBuilder::new(pattern)
        .unicode(needs_unicode(pattern))
        .size_limit(MAX_PROGRAM_BYTES)
        .build()
        .map_err(|error| match error {
            regex::Error::CompiledTooBig(limit) => {
                ConfigError::new(format!("regular expression compiles to more than {limit} bytes"))
            }
            error => ConfigError::new(format!(
                "invalid regular expression '{pattern}': {}",
                one_line(&error.to_string())
            )),
        })
}

/// The library draws the pattern over several lines and names the reason in the last one.
fn one_line(error: &str) -> &str {
    let last = error.lines().last().unwrap_or(error);
    last.strip_prefix("error: ").unwrap_or(last)
}

/// RE2 knows `\Q...\E` and takes `[`, `&&`, `--` and `~~` in a class literally, where the `regex` crate has nested
/// classes and set operations.
fn translate(pattern: &str) -> Cow<'_, str> {
    let bytes = pattern.as_bytes();
    let suspicious = pattern.contains("\\Q")
        || memchr::memchr(b'[', bytes).is_some_and(|at| {
            let rest = &pattern[at + 1..];
            rest.contains('[') || rest.contains("&&") || rest.contains("--") || rest.contains("~~")
        });
    if !suspicious {
        return Cow::Borrowed(pattern);
    }
    let mut out = String::with_capacity(pattern.len() + 8);
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        if let Some(quoted) = rest.strip_prefix("\\Q") {
            let (text, after) = quoted.split_once("\\E").unwrap_or((quoted, ""));
            out.push_str(&regex_syntax::escape(text));
            rest = after;
        } else if c == '\\' {
            let end = rest.char_indices().nth(2).map_or(rest.len(), |(at, _)| at);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        } else if c == '[' {
            rest = translate_class(rest, &mut out);
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    Cow::Owned(out)
}

/// Copies the class at the start of `rest` and returns what follows it.
fn translate_class<'a>(rest: &'a str, out: &mut String) -> &'a str {
    out.push('[');
    let mut rest = &rest[1..];
    for opening in ['^', ']'] {
        if let Some(after) = rest.strip_prefix(opening) {
            if opening == ']' {
                out.push('\\');
            }
            out.push(opening);
            rest = after;
        }
    }
    let mut previous = None;
    while let Some(c) = rest.chars().next() {
        if c == ']' {
            out.push(']');
            return &rest[1..];
        }
        if let Some(end) = rest.strip_prefix("[:").and_then(|named| named.find(":]")) {
            out.push_str(&rest[..end + 4]);
            rest = &rest[end + 4..];
            previous = None;
            continue;
        }
        if c == '\\' {
            let end = rest.char_indices().nth(2).map_or(rest.len(), |(at, _)| at);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            previous = None;
            continue;
        }
        if c == '[' || (matches!(c, '&' | '-' | '~') && previous == Some(c)) {
            out.push('\\');
        }
        out.push(c);
        previous = Some(c);
        rest = &rest[c.len_utf8()..];
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::{Regex, Substitution, translate};
    use envoy_types::pb::envoy::r#type::matcher::v3 as pb;

    #[test]
    fn the_whole_value_must_match() {
        let regex = Regex::new("a|ab").unwrap();
        assert!(regex.is_match(b"ab") && regex.is_match(b"a") && !regex.is_match(b"abc"));
        assert_eq!(Regex::new("/api/v[0-9]+/.*").unwrap().literal_prefix(), b"/api/v");
        assert_eq!(Regex::new("(?i)/api").unwrap().literal_prefix(), b"/");
        assert_eq!(Regex::new("/a|/b").unwrap().literal_prefix(), b"/");
        assert!(Regex::new("a.c").unwrap().is_match(b"a\xffc"));
        assert!(!Regex::new(r"\d").unwrap().is_match("\u{0663}".as_bytes()), "ASCII digits as RE2");
    }

    #[test]
    fn unbalanced_patterns_do_not_slip_through_the_anchors() {
        assert!(Regex::new("a)(b").is_err());
        let error = Regex::new("(").unwrap_err().to_string();
        assert!(error.contains("unclosed group"), "{error}");
        assert!(Regex::new(&"(a{1000}){1000}".repeat(9)).is_err());
    }

    #[test]
    fn classes_are_read_as_re2_reads_them() {
        assert_eq!(translate("[^[/]+"), r"[^\[/]+");
        assert_eq!(translate("[[:alpha:]&&x]"), r"[[:alpha:]&\&x]");
        assert!(Regex::new("[+--]").unwrap().is_match(b","));
        assert!(Regex::new(r"\Qa.b\E+").unwrap().is_match(b"a.bb"));
        assert!(Regex::new("[]a]").unwrap().is_match(b"]"));
    }

    #[test]
    fn substitution_replaces_every_match() {
        let compile = |pattern: &str, substitution: &str| {
            Substitution::compile(&pb::RegexMatchAndSubstitute {
                pattern: Some(pb::RegexMatcher { regex: pattern.into(), engine_type: None }),
                substitution: substitution.into(),
            })
        };
        let swap = compile("^/service/([^/]+)(/.*)$", r"\2/instance/\1").unwrap();
        assert_eq!(&*swap.replace_all(b"/service/foo/v1/api"), b"/v1/api/instance/foo");
        assert_eq!(&*compile("one", "two").unwrap().replace_all(b"/one/one"), b"/two/two");
        assert_eq!(&*compile("a", r"\\").unwrap().replace_all(b"a"), b"\\");
        assert_eq!(&*compile("a", r"b\1").unwrap().replace_all(b"a"), b"a", "no such group");
        assert_eq!(&*compile("a", r"b\x").unwrap().replace_all(b"a"), b"b");
    }
}

//! From format string to segments.

use waystation_schema::ConfigError;

use super::command::{self, Command};
use super::{Extensions, Segment};

/// Cuts `text` at its operators and compiles them. Adjacent literals become one, `%%` a percent sign.
pub(super) fn parse(text: &str, extensions: Extensions) -> Result<Vec<Segment>, ConfigError> {
    let mut segments = Vec::new();
    let mut literal = String::new();
    let mut at = 0;
    while let Some(percent) = text[at..].find('%') {
        literal.push_str(&text[at..at + percent]);
        at += percent;
        if text[at..].starts_with("%%") {
            literal.push('%');
            at += 2;
            continue;
        }
        let (command, len) = Command::scan(&text[at..]).ok_or_else(|| {
            ConfigError::new(format!(
                "Incorrect configuration: {text}. Couldn't find valid command at position {at}"
            ))
        })?;
        if !literal.is_empty() {
            segments.push(Segment::Literal(std::mem::take(&mut literal).into()));
        }
        segments.push(Segment::Operator(command::compile(command, extensions)?));
        at += len;
    }
    literal.push_str(&text[at..]);
    if !literal.is_empty() {
        segments.push(Segment::Literal(literal.into()));
    }
    Ok(segments)
}

impl<'a> Command<'a> {
    /// The command at the start of `text`, which begins with `%`, and how long it is: Envoy's
    /// `%([A-Z0-9_]+)(\((.*?)\))?(:([0-9]+))?%`, where `.` is no newline and the arguments end as early as possible.
    fn scan(text: &'a str) -> Option<(Self, usize)> {
        let body = &text[1..];
        let name_len = body.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))?;
        let (name, rest) = body.split_at(name_len);
        if name.is_empty() {
            return None;
        }
        let found = |arguments, max_length, rest: &str| {
            Some((Self { name, arguments, max_length }, text.len() - rest.len()))
        };
        let Some(inside) = rest.strip_prefix('(') else {
            let (max_length, rest) = end(rest)?;
            return found("", max_length, rest);
        };
        let line = &inside[..inside.find('\n').unwrap_or(inside.len())];
        for (close, _) in line.match_indices(')') {
            if let Some((max_length, rest)) = end(&inside[close + 1..]) {
                return found(&inside[..close], max_length, rest);
            }
        }
        None
    }
}

/// The optional `:N` and the closing `%`; returns what follows.
fn end(text: &str) -> Option<(Option<usize>, &str)> {
    if let Some(rest) = text.strip_prefix('%') {
        return Some((None, rest));
    }
    let (digits, rest) = text.strip_prefix(':')?.split_once('%')?;
    // `parse` would also take a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some((Some(digits.parse().ok()?), rest))
}

//! A YAML reader that fills a [`Document`], with Envoy's idea of what a plain scalar means.
//!
//! Envoy reads YAML with yaml-cpp, turns it into a `google.protobuf.Value` and from there into JSON. Visible
//! consequences, all kept here: `y`, `no`, `On` and their kin are booleans wherever they are not quoted, whatever
//! the field's type (a string field given `y` fails); integers may be octal or hexadecimal and lose that form;
//! integers beyond 32 bits and all floating point numbers travel as strings; a tag does not make a string, quotes
//! do; merge keys are keys like any other.

use std::collections::HashMap;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle};

use crate::document::{Document, NodeKind, Position, TEXT_DEPTH_LIMIT, TextError};

/// How many nodes aliases may add to a document.
const ALIAS_BUDGET: usize = 1_000_000;

/// Parses a text of one document; a second document is an error.
pub(crate) fn parse(text: &str) -> Result<Document<'_>, TextError> {
    let mut loader =
        Loader { document: Document::new(text), open: Vec::new(), anchors: HashMap::new(), copied: 0 };
    let mut documents = 0;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| {
            let info = error.info().strip_prefix("while parsing ").map_or(error.info(), |info| info);
            TextError::new(position(error.marker()), format!("not YAML: {info}"))
        })?;
        let at = position(&span.start);
        match event {
            Event::DocumentStart(_) => documents += 1,
            Event::Scalar(value, ScalarStyle::Plain, 0, _) if documents > 1 && value.is_empty() => {}
            Event::Scalar(..) | Event::SequenceStart(..) | Event::MappingStart(..) if documents > 1 => {
                return Err(TextError::new(at, "a second document in the same text"));
            }
            event => loader.event(&event, at)?,
        }
    }
    if loader.document.len() == 0 {
        loader.document.push_literal(NodeKind::Null, Position { line: 1, column: 1 })?;
    }
    Ok(loader.document)
}

struct Loader<'t> {
    document: Document<'t>,
    open: Vec<Open>,
    /// The node of each anchor; only complete nodes are here, so that none contains itself.
    anchors: HashMap<usize, usize>,
    copied: usize,
}

/// A list or mapping that is not closed yet.
struct Open {
    node: usize,
    mapping: bool,
    children: u32,
    anchor: usize,
}

impl Loader<'_> {
    fn event(&mut self, event: &Event<'_>, at: Position) -> Result<(), TextError> {
        match event {
            Event::Scalar(value, style, anchor, tag) => {
                let key = self.expects_key();
                let start = self.document.len();
                // Only the non-specific tag `!` makes a string of a plain scalar.
                let bang = tag.as_ref().is_some_and(|tag| tag.handle.is_empty() && tag.suffix == "!");
                let quoted = *style != ScalarStyle::Plain && tag.is_none();
                if key || bang || quoted {
                    self.string(value, at)?;
                } else {
                    self.plain(value, at)?;
                }
                self.complete(start, *anchor);
            }
            Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) => {
                if self.expects_key() {
                    return Err(TextError::new(at, "a key must be a scalar"));
                }
                if self.open.len() >= TEXT_DEPTH_LIMIT {
                    return Err(TextError::new(at, "values are nested too deeply"));
                }
                let mapping = matches!(event, Event::MappingStart(..));
                let kind = if mapping { NodeKind::Object } else { NodeKind::Array };
                let node = self.document.open(kind, at)?;
                self.open.push(Open { node, mapping, children: 0, anchor: *anchor });
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let open = self.open.pop().expect("the parser balances its events");
                let elements = if open.mapping { open.children / 2 } else { open.children };
                self.document.close(open.node, elements);
                self.complete(open.node, open.anchor);
            }
            Event::Alias(anchor) => {
                let Some(&node) = self.anchors.get(anchor) else {
                    return Err(TextError::new(at, "an alias inside the value that it names"));
                };
                if self.expects_key() {
                    return Err(TextError::new(at, "a key must not be an alias"));
                }
                self.copied += self.document.after(node) - node;
                if self.copied > ALIAS_BUDGET {
                    return Err(TextError::new(at, "aliases make the document too large"));
                }
                let start = self.document.len();
                self.document.repeat(node, at)?;
                self.complete(start, 0);
            }
            _ => {}
        }
        Ok(())
    }

    fn expects_key(&self) -> bool {
        self.open.last().is_some_and(|open| open.mapping && open.children % 2 == 0)
    }

    fn complete(&mut self, node: usize, anchor: usize) {
        if anchor != 0 {
            self.anchors.insert(anchor, node);
        }
        if let Some(open) = self.open.last_mut() {
            open.children += 1;
        }
    }

    fn string(&mut self, value: &str, at: Position) -> Result<(), TextError> {
        self.document.push_text(NodeKind::String, at, value)
    }

    fn plain(&mut self, value: &str, at: Position) -> Result<(), TextError> {
        if matches!(value, "" | "~" | "null" | "Null" | "NULL") {
            return self.document.push_literal(NodeKind::Null, at);
        }
        if let Some(truth) = boolean(value) {
            let kind = if truth { NodeKind::True } else { NodeKind::False };
            return self.document.push_literal(kind, at);
        }
        if let Some(integer) = integer(value) {
            let kind = if i32::try_from(integer).is_ok() { NodeKind::Number } else { NodeKind::String };
            let mut buffer = itoa::Buffer::new();
            return self.document.push_text(kind, at, buffer.format(integer));
        }
        self.string(value, at)
    }
}

fn position(marker: &Marker) -> Position {
    Position { line: marker.line() as u32, column: marker.col() as u32 + 1 }
}

/// yaml-cpp's booleans: lower case, upper case or capitalised.
fn boolean(value: &str) -> Option<bool> {
    const NAMES: [(&str, &str); 4] = [("y", "n"), ("yes", "no"), ("true", "false"), ("on", "off")];
    let rest = value.get(1..)?;
    let flexible = value.bytes().all(|byte| byte.is_ascii_lowercase())
        || value.bytes().all(|byte| byte.is_ascii_uppercase())
        || (value.as_bytes()[0].is_ascii_uppercase() && rest.bytes().all(|byte| byte.is_ascii_lowercase()));
    if !flexible {
        return None;
    }
    NAMES.iter().find_map(|(yes, no)| {
        if value.eq_ignore_ascii_case(yes) {
            Some(true)
        } else if value.eq_ignore_ascii_case(no) {
            Some(false)
        } else {
            None
        }
    })
}

/// What a C++ stream without a fixed base takes for a 64-bit integer.
fn integer(value: &str) -> Option<i64> {
    let (negative, digits) = match value.as_bytes().first()? {
        b'-' => (true, &value[1..]),
        b'+' => (false, &value[1..]),
        _ => (false, value),
    };
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    if !digits.starts_with(|first: char| first.is_digit(radix)) {
        return None;
    }
    let magnitude = i128::from(u64::from_str_radix(digits, radix).ok()?);
    i64::try_from(if negative { -magnitude } else { magnitude }).ok()
}

#[cfg(test)]
mod tests {
    use super::{boolean, integer, parse};
    use crate::document::{Document, NodeKind};

    fn show(document: &Document<'_>, node: usize) -> String {
        match document.kind(node) {
            NodeKind::Null => "null".to_owned(),
            NodeKind::True => "true".to_owned(),
            NodeKind::False => "false".to_owned(),
            NodeKind::Number => document.text(node).to_owned(),
            NodeKind::String => format!("{:?}", document.text(node)),
            NodeKind::Array => {
                let parts: Vec<_> = document.elements(node).map(|element| show(document, element)).collect();
                format!("[{}]", parts.join(", "))
            }
            NodeKind::Object => {
                let parts: Vec<_> = document
                    .members(node)
                    .map(|(key, value)| format!("{}: {}", document.text(key), show(document, value)))
                    .collect();
                format!("{{{}}}", parts.join(", "))
            }
        }
    }

    #[test]
    fn scalars_mean_what_envoy_takes_them_for() {
        // Each seen in the config_dump of Envoy 1.40.
        let cases = [
            ("1.5", "\"1.5\""),
            ("1e3", "\"1e3\""),
            ("12", "12"),
            ("12345678901", "\"12345678901\""),
            ("0x1F", "31"),
            ("017", "15"),
            ("0o17", "\"0o17\""),
            ("+5", "5"),
            ("-3", "-3"),
            ("y", "true"),
            ("Y", "true"),
            ("YES", "true"),
            ("yEs", "\"yEs\""),
            ("Off", "false"),
            ("~", "null"),
            ("Null", "null"),
            ("\"12\"", "\"12\""),
            ("!!str 12", "12"),
            ("!!int \"12\"", "12"),
            ("!foo 12", "12"),
            ("! 12", "\"12\""),
            ("|\n  12\n", "\"12\\n\""),
            (".nan", "\".nan\""),
            ("2001-01-01", "\"2001-01-01\""),
            ("1_000", "\"1_000\""),
            ("12abc", "\"12abc\""),
            ("0b11", "\"0b11\""),
        ];
        for (text, expected) in cases {
            let document = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(show(&document, 0), expected, "for {text}");
        }
        assert_eq!(boolean("\u{e9}"), None);
        assert_eq!(integer("-0x10"), Some(-16));
        assert_eq!(integer("-9223372036854775808"), Some(i64::MIN));
        assert_eq!(integer("0"), Some(0));
        assert_eq!(integer("-"), None);
        assert_eq!(integer("0x"), None);
        assert_eq!(integer("+-1"), None);
    }

    #[test]
    fn structure_anchors_and_keys() {
        let document = parse("---\na: &x {y: 1, <<: {b: no}}\nc: [*x, *x]\n...\n").unwrap();
        assert_eq!(
            show(&document, 0),
            "{a: {y: 1, <<: {b: false}}, c: [{y: 1, <<: {b: false}}, {y: 1, <<: {b: false}}]}"
        );
        assert_eq!(show(&parse("").unwrap(), 0), "null");
        assert_eq!(show(&parse("# nothing\n").unwrap(), 0), "null");
        assert_eq!(show(&parse("a: 1\n---\n").unwrap(), 0), "{a: 1}");
    }

    #[test]
    fn faults_have_their_place() {
        let cases = [
            ("a: 1\n---\nb: 2\n", "3:1 a second document in the same text"),
            ("a: &a [*a]", "1:8 an alias inside the value that it names"),
            ("? [a]\n: b", "1:3 a key must be a scalar"),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err();
            assert_eq!(format!("{}:{} {}", error.line(), error.column(), error.config_error()), expected);
        }
        for text in ["a: [1", "a: *b", "a:\n\t- x\n\t b", "{a: 1"] {
            let error = parse(text).unwrap_err();
            assert!(error.config_error().reason().starts_with("not YAML: "), "{text}: {error}");
        }
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..10 {
            bomb.push_str(&format!(
                "a{level}: &a{level} [{}]\n",
                vec![format!("*a{}", level - 1); 10].join(", ")
            ));
        }
        assert!(parse(&bomb).unwrap_err().to_string().contains("aliases make the document too large"));
        assert!(parse(&"[".repeat(10_000)).is_err());
    }
}

//! A JSON reader that fills a [`Document`].
//!
//! Beyond RFC 8259 it takes what protobuf's parser, and so Envoy, still takes: a comma behind the last member or element,
//! strings in single quotes, identifiers as keys, control characters in strings, the escapes `\'` and `\U`.

use crate::document::{Document, NodeKind, Position, TEXT_DEPTH_LIMIT, TextError};

/// Parses a whole text; anything but white space behind the value is an error.
pub(crate) fn parse(text: &str) -> Result<Document<'_>, TextError> {
    let mut parser =
        Parser { text: text.as_bytes(), at: 0, line: 1, line_start: 0, document: Document::new(text) };
    parser.skip_space();
    parser.value(0)?;
    parser.skip_space();
    if parser.at < parser.text.len() {
        return Err(parser.error("unexpected text behind the document"));
    }
    Ok(parser.document)
}

struct Parser<'t> {
    text: &'t [u8],
    at: usize,
    line: u32,
    line_start: usize,
    document: Document<'t>,
}

impl Parser<'_> {
    fn value(&mut self, depth: usize) -> Result<(), TextError> {
        if depth > TEXT_DEPTH_LIMIT {
            return Err(self.error("values are nested too deeply"));
        }
        let position = self.position();
        match self.peek() {
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(quote @ (b'"' | b'\'')) => self.string(quote),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => {
                for (word, kind) in
                    [("true", NodeKind::True), ("false", NodeKind::False), ("null", NodeKind::Null)]
                {
                    if self.text[self.at..].starts_with(word.as_bytes()) {
                        self.at += word.len();
                        return self.document.push_literal(kind, position);
                    }
                }
                Err(self.unexpected("a value"))
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<(), TextError> {
        let index = self.document.open(NodeKind::Object, self.position())?;
        self.at += 1;
        self.skip_space();
        let mut members = 0;
        if self.peek() != Some(b'}') {
            loop {
                self.key()?;
                self.skip_space();
                self.expect(b':', "`:`")?;
                self.skip_space();
                self.value(depth + 1)?;
                members += 1;
                self.skip_space();
                if self.is_last(b'}')? {
                    break;
                }
            }
        }
        self.at += 1;
        self.document.close(index, members);
        Ok(())
    }

    fn array(&mut self, depth: usize) -> Result<(), TextError> {
        let index = self.document.open(NodeKind::Array, self.position())?;
        self.at += 1;
        self.skip_space();
        let mut elements = 0;
        if self.peek() != Some(b']') {
            loop {
                self.value(depth + 1)?;
                elements += 1;
                self.skip_space();
                if self.is_last(b']')? {
                    break;
                }
            }
        }
        self.at += 1;
        self.document.close(index, elements);
        Ok(())
    }

    /// Behind a member or an element: whether the list of them ends here, at its closing bracket.
    fn is_last(&mut self, close: u8) -> Result<bool, TextError> {
        match self.peek() {
            Some(b',') => {
                self.at += 1;
                self.skip_space();
            }
            Some(byte) if byte == close => {}
            _ => return Err(self.unexpected(if close == b'}' { "`,` or `}`" } else { "`,` or `]`" })),
        }
        Ok(self.peek() == Some(close))
    }

    fn key(&mut self) -> Result<(), TextError> {
        match self.peek() {
            Some(quote @ (b'"' | b'\'')) => self.string(quote),
            Some(b'A'..=b'Z' | b'a'..=b'z' | b'_') => {
                let (position, start) = (self.position(), self.at);
                while let Some(b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_') = self.peek() {
                    self.at += 1;
                }
                if matches!(&self.text[start..self.at], b"true" | b"false" | b"null") {
                    return Err(TextError::new(position, "a key must not be a literal"));
                }
                self.document.push_source(NodeKind::String, position, start, self.at)
            }
            _ => Err(self.unexpected("a key")),
        }
    }

    fn number(&mut self) -> Result<(), TextError> {
        let (position, start) = (self.position(), self.at);
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        match self.peek() {
            Some(b'0') => self.at += 1,
            Some(b'1'..=b'9') => self.digits(),
            _ => return Err(self.unexpected("a digit")),
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.some_digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.some_digits()?;
        }
        self.document.push_source(NodeKind::Number, position, start, self.at)
    }

    fn some_digits(&mut self) -> Result<(), TextError> {
        let start = self.at;
        self.digits();
        if self.at == start { Err(self.unexpected("a digit")) } else { Ok(()) }
    }

    fn digits(&mut self) {
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
    }

    /// A string that starts here with `quote`, and ends with it.
    fn string(&mut self, quote: u8) -> Result<(), TextError> {
        let position = self.position();
        self.at += 1;
        let start = self.at;
        loop {
            match self.peek() {
                Some(byte) if byte == quote => {
                    self.at += 1;
                    return self.document.push_source(NodeKind::String, position, start, self.at - 1);
                }
                Some(b'\\') => return self.escaped_string(position, start, quote),
                Some(_) => self.character(),
                None => return Err(TextError::new(position, "the string is not closed")),
            }
        }
    }

    /// The rest of a string whose first escape stands here.
    fn escaped_string(&mut self, position: Position, start: usize, quote: u8) -> Result<(), TextError> {
        let source = self.document.source();
        let pooled = self.document.pool().len();
        let mut plain = start;
        loop {
            match self.peek() {
                Some(byte) if byte == quote => {
                    self.document.pool().push_str(&source[plain..self.at]);
                    self.at += 1;
                    return self.document.push_pooled(NodeKind::String, position, pooled);
                }
                Some(b'\\') => {
                    self.document.pool().push_str(&source[plain..self.at]);
                    let character = self.escape()?;
                    self.document.pool().push(character);
                    plain = self.at;
                }
                Some(_) => self.character(),
                None => return Err(TextError::new(position, "the string is not closed")),
            }
        }
    }

    /// Steps over a byte of a string, which may break the line.
    fn character(&mut self) {
        let breaks = self.peek() == Some(b'\n');
        self.at += 1;
        if breaks {
            self.line += 1;
            self.line_start = self.at;
        }
    }

    fn escape(&mut self) -> Result<char, TextError> {
        self.at += 1;
        let character = match self.peek() {
            Some(quote @ (b'"' | b'\'')) => char::from(quote),
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u' | b'U') => {
                self.at += 1;
                return self.unicode_escape();
            }
            _ => return Err(self.error("an unknown escape in a string")),
        };
        self.at += 1;
        Ok(character)
    }

    fn unicode_escape(&mut self) -> Result<char, TextError> {
        let first = self.hex4()?;
        let code = match first {
            0xd800..=0xdbff if self.text[self.at..].starts_with(b"\\u") => {
                self.at += 2;
                let second = self.hex4()?;
                if !(0xdc00..=0xdfff).contains(&second) {
                    return Err(self.error("a surrogate without its pair"));
                }
                0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)
            }
            code => code,
        };
        char::from_u32(code).ok_or_else(|| self.error("a surrogate without its pair"))
    }

    fn hex4(&mut self) -> Result<u32, TextError> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = self.peek().and_then(|byte| char::from(byte).to_digit(16));
            code = code * 16 + digit.ok_or_else(|| self.error("four hexadecimal digits must follow \\u"))?;
            self.at += 1;
        }
        Ok(code)
    }

    fn skip_space(&mut self) {
        while let Some(byte) = self.peek() {
            match byte {
                b' ' | b'\t' | b'\r' => self.at += 1,
                b'\n' => self.character(),
                _ => return,
            }
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn expect(&mut self, byte: u8, what: &str) -> Result<(), TextError> {
        if self.peek() == Some(byte) {
            self.at += 1;
            Ok(())
        } else {
            Err(self.unexpected(what))
        }
    }

    fn position(&self) -> Position {
        // Columns count characters; all but the first byte of a character are 10xxxxxx.
        let before = &self.text[self.line_start..self.at.min(self.text.len())];
        // A document on one line would make this quadratic, so long lines count bytes.
        let column = if before.len() > 1000 {
            before.len()
        } else {
            before.iter().filter(|&&byte| byte & 0xc0 != 0x80).count()
        };
        Position { line: self.line, column: column as u32 + 1 }
    }

    fn error(&self, reason: &str) -> TextError {
        TextError::new(self.position(), reason)
    }

    fn unexpected(&self, wanted: &str) -> TextError {
        match self.document.source().get(self.at..).and_then(|rest| rest.chars().next()) {
            Some(found) => self.error(&format!("expected {wanted}, found {found:?}")),
            None => self.error(&format!("expected {wanted}, found the end of the document")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::parse;
    use crate::document::NodeKind;

    #[test]
    fn nodes_carry_text_and_place() {
        let document = parse("{\n  \"a\\u00e9\": [1, -2.5e3, \"x\"], \"b\": {\"c\": null}\n}").unwrap();
        assert_eq!(document.count(0), 2);
        let members: Vec<_> = document.members(0).collect();
        assert_eq!(document.text(members[0].0), "a\u{e9}");
        let elements: Vec<_> = document.elements(members[0].1).collect();
        assert_eq!(document.text(elements[1]), "-2.5e3");
        assert_eq!(document.kind(elements[2]), NodeKind::String);
        let place = document.position(elements[2]);
        assert_eq!((place.line, place.column), (2, 26));
    }

    #[test]
    fn what_protobufs_parser_takes_is_taken() {
        let document = parse("{'a\\'\\U0041\"': [1, 2,], _b1: {null_c: \"\t\n\",},}").unwrap();
        let members: Vec<_> = document.members(0).collect();
        assert_eq!((document.text(members[0].0), document.count(members[0].1)), ("a'A\"", 2));
        assert_eq!(document.text(members[1].0), "_b1");
        let (key, value) = document.members(members[1].1).next().unwrap();
        assert_eq!((document.text(key), document.text(value)), ("null_c", "\t\n"));
    }

    #[test]
    fn every_kind_of_fault_has_its_place() {
        let cases = [
            ("", "1:1 expected a value, found the end of the document"),
            ("{\"a\":1} x", "1:9 unexpected text behind the document"),
            ("{\"a\":1,,}", "1:8 expected a key, found ','"),
            ("{,}", "1:2 expected a key, found ','"),
            ("[,]", "1:2 expected a value, found ','"),
            ("{true: 1}", "1:2 a key must not be a literal"),
            ("{a-b: 1}", "1:3 expected `:`, found '-'"),
            ("{\"a\": b}", "1:7 expected a value, found 'b'"),
            ("'a\"", "1:1 the string is not closed"),
            ("{\"a\" 1}", "1:6 expected `:`, found '1'"),
            ("[1\n 2]", "2:2 expected `,` or `]`, found '2'"),
            ("[01]", "1:3 expected `,` or `]`, found '1'"),
            ("[1.]", "1:4 expected a digit, found ']'"),
            ("\"abc", "1:1 the string is not closed"),
            ("\"a\\x\"", "1:4 an unknown escape in a string"),
            ("\"\\ud800\"", "1:8 a surrogate without its pair"),
            ("\"\\u12g4\"", "1:6 four hexadecimal digits must follow \\u"),
            ("[\"a\nb\" x", "2:4 expected `,` or `]`, found 'x'"),
            ("nul", "1:1 expected a value, found 'n'"),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err();
            let found = format!("{}:{} {}", error.line(), error.column(), error.config_error());
            assert_eq!(found, expected, "for {text:?}");
        }
        assert!(parse(&"[".repeat(100_000)).is_err());
    }
}

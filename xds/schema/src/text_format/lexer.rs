//! Tokens of the text format.

use crate::document::{Position, TextError};

/// A piece of the text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token<'t> {
    pub(super) kind: TokenKind<'t>,
    pub(super) position: Position,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum TokenKind<'t> {
    Word(&'t str),
    /// Digits and what belongs to a number, unchecked; without sign.
    Number(&'t str),
    /// Its content is in [`Lexer::pending`].
    String,
    Symbol(char),
    End,
}

pub(super) struct Lexer<'t> {
    text: &'t str,
    at: usize,
    line: u32,
    line_start: usize,
    next: Token<'t>,
    /// The content of `next`, when that is a string.
    pending: Vec<u8>,
}

impl<'t> Lexer<'t> {
    pub(super) fn new(text: &'t str) -> Result<Self, TextError> {
        let next = Token { kind: TokenKind::End, position: Position::default() };
        let mut lexer = Self { text, at: 0, line: 1, line_start: 0, next, pending: Vec::new() };
        lexer.advance()?;
        Ok(lexer)
    }

    pub(super) fn peek(&self) -> Token<'t> {
        self.next
    }

    pub(super) fn next(&mut self) -> Result<Token<'t>, TextError> {
        let token = self.next;
        if token.kind != TokenKind::End {
            self.advance()?;
        }
        Ok(token)
    }

    /// Takes a symbol if it comes next.
    pub(super) fn take_symbol(&mut self, symbol: char) -> Result<bool, TextError> {
        let found = self.next.kind == TokenKind::Symbol(symbol);
        if found {
            self.advance()?;
        }
        Ok(found)
    }

    /// One `,` or `;` may stand behind a field.
    pub(super) fn skip_separator(&mut self) -> Result<(), TextError> {
        if !self.take_symbol(',')? {
            self.take_symbol(';')?;
        }
        Ok(())
    }

    /// One or more strings in a row.
    pub(super) fn string(&mut self) -> Result<(Position, Vec<u8>), TextError> {
        let position = self.next.position;
        let mut all = Vec::new();
        let mut found = false;
        while self.next.kind == TokenKind::String {
            found = true;
            all.append(&mut self.pending);
            self.advance()?;
        }
        if !found {
            let token = self.next;
            return Err(token.unexpected("a string"));
        }
        Ok((position, all))
    }

    /// A type URL up to its closing bracket, which is taken too.
    pub(super) fn type_url(&mut self) -> Result<String, TextError> {
        let mut url = String::new();
        loop {
            let token = self.next()?;
            match token.kind {
                TokenKind::Symbol(']') => return Ok(url),
                TokenKind::Symbol(symbol @ ('.' | '/' | '-')) => url.push(symbol),
                TokenKind::Word(word) | TokenKind::Number(word) => url.push_str(word),
                _ => return Err(token.unexpected("a type URL")),
            }
        }
    }

    fn advance(&mut self) -> Result<(), TextError> {
        self.skip_space();
        let position = self.position();
        let start = self.at;
        let bytes = self.text.as_bytes();
        let kind = match bytes.get(start) {
            None => TokenKind::End,
            Some(quote @ (b'"' | b'\'')) => {
                self.read_string(*quote, position)?;
                TokenKind::String
            }
            Some(byte) if byte.is_ascii_alphabetic() || *byte == b'_' => {
                self.skip_while(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
                TokenKind::Word(&self.text[start..self.at])
            }
            Some(byte)
                if byte.is_ascii_digit()
                    || (*byte == b'.' && bytes.get(start + 1).is_some_and(u8::is_ascii_digit)) =>
            {
                let mut last = 0;
                self.skip_while(|byte| {
                    let sign = matches!(byte, b'+' | b'-') && matches!(last, b'e' | b'E');
                    last = byte;
                    sign || byte.is_ascii_alphanumeric() || byte == b'.'
                });
                TokenKind::Number(&self.text[start..self.at])
            }
            Some(b'{' | b'}' | b'<' | b'>' | b'[' | b']' | b':' | b',' | b';' | b'-' | b'.' | b'/') => {
                self.at += 1;
                TokenKind::Symbol(char::from(bytes[start]))
            }
            Some(_) => {
                let found = self.text[start..].chars().next().unwrap_or_default();
                return Err(TextError::new(position, format!("unexpected character {found:?}")));
            }
        };
        self.next = Token { kind, position };
        Ok(())
    }

    fn read_string(&mut self, quote: u8, position: Position) -> Result<(), TextError> {
        let bytes = self.text.as_bytes();
        self.pending.clear();
        self.at += 1;
        loop {
            match bytes.get(self.at) {
                Some(&byte) if byte == quote => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => {
                    self.at += 1;
                    self.escape().ok_or_else(|| TextError::new(position, "an unknown escape in a string"))?;
                }
                Some(b'\n') | None => return Err(TextError::new(position, "the string is not closed")),
                Some(&byte) => {
                    self.pending.push(byte);
                    self.at += 1;
                }
            }
        }
    }

    /// An escape behind its backslash.
    fn escape(&mut self) -> Option<()> {
        let byte = *self.text.as_bytes().get(self.at)?;
        let plain = match byte {
            b'a' => 7,
            b'b' => 8,
            b'f' => 12,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'v' => 11,
            b'\\' | b'\'' | b'"' | b'?' => byte,
            b'0'..=b'7' => {
                let value = self.digits(8, 3)?;
                self.pending.push(u8::try_from(value).ok()?);
                return Some(());
            }
            b'x' | b'X' => {
                self.at += 1;
                let value = self.digits(16, 2)?;
                self.pending.push(u8::try_from(value).ok()?);
                return Some(());
            }
            b'u' | b'U' => {
                self.at += 1;
                let start = self.at;
                let width = if byte == b'u' { 4 } else { 8 };
                let value = self.digits(16, width)?;
                if self.at - start != width {
                    return None;
                }
                let mut buffer = [0; 4];
                let text = char::from_u32(value)?.encode_utf8(&mut buffer);
                self.pending.extend_from_slice(text.as_bytes());
                return Some(());
            }
            _ => return None,
        };
        self.pending.push(plain);
        self.at += 1;
        Some(())
    }

    /// One to `most` digits.
    fn digits(&mut self, radix: u32, most: usize) -> Option<u32> {
        let bytes = self.text.as_bytes();
        let start = self.at;
        let mut value = 0;
        while self.at - start < most
            && let Some(digit) = bytes.get(self.at).and_then(|&byte| char::from(byte).to_digit(radix))
        {
            value = value * radix + digit;
            self.at += 1;
        }
        (self.at > start).then_some(value)
    }

    fn skip_space(&mut self) {
        let bytes = self.text.as_bytes();
        while let Some(&byte) = bytes.get(self.at) {
            match byte {
                b'\n' => {
                    self.at += 1;
                    self.line += 1;
                    self.line_start = self.at;
                }
                b' ' | b'\t' | b'\r' => self.at += 1,
                b'#' => self.skip_while(|byte| byte != b'\n'),
                _ => return,
            }
        }
    }

    fn skip_while(&mut self, mut wanted: impl FnMut(u8) -> bool) {
        while self.text.as_bytes().get(self.at).is_some_and(|&byte| wanted(byte)) {
            self.at += 1;
        }
    }

    fn position(&self) -> Position {
        let before = &self.text.as_bytes()[self.line_start..self.at];
        let column = if before.len() > 1000 {
            before.len()
        } else {
            before.iter().filter(|&&byte| byte & 0xc0 != 0x80).count()
        };
        Position { line: self.line, column: column as u32 + 1 }
    }
}

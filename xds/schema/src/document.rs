//! A parsed JSON or YAML document: one flat tape of nodes, each knowing its line and column.
//!
//! A configuration of ten thousand clusters has half a million values; the tape costs 20 bytes for each and goes
//! back to the system in one piece.

use std::fmt;

use crate::error::ConfigError;

/// Why a text is not the configuration it should be, and where.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TextError {
    error: ConfigError,
    line: u32,
    column: u32,
}

impl TextError {
    pub(crate) fn new(at: Position, reason: impl Into<String>) -> Self {
        Self { error: ConfigError::new(reason), line: at.line, column: at.column }
    }

    /// The message path and the reason.
    pub fn config_error(&self) -> &ConfigError {
        &self.error
    }

    /// The line, from 1.
    pub fn line(&self) -> u32 {
        self.line
    }

    /// The column in characters, from 1.
    pub fn column(&self) -> u32 {
        self.column
    }

    /// Adds the enclosing segment of the message path.
    #[must_use]
    pub(crate) fn at(mut self, segment: impl Into<String>) -> Self {
        self.error = self.error.at(segment);
        self
    }
}

impl fmt::Display for TextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (line {}, column {})", self.error, self.line, self.column)
    }
}

impl std::error::Error for TextError {}

impl From<TextError> for ConfigError {
    fn from(error: TextError) -> Self {
        let (line, column) = (error.line, error.column);
        error.error.with_reason(|reason| format!("{reason} (line {line}, column {column})"))
    }
}

/// A place in the text, both from 1.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Position {
    pub(crate) line: u32,
    pub(crate) column: u32,
}

/// What a node is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NodeKind {
    Null,
    True,
    False,
    /// `a` and `b` are the bounds of its text.
    Number,
    /// As `Number`.
    String,
    /// `a` is the number of elements, `b` the number of nodes that follow and belong to it.
    Array,
    /// As `Array`; each element is a string node and a value.
    Object,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    kind: NodeKind,
    /// Whether the text is in the pool, not in the source.
    pooled: bool,
    position: Position,
    a: u32,
    b: u32,
}

/// A whole document; node 0 is the root.
#[derive(Debug)]
pub(crate) struct Document<'t> {
    source: &'t str,
    pool: String,
    nodes: Vec<Node>,
}

/// More nodes than any configuration has; stops documents that grow by aliases.
const NODE_LIMIT: usize = 1 << 25;
/// Nesting limit of the text.
pub(crate) const TEXT_DEPTH_LIMIT: usize = 200;

impl<'t> Document<'t> {
    pub(crate) fn new(source: &'t str) -> Self {
        Self { source, pool: String::new(), nodes: Vec::with_capacity(source.len() / 16) }
    }

    pub(crate) fn source(&self) -> &'t str {
        self.source
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Adds a null or a boolean.
    pub(crate) fn push_literal(&mut self, kind: NodeKind, position: Position) -> Result<(), TextError> {
        self.push(Node { kind, pooled: false, position, a: 0, b: 0 })
    }

    /// Adds a string or number that stands in the source as it is.
    pub(crate) fn push_source(
        &mut self,
        kind: NodeKind,
        position: Position,
        start: usize,
        end: usize,
    ) -> Result<(), TextError> {
        self.push(Node { kind, pooled: false, position, a: start as u32, b: end as u32 })
    }

    /// Adds a string or number with a text of its own.
    pub(crate) fn push_text(
        &mut self,
        kind: NodeKind,
        position: Position,
        text: &str,
    ) -> Result<(), TextError> {
        let start = self.pool.len();
        self.pool.push_str(text);
        self.push_pooled(kind, position, start)
    }

    /// Where the next text appended to [`Self::pool`] starts.
    pub(crate) fn pool(&mut self) -> &mut String {
        &mut self.pool
    }

    /// Adds a string whose text was appended to the pool from `start`.
    pub(crate) fn push_pooled(
        &mut self,
        kind: NodeKind,
        position: Position,
        start: usize,
    ) -> Result<(), TextError> {
        let end = self.pool.len();
        if u32::try_from(end).is_err() {
            return Err(TextError::new(position, "the document is too large"));
        }
        self.push(Node { kind, pooled: true, position, a: start as u32, b: end as u32 })
    }

    /// Opens an array or object; `close` it with the index returned.
    pub(crate) fn open(&mut self, kind: NodeKind, position: Position) -> Result<usize, TextError> {
        self.push(Node { kind, pooled: false, position, a: 0, b: 0 })?;
        Ok(self.nodes.len() - 1)
    }

    pub(crate) fn close(&mut self, index: usize, elements: u32) {
        let below = (self.nodes.len() - index - 1) as u32;
        self.nodes[index].a = elements;
        self.nodes[index].b = below;
    }

    /// Copies the node at `start` with all below it to the end (a YAML alias).
    pub(crate) fn repeat(&mut self, start: usize, position: Position) -> Result<(), TextError> {
        let end = self.after(start);
        if self.nodes.len() + (end - start) > NODE_LIMIT {
            return Err(TextError::new(position, "the document is too large"));
        }
        self.nodes.extend_from_within(start..end);
        Ok(())
    }

    pub(crate) fn kind(&self, index: usize) -> NodeKind {
        self.nodes[index].kind
    }

    pub(crate) fn position(&self, index: usize) -> Position {
        self.nodes[index].position
    }

    /// The text of a string or number.
    pub(crate) fn text(&self, index: usize) -> &str {
        let node = self.nodes[index];
        let range = node.a as usize..node.b as usize;
        if node.pooled { &self.pool[range] } else { &self.source[range] }
    }

    /// The number of elements of an array or members of an object.
    pub(crate) fn count(&self, index: usize) -> usize {
        self.nodes[index].a as usize
    }

    /// The index behind a node and all below it.
    pub(crate) fn after(&self, index: usize) -> usize {
        let node = self.nodes[index];
        match node.kind {
            NodeKind::Array | NodeKind::Object => index + 1 + node.b as usize,
            _ => index + 1,
        }
    }

    /// The elements of an array.
    pub(crate) fn elements(&self, index: usize) -> impl Iterator<Item = usize> {
        let mut next = index + 1;
        (0..self.count(index)).map(move |_| {
            let element = next;
            next = self.after(element);
            element
        })
    }

    /// The members of an object: the nodes of key and value.
    pub(crate) fn members(&self, index: usize) -> impl Iterator<Item = (usize, usize)> {
        let mut next = index + 1;
        (0..self.count(index)).map(move |_| {
            let key = next;
            next = self.after(key + 1);
            (key, key + 1)
        })
    }

    pub(crate) fn error(&self, index: usize, reason: impl Into<String>) -> TextError {
        TextError::new(self.position(index), reason)
    }

    /// What a node is, for messages.
    pub(crate) fn describe(&self, index: usize) -> String {
        match self.kind(index) {
            NodeKind::Null => "null".to_owned(),
            NodeKind::True => "the boolean true".to_owned(),
            NodeKind::False => "the boolean false".to_owned(),
            NodeKind::Number => format!("the number {}", self.text(index)),
            NodeKind::String => format!("the string {:?}", Abridged(self.text(index))),
            NodeKind::Array => "a list".to_owned(),
            NodeKind::Object => "an object".to_owned(),
        }
    }

    fn push(&mut self, node: Node) -> Result<(), TextError> {
        if self.nodes.len() >= NODE_LIMIT || u32::try_from(self.source.len()).is_err() {
            return Err(TextError::new(node.position, "the document is too large"));
        }
        self.nodes.push(node);
        Ok(())
    }
}

/// The beginning of a text that may be long.
struct Abridged<'a>(&'a str);

impl fmt::Debug for Abridged<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(60) {
            Some((end, _)) => write!(f, "{:?}...", &self.0[..end]),
            None => write!(f, "{:?}", self.0),
        }
    }
}

//! The ledger: what becomes of each field of the messages we accept.
//!
//! `ledger.txt` is the source; the build script folds it into the tables.

use std::fmt::Write as _;

use crate::layout::ledger as word;
use crate::message::{Field, Message};
use crate::table::string;

/// What we do with a field, or with a message as a whole.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum State {
    /// It does what Envoy documents.
    Implemented,
    /// It is refused when set, for this reason.
    Rejected(&'static str),
    /// It is accepted and has no effect, for this reason.
    Ignored(&'static str),
    /// The ledger does not say.
    Unclaimed,
}

/// The state of a field.
#[inline]
pub fn state(field: Field) -> State {
    decode(field.ledger_word())
}

/// The state of a message: [`State::Unclaimed`] when the ledger has no entry for it.
pub fn message_state(message: Message) -> State {
    decode(message.ledger_word())
}

/// The messages that are accepted as a document or inside an `Any`, sorted by name.
pub fn roots() -> impl Iterator<Item = Message> {
    Message::all().filter(|message| message.is_root())
}

/// The support table of the documentation, in Markdown.
pub fn support_markdown() -> String {
    let mut out = String::from(
        "# What is supported\n\n\
         Generated from the ledger; do not edit. Messages marked **root** are accepted as a document, a resource\n\
         or the content of an `Any`. A message that is not listed is refused.\n",
    );
    for message in Message::all() {
        let covered = !message.is_map_entry() && message_state(message) == State::Implemented;
        if !covered || message.package() == "google.protobuf" {
            continue;
        }
        let root = if message.is_root() { " (**root**)" } else { "" };
        let _ = writeln!(out, "\n## {}{root}\n", message.full_name());
        let implemented: Vec<_> = message
            .fields()
            .filter(|&field| state(field) == State::Implemented)
            .map(|field| format!("`{}`", field.name()))
            .collect();
        if message.field_count() == 0 {
            let _ = writeln!(out, "It has no fields.");
        } else if implemented.len() == message.field_count() {
            let _ = writeln!(out, "All fields are implemented.");
            continue;
        } else if !implemented.is_empty() {
            let _ = writeln!(out, "Implemented: {}.", implemented.join(", "));
        }
        let mut first = true;
        for field in message.fields() {
            let (what, reason) = match state(field) {
                State::Implemented => continue,
                State::Rejected(reason) => ("rejected", reason),
                State::Ignored(reason) => ("ignored", reason),
                State::Unclaimed => ("rejected", "not in the ledger"),
            };
            if first && !implemented.is_empty() {
                out.push('\n');
            }
            first = false;
            let _ = writeln!(out, "- `{}`: {what}: {reason}", field.name());
        }
    }
    let mut first = true;
    for message in Message::all() {
        // A message inside another shares its fate.
        if let State::Rejected(reason) = message_state(message)
            && !message.name().contains('.')
        {
            if first {
                out.push_str("\n## Rejected messages\n\n");
                first = false;
            }
            let _ = writeln!(out, "- `{}`: {reason}", message.full_name());
        }
    }
    out
}

fn decode(value: u32) -> State {
    match value & 3 {
        word::IMPLEMENTED => State::Implemented,
        word::REJECTED => State::Rejected(string(value >> 2)),
        word::IGNORED => State::Ignored(string(value >> 2)),
        _ => State::Unclaimed,
    }
}

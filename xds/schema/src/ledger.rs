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

/// The support table of the documentation, in Markdown: by package what is accepted, with every field that is refused or
/// has no effect, then the types that are refused as a whole.
pub fn support_markdown() -> String {
    let mut out = String::from(HEAD);
    let covered: Vec<Message> = Message::all()
        .filter(|message| !message.is_map_entry() && message.package() != "google.protobuf")
        .filter(|message| message_state(*message) == State::Implemented)
        .collect();
    out.push_str("\n## Accepted types\n\n");
    for package in covered.chunk_by(|a, b| a.package() == b.package()) {
        let roots = package.iter().filter(|message| message.is_root());
        let names: Vec<_> = roots.map(|message| format!("`{}`", message.name())).collect();
        if !names.is_empty() {
            let _ = writeln!(out, "- {}: {}", package[0].package(), names.join(", "));
        }
    }
    out.push_str("\n## Fields\n");
    for package in covered.chunk_by(|a, b| a.package() == b.package()) {
        let _ = writeln!(out, "\n### {}", package[0].package());
        let (whole, partial): (Vec<Message>, Vec<Message>) =
            package.iter().partition(|message| message.fields().all(is_implemented));
        if !whole.is_empty() {
            let names: Vec<_> = whole.iter().map(|message| format!("`{}`", message.name())).collect();
            let _ = writeln!(out, "\nImplemented as a whole: {}.", names.join(", "));
        }
        for message in partial {
            fields_markdown(message, &mut out);
        }
    }
    out.push_str("\n## Refused types\n\n");
    // A message inside another shares its fate.
    let refused = Message::all().filter(|message| !message.name().contains('.'));
    let refused = refused.filter_map(|message| match message_state(message) {
        State::Rejected(reason) => Some((message, reason)),
        _ => None,
    });
    let refused: Vec<(Message, &str)> = refused.collect();
    for group in refused.chunk_by(|(a, why), (b, reason)| a.package() == b.package() && why == reason) {
        let names: Vec<_> = group.iter().map(|(message, _)| format!("`{}`", message.name())).collect();
        let (message, reason) = group[0];
        let _ = writeln!(out, "- {}: {} ({reason})", message.package(), names.join(", "));
    }
    out
}

const HEAD: &str = "# What is supported

Generated from the ledger (`xds/schema/ledger.txt`) by `cargo xtask support --write`; do not edit. For one
configuration, `waystation check CONFIG` prints which of its fields are rejected, ignored, unknown or deprecated.

- **rejected**: the configuration is refused with the path of the field when it is set.
- **ignored**: it is accepted and has no effect, for the reason given; never what decides over traffic or security.
- A field that is not named in this page's tables, of a message that is, is implemented. Single values of an implemented
  field may still be refused when the configuration is loaded, with the path and the reason.
- A type that is not listed under *Accepted types* is refused where an `Any` holds it.
";

fn is_implemented(field: Field) -> bool {
    state(field) == State::Implemented
}

fn fields_markdown(message: Message, out: &mut String) {
    let _ = writeln!(out, "\n#### {}\n", message.name());
    let implemented: Vec<_> = message
        .fields()
        .filter(|&field| is_implemented(field))
        .map(|field| format!("`{}`", field.name()))
        .collect();
    if !implemented.is_empty() {
        let _ = writeln!(out, "Implemented: {}.\n", implemented.join(", "));
    }
    out.push_str("| field | | reason |\n|---|---|---|\n");
    for field in message.fields() {
        let (what, reason) = match state(field) {
            State::Implemented => continue,
            State::Rejected(reason) => ("rejected", reason),
            State::Ignored(reason) => ("ignored", reason),
            State::Unclaimed => ("rejected", "not in the ledger"),
        };
        let _ = writeln!(out, "| `{}` | {what} | {reason} |", field.name());
    }
}

fn decode(value: u32) -> State {
    match value & 3 {
        word::IMPLEMENTED => State::Implemented,
        word::REJECTED => State::Rejected(string(value >> 2)),
        word::IGNORED => State::Ignored(string(value >> 2)),
        _ => State::Unclaimed,
    }
}

//! Reads `ledger.txt`: which fields of the messages we accept are implemented, rejected or ignored.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;

use protox::prost_reflect::{DescriptorPool, MessageDescriptor};

/// What we do with a field, or with a whole message.
#[derive(Clone, Debug)]
pub(crate) enum State {
    Unclaimed,
    Implemented,
    Rejected(String),
    Ignored(String),
}

/// The parsed ledger.
#[derive(Default)]
pub(crate) struct Ledger {
    roots: HashSet<String>,
    strict: HashSet<String>,
    messages: HashMap<String, Entry>,
    /// `(prefix, state)` of the lines whose type ends with `*`.
    patterns: Vec<(String, State)>,
}

#[derive(Default)]
struct Entry {
    fields: HashMap<String, State>,
    /// The `*` line.
    rest: Option<State>,
    /// The state of the message as a whole.
    whole: Option<State>,
}

/// What is wrong with a line, counted from 1.
pub(crate) struct LedgerError {
    line: usize,
    reason: String,
}

impl fmt::Display for LedgerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.reason)
    }
}

static UNCLAIMED: State = State::Unclaimed;
static IMPLEMENTED: State = State::Implemented;

impl Ledger {
    pub(crate) fn is_root(&self, message: &str) -> bool {
        self.roots.contains(message)
    }

    pub(crate) fn is_strict(&self, message: &str) -> bool {
        self.strict.contains(message)
    }

    /// The state of a message as a whole.
    pub(crate) fn message(&self, name: &str) -> &State {
        if let Some(entry) = self.messages.get(name) {
            return entry.whole.as_ref().unwrap_or(&IMPLEMENTED);
        }
        self.by_pattern(name).unwrap_or(&UNCLAIMED)
    }

    /// The state of a field.
    pub(crate) fn field(&self, owner: &MessageDescriptor, field: &str) -> &State {
        // The value of a well-known type is the field that holds it.
        if owner.is_map_entry() || owner.package_name() == "google.protobuf" {
            return &IMPLEMENTED;
        }
        match self.messages.get(owner.full_name()) {
            Some(entry) => {
                entry.fields.get(field).or(entry.rest.as_ref()).or(entry.whole.as_ref()).unwrap_or(&UNCLAIMED)
            }
            None => self.by_pattern(owner.full_name()).unwrap_or(&UNCLAIMED),
        }
    }

    fn by_pattern(&self, name: &str) -> Option<&State> {
        self.patterns
            .iter()
            .filter(|(prefix, _)| name.starts_with(prefix.as_str()))
            .max_by_key(|(prefix, _)| prefix.len())
            .map(|(_, state)| state)
    }
}

/// Reads and checks the ledger against the protos.
pub(crate) fn read(path: &str, pool: &DescriptorPool) -> Result<Ledger, LedgerError> {
    let text = fs::read_to_string(path)
        .map_err(|error| LedgerError { line: 0, reason: format!("cannot read it: {error}") })?;
    let mut ledger = Ledger::default();
    let mut current: Option<MessageDescriptor> = None;
    for (index, line) in text.lines().enumerate() {
        let at = |reason: String| LedgerError { line: index + 1, reason };
        let content = line.trim();
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        if line.starts_with([' ', '\t']) {
            let Some(message) = &current else { return Err(at("a field line without a message".to_owned())) };
            let (fields, state) =
                content.split_once(':').ok_or_else(|| at("expected `FIELD, FIELD: STATE`".to_owned()))?;
            let state = parse_state(state).map_err(at)?;
            let entry = ledger.messages.get_mut(message.full_name()).expect("the header line made it");
            for field in fields.split(',').map(str::trim) {
                if field == "*" {
                    if entry.rest.replace(state.clone()).is_some() {
                        return Err(at("a second `*` line".to_owned()));
                    }
                } else if message.get_field_by_name(field).is_none() {
                    return Err(at(format!("{} has no field {field}", message.full_name())));
                } else if entry.fields.insert(field.to_owned(), state.clone()).is_some() {
                    return Err(at(format!("{field} stands here twice")));
                }
            }
            continue;
        }
        current = None;
        let (root, content) = match content.strip_prefix("root ") {
            Some(rest) => (true, rest.trim()),
            None => (false, content),
        };
        let (strict, content) = match content.strip_prefix("strict ") {
            Some(rest) => (true, rest.trim()),
            None => (false, content),
        };
        let (name, state) = match content.split_once(':') {
            Some((name, state)) => (name.trim(), Some(parse_state(state).map_err(at)?)),
            None => (content, None),
        };
        if let Some(prefix) = name.strip_suffix('*') {
            let state = state.ok_or_else(|| at("a pattern needs a state".to_owned()))?;
            if root || strict {
                return Err(at("a pattern cannot be a root or strict".to_owned()));
            }
            if !pool.all_messages().any(|message| message.full_name().starts_with(prefix)) {
                return Err(at(format!("no message matches {name}")));
            }
            ledger.patterns.push((prefix.to_owned(), state));
            continue;
        }
        let message = pool.get_message_by_name(name).ok_or_else(|| at(format!("no message {name}")))?;
        if root {
            ledger.roots.insert(name.to_owned());
        }
        if strict {
            ledger.strict.insert(name.to_owned());
        }
        let entry = Entry { whole: state, ..Entry::default() };
        if ledger.messages.insert(name.to_owned(), entry).is_some() {
            return Err(at(format!("{name} stands here twice")));
        }
        current = Some(message);
    }
    Ok(ledger)
}

fn parse_state(text: &str) -> Result<State, String> {
    let text = text.trim();
    if text == "implemented" {
        return Ok(State::Implemented);
    }
    let (word, reason) = text.split_once(':').unwrap_or((text, ""));
    let reason = reason.trim();
    match word.trim() {
        "rejected" | "ignored" if reason.is_empty() => Err(format!("`{word}` needs a reason")),
        "rejected" => Ok(State::Rejected(reason.to_owned())),
        "ignored" => Ok(State::Ignored(reason.to_owned())),
        other => Err(format!("unknown state `{other}`: implemented, rejected: REASON or ignored: REASON")),
    }
}

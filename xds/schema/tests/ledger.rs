//! The ledger is complete: what can be reached from an accepted message has an entry.

use std::collections::HashSet;

use waystation_schema::Message;
use waystation_schema::ledger::{self, State};

#[test]
fn every_reachable_field_has_an_entry() {
    let mut pending: Vec<Message> = ledger::roots().collect();
    assert!(pending.len() > 50, "{} roots", pending.len());
    let mut seen: HashSet<Message> = pending.iter().copied().collect();
    let mut missing = Vec::new();
    while let Some(message) = pending.pop() {
        for field in message.fields() {
            match ledger::state(field) {
                State::Implemented => {
                    if let Some(inner) = field.message()
                        && seen.insert(inner)
                    {
                        pending.push(inner);
                    }
                }
                State::Unclaimed => missing.push(format!("{}.{}", message.full_name(), field.name())),
                State::Rejected(_) | State::Ignored(_) => {}
            }
        }
    }
    missing.sort();
    assert!(missing.is_empty(), "ledger.txt has no entry for:\n{}", missing.join("\n"));
}

#[test]
fn no_entry_is_unreachable() {
    let mut reachable: HashSet<Message> = ledger::roots().collect();
    let mut pending: Vec<Message> = reachable.iter().copied().collect();
    while let Some(message) = pending.pop() {
        for inner in message
            .fields()
            .filter(|&field| ledger::state(field) == State::Implemented)
            .filter_map(|field| field.message())
        {
            if reachable.insert(inner) {
                pending.push(inner);
            }
        }
    }
    let stale: Vec<_> = Message::all()
        .filter(|message| ledger::message_state(*message) == State::Implemented)
        .filter(|message| !message.is_map_entry() && message.package() != "google.protobuf")
        .filter(|message| !reachable.contains(message))
        .map(Message::full_name)
        .collect();
    assert!(stale.is_empty(), "nothing implemented leads to:\n{}", stale.join("\n"));
}

#[test]
fn the_support_table_names_roots_and_reasons() {
    let table = ledger::support_markdown();
    let accepted = "- envoy.config.cluster.v3: `Cluster`\n";
    assert!(table.contains(accepted));
    assert!(table.contains("### envoy.config.cluster.v3\n"));
    assert!(table.contains("\n#### Cluster\n"));
    assert!(table.contains("| `preconnect_policy` | rejected | "));
    assert!(table.contains("- envoy.extensions.filters.http.lua.v3: `Lua`, "));
}

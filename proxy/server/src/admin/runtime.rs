//! `/runtime` and `/runtime_modify`.

use std::collections::BTreeSet;

use hyper::{Response, StatusCode};
use serde_json::{Map, Value as Json, json};
use waystation_filter_api::value::Value;

use super::{Admin, Body, Query, full, ok, respond, shutting_down, text};

pub(super) fn runtime(admin: &Admin) -> Response<Body> {
    let layers = admin.shared.runtime.layers();
    let keys: BTreeSet<&String> = layers.iter().flat_map(|layer| layer.values.keys()).collect();
    let mut entries = Map::new();
    for key in keys {
        let values: Vec<String> =
            layers.iter().map(|layer| layer.values.get(key).map(show).unwrap_or_default()).collect();
        let last = values.iter().rev().find(|value| !value.is_empty()).cloned().unwrap_or_default();
        entries.insert(key.clone(), json!({ "final_value": last, "layer_values": values }));
    }
    let names: Vec<&str> = layers.iter().map(|layer| layer.name.as_str()).collect();
    let document = json!({ "entries": Json::Object(entries), "layers": names });
    let mut body = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b" ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut body, formatter);
    // A document of strings always serialises into memory.
    let _ = serde::Serialize::serialize(&document, &mut serializer);
    respond(StatusCode::OK, "application/json", full(body))
}

fn show(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.to_string(),
        Value::List(_) => "[...]".to_owned(),
        Value::Struct(fields) => {
            let fields: Vec<String> =
                fields.iter().map(|(key, value)| format!("{key}: {}", show(value))).collect();
            format!("{{{}}}", fields.join(", "))
        }
    }
}

pub(super) async fn modify(admin: &Admin, query: &Query) -> Response<Body> {
    let changes: Vec<(String, String)> =
        query.pairs().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    if changes.is_empty() {
        return text(
            StatusCode::BAD_REQUEST,
            "usage: /runtime_modify?key1=value1&key2=value2&keyN=valueN\n       or send the parameters as form \
             values\nuse an empty value to remove a previously added override",
        );
    }
    match admin.main.ask(move |server| server.configuration().modify_runtime(&changes)).await {
        Some(true) => ok(),
        Some(false) => text(StatusCode::SERVICE_UNAVAILABLE, "No admin layer specified"),
        None => shutting_down(),
    }
}

//! `%COALESCE({"operators": [...]})%`.

use serde_json::Value;
use waystation_schema::ConfigError;

use super::Extensions;
use super::command::{self, Command};
use super::operator::Operator;

pub(super) fn compile(json: &str, max_length: Option<usize>) -> Result<Operator, ConfigError> {
    let error = |reason: String| ConfigError::new(format!("COALESCE: {reason}"));
    let config: Value = serde_json::from_str(json)
        .map_err(|reason| error(format!("failed to parse JSON configuration: {reason}")))?;
    let entries = config
        .get("operators")
        .ok_or_else(|| error("JSON configuration must contain 'operators' array".into()))?
        .as_array()
        .ok_or_else(|| error("'operators' must be an array".into()))?;
    if entries.is_empty() {
        return Err(error("'operators' array must not be empty".into()));
    }
    let compile = |(index, entry)| {
        compile_entry(entry).map_err(|reason| {
            error(format!("failed to parse operator at index {index}: {}", reason.reason()))
        })
    };
    let operators = entries.iter().enumerate().map(compile).collect::<Result<_, _>>()?;
    Ok(Operator::Coalesce { operators, max_length })
}

fn compile_entry(entry: &Value) -> Result<Operator, ConfigError> {
    let error = |reason: &str| Err(ConfigError::new(reason));
    let (name, arguments, max_length) = match entry {
        Value::String(name) => (&**name, "", None),
        Value::Object(entry) => {
            let Some(Value::String(name)) = entry.get("command") else {
                return error("operator object must have 'command' field");
            };
            let arguments = match entry.get("param") {
                None => "",
                Some(Value::String(text)) => text,
                Some(_) => return error("'param' field must be a string"),
            };
            let max_length = match entry.get("max_length").map(Value::as_u64) {
                None => None,
                Some(Some(length @ 1..)) => Some(usize::try_from(length).unwrap_or(usize::MAX)),
                Some(_) => return error("'max_length' must be a positive integer"),
            };
            (&**name, arguments, max_length)
        }
        _ => {
            return error(
                "operator entry must be either a string (command name) or an object with 'command' field",
            );
        }
    };
    // A list in a list is bounded by the parser's own depth: each level is JSON text inside a JSON string, and so at
    // least twice as long as the one within.
    command::compile_known(Command { name, arguments, max_length }, Extensions::default())?
        .ok_or_else(|| ConfigError::new(format!("unknown command: '{name}'")))
}

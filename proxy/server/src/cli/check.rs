//! `waystation check CONFIG`: what of a configuration would be rejected or ignored.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use waystation_schema::{Encoded, Format, Message, Policy, TextOptions, check, to_wire};

use crate::bootstrap::BOOTSTRAP;

const USAGE: &str = "usage: waystation check CONFIG [--type MESSAGE]
  CONFIG   a bootstrap in YAML, JSON or binary (.pb), or with --type any other message of the API
Prints one line for each field that is rejected, unknown, deprecated or ignored. Exit code 1 when something is rejected.";

/// Runs the subcommand.
pub fn main(args: &[OsString]) -> ExitCode {
    let words: Vec<String> = args.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let (path, type_name) = match &words[..] {
        [path] if !path.starts_with('-') => (path, BOOTSTRAP),
        [path, flag, name] if flag == "--type" => (path, name.as_str()),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    match run(Path::new(path), type_name) {
        Ok(lines) => {
            for line in &lines {
                println!("{line}");
            }
            println!("configuration '{path}' OK");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            println!("rejected: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn run(path: &Path, type_name: &str) -> Result<Vec<String>, String> {
    let message = Message::find(type_name).ok_or_else(|| format!("there is no message {type_name}"))?;
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let options = TextOptions { allow_unknown: true };
    let format = Format::of_path(path).unwrap_or(Format::Yaml);
    let Encoded { wire, unknown } =
        to_wire(message, format, &bytes, options).map_err(|error| error.to_string())?;
    let policy = Policy { allow_unknown: true, allow_disallowed: true };
    let report = check(message, &wire, policy).map_err(|error| error.to_string())?;
    let mut lines = Vec::new();
    let sections = [
        ("unknown", &unknown),
        ("unknown", &report.unknown),
        ("deprecated", &report.deprecated),
        ("ignored", &report.ignored),
    ];
    for (kind, found) in sections {
        lines.extend(found.iter().map(|line| format!("{kind}: {line}")));
    }
    Ok(lines)
}

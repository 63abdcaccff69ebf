//! `waystation check CONFIG`: what of a configuration would be rejected or ignored.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use waystation_schema::{
    ConfigError, Encoded, Finding, Format, Message, Place, TextOptions, Visitor, to_wire, walk,
};

use super::options::{self, Command, Options};
use crate::bootstrap::{BOOTSTRAP, Bootstrap};

const USAGE: &str = "usage: waystation check CONFIG [--type MESSAGE]
  CONFIG   a bootstrap in YAML, JSON or binary (.pb), or with --type any other message of the API
Prints one line for each field that is rejected, unknown, deprecated or ignored. A bootstrap of which no field is
rejected is also loaded as by --mode validate. Unknown fields are refused at start, unless
--allow-unknown-static-fields is given. Exit code 1 when something is rejected.";

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
    let findings = match findings(Path::new(path), type_name) {
        Ok(findings) => findings,
        Err(reason) => {
            println!("rejected: {reason}");
            return ExitCode::FAILURE;
        }
    };
    let rejected = findings.rejected.len();
    for line in findings.lines() {
        println!("{line}");
    }
    if rejected > 0 {
        println!("configuration '{path}' is rejected: {rejected} reasons");
        return ExitCode::FAILURE;
    }
    println!("configuration '{path}' OK");
    ExitCode::SUCCESS
}

/// All that a walk comes upon, by what it means for the user.
#[derive(Debug, Default)]
struct Findings {
    rejected: Vec<String>,
    unknown: Vec<String>,
    deprecated: Vec<String>,
    ignored: Vec<String>,
}

impl Findings {
    fn lines(&self) -> impl Iterator<Item = String> {
        let sections = [
            ("rejected", &self.rejected),
            ("unknown", &self.unknown),
            ("deprecated", &self.deprecated),
            ("ignored", &self.ignored),
        ];
        sections.into_iter().flat_map(|(kind, found)| found.iter().map(move |line| format!("{kind}: {line}")))
    }
}

impl Visitor for Findings {
    fn found(&mut self, place: &Place<'_>, finding: &Finding<'_>) -> Result<(), ConfigError> {
        let list = match finding {
            Finding::UnknownField { .. } => &mut self.unknown,
            Finding::Ignored { .. } => &mut self.ignored,
            Finding::Deprecated { field, value, .. } => {
                let disallowed = value.map_or_else(|| field.is_disallowed(), |value| value.is_disallowed());
                if disallowed { &mut self.rejected } else { &mut self.deprecated }
            }
            Finding::Malformed(_)
            | Finding::Constraint(_)
            | Finding::UnknownType { .. }
            | Finding::Rejected { .. }
            | Finding::RejectedType { .. }
            | Finding::Unclaimed
            | Finding::TypedStruct(_) => &mut self.rejected,
        };
        list.push(place.error(finding.to_string()).to_string());
        Ok(())
    }
}

fn findings(path: &Path, type_name: &str) -> Result<Findings, String> {
    let message = Message::find(type_name).ok_or_else(|| format!("there is no message {type_name}"))?;
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let format = Format::of_path(path).unwrap_or(Format::Json);
    let Encoded { wire, unknown } = to_wire(message, format, &bytes, TextOptions { allow_unknown: true })
        .map_err(|error| error.to_string())?;
    let mut findings = Findings { unknown, ..Findings::default() };
    walk(message, &wire, &mut findings).map_err(|error| error.to_string())?;
    if type_name == BOOTSTRAP
        && findings.rejected.is_empty()
        && let Err(reason) = load(&wire, path)
    {
        findings.rejected.push(reason);
    }
    Ok(findings)
}

/// What `--mode validate` does after the walk: the first error of the converters.
fn load(wire: &[u8], path: &Path) -> Result<(), String> {
    let options = validate_options(path)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start a runtime: {error}"))?;
    let report = waystation_schema::Report::default();
    let bootstrap =
        Bootstrap::decode(wire.to_vec().into(), &options, report).map_err(|error| error.to_string())?;
    runtime.block_on(super::serve(bootstrap, Arc::new(options)))
}

fn validate_options(path: &Path) -> Result<Options, String> {
    let words = ["waystation", "--mode", "validate", "--disable-hot-restart", "--config-path"];
    let args = words.map(OsString::from).into_iter().chain([path.as_os_str().to_owned()]);
    match options::parse(args) {
        Ok(Command::Run(options)) => Ok(*options),
        Ok(_) => Err("the command line of --mode validate does not run".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(yaml: &str) -> Vec<String> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("bootstrap.yaml");
        std::fs::write(&path, yaml).expect("it is writable");
        findings(&path, BOOTSTRAP).expect("it reads").lines().collect()
    }

    #[test]
    fn every_rejection_is_told_with_its_path() {
        let lines = check(
            "
admin: {profile_path: /tmp/p}
nonsense: 1
flags_path: /tmp
tracing: {}
static_resources:
  clusters:
  - {name: c, connect_timeout: 0s}
  - {name: d, preconnect_policy: {}}
",
        );
        let starts = [
            "rejected: static_resources.clusters[c].connect_timeout: ",
            "rejected: static_resources.clusters[d].preconnect_policy: not supported: ",
            "rejected: flags_path: not supported: ",
            "rejected: tracing: not supported: ",
            "unknown: ",
            "ignored: admin.profile_path: ignored: there is no profiler",
        ];
        for start in starts {
            assert!(lines.iter().any(|line| line.starts_with(start)), "{start}\n{}", lines.join("\n"));
        }
        assert_eq!(lines.iter().filter(|line| line.starts_with("rejected: ")).count(), 4, "{lines:?}");
    }

    #[test]
    fn the_converters_have_the_last_word() {
        assert_eq!(check("static_resources: {clusters: [{name: c}]}"), Vec::<String>::new());
        let lines = check("static_resources: {clusters: [{name: c, type: EDS}]}");
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(
            lines[0].starts_with("rejected: static_resources.clusters[c].eds_cluster_config"),
            "{lines:?}"
        );
        let lines = check("header_prefix: x-other");
        assert!(lines.iter().any(|line| line.starts_with("rejected: header_prefix: ")), "{lines:?}");
    }
}

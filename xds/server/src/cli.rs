//! `waystation xds-server`.

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs the subcommand; `args` are those behind its name.
pub fn main(args: &[OsString]) -> ExitCode {
    eprintln!("unknown option {args:?}");
    ExitCode::FAILURE
}

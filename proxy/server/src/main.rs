//! `waystation`: a proxy that stands wherever an `envoy` binary stands.

use std::process::ExitCode;

fn main() -> ExitCode {
    waystation::cli::main(std::env::args_os())
}

//! The repository's commands: `cargo verify`, `cargo demo`, `cargo bench-peers`, `cargo xtask support`.

#![forbid(unsafe_code)]

mod bench;
mod demo;
mod run;
mod support;
mod verify;

use std::process::ExitCode;

const USAGE: &str = "usage:
  cargo verify [--fast]        every check that a change must pass; --fast leaves out what needs an optimised build
  cargo demo [--keep]          the proxy, its management server and an upstream, changed live under load
  cargo bench-peers [NAME..]   this proxy beside Envoy, nginx and HAProxy, in one run
  cargo xtask support [--write] compare (or write) docs/support.md with the ledger";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let flags: Vec<&str> = args.iter().skip(1).map(String::as_str).collect();
    let result = match args.first().map(String::as_str) {
        Some("verify") => verify::run(flags.contains(&"--fast")),
        Some("demo") => demo::run(flags.contains(&"--keep")),
        Some("bench-peers") => bench::run(&flags),
        Some("support") => support::run(flags.contains(&"--write")),
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

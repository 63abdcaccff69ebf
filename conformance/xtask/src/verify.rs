//! `cargo verify`: every check that a change must pass.

use std::env;
use std::fs;
use std::process::Command;
use std::time::Instant;

use crate::run::{cargo, find, root, step, step_of_cases, succeeds, target};
use crate::support;

/// What became of a check.
enum Outcome {
    Passed,
    Failed(String),
    /// This machine lacks what it needs.
    Skipped(String),
}

struct Checks {
    /// On CI a check that is skipped for want of a tool counts as failed: `.ci/run` installs the tools.
    strict: bool,
    results: Vec<(&'static str, Outcome, u64)>,
}

/// Runs all checks and reports them together.
pub(crate) fn run(fast: bool) -> Result<(), String> {
    let mut checks = Checks { strict: env::var_os("CI").is_some(), results: Vec::new() };
    checks.run("fmt", || done(step(cargo().args(["fmt", "--all", "--check"]))));
    checks.run("clippy", || {
        let flags = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
        done(step(cargo().args(flags)))
    });
    checks.run("fuzz targets", || done(fuzz_targets()));
    checks.run("support table", || done(support::run(false)));
    checks.run("deny", deny);
    checks.run("doc", || {
        let flags = ["doc", "--workspace", "--no-deps", "--quiet"];
        done(step(cargo().args(flags).env("RUSTDOCFLAGS", "-D warnings")))
    });
    checks.run("test", || done(step(cargo().args(["test", "--workspace", "--quiet"]))));
    if !fast {
        checks.rigs();
    }
    checks.report()
}

fn done(result: Result<(), String>) -> Outcome {
    match result {
        Ok(()) => Outcome::Passed,
        Err(text) => Outcome::Failed(text),
    }
}

/// The fuzz crates are workspaces of their own, which nothing else would compile. libFuzzer itself, in C++, is not needed
/// for that. Each begins with the versions of the workspace, so that most of what it needs is compiled already.
fn fuzz_targets() -> Result<(), String> {
    for group in ["filters", "proxy", "xds"] {
        let members = fs::read_dir(root().join(group)).map_err(|error| format!("{group}: {error}"))?;
        for manifest in members.flatten().map(|member| member.path().join("fuzz/Cargo.toml")) {
            if manifest.is_file() {
                fs::copy(root().join("Cargo.lock"), manifest.with_file_name("Cargo.lock"))
                    .map_err(|error| format!("{}: {error}", manifest.display()))?;
                let mut check = cargo();
                check.args(["check", "--quiet", "--bins", "--manifest-path"]).arg(manifest);
                step(check.arg("--target-dir").arg(target()).env("CUSTOM_LIBFUZZER_PATH", "/libFuzzer.a"))?;
            }
        }
    }
    Ok(())
}

/// Bans, licences and sources; advisories only where their database can be reached.
fn deny() -> Outcome {
    if find("cargo-deny").is_none() {
        return Outcome::Skipped("cargo-deny is not installed".to_owned());
    }
    let offline = ["deny", "--log-level", "error", "check", "bans", "licenses", "sources"];
    if let Err(text) = step(cargo().args(offline)) {
        return Outcome::Failed(text);
    }
    let fetched = succeeds(cargo().args(["deny", "fetch", "db"]));
    if !fetched {
        println!("   advisories: their database cannot be reached from here, not checked");
        return Outcome::Passed;
    }
    done(step(cargo().args(["deny", "--log-level", "error", "check", "advisories"])))
}

impl Checks {
    fn run(&mut self, name: &'static str, check: impl FnOnce() -> Outcome) {
        println!("── {name}");
        let start = Instant::now();
        let outcome = check();
        self.results.push((name, outcome, start.elapsed().as_secs()));
    }

    /// The conformance rigs, on an optimised build.
    fn rigs(&mut self) {
        self.run("build", || {
            let flags = ["build", "--profile", "quick", "--package", "waystation", "--quiet"];
            if let Err(text) = step(cargo().args(flags)) {
                return Outcome::Failed(text);
            }
            done(step(cargo().args(["build", "--package", "waystation-rig", "--quiet"])))
        });
        let Some((_, Outcome::Passed, _)) = self.results.last() else {
            return;
        };
        let subject = target().join("quick/waystation");
        let rig = |arguments: &[&str]| {
            let mut command = Command::new(target().join("debug/rig"));
            command.current_dir(root()).args(arguments).arg("--subject").arg(&subject);
            command
        };
        let envoy = find("envoy");
        match &envoy {
            Some(envoy) => {
                self.run("differential", || done(step_of_cases(rig(&["run"]).arg("--envoy").arg(envoy))));
            }
            None => {
                self.run("differential", || {
                    Outcome::Skipped(
                        "envoy is not installed: compared with its recorded answers only".to_owned(),
                    )
                });
                self.run("recorded answers", || done(step_of_cases(rig(&["run"]).arg("--golden"))));
            }
        }
        self.run("launchers", || done(step_of_cases(&mut rig(&["launchers"]))));
        self.run("bad input", || {
            let mut command = rig(&["abuse"]);
            if let Some(envoy) = &envoy {
                command.arg("--envoy").arg(envoy);
            }
            done(step_of_cases(&mut command))
        });
        self.run("h2spec", || {
            let Some(h2spec) = find("h2spec") else {
                return Outcome::Skipped("h2spec is not installed".to_owned());
            };
            let Some(envoy) = &envoy else {
                return Outcome::Skipped("envoy, whose result is the bar, is not installed".to_owned());
            };
            done(step_of_cases(rig(&["h2spec"]).arg("--h2spec").arg(h2spec).arg("--envoy").arg(envoy)))
        });
        self.run("go-control-plane", || {
            if find("go").is_none() {
                return Outcome::Skipped("go is not installed".to_owned());
            }
            let server = target().join("go-control-plane");
            let mut build = Command::new("go");
            build.current_dir(root().join("conformance/go-control-plane"));
            if let Err(text) = step(build.args(["build", "-o"]).arg(&server).arg(".")) {
                return Outcome::Failed(text);
            }
            done(step_of_cases(rig(&["control-plane"]).arg("--go").arg(&server)))
        });
    }

    fn report(self) -> Result<(), String> {
        let (mut passed, mut failed, mut skipped) = (0, 0, 0);
        println!();
        for (name, outcome, seconds) in &self.results {
            let (mark, text) = match outcome {
                Outcome::Passed => ("ok", String::new()),
                Outcome::Failed(text) => ("FAILED", format!(": {text}")),
                Outcome::Skipped(text) if self.strict => ("FAILED", format!(": should have run, but {text}")),
                Outcome::Skipped(text) => ("skipped", format!(": {text}")),
            };
            match mark {
                "ok" => passed += 1,
                "skipped" => skipped += 1,
                _ => failed += 1,
            }
            println!("{mark:>8}  {name} ({seconds} s){text}");
        }
        println!("\n{passed} passed, {failed} failed, {skipped} skipped");
        if failed == 0 { Ok(()) } else { Err("verify failed".to_owned()) }
    }
}

//! Running all files, comparing, recording.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::case::{self, CaseFile};
use crate::certs::Certs;
use crate::compare::{Difference, covers, differences};
use crate::session;

/// Where the expected results come from.
#[derive(Debug, Clone)]
pub(crate) enum Oracle {
    Envoy(PathBuf),
    Golden(PathBuf),
}

/// How one case went.
enum Outcome {
    Passed,
    /// Passed with differences that have a reason.
    Deviates(Vec<String>),
    Failed(Vec<Difference>),
    /// The case itself does not work: the oracle could not carry it out.
    Broken(String),
    Skipped(&'static str),
}

/// Compares the subject with the oracle over all cases.
pub(crate) async fn compare(
    cases: &Path,
    filter: Option<&str>,
    oracle: &Oracle,
    subject: &Path,
    jobs: usize,
    verbose: bool,
) -> Result<ExitCode> {
    let certs = Certs::generate()?;
    let mut set = JoinSet::new();
    let gate = Arc::new(Semaphore::new(jobs));
    for file in case::load(cases, filter)? {
        let (certs, gate, oracle, subject) =
            (Arc::clone(&certs), Arc::clone(&gate), oracle.clone(), subject.to_owned());
        set.spawn(async move {
            let _permit = gate.acquire_owned().await;
            let expected = match &oracle {
                Oracle::Envoy(binary) => Ok(session::run(&file, binary, &certs).await),
                Oracle::Golden(dir) => read_golden(dir, &file),
            };
            let got = session::run(&file, &subject, &certs).await;
            (file, expected, got)
        });
    }
    let mut files = set.join_all().await;
    files.sort_by(|a, b| a.0.name.cmp(&b.0.name));
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (file, expected, got) in &files {
        let outcomes: Vec<(&case::Case, Outcome)> =
            file.parsed.iter().map(|case| (case, outcome(case, expected.as_ref().ok(), got))).collect();
        let good =
            outcomes.iter().filter(|(_, o)| matches!(o, Outcome::Passed | Outcome::Deviates(_))).count();
        println!("{:40} {good:3} of {:3}", file.name, outcomes.len());
        let mut last = String::new();
        for (case, outcome) in outcomes {
            match outcome {
                Outcome::Passed => passed += 1,
                Outcome::Deviates(reasons) => {
                    passed += 1;
                    println!("  deviates  {}: {}", case.name, reasons.join("; "));
                }
                Outcome::Skipped(why) => {
                    skipped += 1;
                    println!("  skipped   {}: {why}", case.name);
                }
                Outcome::Broken(why) => {
                    failed += 1;
                    println!(
                        "  BROKEN    {}: {}",
                        case.name,
                        if why == last { "as above" } else { why.as_str() }
                    );
                    last = why;
                }
                Outcome::Failed(found) => {
                    failed += 1;
                    println!("  FAILED    {}", case.name);
                    for d in found.iter().take(if verbose { usize::MAX } else { 6 }) {
                        println!(
                            "            {}\n              expected {}\n              got      {}",
                            d.path,
                            short(&d.expected),
                            short(&d.got)
                        );
                    }
                    if !verbose && found.len() > 6 {
                        println!("            and {} more", found.len() - 6);
                    }
                }
            }
        }
    }
    println!("\n{passed} passed, {failed} failed, {skipped} skipped");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn short(text: &str) -> String {
    if text.len() <= 400 { text.to_owned() } else { text.chars().take(400).collect::<String>() + "…" }
}

fn outcome(case: &case::Case, expected: Option<&Map<String, Value>>, got: &Map<String, Value>) -> Outcome {
    let Some(expected) = expected.and_then(|e| e.get(&case.name)) else {
        return Outcome::Skipped("nothing recorded for it");
    };
    if let Some(error) = expected.get("error") {
        return Outcome::Broken(format!("the oracle: {error}"));
    }
    let Some(got) = got.get(&case.name) else { return Outcome::Broken("no result".to_owned()) };
    if let Some(error) = got.get("error") {
        return Outcome::Broken(format!("the subject: {}", error.as_str().unwrap_or_default()));
    }
    let found = differences(expected, got);
    let unexplained: Vec<Difference> =
        found.iter().filter(|d| !case.deviation.iter().any(|dev| covers(dev, &d.path))).cloned().collect();
    if !unexplained.is_empty() {
        return Outcome::Failed(unexplained);
    }
    for deviation in &case.deviation {
        if !found.iter().any(|d| covers(deviation, &d.path)) {
            return Outcome::Broken(format!("its deviation no longer occurs: {}", deviation.reason));
        }
    }
    if case.deviation.is_empty() {
        Outcome::Passed
    } else {
        Outcome::Deviates(case.deviation.iter().map(|d| d.reason.clone()).collect())
    }
}

fn golden_path(dir: &Path, file: &CaseFile) -> PathBuf {
    dir.join(format!("{}.json", file.name))
}

fn read_golden(dir: &Path, file: &CaseFile) -> Result<Map<String, Value>> {
    let path = golden_path(dir, file);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// Runs all cases against Envoy, `times` over, and stores what it answered. Fails when two runs differ.
pub(crate) async fn record(
    cases: &Path,
    filter: Option<&str>,
    envoy: &Path,
    golden: &Path,
    jobs: usize,
    times: usize,
    show: bool,
) -> Result<ExitCode> {
    let certs = Certs::generate()?;
    let mut set = JoinSet::new();
    let gate = Arc::new(Semaphore::new(jobs));
    for file in case::load(cases, filter)? {
        let (certs, gate, envoy) = (Arc::clone(&certs), Arc::clone(&gate), envoy.to_owned());
        set.spawn(async move {
            let _permit = gate.acquire_owned().await;
            let mut runs = Vec::new();
            for _ in 0..times {
                runs.push(session::run(&file, &envoy, &certs).await);
            }
            (file, runs)
        });
    }
    let mut files = set.join_all().await;
    files.sort_by(|a, b| a.0.name.cmp(&b.0.name));
    let (mut stable, mut failed) = (0, 0);
    for (file, runs) in files {
        let first = &runs[0];
        println!("{:40} {:3} cases", file.name, first.len());
        let mut good = Map::new();
        let mut last = String::new();
        for (name, result) in first {
            if let Some(error) = runs.iter().find_map(|r| r.get(name).and_then(|v| v.get("error"))) {
                failed += 1;
                // One failed start breaks every case of its file.
                let error = error.to_string();
                println!(
                    "  BROKEN    {name}: {}",
                    if error == last { "as above".to_owned() } else { short(&error) }
                );
                last = error;
                continue;
            }
            let unstable: Vec<Difference> = runs[1..]
                .iter()
                .flat_map(|r| differences(result, r.get(name).unwrap_or(&Value::Null)))
                .collect();
            if let Some(d) = unstable.first() {
                failed += 1;
                println!("  UNSTABLE  {name}: {}: {} / {}", d.path, short(&d.expected), short(&d.got));
                continue;
            }
            stable += 1;
            good.insert(name.clone(), result.clone());
            if show {
                println!("  {name}: {}", serde_json::to_string_pretty(result)?);
            }
        }
        let path = golden_path(golden, &file);
        if filter.is_some()
            && let Ok(known) = read_golden(golden, &file)
        {
            for (name, value) in known {
                good.entry(name).or_insert(value);
            }
        }
        std::fs::create_dir_all(path.parent().context("a parent")?)?;
        std::fs::write(path, serde_json::to_string_pretty(&good)? + "\n")?;
    }
    println!("\n{stable} recorded, {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Counts cases per topic.
pub(crate) fn list(cases: &Path, filter: Option<&str>) -> Result<ExitCode> {
    let files = case::load(cases, filter)?;
    if files.is_empty() {
        bail!("no cases");
    }
    let mut topics: std::collections::BTreeMap<String, usize> = std::collections::BTreeMap::new();
    for file in &files {
        let topic = file.name.split('/').next().unwrap_or_default().to_owned();
        *topics.entry(topic).or_default() += file.parsed.len();
    }
    for (topic, n) in &topics {
        println!("{topic:20} {n:4}");
    }
    println!("{:20} {:4}", "all", topics.values().sum::<usize>());
    Ok(ExitCode::SUCCESS)
}

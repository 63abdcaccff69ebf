//! h2spec against both binaries: what Envoy passes, the subject has to pass.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use serde_json::json;
use tokio::process::Command;

use crate::case::CaseFile;
use crate::certs::Certs;
use crate::proxy::Proxy;
use crate::session;
use crate::upstream::Upstreams;

/// Runs h2spec against both and compares test by test.
pub(crate) async fn run(h2spec: &Path, envoy: &Path, subject: &Path) -> Result<ExitCode> {
    let certs = Certs::generate()?;
    let theirs = results(h2spec, envoy, &certs).await.context("envoy")?;
    let ours = results(h2spec, subject, &certs).await.context("subject")?;
    let passed = |results: &BTreeMap<String, bool>| results.values().filter(|p| **p).count();
    let missing: Vec<&String> =
        theirs.iter().filter(|(name, ok)| **ok && ours.get(*name) != Some(&true)).map(|(n, _)| n).collect();
    for name in &missing {
        println!("FAILED  {name} (Envoy passes)");
    }
    for (name, _) in theirs.iter().filter(|(_, ok)| !**ok) {
        println!(
            "note    {name}: Envoy fails, the subject {}",
            if ours.get(name) == Some(&true) { "passes" } else { "too" }
        );
    }
    println!(
        "\nEnvoy passes {} of {}, the subject {} of {}",
        passed(&theirs),
        theirs.len(),
        passed(&ours),
        ours.len()
    );
    println!("{} passed, {} failed, 0 skipped", passed(&theirs) - missing.len(), missing.len());
    Ok(if missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn results(h2spec: &Path, binary: &Path, certs: &Arc<Certs>) -> Result<BTreeMap<String, bool>> {
    let file: CaseFile = serde_json::from_value(json!({
        "upstreams": {"a": "h1"},
        "http": {"ingress": {}},
        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}],
    }))?;
    let tmp = tempfile::Builder::new().prefix("rig").tempdir()?;
    let upstreams = Upstreams::start(&file.upstreams, certs).await?;
    let place = session::place(tmp.path(), certs, &upstreams, binary)?;
    let proxy = Proxy::start(binary, &place, &session::config(&file, &place)?, &[]).await?;
    let port = proxy.listener(&place, "ingress").await?;
    let report = tmp.path().join("report.xml");
    let output = Command::new(h2spec)
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-o", "2", "-j"])
        .arg(&report)
        .output()
        .await
        .context("h2spec")?;
    let text = std::fs::read_to_string(&report)
        .with_context(|| String::from_utf8_lossy(&output.stdout).into_owned())?;
    proxy.stop().await;
    Ok(junit(&text))
}

/// Test cases of a JUnit report: `<testcase package=".." classname="..">` with `<failure>` or `<error>` inside.
fn junit(text: &str) -> BTreeMap<String, bool> {
    let mut out = BTreeMap::new();
    for part in text.split("<testcase ").skip(1) {
        let body = part.split("</testcase>").next().unwrap_or(part);
        let attribute = |name: &str| {
            let start = body.find(&format!("{name}=\""))? + name.len() + 2;
            Some(body[start..].split('"').next().unwrap_or_default())
        };
        let name = format!(
            "{}: {}",
            attribute("package").unwrap_or_default(),
            attribute("classname").unwrap_or_default()
        );
        let bad = body.contains("<failure") || body.contains("<error") || body.contains("<skipped");
        let same = out.keys().filter(|k: &&String| k.starts_with(&name)).count();
        out.insert(if same == 0 { name } else { format!("{name} #{same}") }, !bad);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::junit;

    #[test]
    fn a_report_is_read() {
        let found = junit(
            "<testcase package=\"http2/1\" classname=\"one\"></testcase>\
             <testcase package=\"http2/1\" classname=\"two\"><failure>x</failure></testcase>",
        );
        assert_eq!(found.get("http2/1: one"), Some(&true));
        assert_eq!(found.get("http2/1: two"), Some(&false));
    }
}

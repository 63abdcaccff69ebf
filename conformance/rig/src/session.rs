//! One run of one case file against one binary.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use crate::bootstrap;
use crate::case::{Case, CaseFile};
use crate::certs::Certs;
use crate::place::Place;
use crate::proxy::Proxy;
use crate::steps::{Steps, file_text};
use crate::upstream::Upstreams;

/// Runs every case of the file; the result of each under its name. A case that could not be carried out has
/// an `error` instead.
pub(crate) async fn run(file: &CaseFile, binary: &Path, certs: &Arc<Certs>) -> Map<String, Value> {
    let mut out = Map::new();
    let groups: Vec<&[Case]> =
        if file.isolated { file.parsed.chunks(1).collect() } else { vec![file.parsed.as_slice()] };
    for group in groups {
        if let Err(error) = run_group(file, group, binary, certs, &mut out).await {
            for case in group {
                out.entry(case.name.clone()).or_insert_with(|| json!({"error": format!("{error:#}")}));
            }
        }
    }
    out
}

/// The bootstrap a file stands for, for the reader.
pub(crate) async fn show(file: &CaseFile, certs: &Arc<Certs>) -> Result<String> {
    let tmp = tempfile::tempdir()?;
    let upstreams = Upstreams::start(&file.upstreams, certs).await?;
    config(file, &place(tmp.path(), certs, &upstreams, Path::new("proxy"))?)
}

pub(crate) fn place(tmp: &Path, certs: &Arc<Certs>, upstreams: &Upstreams, binary: &Path) -> Result<Place> {
    certs.write(&tmp.join("certs"))?;
    Ok(Place {
        tmp: tmp.to_owned(),
        certs: Arc::clone(certs),
        upstreams: upstreams.ports(),
        ports: Mutex::default(),
        binary: binary.to_owned(),
    })
}

pub(crate) fn config(file: &CaseFile, place: &Place) -> Result<String> {
    match &file.config {
        Some(text) => place.fill(text),
        None => Ok(serde_json::to_string_pretty(&place.fill_tree(&bootstrap::build(file))?)?),
    }
}

async fn run_group(
    file: &CaseFile,
    cases: &[Case],
    binary: &Path,
    certs: &Arc<Certs>,
    out: &mut Map<String, Value>,
) -> Result<()> {
    let tmp = tempfile::Builder::new().prefix("rig").tempdir()?;
    let upstreams = Upstreams::start(&file.upstreams, certs).await?;
    let place = place(tmp.path(), certs, &upstreams, binary)?;
    for (name, value) in &file.files {
        let path = place.tmp.join(name);
        std::fs::create_dir_all(path.parent().context("a parent")?)?;
        std::fs::write(path, file_text(&place, value)?)?;
    }
    let _management = if file.xds { Some(management(&place).await?) } else { None };
    let mut proxy = None;
    if let [only] = cases {
        // Requests of the proxy's own begin with it.
        upstreams.prepare(&only.upstream)?;
    }
    if bootstrap::wanted(file) {
        let args = file.args.iter().map(|a| place.fill(a)).collect::<Result<Vec<_>>>()?;
        let started = Proxy::start(binary, &place, &config(file, &place)?, &args).await?;
        started.learn_ports(&place).await?;
        proxy = Some(started);
    }
    for case in cases {
        let mut result =
            match run_case(case, file, cases.len() == 1, &place, proxy.as_mut(), binary, &upstreams).await {
                Ok(result) => result,
                Err(error) => json!({"error": format!("{error:#}")}),
            };
        let extra: Vec<_> = file.normalise.iter().chain(&case.normalise).collect();
        place.normalise(&mut result, &extra)?;
        out.insert(case.name.clone(), result);
        let gone = proxy.as_mut().is_some_and(|p| matches!(p.child.try_wait(), Ok(Some(_))));
        if gone && !case.steps.iter().any(|s| s.exit.is_some()) {
            let words = proxy.as_ref().map(Proxy::last_words).unwrap_or_default();
            out.insert(case.name.clone(), json!({"error": format!("the proxy died: {words}")}));
        }
    }
    if let Some(proxy) = proxy {
        proxy.stop().await;
    }
    Ok(())
}

/// The embedded management server, until it is dropped.
async fn management(place: &Place) -> Result<AbortOnDropHandle<()>> {
    let dir = place.tmp.join("xds");
    std::fs::create_dir_all(&dir)?;
    let server = waystation_xds_server::Server::builder(dir).console(|_| {}).start()?;
    let listener = TcpListener::bind(("127.0.0.1", place.port("xds")?)).await?;
    Ok(AbortOnDropHandle::new(tokio::spawn(async move { server.serve(listener).await })))
}

async fn run_case(
    case: &Case,
    file: &CaseFile,
    alone: bool,
    place: &Place,
    proxy: Option<&mut Proxy>,
    binary: &Path,
    upstreams: &Upstreams,
) -> Result<Value> {
    if !alone {
        upstreams.prepare(&case.upstream)?;
    }
    let log = place.tmp.join("access.log");
    let seen_lines = std::fs::read_to_string(&log).unwrap_or_default().lines().count();
    let mut steps = Steps::new(place, proxy, binary, upstreams);
    let results = steps.run(case).await?;
    let tallies = case.steps.iter().any(|s| s.tally.is_some() || s.until.is_some());
    let mut out = json!({"steps": results});
    if !file.http.is_empty() {
        // Lines of a tally are waited for, so that they do not fall into the next case, but say nothing.
        let lines = log_lines(&log, seen_lines, case.logs.unwrap_or(steps.answers)).await;
        if !tallies || case.logs.is_some() {
            out["log"] = json!(lines);
        }
    }
    if !case.stats.is_empty() {
        out["stats"] = steps.stats(&case.stats).await?;
    }
    drop(steps);
    if case.unseen.is_none() && !tallies {
        let mut seen = upstreams.seen(case.connections);
        if let Some(first) = case.first_seen {
            seen.values_mut().for_each(|seen| seen.truncate(first));
        }
        if !seen.is_empty() {
            out["seen"] = json!(seen);
        }
    }
    Ok(out)
}

/// The access log lines after the first `skip`, once there are `wanted` of them or patience ends.
async fn log_lines(path: &Path, skip: usize, wanted: usize) -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(3);
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let lines: Vec<String> = whole.lines().skip(skip).map(str::to_owned).collect();
        if lines.len() >= wanted || Instant::now() > deadline {
            return lines;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

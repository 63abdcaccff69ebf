//! Hostile input: floods, slowness, truncation. Both binaries must survive with the same class of answer, in
//! bounded memory.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::case::CaseFile;
use crate::certs::Certs;
use crate::place::Place;
use crate::proxy::Proxy;
use crate::session;
use crate::upstream::Upstreams;
use crate::wire::http2::{self, Event, Reader, frame};
use crate::wire::{Conn, http1};

/// What an attack may cost in KiB of resident memory, unless it costs Envoy more.
const BOUND_KIB: u64 = 64 * 1024;

const ATTACKS: [Attack; 15] = [
    Attack::same("rapid reset"),
    Attack::same("reset once accepted"),
    Attack::same("continuation flood"),
    Attack::same("settings flood"),
    Attack::or(
        "ping flood",
        "open",
        "one PING is answered at a time and nothing is read meanwhile: answers do not queue, as they may in Envoy",
    ),
    Attack::same("empty data flood"),
    Attack::same("priority flood"),
    Attack::same("window update flood"),
    Attack::same("oversize h2 headers"),
    Attack::same("slow heads"),
    Attack::same("oversize h1 headers"),
    Attack::same("endless request line"),
    Attack::same("endless chunk extension"),
    Attack::same("truncated client hello"),
    Attack::same("garbage"),
];

/// An attack, and another answer than Envoy's that is as good, with the reason.
struct Attack {
    name: &'static str,
    also: Option<(&'static str, &'static str)>,
}

impl Attack {
    const fn same(name: &'static str) -> Self {
        Self { name, also: None }
    }

    const fn or(name: &'static str, answer: &'static str, reason: &'static str) -> Self {
        Self { name, also: Some((answer, reason)) }
    }
}

/// How an attack ended.
struct Ending {
    answer: String,
    grown: u64,
    alive: bool,
}

/// Runs every attack against both.
pub(crate) async fn run(envoy: Option<&Path>, subject: &Path) -> Result<ExitCode> {
    let certs = Certs::generate()?;
    let (mut failed, mut passed) = (0, 0);
    println!("{:26} {:34} {:34} {:>10} {:>10}", "", "Envoy", "subject", "KiB", "KiB");
    for Attack { name: attack, also } in ATTACKS {
        let mut note = "";
        let theirs = match envoy {
            Some(binary) => {
                Some(one(attack, binary, &certs).await.with_context(|| format!("{attack}: envoy"))?)
            }
            None => None,
        };
        let ours = one(attack, subject, &certs).await;
        let (text, grown, good) = match &ours {
            Err(error) => (format!("{error:#}"), 0, false),
            Ok(o) => {
                let mut same = theirs.as_ref().is_none_or(|t| t.answer == o.answer);
                if let Some((answer, reason)) = also
                    && !same
                    && o.answer == answer
                {
                    (same, note) = (true, reason);
                }
                (
                    o.answer.clone(),
                    o.grown,
                    same && o.alive
                        && o.grown < BOUND_KIB.max(theirs.as_ref().map_or(0, |t| t.grown * 3 / 2)),
                )
            }
        };
        let (their_text, their_grown) = theirs.map_or_else(Default::default, |t| (t.answer, t.grown));
        println!(
            "{attack:26} {their_text:34} {text:34} {their_grown:10} {grown:10} {}",
            if good { note } else { "FAILED" }
        );
        if good {
            passed += 1;
        } else {
            failed += 1;
        }
    }
    println!("\n{passed} passed, {failed} failed, 0 skipped");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn one(attack: &str, binary: &Path, certs: &Arc<Certs>) -> Result<Ending> {
    let file: CaseFile = serde_json::from_value(json!({
        "upstreams": {"a": "h1"},
        "http": {
            "ingress": {"request_headers_timeout": "0.5s"},
            "secure": {"tls": {"common_tls_context": {"tls_certificates": [{
                "certificate_chain": {"filename": "{{cert:server}}"}, "private_key": {"filename": "{{key:server}}"}}]}}},
        },
        "routes": [{"match": {"path": "/wait"}, "route": {"cluster": "a"}},
            {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "ok"}}}],
    }))?;
    let tmp = tempfile::Builder::new().prefix("rig").tempdir()?;
    let upstreams = Upstreams::start(&file.upstreams, certs).await?;
    let place = session::place(tmp.path(), certs, &upstreams, binary)?;
    let mut proxy = Proxy::start(binary, &place, &session::config(&file, &place)?, &[]).await?;
    ask(&proxy, &place).await.context("before the attack")?;
    let before = proxy.rss_kib();
    let answer = timeout(Duration::from_secs(20), perform(attack, &proxy, &place))
        .await
        .unwrap_or_else(|_| Ok("still going after 20 s".to_owned()))?;
    let alive = ask(&proxy, &place).await.is_ok() && proxy.child.try_wait()?.is_none();
    let grown = proxy.rss_kib().saturating_sub(before);
    proxy.stop().await;
    Ok(Ending { answer: if alive { answer } else { format!("{answer}, then dead") }, grown, alive })
}

/// An honest request must be served at once.
async fn ask(proxy: &Proxy, place: &Place) -> Result<()> {
    let mut conn = open(proxy, place, "ingress").await?;
    conn.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await?;
    let (_, answer) = timeout(Duration::from_secs(2), http1::read_response(&mut conn, false)).await?;
    anyhow::ensure!(answer.is_some_and(|a| a.status() == 200), "no answer");
    Ok(())
}

async fn open(proxy: &Proxy, place: &Place, listener: &str) -> Result<Conn> {
    let port = proxy.listener(place, listener).await?;
    Ok(Conn::tcp(TcpStream::connect(("127.0.0.1", port)).await?))
}

fn request(stream: u32, end: bool) -> Vec<u8> {
    request_for("/", stream, end)
}

fn request_for(path: &str, stream: u32, end: bool) -> Vec<u8> {
    let fields = [(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "a")];
    let fields: Vec<_> = fields.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec())).collect();
    http2::header_frames(stream, &fields, end)
}

async fn perform(attack: &str, proxy: &Proxy, place: &Place) -> Result<String> {
    let listener = if attack == "truncated client hello" { "secure" } else { "ingress" };
    let mut conn = open(proxy, place, listener).await?;
    Ok(match attack {
        "rapid reset" => {
            let cancel = 8_u32.to_be_bytes();
            flood(
                conn,
                (0..20_000_u32).map(|i| {
                    let mut out = request(i * 2 + 1, true);
                    out.extend_from_slice(&frame(http2::RST_STREAM, 0, i * 2 + 1, &cancel));
                    out
                }),
            )
            .await
        }
        "reset once accepted" => reset_once_accepted(conn).await,
        "continuation flood" => {
            let first = frame(
                http2::HEADERS,
                http2::END_STREAM,
                1,
                &http2::block(&[(b"x-a".to_vec(), vec![b'a'; 8000])]),
            );
            let more = http2::block(&[(b"x-b".to_vec(), vec![b'b'; 8000])]);
            let rest = (0..10_000).map(move |_| frame(http2::CONTINUATION, 0, 1, &more));
            flood(conn, std::iter::once(first).chain(rest)).await
        }
        "settings flood" => flood(conn, (0..100_000).map(|_| frame(http2::SETTINGS, 0, 0, b""))).await,
        "ping flood" => flood(conn, (0..100_000).map(|_| frame(http2::PING, 0, 0, b"floodflo"))).await,
        "empty data flood" => {
            let rest = (0..50_000).map(|_| frame(http2::DATA, 0, 1, b""));
            flood(conn, std::iter::once(request(1, false)).chain(rest)).await
        }
        "priority flood" => flood(conn, (0..50_000).map(|_| frame(2, 0, 1, &[0, 0, 0, 0, 16]))).await,
        "window update flood" => {
            let rest = (0..50_000).map(|_| frame(http2::WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes()));
            flood(conn, std::iter::once(request(1, false)).chain(rest)).await
        }
        "oversize h2 headers" => {
            let mut fields: Vec<(Vec<u8>, Vec<u8>)> = vec![
                (b":method".to_vec(), b"GET".to_vec()),
                (b":scheme".to_vec(), b"http".to_vec()),
                (b":path".to_vec(), b"/".to_vec()),
                (b":authority".to_vec(), b"a".to_vec()),
            ];
            fields.push((b"x-big".to_vec(), vec![b'a'; 70_000]));
            flood(conn, std::iter::once(http2::header_frames(1, &fields, true))).await
        }
        "slow heads" => {
            // A thousand connections that never finish their heads; the header timeout must clear them.
            let mut held = Vec::new();
            for _ in 0..1000 {
                let mut slow = open(proxy, place, "ingress").await?;
                slow.send(b"GET / HTTP/1.1\r\nhost: a\r\n").await?;
                held.push(slow);
            }
            let mut statuses = std::collections::BTreeMap::new();
            for slow in &mut held {
                let (_, answer) = http1::read_response(slow, false).await;
                *statuses.entry(answer.map_or(0, |a| a.status())).or_insert(0) += 1;
            }
            drop(conn);
            format!("{statuses:?}")
        }
        "oversize h1 headers" => {
            let mut head = b"GET / HTTP/1.1\r\nhost: a\r\n".to_vec();
            for i in 0..2000 {
                head.extend_from_slice(format!("x-{i}: {}\r\n", "a".repeat(1000)).as_bytes());
            }
            h1(&mut conn, &head).await
        }
        "endless request line" => {
            let mut head = b"GET /".to_vec();
            head.resize(8 << 20, b'a');
            h1(&mut conn, &head).await
        }
        "endless chunk extension" => {
            let mut head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5;".to_vec();
            head.resize(8 << 20, b'a');
            h1(&mut conn, &head).await
        }
        "truncated client hello" => {
            conn.send(&[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]).await?;
            conn.half_close().await;
            let rest = timeout(Duration::from_secs(3), conn.read_all()).await;
            rest.map_or_else(|_| "open".to_owned(), |_| "closed".to_owned())
        }
        _ => {
            let noise: Vec<u8> =
                (0..1_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            h1(&mut conn, &noise).await
        }
    })
}

async fn h1(conn: &mut Conn, bytes: &[u8]) -> String {
    // The peer may close before all is sent; its answer still counts.
    let _ = timeout(Duration::from_secs(5), conn.send(bytes)).await;
    match timeout(Duration::from_secs(5), http1::read_response(conn, false)).await {
        Err(_) => "no answer".to_owned(),
        Ok((_, None)) => "closed".to_owned(),
        Ok((_, Some(answer))) => answer.status().to_string(),
    }
}

/// Begins requests whose upstream waits for their end, and resets them when a PING says that they have been seen.
async fn reset_once_accepted(mut conn: Conn) -> String {
    const AT_A_TIME: u32 = 10;
    let mut reader = Reader::new();
    let mut out = http2::PREFACE.to_vec();
    out.extend_from_slice(&frame(http2::SETTINGS, 0, 0, b""));
    for turn in 0..2000 {
        let streams = (0..AT_A_TIME).map(|i| (turn * AT_A_TIME + i) * 2 + 1);
        streams.clone().for_each(|stream| out.extend_from_slice(&request_for("/wait", stream, false)));
        out.extend_from_slice(&frame(http2::PING, 0, 0, b"accepted"));
        if !matches!(timeout(Duration::from_secs(2), conn.send(&out)).await, Ok(Ok(()))) {
            return "closed".to_owned();
        }
        out.clear();
        loop {
            match timeout(Duration::from_secs(3), reader.next(&mut conn)).await {
                Err(_) => return "silent".to_owned(),
                Ok(Event::GoAway { .. } | Event::Closed) => return "closed".to_owned(),
                Ok(Event::Pong) => break,
                Ok(_) => {}
            }
        }
        let cancel = 8_u32.to_be_bytes();
        streams.for_each(|stream| out.extend_from_slice(&frame(http2::RST_STREAM, 0, stream, &cancel)));
    }
    "open".to_owned()
}

/// Sends frames while reading what comes; the answer is how the connection ended.
async fn flood(mut conn: Conn, frames: impl Iterator<Item = Vec<u8>>) -> String {
    let mut reader = Reader::new();
    let mut out = http2::PREFACE.to_vec();
    out.extend_from_slice(&frame(http2::SETTINGS, 0, 0, b""));
    let mut frames = frames.peekable();
    while frames.peek().is_some() {
        for f in frames.by_ref().take(500) {
            out.extend_from_slice(&f);
        }
        if !matches!(timeout(Duration::from_secs(2), conn.send(&out)).await, Ok(Ok(()))) {
            break;
        }
        out.clear();
        // What has arrived is taken without waiting for more.
        while let Ok(true) = timeout(Duration::from_millis(1), conn.fill()).await {}
    }
    let _ = conn.send(&frame(http2::PING, 0, 0, b"the end.")).await;
    let mut ended = String::new();
    loop {
        match timeout(Duration::from_secs(3), reader.next(&mut conn)).await {
            Err(_) => return "open".to_owned() + &ended,
            Ok(Event::Pong) if !ended.is_empty() => {}
            Ok(Event::GoAway { .. } | Event::Closed) => return "closed".to_owned(),
            Ok(Event::Reset { .. }) => ended = ", stream reset".to_owned(),
            Ok(Event::Headers { fields, .. }) => {
                let status = fields.first().cloned().unwrap_or_default();
                if status != ":status: 200" {
                    ended = format!(", {status}");
                }
            }
            Ok(_) => {}
        }
    }
}

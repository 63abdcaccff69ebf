//! Running the steps of one case and noting what came of each.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use regex::Regex;
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::timeout;

use crate::case::{Case, Exec, FrameSpec, Step, Tally, Until};
use crate::client::h2::Session;
use crate::client::{self, Client, Opened};
use crate::place::{Place, write_atomically};
use crate::proxy::{PATIENCE, Proxy, describe};
use crate::report;
use crate::upstream::{Upstreams, h2::field};
use crate::wire::http1::{self, chunked};
use crate::wire::http2::{self, frame};
use crate::wire::{Conn, bytes_of, latin1};

const POLL: Duration = Duration::from_millis(10);
/// Answers of the proxy take at most a second of delayed close beyond what a case scripts.
const ANSWER: Duration = Duration::from_secs(6);

/// The one executing a case.
pub(crate) struct Steps<'a> {
    pub(crate) place: &'a Place,
    pub(crate) proxy: Option<&'a mut Proxy>,
    pub(crate) binary: &'a Path,
    pub(crate) upstreams: &'a Upstreams,
    conns: HashMap<String, Client>,
    before: BTreeMap<String, i64>,
    /// Final responses read, each of which leaves an access log line.
    pub(crate) answers: usize,
}

impl<'a> Steps<'a> {
    pub(crate) fn new(
        place: &'a Place,
        proxy: Option<&'a mut Proxy>,
        binary: &'a Path,
        upstreams: &'a Upstreams,
    ) -> Self {
        Self { place, proxy, binary, upstreams, conns: HashMap::new(), before: BTreeMap::new(), answers: 0 }
    }

    /// Runs all steps; the results are one entry per step that observes something.
    pub(crate) async fn run(&mut self, case: &Case) -> Result<Vec<Value>> {
        let wants_stats = !case.stats.is_empty() || case.steps.iter().any(|s| s.wait.is_some());
        if wants_stats {
            self.before = self.proxy()?.stats().await?;
        }
        let mut out = Vec::new();
        for (i, step) in case.steps.iter().enumerate() {
            let result = self.step(step).await.with_context(|| format!("step {i}"))?;
            if !result.is_null() {
                out.push(result);
            }
        }
        Ok(out)
    }

    /// How the chosen stats moved.
    pub(crate) async fn stats(&mut self, names: &[String]) -> Result<Value> {
        let now = self.proxy()?.stats().await?;
        let value = |name: &String| match now.get(name) {
            None => Value::Null,
            Some(v) => json!(v - self.before.get(name).unwrap_or(&0)),
        };
        Ok(names.iter().map(|n| (n.clone(), value(n))).collect())
    }

    fn proxy(&mut self) -> Result<&mut Proxy> {
        self.proxy.as_deref_mut().context("this file starts no proxy")
    }

    async fn step(&mut self, step: &Step) -> Result<Value> {
        if step.get.is_some() || step.request.is_some() {
            return self.requests(step).await;
        }
        if step.head.is_some() || step.raw.is_some() || step.receive.is_some() {
            return self.bytes(step).await;
        }
        if let Some(frames) = &step.frames {
            return self.frames(step, frames).await;
        }
        if let Some(request) = &step.admin {
            let request = self.place.fill(request)?;
            let answer = self.proxy()?.admin(&request).await?;
            return show(&answer, step);
        }
        if let Some(wanted) = &step.wait {
            return self.wait_stats(wanted).await.map(|()| Value::Null);
        }
        if let Some(wanted) = &step.wait_seen {
            return self.wait_seen(wanted).await.map(|()| Value::Null);
        }
        if let Some(name) = &step.seen {
            return self.seen(name, step.times.unwrap_or(1)).await;
        }
        if let Some(answers) = &step.answer {
            return self.upstreams.change(answers).map(|()| Value::Null);
        }
        if let Some(wanted) = &step.wait_log {
            return self.wait_log(wanted).await.map(|()| Value::Null);
        }
        if let Some(until) = &step.until {
            return self.until(until).await;
        }
        if let Some(name) = &step.file {
            return self.file(name, step.times.unwrap_or(1)).await;
        }
        if let Some(files) = &step.write {
            for (name, value) in files {
                let path = self.place.tmp.join(name);
                write_atomically(&path, file_text(self.place, value)?.as_bytes())?;
            }
            return Ok(Value::Null);
        }
        if let Some(signal) = &step.signal {
            self.proxy()?.signal(signal).await?;
            return Ok(Value::Null);
        }
        if step.exit.is_some() {
            return Ok(json!({"exit": self.proxy()?.wait().await?}));
        }
        if let Some(exec) = &step.exec {
            return self.exec(exec).await;
        }
        if let Some(name) = &step.half_close {
            match self.conns.get_mut(name) {
                Some(Client::H1(conn)) => conn.half_close().await,
                Some(Client::H2(session)) => session.conn.half_close().await,
                None => bail!("no connection {name}"),
            }
            return Ok(Value::Null);
        }
        if let Some(name) = &step.close {
            self.conns.remove(name);
            return Ok(Value::Null);
        }
        if let Some(name) = &step.reset {
            match self.conns.remove(name).with_context(|| format!("no connection {name}"))? {
                Client::H1(conn) => conn.reset(),
                Client::H2(session) => session.conn.reset(),
            }
            return Ok(Value::Null);
        }
        if let Some(ms) = step.pause {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            return Ok(Value::Null);
        }
        bail!("a step without a verb")
    }

    /// The connection a step works on, with what to record of a fresh TLS handshake.
    async fn connection(&mut self, step: &Step, h2: bool) -> Result<Result<(Client, Option<Value>), Value>> {
        if let Some(known) = step.on.as_ref().and_then(|name| self.conns.remove(name)) {
            return Ok(Ok((known, None)));
        }
        let name = step.to.as_deref().unwrap_or("ingress");
        let place = self.place;
        let port = self.proxy()?.listener(place, name).await?;
        let opened = timeout(ANSWER, client::open(port, step.tls.as_ref(), &place.certs)).await;
        let Ok(opened) = opened else { return Ok(Err(json!({"handshake": "none in time"}))) };
        match opened? {
            Opened { conn: None, tls } => Ok(Err(tls.unwrap_or_default())),
            Opened { conn: Some(conn), tls } => {
                if h2 {
                    let mut session = Session::new(conn);
                    session.greet().await;
                    Ok(Ok((Client::H2(Box::new(session)), tls)))
                } else {
                    Ok(Ok((Client::H1(conn), tls)))
                }
            }
        }
    }

    async fn requests(&mut self, step: &Step) -> Result<Value> {
        let Some(tally) = &step.tally else { return self.request(step).await.map(|(v, _)| v) };
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let times = step.times.unwrap_or(1);
        if let Some(at_once) = step.at_once {
            for round in (0..times).step_by(at_once) {
                for key in self.volley(step, at_once.min(times - round)).await? {
                    *counts.entry(key).or_default() += 1;
                }
            }
            return Ok(tallied(tally, &counts));
        }
        for _ in 0..times {
            let (_, key) = self.request(step).await?;
            *counts.entry(key).or_default() += 1;
        }
        Ok(tallied(tally, &counts))
    }

    /// So many requests over connections of their own, all sent before an answer is read.
    async fn volley(&mut self, step: &Step, count: usize) -> Result<Vec<String>> {
        let (out, to_head) = self.bytes_h1(step)?;
        let mut conns = Vec::with_capacity(count);
        for _ in 0..count {
            match self.connection(step, false).await? {
                Ok((Client::H1(conn), _)) => conns.push(conn),
                _ => bail!("no HTTP/1 connection"),
            }
        }
        for conn in &mut conns {
            let _ = timeout(ANSWER, conn.send(&out)).await;
        }
        let mut keys = Vec::with_capacity(count);
        for conn in &mut conns {
            keys.push(self.read(conn, step, to_head).await?.1);
        }
        Ok(keys)
    }

    /// One request; the second part is what a tally counts.
    async fn request(&mut self, step: &Step) -> Result<(Value, String)> {
        let (client, tls) = match self.connection(step, step.h2).await? {
            Ok(opened) => opened,
            Err(failure) => return Ok((failure, String::new())),
        };
        let (mut result, key, client) = match client {
            Client::H1(conn) => self.request_h1(step, conn).await?,
            Client::H2(session) => self.request_h2(step, session).await?,
        };
        if let Some(tls) = tls {
            result["tls"] = tls;
        }
        if let (Some(name), Some(client)) = (&step.on, client) {
            self.conns.insert(name.clone(), client);
        }
        Ok((result, key))
    }

    fn line(&self, step: &Step) -> Result<(String, String)> {
        let line = match (&step.get, &step.request) {
            (Some(path), _) => format!("GET {path}"),
            (None, Some(line)) => line.clone(),
            (None, None) => bail!("no request"),
        };
        let line = self.place.fill(&line)?;
        let (method, path) = line.split_once(' ').context("METHOD path")?;
        Ok((method.to_owned(), path.to_owned()))
    }

    fn host(&self, step: &Step) -> Result<String> {
        self.place.fill(step.host.as_deref().unwrap_or("case.test"))
    }

    /// The request's bytes, and whether it is a HEAD.
    fn bytes_h1(&self, step: &Step) -> Result<(Vec<u8>, bool)> {
        let (method, path) = self.line(step)?;
        let version = step.version.as_deref().unwrap_or("1.1");
        let mut head = format!("{method} {path} HTTP/{version}\r\n");
        let host = self.host(step)?;
        if host != "-" {
            head.push_str(&format!("host: {host}\r\n"));
        }
        for line in &step.headers {
            head.push_str(&format!("{}\r\n", self.place.fill(line)?));
        }
        if step.chunks.is_some() || !step.trailers.is_empty() {
            head.push_str("transfer-encoding: chunked\r\n");
        } else if let Some(body) = &step.body {
            head.push_str(&format!("content-length: {}\r\n", body.0.len()));
        }
        head.push_str("\r\n");
        let mut out = bytes_of(&head);
        if step.chunks.is_some() || !step.trailers.is_empty() {
            chunked(step.chunks.as_deref().unwrap_or_default(), &step.trailers, &mut out);
        } else if let Some(body) = &step.body {
            out.extend_from_slice(&body.0);
        }
        Ok((out, method == "HEAD"))
    }

    async fn request_h1(&mut self, step: &Step, mut conn: Conn) -> Result<(Value, String, Option<Client>)> {
        let (out, to_head) = self.bytes_h1(step)?;
        let _ = timeout(ANSWER, conn.send(&out)).await;
        let (result, key) = self.read(&mut conn, step, to_head).await?;
        Ok((result, key, Some(Client::H1(conn))))
    }

    /// Reads what the step asks for.
    async fn read(&mut self, conn: &mut Conn, step: &Step, to_head: bool) -> Result<(Value, String)> {
        let only = step.only.as_deref();
        let read = step.read.as_ref().or(step.receive.as_ref()).cloned().unwrap_or_else(|| json!("response"));
        let count = match &read {
            Value::Number(n) => n.as_u64().unwrap_or(1),
            Value::String(s) if s == "response" || s == "head" => 1,
            Value::String(s) if s == "nothing" => return Ok((Value::Null, String::new())),
            Value::String(s) if s == "close" => {
                let all = timeout(ANSWER, conn.read_all()).await;
                let text = all.map_or_else(|_| json!("still open"), |b| report::body_value(&b));
                return Ok((json!({"until_close": text, "alert": conn.alert}), String::new()));
            }
            Value::Object(map) => {
                if let Some(mark) = map.get("until").and_then(Value::as_str) {
                    let got = timeout(ANSWER, conn.read_until(&bytes_of(mark))).await;
                    return Ok((
                        json!({"read": got.map_or_else(|_| "timeout".into(), |b| latin1(&b))}),
                        String::new(),
                    ));
                }
                let n = map.get("bytes").and_then(Value::as_u64).context("`until` or `bytes`")? as usize;
                let _ = timeout(ANSWER, conn.need(n)).await;
                return Ok((json!({"read": latin1(&conn.take(n))}), String::new()));
            }
            other => bail!("read {other}?"),
        };
        let mut results = Vec::new();
        let mut key = String::new();
        for _ in 0..count {
            let Ok((interim, message)) =
                timeout(ANSWER, http1::read_response(conn, to_head || read == "head")).await
            else {
                results.push(json!({"timeout": true, "so_far": latin1(&conn.take(usize::MAX))}));
                break;
            };
            self.answers += usize::from(message.is_some());
            let mut result = report::response(&interim, message.as_ref(), only, step.ordered);
            if let Some(alert) = &conn.alert {
                result["alert"] = json!(alert);
            }
            if step.then_closed {
                let rest = timeout(Duration::from_secs(3), conn.read_all()).await;
                result["then_closed"] = rest.map_or_else(
                    |_| json!(false),
                    |b| if b.is_empty() { json!(true) } else { report::body_value(&b) },
                );
            }
            key = message.as_ref().map_or_else(String::new, |m| {
                match step.tally.as_ref().map(|t| t.by.as_str()) {
                    Some("status") => m.status().to_string(),
                    Some("body") => latin1(&m.body),
                    Some(name) => m.header(name).unwrap_or("-").to_owned(),
                    None => String::new(),
                }
            });
            let gone = message.is_none();
            results.push(result);
            if gone {
                break;
            }
        }
        let result = if results.len() == 1 { results.remove(0) } else { Value::Array(results) };
        Ok((result, key))
    }

    async fn request_h2(
        &mut self,
        step: &Step,
        mut session: Box<Session>,
    ) -> Result<(Value, String, Option<Client>)> {
        let (method, path) = self.line(step)?;
        let host = self.host(step)?;
        let mut lines = vec![format!(":method: {method}")];
        if method != "CONNECT" || step.headers.iter().any(|h| h.starts_with(":protocol")) {
            lines.push(format!(":scheme: {}", step.scheme.as_deref().unwrap_or("http")));
            lines.push(format!(":path: {path}"));
        }
        if host != "-" {
            lines.push(format!(":authority: {host}"));
        }
        for line in &step.headers {
            lines.push(self.place.fill(line)?);
        }
        lines.sort_by_key(|l| !l.starts_with(':'));
        let stream = session.take_stream();
        let has_body = step.body.is_some() || step.chunks.is_some();
        let mut out = http2::header_frames(stream, &fields(&lines), !has_body && step.trailers.is_empty());
        let ends = step.trailers.is_empty();
        let chunks = step.chunks.clone().or_else(|| step.body.clone().map(|b| vec![b])).unwrap_or_default();
        for (i, chunk) in chunks.iter().enumerate() {
            out.extend_from_slice(&http2::data_frames(stream, &chunk.0, ends && i + 1 == chunks.len()));
        }
        if !ends {
            out.extend_from_slice(&http2::header_frames(stream, &fields(&step.trailers), true));
        }
        let _ = timeout(ANSWER, session.conn.send(&out)).await;
        if step.read.as_ref().is_some_and(|r| r == "nothing") {
            return Ok((Value::Null, String::new(), Some(Client::H2(session))));
        }
        let late = timeout(ANSWER, session.finish(stream)).await.is_err();
        self.answers += usize::from(session.answered(stream));
        let mut result = session.reply(stream, step.only.as_deref(), step.ordered);
        if late {
            result["timeout"] = Value::from(true);
        }
        if step.then_closed {
            let closed = timeout(Duration::from_secs(3), session.drain()).await.is_ok();
            result = session.reply(stream, step.only.as_deref(), step.ordered);
            result["then_closed"] = Value::from(closed);
        }
        let key = match step.tally.as_ref().map(|t| t.by.as_str()) {
            Some("status") => session.header(stream, ":status").unwrap_or_default(),
            Some("body") => latin1(session.body(stream)),
            Some(name) => session.header(stream, name).unwrap_or_else(|| "-".to_owned()),
            None => String::new(),
        };
        Ok((result, key, Some(Client::H2(session))))
    }

    async fn bytes(&mut self, step: &Step) -> Result<Value> {
        let (client, tls) = match self.connection(step, false).await? {
            Ok(opened) => opened,
            Err(failure) => return Ok(failure),
        };
        let Client::H1(mut conn) = client else { bail!("raw bytes on an HTTP/2 connection") };
        let mut out = Vec::new();
        let mut to_head = false;
        if let Some(lines) = &step.head {
            to_head = lines.first().is_some_and(|l| l.starts_with("HEAD "));
            for line in lines {
                out.extend_from_slice(&bytes_of(&self.place.fill(line)?));
                out.extend_from_slice(b"\r\n");
            }
            out.extend_from_slice(b"\r\n");
            if let Some(body) = &step.body {
                out.extend_from_slice(&body.0);
            }
        }
        if let Some(raw) = &step.raw {
            out.extend_from_slice(&raw.0);
        }
        if !out.is_empty() {
            let _ = timeout(ANSWER, conn.send(&out)).await;
        }
        let (mut result, _) = self.read(&mut conn, step, to_head).await?;
        if let Some(tls) = tls {
            if result.is_null() {
                result = json!({});
            }
            result["tls"] = tls;
        }
        if let Some(name) = &step.on {
            self.conns.insert(name.clone(), Client::H1(conn));
        }
        Ok(result)
    }

    async fn frames(&mut self, step: &Step, frames: &[FrameSpec]) -> Result<Value> {
        let (client, _) = match self.connection(step, true).await? {
            Ok(opened) => opened,
            Err(failure) => return Ok(failure),
        };
        let Client::H2(mut session) = client else { bail!("frames on an HTTP/1 connection") };
        let mut out = Vec::new();
        for spec in frames {
            encode(spec, &mut out)?;
        }
        let _ = timeout(ANSWER, session.conn.send(&out)).await;
        // `read` names the streams to wait for; `close` waits for the end of the connection.
        let mut result = Value::Null;
        match step.read.as_ref() {
            Some(Value::String(s)) if s == "nothing" => {}
            Some(Value::String(s)) if s == "close" => {
                let closed = timeout(ANSWER, session.drain()).await.is_ok();
                let mut replies = serde_json::Map::new();
                for spec in frames.iter().filter(|f| f.headers.is_some()) {
                    self.answers += usize::from(session.answered(spec.stream));
                    replies.insert(
                        spec.stream.to_string(),
                        session.reply(spec.stream, step.only.as_deref(), false),
                    );
                }
                result = json!({"closed": closed, "streams": replies, "connection": session.reply(0, None, false)});
            }
            other => {
                let streams: Vec<u32> = match other {
                    Some(value) => serde_json::from_value(value.clone())?,
                    None => vec![1],
                };
                let mut replies = serde_json::Map::new();
                for stream in streams {
                    let late = timeout(ANSWER, session.finish(stream)).await.is_err();
                    self.answers += usize::from(session.answered(stream));
                    let mut reply = session.reply(stream, step.only.as_deref(), false);
                    if late {
                        reply["timeout"] = Value::from(true);
                    }
                    replies.insert(stream.to_string(), reply);
                }
                result = result_or(result, Value::Object(replies));
            }
        }
        if let Some(name) = &step.on {
            self.conns.insert(name.clone(), Client::H2(session));
        }
        Ok(result)
    }

    async fn wait_stats(&mut self, wanted: &BTreeMap<String, Value>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.proxy()?.stats().await?;
            let reached = |(name, value): (&String, &Value)| {
                let is = now.get(name).copied();
                match value {
                    Value::String(s) if s.starts_with('+') => {
                        let since = self.before.get(name).copied().unwrap_or(0);
                        s[1..].parse().is_ok_and(|n: i64| is.unwrap_or(0) - since >= n)
                    }
                    other => is == other.as_i64(),
                }
            };
            if wanted.iter().all(reached) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let are: Vec<_> = wanted.keys().map(|n| (n, now.get(n))).collect();
                bail!("stats did not reach {wanted:?}: {are:?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn wait_seen(&mut self, wanted: &BTreeMap<String, usize>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.upstreams.seen(false);
            if wanted.iter().all(|(name, n)| seen.get(name).map_or(0, Vec::len) >= *n) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("upstreams did not see {wanted:?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn seen(&mut self, name: &str, wanted: usize) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut seen = self.upstreams.seen_of(name)?;
            if seen.len() >= wanted {
                seen.truncate(wanted);
                return Ok(json!({"seen": seen}));
            }
            if Instant::now() > deadline {
                bail!("{name} does not see {wanted} requests: {seen:?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn wait_log(&mut self, wanted: &str) -> Result<()> {
        let expression = Regex::new(&self.place.fill(wanted)?)?;
        let log = self.proxy()?.stderr.clone();
        let deadline = Instant::now() + PATIENCE;
        while !expression.is_match(&std::fs::read_to_string(&log)?) {
            if Instant::now() > deadline {
                bail!("the log does not say {wanted:?}");
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// The first lines of a file below `{{tmp}}`, once there are as many.
    async fn file(&mut self, name: &str, wanted: usize) -> Result<Value> {
        let path = self.place.tmp.join(name);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let lines: Vec<&str> = whole.lines().take(wanted).collect();
            if lines.len() == wanted {
                return Ok(json!({"lines": lines}));
            }
            if Instant::now() > deadline {
                bail!("{name} does not come to {wanted} lines: {text}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn until(&mut self, until: &Until) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = if let Some(request) = &until.admin {
                let request = self.place.fill(request)?;
                Some(self.proxy()?.admin(&request).await?)
            } else {
                let place = self.place;
                let listener = until.to.as_deref().unwrap_or("ingress");
                let port = self.proxy()?.listener(place, listener).await?;
                let path = until.get.as_deref().unwrap_or("/");
                let host = until.host.as_deref().unwrap_or("case.test");
                match tokio::net::TcpStream::connect(("127.0.0.1", port)).await {
                    Err(_) => None,
                    Ok(stream) => {
                        let mut conn = Conn::tcp(stream);
                        let _ = conn
                            .send(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n").as_bytes())
                            .await;
                        timeout(ANSWER, http1::read_response(&mut conn, false)).await.ok().and_then(|r| r.1)
                    }
                }
            };
            self.answers += usize::from(message.is_some() && until.admin.is_none());
            let body = message.as_ref().map(|m| latin1(&m.body));
            let met = message.as_ref().is_some_and(|m| {
                until.status.is_none_or(|s| s == m.status())
                    && until
                        .body
                        .as_ref()
                        .is_none_or(|b| body.as_deref().is_some_and(|body| body.contains(b)))
            });
            if met {
                return Ok(json!({"until": "met"}));
            }
            if Instant::now() > deadline {
                return Ok(json!({"until": "never", "last": message.map(|m| m.head), "body": body}));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn exec(&mut self, exec: &Exec) -> Result<Value> {
        if let Some(config) = &exec.config {
            let name = if config.is_string() { "config.yaml" } else { "config.json" };
            let name = exec.file.as_deref().unwrap_or(name);
            std::fs::write(self.place.tmp.join(name), file_text(self.place, config)?)?;
        }
        let mut command = Command::new(self.binary);
        for arg in &exec.args {
            command.arg(self.place.fill(arg)?);
        }
        command.current_dir(&self.place.tmp).kill_on_drop(true).stdin(std::process::Stdio::null());
        let Ok(output) = timeout(PATIENCE, command.output()).await else {
            return Ok(json!({"exit": "never"}));
        };
        let output = output?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let mut result = json!({"exit": describe(output.status)});
        if exec.stdout {
            result["stdout"] = json!(String::from_utf8_lossy(&output.stdout));
        }
        for expression in &exec.stderr {
            let found = Regex::new(expression)?.is_match(&stderr);
            if !found {
                result["stderr"] = json!(stderr.lines().rev().take(4).collect::<Vec<_>>());
            }
            result["found"][expression] = Value::from(found);
        }
        if exec.last > 0 {
            let prefix = Regex::new(r"^\[[^\]]*\]\[\d+\]\[(\w+)\]\[(\w+)\] (\[[^\]]*\] )?")?;
            let lines: Vec<String> =
                stderr.lines().rev().take(exec.last).map(|l| prefix.replace(l, "").into_owned()).collect();
            result["last"] = json!(lines);
        }
        Ok(result)
    }
}

fn result_or(first: Value, second: Value) -> Value {
    if first.is_null() { second } else { first }
}

fn fields(lines: &[String]) -> Vec<(Vec<u8>, Vec<u8>)> {
    lines.iter().map(|line| field(line)).collect()
}

fn encode(spec: &FrameSpec, out: &mut Vec<u8>) -> Result<()> {
    let s = spec.stream;
    if spec.preface {
        out.extend_from_slice(http2::PREFACE);
    }
    if let Some(lines) = &spec.headers {
        out.extend_from_slice(&http2::header_frames(s, &fields(lines), spec.end && spec.data.is_none()));
    }
    if let Some(data) = &spec.data {
        out.extend_from_slice(&http2::data_frames(s, &data.0, spec.end));
    }
    if let Some(code) = &spec.rst {
        out.extend_from_slice(&frame(http2::RST_STREAM, 0, s, &http2::error_code(code).to_be_bytes()));
    }
    if spec.ping {
        out.extend_from_slice(&frame(http2::PING, 0, 0, b"waystati"));
    }
    if spec.goaway {
        out.extend_from_slice(&frame(http2::GOAWAY, 0, 0, &[0; 8]));
    }
    if let Some(n) = spec.window {
        out.extend_from_slice(&frame(http2::WINDOW_UPDATE, 0, s, &n.to_be_bytes()));
    }
    if let Some((kind, flags, hex)) = &spec.any {
        let text: crate::case::Text = serde_json::from_value(json!({"hex": hex}))?;
        out.extend_from_slice(&frame(*kind, *flags, s, &text.0));
    }
    Ok(())
}

fn tallied(tally: &Tally, counts: &BTreeMap<String, usize>) -> Value {
    if tally.distinct {
        return json!({"distinct": counts.len()});
    }
    let mut out = serde_json::Map::new();
    for (key, n) in counts {
        let value = match tally.within.get(key) {
            Some((least, most)) if (least..=most).contains(&n) => json!(format!("{least}..={most}")),
            _ => json!(n),
        };
        out.insert(key.clone(), value);
    }
    Value::Object(out)
}

/// What to record of an admin answer.
fn show(answer: &http1::Message, step: &Step) -> Result<Value> {
    let text = latin1(&answer.body);
    let mut out = json!({"status": answer.head.first()});
    if let Some(only) = &step.only {
        out["headers"] = report::header_lines(&answer.head[1..], Some(only), false);
    }
    match &step.show {
        None => out["body"] = Value::String(text),
        Some(Value::String(s)) if s == "status" => {}
        Some(Value::String(s)) if s == "names" => out["names"] = names(&text),
        Some(Value::String(s)) if s == "shape" => {
            out["shape"] = shape(&serde_json::from_str(&text).context("JSON from admin")?);
        }
        Some(Value::Object(map)) => {
            if let Some(lines) = map.get("lines").and_then(Value::as_str) {
                let wanted = Regex::new(lines)?;
                out["lines"] = text.lines().filter(|l| wanted.is_match(l)).map(str::to_owned).collect();
            }
            if let Some(pointers) = map.get("json") {
                let json: Value = serde_json::from_str(&text).context("JSON from admin")?;
                let one = |p: &str| json.pointer(p).cloned().unwrap_or_default();
                out["json"] = match pointers {
                    Value::Array(list) => {
                        list.iter().filter_map(Value::as_str).map(|p| (p.to_owned(), one(p))).collect()
                    }
                    other => one(other.as_str().unwrap_or_default()),
                };
            }
            if let Some(name) = map.get("shape_of").and_then(Value::as_str) {
                let json: Value = serde_json::from_str(&text).context("JSON from admin")?;
                out["shape"] = shape(json.pointer(name).unwrap_or(&Value::Null));
            }
        }
        Some(other) => bail!("show {other}?"),
    }
    Ok(out)
}

/// The stats of a listing without their values, each under its name, so that a deviation can speak of one.
fn names(text: &str) -> Value {
    static PORT: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"127\.0\.0\.1_\d+").expect("the expression is valid"));
    let listed = text.lines().filter(|line| !line.contains("_bucket{")).map(|line| {
        let name = match line.rsplit_once("} ").map(|(name, _)| format!("{name}}}")) {
            Some(sample) => sample,
            // `# TYPE name kind` is a name and its kind.
            None if line.starts_with('#') => line.to_owned(),
            None => line.split(": ").next().unwrap_or(line).to_owned(),
        };
        (PORT.replace_all(&name, "{address}").into_owned(), Value::Bool(true))
    });
    Value::Object(listed.collect())
}

/// The keys of a JSON tree with the kinds of their values; arrays show their first element.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(map.iter().map(|(k, v)| (k.clone(), shape(v))).collect()),
        Value::Array(items) => Value::Array(items.first().map(shape).into_iter().collect()),
        Value::Null => json!("null"),
        Value::Bool(_) => json!("bool"),
        Value::Number(_) => json!("number"),
        Value::String(_) => json!("string"),
    }
}

/// A file's content: text as it is, anything else as JSON; both with their placeholders filled.
pub(crate) fn file_text(place: &Place, value: &Value) -> Result<String> {
    match value {
        Value::String(text) => place.fill(text),
        other => Ok(serde_json::to_string_pretty(&place.fill_tree(other)?)?),
    }
}

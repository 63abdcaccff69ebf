//! Scripted upstreams that remember what they saw.

mod als;
mod grpc;
mod h1;
pub(crate) mod h2;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::case::{Answer, AnswerSpec, At, Kind, Then, UpstreamSpec};
use crate::certs::Certs;
use crate::client::tls;
use crate::wire::{Conn, duplicate, latin1};

/// All upstreams of one run of one file.
pub(crate) struct Upstreams {
    each: BTreeMap<String, Upstream>,
}

struct Upstream {
    port: u16,
    script: Arc<Script>,
    task: Option<JoinHandle<()>>,
    /// Holds the port of an upstream that refuses: bound, never listening.
    _held: Option<socket2::Socket>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// What one upstream will answer and what it has seen.
struct Script {
    name: String,
    usual: Vec<Answer>,
    answers: Mutex<VecDeque<AnswerSpec>>,
    seen: Mutex<Seen>,
    connections: AtomicUsize,
}

/// All that was ever seen, and where that of the case under way begins.
#[derive(Default)]
struct Seen {
    all: Vec<Value>,
    from: usize,
}

impl Upstreams {
    pub(crate) async fn start(specs: &BTreeMap<String, UpstreamSpec>, certs: &Certs) -> Result<Self> {
        let mut each = BTreeMap::new();
        for (name, spec) in specs {
            each.insert(
                name.clone(),
                Upstream::start(name, spec, certs).await.with_context(|| name.clone())?,
            );
        }
        Ok(Self { each })
    }

    pub(crate) fn ports(&self) -> BTreeMap<String, u16> {
        self.each.iter().map(|(n, u)| (n.clone(), u.port)).collect()
    }

    /// Forgets the past and takes the answers of the next case.
    pub(crate) fn prepare(&self, answers: &BTreeMap<String, Vec<Answer>>) -> Result<()> {
        for name in answers.keys() {
            self.each.get(name).with_context(|| format!("no upstream {name}"))?;
        }
        for (name, upstream) in &self.each {
            let script = &upstream.script;
            let all = answers.get(name).into_iter().flatten().chain(&script.usual);
            *script.answers.lock() = all.map(|a| a.0.clone()).collect();
            let mut seen = script.seen.lock();
            seen.from = seen.all.len();
        }
        Ok(())
    }

    /// Has some upstreams answer differently from now on.
    pub(crate) fn change(&self, answers: &BTreeMap<String, Vec<Answer>>) -> Result<()> {
        for (name, answers) in answers {
            let upstream = self.each.get(name).with_context(|| format!("no upstream {name}"))?;
            *upstream.script.answers.lock() = answers.iter().map(|a| a.0.clone()).collect();
        }
        Ok(())
    }

    /// What one upstream has seen since the start, over which connections.
    pub(crate) fn seen_of(&self, name: &str) -> Result<Vec<Value>> {
        let upstream = self.each.get(name).with_context(|| format!("no upstream {name}"))?;
        Ok(upstream.script.seen.lock().all.clone())
    }

    /// What each upstream saw, without those that saw nothing.
    pub(crate) fn seen(&self, connections: bool) -> BTreeMap<String, Vec<Value>> {
        let mut out = BTreeMap::new();
        for (name, upstream) in &self.each {
            let mut seen = {
                let seen = upstream.script.seen.lock();
                seen.all[seen.from..].to_vec()
            };
            let mut order: Vec<Value> = Vec::new();
            for entry in &mut seen {
                let id = entry.as_object_mut().and_then(|o| o.remove("connection")).unwrap_or_default();
                let index = order.iter().position(|o| *o == id).unwrap_or_else(|| {
                    order.push(id);
                    order.len() - 1
                });
                if connections {
                    entry["connection"] = Value::from(index);
                }
            }
            if !seen.is_empty() {
                out.insert(name.clone(), seen);
            }
        }
        out
    }
}

impl Upstream {
    async fn start(name: &str, spec: &UpstreamSpec, certs: &Certs) -> Result<Self> {
        let script = Arc::new(Script {
            name: name.to_owned(),
            usual: spec.answers.clone(),
            answers: Mutex::new(spec.answers.iter().map(|a| a.0.clone()).collect()),
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
        });
        if spec.kind == Kind::Refuse {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
            let port = socket.local_addr()?.as_socket().context("an inet address")?.port();
            return Ok(Self { port, script, task: None, _held: Some(socket) });
        }
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let acceptor = match &spec.tls {
            Some(cert) => Some(tls::acceptor(certs, cert, &spec.alpn, spec.client_ca)?),
            None => None,
        };
        let task = tokio::spawn(serve(listener, acceptor, spec.kind, Arc::clone(&script)));
        Ok(Self { port, script, task: Some(task), _held: None })
    }
}

async fn serve(listener: TcpListener, acceptor: Option<TlsAcceptor>, kind: Kind, script: Arc<Script>) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        let _ = stream.set_nodelay(true);
        let (acceptor, script) = (acceptor.clone(), Arc::clone(&script));
        connections.spawn(async move {
            let id = script.connections.fetch_add(1, Ordering::Relaxed);
            let socket = duplicate(&stream);
            let mut sni = None;
            let conn = match acceptor {
                None => Conn::tcp(stream),
                Some(acceptor) => {
                    let Ok(tls) = acceptor.accept(stream).await else { return };
                    sni = Some(tls.get_ref().1.server_name().unwrap_or("-").to_owned());
                    let sans = tls.get_ref().1.peer_certificates().is_some();
                    if sans {
                        sni = sni.map(|s| format!("{s} (client certificate)"));
                    }
                    Conn::new(Box::new(tls), socket)
                }
            };
            match kind {
                Kind::H1 => h1::serve(conn, id, sni, &script).await,
                Kind::H2 => h2::serve(conn, id, sni, &script).await,
                Kind::Tcp => tcp(conn, id, &script).await,
                Kind::Als => als::serve(conn, &script).await,
                Kind::Refuse => {}
            }
        });
    }
}

impl Script {
    /// The answer to a request for `path`.
    fn next(&self, path: &str) -> AnswerSpec {
        let fits = |answer: &AnswerSpec| answer.path.as_ref().is_none_or(|prefix| path.starts_with(prefix));
        self.take(|answers| answers.iter().position(fits)).unwrap_or_default()
    }

    fn next_at_accept(&self) -> Option<AnswerSpec> {
        self.take(|answers| answers.front().filter(|answer| answer.at == At::Accept).map(|_| 0))
    }

    fn take(&self, find: impl FnOnce(&VecDeque<AnswerSpec>) -> Option<usize>) -> Option<AnswerSpec> {
        let mut answers = self.answers.lock();
        let place = find(&answers)?;
        if answers[place].always { Some(answers[place].clone()) } else { answers.remove(place) }
    }

    /// Adds an entry and returns its place.
    fn record(&self, entry: Value) -> usize {
        let mut seen = self.seen.lock();
        seen.all.push(entry);
        seen.all.len() - 1
    }

    fn update(&self, at: usize, key: &str, value: Value) {
        if let Some(entry) = self.seen.lock().all.get_mut(at) {
            entry[key] = value;
        }
    }
}

/// A TCP upstream echoes; at `accept` it may speak first or close.
async fn tcp(mut conn: Conn, id: usize, script: &Script) {
    let at = script.record(json!({"connection": id, "bytes": ""}));
    let mut then = Then::Keep;
    if let Some(answer) = script.next_at_accept() {
        tokio::time::sleep(std::time::Duration::from_millis(answer.delay)).await;
        if let Some(raw) = &answer.raw {
            let _ = conn.send(&raw.0).await;
        }
        then = answer.then;
    }
    let mut all = Vec::new();
    match then {
        Then::Close => return,
        Then::Reset => return conn.reset(),
        Then::HalfClose => conn.half_close().await,
        _ => {}
    }
    while conn.fill().await {
        let bytes = conn.take(usize::MAX);
        all.extend_from_slice(&bytes);
        script.update(at, "bytes", Value::String(latin1(&all)));
        if then == Then::Keep || then == Then::Echo {
            let _ = conn.send(&bytes).await;
        }
    }
    if then == Then::HalfClose || then == Then::Keep {
        conn.half_close().await;
    }
}

//! A real go-control-plane server drives the proxy by every transport, and traffic has to follow.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::case::ClientTls;
use crate::certs::Certs;
use crate::client;
use crate::proxy::{PATIENCE, Proxy};
use crate::session;
use crate::upstream::Upstreams;
use crate::wire::{http1, latin1};

const MODES: [&str; 7] = ["ads-sotw", "ads-delta", "sotw", "delta", "rest", "ads-on-demand", "on-demand"];

/// A mode takes a few seconds.
const MODE: Duration = Duration::from_secs(90);

/// Drives the subject through every mode.
pub(crate) async fn run(server: &Path, subject: &Path) -> Result<ExitCode> {
    let certs = Certs::generate()?;
    let mut failed = 0;
    for mode in MODES {
        // A request that is fetched for waits as long as its configuration does not come.
        let run = timeout(MODE, one(mode, server, subject, &certs)).await;
        match run.unwrap_or_else(|_| bail!("it hangs")) {
            Ok(requests) => println!("{mode:13} ok      {requests} requests, none lost"),
            Err(error) => {
                failed += 1;
                println!("{mode:13} FAILED  {error:#}");
            }
        }
    }
    println!("\n{} passed, {failed} failed, 0 skipped", MODES.len() - failed);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The Go program and its conversation.
struct Server {
    _child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    heard: Vec<String>,
}

impl Server {
    async fn start(binary: &Path, mode: &str) -> Result<(Self, u16, u16)> {
        let mut child = Command::new(binary)
            .args(["-mode", mode])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdin = child.stdin.take().context("stdin")?;
        let lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
        let mut server = Self { _child: child, stdin, lines, heard: Vec::new() };
        let ports = server.hear("ports ").await?;
        let mut words = ports.split(' ').skip(1).map(str::parse::<u16>);
        let (grpc, rest) = (words.next().context("a port")??, words.next().context("a port")??);
        Ok((server, grpc, rest))
    }

    /// Waits for a line that begins so.
    async fn hear(&mut self, start: &str) -> Result<String> {
        let wait = async {
            while let Some(line) = self.lines.next_line().await? {
                self.heard.push(line.clone());
                if line.starts_with(start) {
                    return Ok(line);
                }
                ensure!(!line.starts_with("error"), "the server: {line}");
            }
            bail!("the server ended")
        };
        let result = timeout(PATIENCE, wait).await;
        result.with_context(|| format!("no {start:?} among {:?}", self.heard))?
    }

    async fn set(&mut self, version: usize, settings: &str) -> Result<()> {
        self.stdin.write_all(format!("set {version} {settings}\n").as_bytes()).await?;
        self.hear(&format!("set {version}")).await.map(|_| ())
    }
}

/// What a request must show.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Seen {
    status: u16,
    body: String,
    route: String,
    certificate: String,
}

async fn get(port: u16, path: &str, certs: &Certs) -> Result<Seen> {
    get_of("a", port, path, certs).await
}

async fn get_of(host: &str, port: u16, path: &str, certs: &Certs) -> Result<Seen> {
    let tls = ClientTls { sni: Some("server.test".to_owned()), ..ClientTls::default() };
    let opened = client::open(port, Some(&tls), certs).await?;
    let mut conn = opened.conn.with_context(|| format!("handshake: {:?}", opened.tls))?;
    conn.send(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n").as_bytes()).await?;
    let (_, message) = http1::read_response(&mut conn, false).await;
    let message = message.context("closed without an answer")?;
    Ok(Seen {
        status: message.status(),
        body: latin1(&message.body),
        route: message.header("x-route").unwrap_or_default().to_owned(),
        certificate: opened
            .tls
            .and_then(|t| t["certificate"].as_str().map(str::to_owned))
            .unwrap_or_default(),
    })
}

async fn until(port: u16, path: &str, certs: &Certs, met: impl Fn(&Seen) -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = get(port, path, certs).await;
        if seen.as_ref().is_ok_and(&met) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("traffic did not follow: {seen:?}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn one(mode: &str, server: &Path, subject: &Path, certs: &Arc<Certs>) -> Result<usize> {
    let tmp = tempfile::Builder::new().prefix("rig").tempdir()?;
    let specs = [("a", "h1"), ("b", "h1")]
        .map(|(name, kind)| Ok((name.to_owned(), serde_json::from_value(json!(kind))?)))
        .into_iter()
        .collect::<Result<BTreeMap<_, _>>>()?;
    let upstreams = Upstreams::start(&specs, certs).await?;
    let place = session::place(tmp.path(), certs, &upstreams, subject)?;
    let (a, b) = (place.upstreams["a"], place.upstreams["b"]);
    let cert = |name: &str| tmp.path().join("certs").join(name).display().to_string();
    let (mut server, grpc, rest) = Server::start(server, mode).await?;
    server.set(1, &format!("hosts=a upstream={a} flag=0 header=one cert={}", cert("server"))).await?;
    let mut proxy = Proxy::start(subject, &place, &bootstrap(mode, grpc, rest).to_string(), &[]).await?;
    let port = proxy.listener(&place, "ingress").await?;
    until(port, "/", certs, |s| s.body == "a" && s.route == "one" && s.certificate == "server")
        .await
        .context("first")?;

    // From here on no request may be lost, whatever changes.
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let load = tokio::spawn({
        let (stop, count, certs) = (Arc::clone(&stop), Arc::clone(&count), Arc::clone(certs));
        async move {
            while !stop.load(Ordering::Relaxed) {
                let seen = get(port, "/", &certs).await?;
                ensure!(seen.status == 200, "a request was lost: {seen:?}");
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }
    });
    let changes = async {
        let base = |upstream: u16, flag: u8, header: &str, name: &str| {
            format!("hosts=a upstream={upstream} flag={flag} header={header} cert={}", cert(name))
        };
        server.set(2, &base(b, 0, "one", "server")).await?;
        until(port, "/", certs, |s| s.body == "b").await.context("endpoints")?;
        server.set(3, &base(b, 0, "two", "server")).await?;
        until(port, "/", certs, |s| s.route == "two").await.context("routes")?;
        server.set(4, &base(b, 100, "two", "server")).await?;
        until(port, "/flag", certs, |s| s.body == "flag").await.context("runtime")?;
        server.set(5, &base(b, 100, "two", "other")).await?;
        until(port, "/", certs, |s| s.certificate == "other").await.context("secret")?;
        if mode.ends_with("on-demand") {
            on_demand(&mut server, port, certs, &proxy, &base(b, 100, "two", "other")).await?;
            server.set(7, &base(b, 0, "four", "server")).await?;
            return until(port, "/", certs, |s| s.route == "four" && s.certificate == "server").await;
        }
        server.set(6, &(base(a, 100, "three", "other") + " bad=1")).await?;
        // A REST server is never told of a rejection; the stat is the only sign.
        if mode == "rest" {
            rejected(&proxy).await?;
        } else {
            server.hear("nack Cluster").await?;
        }
        until(port, "/", certs, |s| s.body == "a" && s.route == "three")
            .await
            .context("beside a bad cluster")?;
        server.set(7, &base(b, 0, "four", "server")).await?;
        until(port, "/", certs, |s| s.body == "b" && s.route == "four" && s.certificate == "server")
            .await
            .context("after a bad cluster")?;
        Ok::<_, anyhow::Error>(())
    };
    let changed = changes.await;
    let alive = if changed.is_ok() { away(server, port, certs).await } else { Ok(()) };
    stop.store(true, Ordering::Relaxed);
    let load = load.await?;
    let ended = proxy.child.try_wait()?;
    let words = proxy.last_words();
    proxy.stop().await;
    changed.and(alive).with_context(|| format!("the proxy's last words: {words}"))?;
    load?;
    ensure!(ended.is_none(), "the proxy ended");
    Ok(count.load(Ordering::Relaxed))
}

/// A virtual host that comes while a request waits for it, goes, and is asked for again; a cluster that changes.
async fn on_demand(
    server: &mut Server,
    port: u16,
    certs: &Arc<Certs>,
    proxy: &Proxy,
    settings: &str,
) -> Result<()> {
    let asked = "ask VirtualHost routes/b";
    let other = |certs: &Arc<Certs>| {
        let certs = Arc::clone(certs);
        tokio::spawn(async move { get_of("b", port, "/", &certs).await })
    };
    let waiting = other(certs);
    server.hear(asked).await?;
    server.set(6, &format!("{settings} hosts=a,b timeout=1")).await?;
    let seen = timeout(PATIENCE, waiting).await.context("nobody told the request")???;
    ensure!(seen.status == 200 && seen.body == "b", "on demand: {seen:?}");
    server.set(6, settings).await?;
    // Until it is gone it is served. What the server says of names that are given up may answer a request as well: there
    // is no such host at that time.
    loop {
        tokio::select! {
            seen = other(certs) => {
                let seen = seen??;
                ensure!(matches!(seen.status, 200 | 404), "neither there nor waited for: {seen:?}");
            }
            asked = server.hear(asked) => break drop(asked?),
        }
    }
    server.set(6, &format!("{settings} hosts=a,b timeout=2")).await?;
    let served = async {
        while other(certs).await??.status != 200 {}
        Ok::<_, anyhow::Error>(())
    };
    timeout(PATIENCE, served).await.context("a virtual host that has come again")??;
    stat_is(proxy, "cluster_manager.cluster_modified", |n| n > 0).await
}

/// Without its server the proxy keeps what it has.
async fn away(server: Server, port: u16, certs: &Certs) -> Result<()> {
    drop(server);
    let seen = get(port, "/", certs).await?;
    ensure!(seen.body == "b" && seen.route == "four", "config was not kept: {seen:?}");
    Ok(())
}

async fn rejected(proxy: &Proxy) -> Result<()> {
    stat_is(proxy, "cluster_manager.cds.update_rejected", |n| n > 0).await
}

async fn stat_is(proxy: &Proxy, name: &str, met: impl Fn(i64) -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !proxy.stats().await?.get(name).is_some_and(|n| met(*n)) {
        ensure!(Instant::now() < deadline, "{name}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

fn bootstrap(mode: &str, grpc: u16, rest: u16) -> Value {
    let ads = mode.starts_with("ads");
    let grpc_source = |kind: &str| {
        json!({"api_type": kind, "transport_api_version": "V3",
            "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]})
    };
    let source = match mode {
        _ if ads => json!({"ads": {}, "resource_api_version": "V3"}),
        "rest" => json!({"resource_api_version": "V3", "api_config_source": {"api_type": "REST",
            "transport_api_version": "V3", "cluster_names": ["rest"], "refresh_delay": "0.2s", "request_timeout": "1s"}}),
        "delta" | "on-demand" => {
            json!({"resource_api_version": "V3", "api_config_source": grpc_source("DELTA_GRPC")})
        }
        _ => json!({"resource_api_version": "V3", "api_config_source": grpc_source("GRPC")}),
    };
    let cluster = |name: &str, port: u16| {
        json!({"name": name, "type": "STATIC", "connect_timeout": "1s", "load_assignment": {"cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(port)}}]}]}})
    };
    let mut xds = cluster("xds", grpc);
    xds["typed_extension_protocol_options"] = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}}}});
    let mut dynamic = json!({"lds_config": source});
    if !mode.ends_with("on-demand") {
        dynamic["cds_config"] = source.clone();
    }
    if ads {
        dynamic["ads_config"] = grpc_source(if mode == "ads-sotw" { "GRPC" } else { "DELTA_GRPC" });
    }
    json!({
        "node": {"id": "rig", "cluster": "rig"},
        "admin": {"address": address(0)},
        "dynamic_resources": dynamic,
        "static_resources": {"clusters": [xds, cluster("rest", rest)]},
        "layered_runtime": {"layers": [{"name": "rtds", "rtds_layer": {"name": "rtds", "rtds_config": source}}]},
    })
}

fn address(port: u16) -> Value {
    json!({"socket_address": {"address": "127.0.0.1", "port_value": port}})
}

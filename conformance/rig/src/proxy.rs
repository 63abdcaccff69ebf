//! A proxy process under test.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::place::Place;
use crate::wire::Conn;
use crate::wire::http1::{self, Message};

/// How long anything may take before it counts as not happening.
pub(crate) const PATIENCE: Duration = Duration::from_secs(8);
const POLL: Duration = Duration::from_millis(10);

/// A running proxy; dropping it kills it.
pub(crate) struct Proxy {
    pub(crate) child: Child,
    pub(crate) admin: String,
    pub(crate) stderr: PathBuf,
}

impl Proxy {
    /// Starts `binary` with the bootstrap and waits until it is ready.
    pub(crate) async fn start(binary: &Path, place: &Place, config: &str, args: &[String]) -> Result<Self> {
        let tmp = &place.tmp;
        let path = tmp.join("bootstrap.json");
        std::fs::write(&path, config)?;
        let address = tmp.join("admin.txt");
        let mut command = Command::new(binary);
        command.arg("-c").arg(&path).arg("--admin-address-path").arg(&address);
        command.args(["--disable-hot-restart", "--file-flush-interval-msec", "20"]);
        // One worker, so that what a case sees has one order, unless the case is about many.
        if !args.iter().any(|arg| arg == "--concurrency") {
            command.args(["--concurrency", "1"]);
        }
        command.args(args);
        Self::spawn(command, tmp, &address).await
    }

    /// Starts a prepared command; the admin address appears in a file.
    pub(crate) async fn spawn(mut command: Command, tmp: &Path, address: &Path) -> Result<Self> {
        let stderr = tmp.join("stderr.log");
        let log = std::fs::File::create(&stderr)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).current_dir(tmp).kill_on_drop(true);
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        let mut proxy = Self { child, admin: String::new(), stderr };
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = proxy.child.try_wait()? {
                bail!("ended at start with {status}: {}", proxy.last_words());
            }
            if let Ok(text) = std::fs::read_to_string(address)
                && text.contains(':')
            {
                proxy.admin = text;
                if let Ok(ready) = proxy.admin("GET /ready").await
                    && ready.status() == 200
                {
                    return Ok(proxy);
                }
            }
            if Instant::now() > deadline {
                bail!("not ready in time: {}", proxy.last_words());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The end of what it wrote to stderr.
    pub(crate) fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.stderr).unwrap_or_default();
        let line = text.lines().rev().find(|l| l.contains("[critical]") || l.contains("panicked"));
        let line = line.or_else(|| text.lines().last()).unwrap_or_default();
        let end = line.chars().count().saturating_sub(300);
        if end < 300 {
            return line.to_owned();
        }
        line.chars().take(300).chain(" ... ".chars()).chain(line.chars().skip(end)).collect()
    }

    /// Asks the admin server: `METHOD /path`.
    pub(crate) async fn admin(&self, request: &str) -> Result<Message> {
        tokio::time::timeout(PATIENCE, ask(&self.admin, request)).await.context("admin did not answer")?
    }

    /// Every counter and gauge by name.
    pub(crate) async fn stats(&self) -> Result<std::collections::BTreeMap<String, i64>> {
        let text = String::from_utf8_lossy(&self.admin("GET /stats").await?.body).into_owned();
        Ok(text
            .lines()
            .filter_map(|l| l.rsplit_once(": "))
            .filter_map(|(n, v)| Some((n.to_owned(), v.parse().ok()?)))
            .collect())
    }

    /// Learns the ports of its listeners.
    pub(crate) async fn learn_ports(&self, place: &Place) -> Result<()> {
        let answer = self.admin("GET /listeners?format=json").await?;
        let json: Value = serde_json::from_slice(&answer.body).context("/listeners?format=json")?;
        let mut ports = place.ports.lock();
        for status in json["listener_statuses"].as_array().into_iter().flatten() {
            let port = &status["local_address"]["socket_address"]["port_value"];
            if let (Some(name), Some(port)) = (status["name"].as_str(), port.as_u64()) {
                ports.insert(name.to_owned(), u16::try_from(port)?);
            }
        }
        Ok(())
    }

    /// Port of a listener, which may have to appear first; `admin` is always there.
    pub(crate) async fn listener(&self, place: &Place, name: &str) -> Result<u16> {
        if name == "admin" {
            let port = self.admin.rsplit(':').next().unwrap_or_default();
            return port.parse().context("the admin address has no port");
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(port) = place.ports.lock().get(name) {
                return Ok(*port);
            }
            if Instant::now() > deadline {
                bail!("no listener {name}");
            }
            self.learn_ports(place).await?;
            tokio::time::sleep(POLL).await;
        }
    }

    /// Resident set in KiB.
    pub(crate) fn rss_kib(&self) -> u64 {
        let Some(pid) = self.child.id() else { return 0 };
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = text.lines().find(|l| l.starts_with("VmRSS")).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
    }

    /// Sends a signal by name, such as `TERM`.
    pub(crate) async fn signal(&self, name: &str) -> Result<()> {
        let pid = self.child.id().context("the proxy has ended")?;
        Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status().await?;
        Ok(())
    }

    /// Waits for the end and tells how: a code, or a signal.
    pub(crate) async fn wait(&mut self) -> Result<String> {
        let status = tokio::time::timeout(PATIENCE, self.child.wait()).await.context("did not end")??;
        Ok(describe(status))
    }

    /// Kills and reaps it.
    pub(crate) async fn stop(mut self) {
        let _ = self.child.kill().await;
    }
}

pub(crate) fn describe(status: std::process::ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".to_owned(),
    }
}

/// One request to an admin address.
pub(crate) async fn ask(address: &str, request: &str) -> Result<Message> {
    let stream = TcpStream::connect(address).await?;
    let mut conn = Conn::tcp(stream);
    let (method, path) = request.split_once(' ').context("METHOD /path")?;
    let length = if method == "POST" { "content-length: 0\r\n" } else { "" };
    conn.send(
        format!("{method} {path} HTTP/1.1\r\nhost: admin\r\n{length}connection: close\r\n\r\n").as_bytes(),
    )
    .await?;
    let (_, message) = http1::read_response(&mut conn, method == "HEAD").await;
    message.context("admin closed without an answer")
}

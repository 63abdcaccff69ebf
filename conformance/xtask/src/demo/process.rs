//! The programs that the demo starts.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::http;
use crate::run::describe;

/// How long a program may take to start.
const PATIENCE: Duration = Duration::from_secs(20);

/// Lines of a log that an error shows.
const SHOWN_LINES: usize = 20;

/// A running program; dropping it stops it.
#[derive(Debug)]
pub(super) struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Result<Self, String> {
        let line = describe(command);
        command
            .stdin(Stdio::null())
            .spawn()
            .map(Self)
            .map_err(|error| format!("cannot run `{line}`: {error}"))
    }

    /// Waits until the program ends by itself.
    pub(super) fn wait(&mut self) {
        // An error means that there is nothing to wait for.
        let _ = self.0.wait();
    }

    /// How it ended, if it did.
    fn ended(&mut self) -> Option<String> {
        self.0.try_wait().ok().flatten().map(|status| status.to_string())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail only when it has ended before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The management server, its addresses for xDS and for people.
pub(super) struct Control {
    _program: Program,
    pub(super) xds: SocketAddr,
    pub(super) admin: String,
}

/// Starts the management server on free ports; what it has to say is shown.
pub(super) fn start_control(waystation: &Path, folder: &Path) -> Result<Control, String> {
    let mut command = Command::new(waystation);
    command.args(["xds-server", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--dir"]).arg(folder);
    let mut program = Program::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    if let Some(stderr) = program.0.stderr.take() {
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                println!("     xds-server | {line}");
            }
        });
    }
    let stdout = program.0.stdout.take().ok_or("the management server has no output")?;
    // It ends when the program does, so that this cannot wait for ever.
    let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
    let mut next = |label: &str| {
        let line = lines.next().unwrap_or_default();
        let value = line.strip_prefix(label).map(|value| value.trim().to_owned());
        value.ok_or_else(|| {
            format!("the management server did not start (expected `{label} ...`, got {line:?})")
        })
    };
    let xds = next("xDS (plain):")?;
    let admin = next("admin:")?;
    let xds = xds.parse().map_err(|_| format!("the management server listens on {xds:?}"))?;
    Ok(Control { _program: program, xds, admin })
}

/// The proxy, and its admin address.
pub(super) struct Proxy {
    pub(super) program: Program,
    pub(super) admin: SocketAddr,
    log: PathBuf,
}

/// Starts the proxy and waits until it is ready; its log goes to a file.
pub(super) fn start_proxy(proxy: &Path, bootstrap: &Path, folder: &Path) -> Result<Proxy, String> {
    let log = folder.join("proxy.log");
    let explain = |error: std::io::Error| format!("{}: {error}", log.display());
    let file = File::create(&log).map_err(explain)?;
    let address_file = folder.join("admin-address");
    let mut command = Command::new(proxy);
    command
        .args(["--disable-hot-restart", "-c"])
        .arg(bootstrap)
        .arg("--admin-address-path")
        .arg(&address_file);
    command.stdout(file.try_clone().map_err(explain)?).stderr(file);
    let program = Program::start(&mut command)?;
    let mut proxy = Proxy { program, admin: SocketAddr::from(([127, 0, 0, 1], 0)), log };
    proxy.admin =
        proxy.until("its admin address", || fs::read_to_string(&address_file).ok()?.trim().parse().ok())?;
    let admin = proxy.admin;
    proxy.until("/ready", || ok(admin, "/ready"))?;
    Ok(proxy)
}

impl Proxy {
    /// Polls until there is what is waited for, or the proxy has ended, or too much time has passed.
    pub(super) fn until<T>(&mut self, what: &str, poll: impl Fn() -> Option<T>) -> Result<T, String> {
        let start = Instant::now();
        loop {
            if let Some(found) = poll() {
                return Ok(found);
            }
            let reason = match self.program.ended() {
                Some(status) => format!("the proxy ended: {status}"),
                None if start.elapsed() > PATIENCE => {
                    format!("the proxy is not there after {PATIENCE:?}: no {what}")
                }
                None => {
                    thread::sleep(Duration::from_millis(5));
                    continue;
                }
            };
            return Err(format!("{reason}\n{}", self.last_words()));
        }
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }
}

/// Something, when a page answers with 200.
pub(super) fn ok(address: SocketAddr, path: &str) -> Option<()> {
    http::get(address, path).ok().filter(|response| response.status == 200).map(|_| ())
}

//! The proxies: where they are, their versions, how each is started with its form of the same configuration.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::place::{Place, fill, free_address, template, write};
use super::process::Process;
use super::{LOAD_CORE, PROXY_CORE, client};
use crate::run;

/// How long any proxy may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(90);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Waystation,
    Envoy,
    Nginx,
    Haproxy,
}

/// All proxies, in the order of their rounds.
pub(super) const EVERYONE: [Kind; 4] = [Kind::Waystation, Kind::Envoy, Kind::Nginx, Kind::Haproxy];

/// Those that read an Envoy bootstrap.
pub(super) const BY_BOOTSTRAP: [Kind; 2] = [Kind::Waystation, Kind::Envoy];

pub(super) struct Peer {
    pub(super) kind: Kind,
    pub(super) version: String,
    program: PathBuf,
}

pub(super) struct Peers {
    pub(super) found: Vec<Peer>,
    /// With the reason.
    pub(super) missing: Vec<(Kind, String)>,
}

/// A running proxy.
pub(super) struct Proxy<'a> {
    pub(super) peer: &'a Peer,
    pub(super) process: Process,
    pub(super) listen: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) folder: PathBuf,
}

/// How to learn that a proxy serves.
#[derive(Clone, Copy)]
pub(super) enum Probe {
    /// A request through the listener of those that have no `/ready`.
    Request,
    /// Their listener accepts: it speaks TLS or HTTP/2 only.
    Connect,
}

/// nginx with the 43-byte answer, on the load generator's core.
pub(super) struct Origin {
    pub(super) http1: SocketAddr,
    pub(super) http2: SocketAddr,
    /// HTTP/1 on all addresses of this machine.
    pub(super) everywhere: SocketAddr,
    _process: Process,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Waystation => "waystation",
            Self::Envoy => "envoy",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
        }
    }

    /// The file of `conformance/bench` with this proxy's form of a configuration.
    fn file(self, config: &str) -> String {
        match self {
            Self::Waystation | Self::Envoy if config.contains('.') => format!("envoy/{config}"),
            Self::Waystation | Self::Envoy => format!("envoy/{config}.yaml"),
            Self::Nginx => format!("nginx/{config}.conf"),
            Self::Haproxy => format!("haproxy/{config}.cfg"),
        }
    }

    /// The command line after the program's name.
    pub(super) fn arguments(self, config: &str, folder: &str) -> Vec<String> {
        let line = match self {
            Self::Waystation | Self::Envoy => {
                format!("-c {config} --concurrency 1 --disable-hot-restart -l warning")
            }
            Self::Nginx => format!("-p {folder} -e stderr -c {config}"),
            Self::Haproxy => format!("-db -f {config}"),
        };
        line.split(' ').map(str::to_owned).collect()
    }
}

impl Peers {
    pub(super) fn find(waystation: Result<PathBuf, String>, envoy: Option<PathBuf>) -> Self {
        let places = [
            (Kind::Waystation, waystation),
            (Kind::Envoy, envoy.ok_or_else(|| "not on the path".to_owned())),
            (Kind::Nginx, run::find("nginx").ok_or_else(|| "not on the path".to_owned())),
            (Kind::Haproxy, run::find("haproxy").ok_or_else(|| "not on the path".to_owned())),
        ];
        let mut peers = Self { found: Vec::new(), missing: Vec::new() };
        for (kind, place) in places {
            // Processes are started in folders of their own.
            let program = place.and_then(|file| {
                file.canonicalize().map_err(|error| format!("cannot run {}: {error}", file.display()))
            });
            match program.and_then(|program| Ok((version(kind, &program)?, program))) {
                Ok((version, program)) => peers.found.push(Peer { kind, version, program }),
                Err(reason) => peers.missing.push((kind, reason)),
            }
        }
        peers
    }

    /// Those of the given kinds that this machine has.
    pub(super) fn of<'a>(&'a self, kinds: &'a [Kind]) -> impl Iterator<Item = &'a Peer> {
        self.found.iter().filter(|peer| kinds.contains(&peer.kind))
    }
}

impl Peer {
    /// Starts it in a new folder with a configuration; it need not serve yet.
    pub(super) fn start(
        &self,
        place: &Place,
        config: &str,
        values: &[(&str, &str)],
        prepare: impl FnOnce(&Path) -> Result<(), String>,
    ) -> Result<Proxy<'_>, String> {
        self.start_under(&[], place, config, values, prepare)
    }

    /// Starts it as what another program, given with its arguments, runs.
    pub(super) fn start_under(
        &self,
        wrapper: &[String],
        place: &Place,
        config: &str,
        values: &[(&str, &str)],
        prepare: impl FnOnce(&Path) -> Result<(), String>,
    ) -> Result<Proxy<'_>, String> {
        let name = self.kind.name();
        let folder = place.folder(name)?;
        prepare(&folder)?;
        let (listen, admin) = (free_address()?, free_address()?);
        let own = [
            ("@LISTEN@", &*listen.port().to_string()),
            ("@ADMIN@", &*admin.port().to_string()),
            ("@DIR@", &*folder.to_string_lossy()),
        ];
        let file = self.kind.file(config);
        let text = fill(&template(&file)?, &[&own[..], values].concat());
        let file = folder.join(Path::new(&file).file_name().unwrap_or_default());
        write(&file, &text)?;
        let arguments = self.kind.arguments(&file.to_string_lossy(), &folder.to_string_lossy());
        let own = std::iter::once(self.program.to_string_lossy().into_owned()).chain(arguments);
        let line: Vec<String> = wrapper.iter().cloned().chain(own).collect();
        let process = Process::start(name, Path::new(&line[0]), &line[1..], PROXY_CORE, &folder)?;
        Ok(Proxy { peer: self, process, listen, admin, folder })
    }
}

impl Proxy<'_> {
    /// Waits until it serves; the time since its start.
    pub(super) fn ready(&mut self, probe: Probe, poll: Duration) -> Result<Duration, String> {
        let limit = Duration::from_secs(5);
        loop {
            let serves = match (self.peer.kind, probe) {
                (Kind::Waystation | Kind::Envoy, _) => {
                    client::get(self.admin, "/ready", limit).is_ok_and(|answer| answer.status == 200)
                }
                (_, Probe::Request) => {
                    client::get(self.listen, "/", limit).is_ok_and(|answer| answer.status == 200)
                }
                (_, Probe::Connect) => TcpStream::connect_timeout(&self.listen, limit).is_ok(),
            };
            let elapsed = self.process.started.elapsed();
            if serves {
                return Ok(elapsed);
            }
            self.process.check()?;
            if elapsed > START_LIMIT {
                let words = self.process.last_words();
                return Err(format!("{} is not ready after {elapsed:.0?}: {words}", self.peer.kind.name()));
            }
            thread::sleep(poll);
        }
    }
}

impl Origin {
    pub(super) fn start(place: &Place) -> Result<Self, String> {
        let program = run::find("nginx").ok_or("`nginx` is not installed (it is the origin, too)")?;
        let folder = place.folder("origin")?;
        let (http1, http2, everywhere) = (free_address()?, free_address()?, free_address()?);
        let service = folder.join("envoy.service.auth.v3.Authorization");
        fs::create_dir_all(&service).map_err(|error| error.to_string())?;
        // A gRPC frame without content.
        write(&service.join("Check"), "\0\0\0\0\0")?;
        let text = fill(
            &template("nginx/origin.conf")?,
            &[
                ("@LISTEN@", &*http1.port().to_string()),
                ("@LISTEN_H2@", &*http2.port().to_string()),
                ("@EVERYWHERE@", &*everywhere.port().to_string()),
                ("@DIR@", &*folder.to_string_lossy()),
            ],
        );
        let file = folder.join("origin.conf");
        write(&file, &text)?;
        let arguments = Kind::Nginx.arguments(&file.to_string_lossy(), &folder.to_string_lossy());
        let mut process = Process::start("origin", &program, &arguments, LOAD_CORE, &folder)?;
        while !client::get(http1, "/", Duration::from_secs(1)).is_ok_and(|answer| answer.status == 200) {
            process.check()?;
            if process.started.elapsed() > START_LIMIT {
                return Err(format!("the origin does not answer: {}", process.last_words()));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { http1, http2, everywhere, _process: process })
    }
}

fn version(kind: Kind, program: &Path) -> Result<String, String> {
    let flag = if matches!(kind, Kind::Nginx | Kind::Haproxy) { "-v" } else { "--version" };
    let output = Command::new(program)
        .arg(flag)
        .output()
        .map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    // nginx tells it on standard error.
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find(|line| line.contains("ersion")).unwrap_or_default();
    let words = match kind {
        // `PROGRAM  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL`
        Kind::Waystation | Kind::Envoy => line.rsplit("version: ").next(),
        // `nginx version: nginx/1.22.1`, `HAProxy version 2.6.12-1 2026/01/01 - https://haproxy.org/`
        Kind::Nginx => line.rsplit('/').next(),
        Kind::Haproxy => line.split(' ').nth(2),
    };
    Ok(words.unwrap_or_default().trim().to_owned())
}

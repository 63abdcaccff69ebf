//! `cargo demo`: the proxy, its management server and two upstreams, changed live under load.
//!
//! `WAYSTATION_DEMO_PROXY=/path/to/envoy` puts another proxy in the place of ours, to compare.

use std::env;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use crate::run::{cargo, find, root, step, target};

mod http;
mod load;
mod process;
mod upstream;

use self::load::{Load, UPSTREAMS};
use self::process::{Control, Proxy};

/// The ports in the examples, which the demo replaces by free ones.
const XDS_PORT: &str = "port_value: 18000";
const ADMIN_PORT: &str = "port_value: 9901";
const LISTENER_PORT: &str = "port_value: 10000";
const ENDPOINT_PORT: &str = "port_value: 8080";

/// Load before the first change, between changes and after the last one.
const INTERLUDE: Duration = Duration::from_millis(700);

/// Runs the demo; an error when a request failed.
pub(crate) fn run(keep: bool) -> Result<(), String> {
    say("building the proxy (the first time takes a few minutes)");
    step(cargo().args(["build", "--quiet", "--package", "waystation"]))?;
    let waystation = target().join("debug/waystation");
    let proxy = env::var_os("WAYSTATION_DEMO_PROXY").map_or_else(|| waystation.clone(), PathBuf::from);
    let folder = Folder::new()?;
    let mut stage = Stage::set(&waystation, &proxy, &folder)?;
    stage.show()?;
    let failed = stage.change_under_load()?;
    stage.what_next(&folder);
    if keep {
        say(&format!("everything keeps running until Ctrl-C; files in {}", folder.path.display()));
        folder.keep();
        stage.proxy.program.wait();
        return Err("the proxy has ended".to_owned());
    }
    if failed == 0 { Ok(()) } else { Err(format!("{failed} requests failed")) }
}

/// Everything that runs.
struct Stage {
    control: Control,
    proxy: Proxy,
    config: Config,
    listener: SocketAddr,
    /// In the order of [`UPSTREAMS`].
    upstreams: Vec<SocketAddr>,
}

impl Stage {
    fn set(waystation: &Path, proxy: &Path, folder: &Folder) -> Result<Self, String> {
        let upstreams: Vec<SocketAddr> =
            UPSTREAMS.into_iter().map(upstream::start).collect::<Result<_, _>>()?;
        let listener = free_address()?;
        let config = Config { folder: folder.make("xds")? };
        config.copy("clusters.yaml", &[])?;
        config.copy("routes.yaml", &[])?;
        config.copy("listeners.yaml", &[(LISTENER_PORT, &port(listener))])?;
        config.copy("endpoints.yaml", &[(ENDPOINT_PORT, &port(upstreams[0]))])?;
        say("starting the management server on a folder of four files");
        let control = process::start_control(waystation, &config.folder)?;
        let bootstrap =
            example("bootstrap.yaml", &[(XDS_PORT, &port(control.xds)), (ADMIN_PORT, "port_value: 0")])?;
        let file = folder.path.join("bootstrap.yaml");
        write(&file, &bootstrap)?;
        say(&format!("starting {} with a bootstrap that names only the server", proxy.display()));
        let start = Instant::now();
        let mut proxy = process::start_proxy(proxy, &file, &folder.path)?;
        proxy.until("the listener from the server", || process::ok(listener, "/hello"))?;
        println!("     ready and serving what it was sent after {} ms", start.elapsed().as_millis());
        Ok(Self { control, proxy, config, listener, upstreams })
    }

    /// A request of each kind.
    fn show(&self) -> Result<(), String> {
        say("requests");
        for path in ["/hello", "/"] {
            let response = http::get(self.listener, path)?;
            println!("     HTTP/1.1  GET {path:<7} {}  {}", response.status, response.body.trim_end());
        }
        if find("curl").is_none() {
            println!("     HTTP/2    skipped: curl is not installed");
            return Ok(());
        }
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--max-time", "5", "--http2-prior-knowledge"]);
        curl.args(["--write-out", "HTTP/%{http_version} %{http_code}"])
            .arg(format!("http://{}/", self.listener));
        let output = curl.output().map_err(|error| format!("curl: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        // curl shows the body first.
        match text.rsplit_once('\n') {
            Some((body, "HTTP/2 200")) => println!("     HTTP/2    GET /       200  {body}"),
            _ if String::from_utf8_lossy(&output.stderr).contains("does not support") => {
                println!("     HTTP/2    skipped: this curl does not speak it");
            }
            _ => {
                let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
                return Err(format!("HTTP/2 request failed: {text:?} {complaint}"));
            }
        }
        Ok(())
    }

    /// Changes one thing after the other while requests flow; the number of requests that failed.
    fn change_under_load(&mut self) -> Result<u64, String> {
        say("8 clients send requests without pause while the configuration changes");
        let load = Load::start(self.listener);
        let result = self.changes(&load);
        let (tally, failures) = load.stop();
        result?;
        let (requests, failed) = (tally.requests.load(Relaxed), tally.failed.load(Relaxed));
        let answers: Vec<String> =
            UPSTREAMS.iter().map(|name| format!("{name} {}", tally.from(name))).collect();
        println!("\n     {requests} requests, {failed} failed requests; answered by {}", answers.join(", "));
        failures.iter().for_each(|reason| println!("     failed: {reason}"));
        Ok(failed)
    }

    fn changes(&self, load: &Load) -> Result<(), String> {
        let tell = |what: &str, took: Duration| println!("     {what} after {} ms", took.as_millis());
        load.wait("the first answer", |tally| tally.from("a") > 0)?;
        thread::sleep(INTERLUDE);

        println!("\n  -- routes.yaml: x-demo-version 1 becomes 2");
        let before = "value: \"1\"";
        self.config.copy("routes.yaml", &[(before, "value: \"2\"")])?;
        tell(
            "the first answer with the new header",
            load.wait("the new header", |tally| tally.version(2) > 0)?,
        );
        thread::sleep(INTERLUDE);

        println!("\n  -- endpoints.yaml: the endpoint of upstream a becomes that of upstream b");
        self.config.copy("endpoints.yaml", &[(ENDPOINT_PORT, &port(self.upstreams[1]))])?;
        tell("the first answer of b", load.wait("an answer of b", |tally| tally.from("b") > 0)?);
        thread::sleep(INTERLUDE);

        println!("\n  -- canary.yaml: a new cluster with its endpoint, and in the same moment");
        println!("  -- routes.yaml: a fifth of the requests goes there");
        let weighted =
            "weighted_clusters: {clusters: [{name: echo, weight: 80}, {name: canary, weight: 20}]}";
        self.config.copy("routes.yaml", &[(before, "value: \"3\""), ("cluster: echo", weighted)])?;
        self.config.write("canary.yaml", &canary(self.upstreams[2])?)?;
        tell(
            "the first answer of canary",
            load.wait("an answer of canary", |tally| tally.from("canary") > 0)?,
        );
        thread::sleep(INTERLUDE);

        println!("\n  -- routes.yaml: a mistake");
        self.config.copy("routes.yaml", &[(before, "value: \"4\""), ("prefix: /", "prefx: /")])?;
        thread::sleep(INTERLUDE);
        if load.tally().version(4) > 0 {
            return Err("the mistake has reached the proxy".to_owned());
        }
        println!("     the proxy has not noticed");
        Ok(())
    }

    fn what_next(&self, folder: &Folder) {
        let (listener, admin) = (self.listener, self.proxy.admin);
        say("what there is to see and to try (with `cargo demo --keep`)");
        println!("     the proxy's admin page      http://{admin}/");
        println!("     the server's page           {}", self.control.admin);
        println!("     a request                   curl -i http://{listener}/");
        println!("     what the proxy was sent     curl http://{admin}/config_dump");
        println!("     its clusters                curl http://{admin}/clusters");
        println!("     change something            edit the files in {}", self.config.folder.display());
        println!("     the bootstrap               {}", folder.path.join("bootstrap.yaml").display());
    }
}

/// The management server's folder.
struct Config {
    folder: PathBuf,
}

impl Config {
    /// Puts an example there, with some texts replaced.
    fn copy(&self, name: &str, replace: &[(&str, &str)]) -> Result<(), String> {
        self.write(name, &example(&format!("xds/{name}"), replace)?)
    }

    /// Moves a file into place, as editors and Kubernetes do.
    fn write(&self, name: &str, text: &str) -> Result<(), String> {
        let draft = self.folder.join(format!(".{name}"));
        let place = self.folder.join(name);
        write(&draft, text)?;
        fs::rename(&draft, &place).map_err(|error| format!("{}: {error}", place.display()))
    }
}

/// The cluster `canary` and its endpoint, made from those of `echo`.
fn canary(endpoint: SocketAddr) -> Result<String, String> {
    let cluster = example("xds/clusters.yaml", &[("name: echo", "name: canary")])?;
    let endpoints = example(
        "xds/endpoints.yaml",
        &[("cluster_name: echo", "cluster_name: canary"), (ENDPOINT_PORT, &port(endpoint))],
    )?;
    Ok(format!("{cluster}---\n{endpoints}"))
}

/// An example with some texts replaced; each must be there.
fn example(name: &str, replace: &[(&str, &str)]) -> Result<String, String> {
    let path = root().join("examples").join(name);
    let mut text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    for (old, new) in replace {
        if !text.contains(old) {
            return Err(format!("{} has no `{old}`, which the demo replaces", path.display()));
        }
        text = text.replace(old, new);
    }
    Ok(text)
}

fn port(address: SocketAddr) -> String {
    format!("port_value: {}", address.port())
}

/// An address that nobody listens on. The system does not give it out again soon.
fn free_address() -> Result<SocketAddr, String> {
    let listener = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.map_err(|error| format!("no free port: {error}"))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn say(text: &str) {
    println!("\n== {text}");
}

/// A temporary folder, removed at the end.
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn new() -> Result<Self, String> {
        let path = env::temp_dir().join(format!("waystation-demo-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { path })
    }

    fn make(&self, name: &str) -> Result<PathBuf, String> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(path)
    }

    /// Leaves it where it is.
    fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed now, the system removes some day.
        let _ = fs::remove_dir_all(&self.path);
    }
}

//! The command lines with which real launchers start the binary, each of which has to work unmodified.

use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use regex::Regex;
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::proxy::{PATIENCE, ask};
use crate::wire::latin1;

const LAUNCHERS: [&str; 6] =
    ["pilot-agent", "kuma-dp", "kuma-dp --cpuset-threads", "consul", "envoy gateway", "go-control-plane"];

/// Starts the subject as each launcher does.
pub(crate) async fn run(subject: &Path) -> Result<ExitCode> {
    let mut failed = 0;
    for launcher in LAUNCHERS {
        match one(launcher, subject).await {
            Ok(()) => println!("{launcher:26} ok"),
            Err(error) => {
                failed += 1;
                println!("{launcher:26} FAILED  {error:#}");
            }
        }
    }
    println!("\n{} passed, {failed} failed, 0 skipped", LAUNCHERS.len() - failed);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn one(launcher: &str, subject: &Path) -> Result<()> {
    let tmp = tempfile::Builder::new().prefix("rig").tempdir()?;
    match launcher {
        "pilot-agent" => pilot_agent(subject, tmp.path()).await,
        "kuma-dp" => kuma(subject, tmp.path(), &["--concurrency", "2"]).await,
        "kuma-dp --cpuset-threads" => kuma(subject, tmp.path(), &["--cpuset-threads"]).await,
        "consul" => consul(subject, tmp.path()).await,
        "envoy gateway" => envoy_gateway(subject, tmp.path()).await,
        _ => go_control_plane(subject, tmp.path()).await,
    }
}

fn spawn(command: &mut Command, tmp: &Path) -> Result<Child> {
    let log = std::fs::File::create(tmp.join("stderr.log"))?;
    Ok(command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .current_dir(tmp)
        .kill_on_drop(true)
        .spawn()?)
}

/// A port for a config that must name one.
fn port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn address(port: u16) -> Value {
    json!({"socketAddress": {"address": "127.0.0.1", "portValue": port}})
}

/// Polls an admin path as launchers do, until it answers so.
async fn poll(child: &mut Child, tmp: &Path, admin: &str, request: &str, body: &str) -> Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait()? {
            let log = std::fs::read_to_string(tmp.join("stderr.log")).unwrap_or_default();
            bail!("ended with {status}: {}", log.lines().last().unwrap_or_default());
        }
        let answer = ask(admin, request).await;
        if let Ok(answer) = &answer
            && answer.status() == 200
            && latin1(&answer.body).contains(body)
        {
            return Ok(latin1(&answer.body));
        }
        if Instant::now() > deadline {
            bail!("{request}: {:?}", answer.map(|a| (a.status(), latin1(&a.body))));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn terminate(mut child: Child) -> Result<()> {
    let pid = child.id().context("it has ended")?.to_string();
    Command::new("kill").args(["-TERM", &pid]).status().await?;
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.context("SIGTERM did not end it")??;
    ensure!(status.code() == Some(0), "SIGTERM: {status}");
    Ok(())
}

/// A listener that answers by itself, in lower camel case.
fn listener(port: u16) -> Value {
    json!({"name": "l", "address": address(port), "filterChains": [{"filters": [{"name": "d", "typedConfig": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.direct_response.v3.Config",
        "response": {"inlineString": "served"}}}]}]})
}

async fn served(port: u16) -> Result<()> {
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    let mut conn = crate::wire::Conn::tcp(stream);
    ensure!(conn.read_all().await == b"served", "the listener does not serve");
    Ok(())
}

/// A bootstrap below the working directory, unknown Istio fields allowed, then a graceful drain and SIGKILL.
async fn pilot_agent(subject: &Path, tmp: &Path) -> Result<()> {
    let (admin, listen) = (port()?, port()?);
    std::fs::create_dir_all(tmp.join("etc/istio/proxy"))?;
    let config = json!({
        "node": {"id": "sidecar~10.0.0.1~p.ns~ns.svc.cluster.local", "cluster": "p.ns", "locality": {},
            "metadata": {"ISTIO_VERSION": "1.31"}},
        "admin": {"access_log_path": "/dev/null", "profile_path": "/dev/null", "address": address(admin)},
        "static_resources": {"listeners": [listener(listen)]},
        "stats_config": {"use_all_default_tags": false, "stats_tags": [
            {"tag_name": "cluster_name", "regex": "^cluster\\.((.+?(\\..+?\\.svc\\.cluster\\.local)?)\\.)"}]},
    });
    std::fs::write(tmp.join("etc/istio/proxy/envoy-rev.json"), config.to_string())?;
    let mut command = Command::new(subject);
    command.args([
        "-c",
        "etc/istio/proxy/envoy-rev.json",
        "--drain-time-s",
        "45",
        "--drain-strategy",
        "immediate",
    ]);
    command.args([
        "--local-address-ip-version",
        "v4",
        "--file-flush-interval-msec",
        "1000",
        "--disable-hot-restart",
    ]);
    command.args(["--allow-unknown-static-fields", "-l", "warning", "--component-log-level", "misc:error"]);
    command.args(["--skip-deprecated-logs", "--concurrency", "1"]);
    let mut child = spawn(&mut command, tmp)?;
    let admin = format!("127.0.0.1:{admin}");
    poll(&mut child, tmp, &admin, "GET /ready", "LIVE").await?;
    let filter = "GET /stats?usedonly&filter=^(server.state|listener_manager.workers_started)";
    let stats = poll(&mut child, tmp, &admin, filter, "workers_started: 1").await?;
    ensure!(stats.contains("server.state: 0"), "{stats}");
    served(listen).await?;
    let drained = ask(&admin, "POST /drain_listeners?graceful").await?;
    ensure!(latin1(&drained.body) == "OK\n", "drain: {drained:?}");
    child.kill().await?;
    Ok(())
}

/// `--version` first, its five parts parsed; then YAML in lower camel case.
async fn kuma(subject: &Path, tmp: &Path, threads: &[&str]) -> Result<()> {
    let output = Command::new(subject).arg("--version").output().await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split("version: ").nth(1).context("no `version: ` on stdout")?.trim().to_owned();
    let parts: Vec<&str> = version.split('/').collect();
    ensure!(parts.len() == 5, "{version} has {} parts", parts.len());
    ensure!(Regex::new(r"^\d+\.\d+\.\d+")?.is_match(parts[1]), "{} is no version", parts[1]);
    let (admin, listen) = (port()?, port()?);
    let mut listener = listener(listen);
    listener["name"] = json!("inbound");
    let pipe = tmp.join("kuma.sock").display().to_string();
    let config = json!({
        "node": {"id": "mesh.dp", "cluster": "svc"},
        "admin": {"address": address(admin)},
        "defaultRegexEngine": {"name": "envoy.regex_engines.google_re2", "typedConfig":
            {"@type": "type.googleapis.com/envoy.extensions.regex_engines.v3.GoogleRE2"}},
        "statsConfig": {"statsTags": [{"tagName": "name", "regex": "^grpc\\.((.+)\\.)"}]},
        "staticResources": {
            "listeners": [listener, {"name": "pipe", "address": {"pipe": {"path": pipe}},
                "filterChains": listener["filterChains"]}],
            "clusters": [{"name": "access_log_sink", "type": "STATIC", "connectTimeout": "5s", "loadAssignment":
                {"clusterName": "access_log_sink", "endpoints": [{"lbEndpoints": [{"endpoint": {"address":
                    {"pipe": {"path": "/tmp/none.sock"}}}}]}]}}]},
    });
    let path = tmp.join("bootstrap.yaml");
    std::fs::write(&path, serde_yaml_ng::to_string(&config)?)?;
    let mut command = Command::new(subject);
    command.arg("--config-path").arg(&path).args(["--drain-time-s", "30", "--drain-strategy", "immediate"]);
    command.args([
        "--disable-hot-restart",
        "--log-level",
        "info",
        "--component-log-level",
        "upstream:warning",
    ]);
    command.args(threads);
    let mut child = spawn(&mut command, tmp)?;
    let admin = format!("127.0.0.1:{admin}");
    poll(&mut child, tmp, &admin, "GET /ready", "LIVE").await?;
    served(listen).await?;
    ensure!(std::fs::metadata(&pipe).is_ok(), "no pipe listener");
    poll(
        &mut child,
        tmp,
        &admin,
        "GET /stats?format=prometheus&text_readouts=&filter=server.live",
        "envoy_server_live",
    )
    .await?;
    poll(&mut child, tmp, &admin, "GET /config_dump", "inbound").await?;
    poll(&mut child, tmp, &admin, "GET /clusters", "access_log_sink::").await?;
    ask(&admin, "POST /healthcheck/fail").await?;
    ask(&admin, "POST /drain_listeners?inboundonly&graceful&skip_exit").await?;
    terminate(child).await
}

/// The bootstrap comes through a named pipe; the process is replaced in place; the first x.y.z is the version.
async fn consul(subject: &Path, tmp: &Path) -> Result<()> {
    let output = Command::new(subject).arg("--version").output().await?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let version =
        Regex::new(r"\d+\.\d+\.\d+")?.find(&text).context("no x.y.z in --version")?.as_str().to_owned();
    let parts: Vec<u32> = version.split('.').map(str::parse).collect::<Result<_, _>>()?;
    ensure!(parts >= vec![1, 33, 0], "{version} is too old for Consul");
    let (admin, listen, metrics) = (port()?, port()?, port()?);
    let config = json!({
        "admin": {"access_log_path": "/dev/null", "address": address(admin)},
        "node": {"cluster": "web", "id": "web-proxy", "metadata": {"namespace": "default", "envoy_version": version}},
        "layered_runtime": {"layers": [{"name": "base", "static_layer": {"re2.max_program_size.error_level": 1048576}}]},
        "static_resources": {
            "clusters": [{"name": "self_admin", "ignore_health_on_host_removal": false, "connect_timeout": "5s",
                "type": "STATIC", "loadAssignment": {"clusterName": "self_admin", "endpoints": [{"lbEndpoints":
                    [{"endpoint": {"address": address(admin)}}]}]}}],
            "listeners": [listener(listen), {"name": "envoy_prometheus_metrics_listener", "address": address(metrics),
                "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typedConfig": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                    "stat_prefix": "envoy_prometheus_metrics", "codec_type": "HTTP1",
                    "route_config": {"name": "self_admin_route", "virtual_hosts": [{"name": "self_admin", "domains": ["*"],
                        "routes": [{"match": {"path": "/metrics"}, "route": {"cluster": "self_admin",
                            "prefix_rewrite": "/stats/prometheus"}}]}]},
                    "http_filters": [{"name": "envoy.filters.http.router", "typedConfig":
                        {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]}}]}]}]},
        "stats_config": {"stats_tags": [{"regex": "^cluster\\.(?:passthrough~)?((?:([^.]+)~)?(?:[^.]+\\.)?[^.]+\\.)",
            "tag_name": "consul.destination.custom_hash"}, {"tag_name": "local_cluster", "fixed_value": "web"}],
            "use_all_default_tags": true},
    });
    let pipe = tmp.join("envoy-bootstrap.json");
    let made = Command::new("mkfifo").arg(&pipe).status().await?;
    ensure!(made.success(), "mkfifo");
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\""]).arg(subject).arg("--config-path").arg(&pipe);
    command.args(["--disable-hot-restart", "--log-level", "info"]);
    let mut child = spawn(&mut command, tmp)?;
    // Opening waits for the reader, and the whole of it is written once.
    let text = config.to_string();
    let writer = tokio::task::spawn_blocking(move || std::fs::write(pipe, text));
    tokio::time::timeout(PATIENCE, writer).await.context("nobody read the pipe")???;
    let admin = format!("127.0.0.1:{admin}");
    poll(&mut child, tmp, &admin, "GET /ready", "LIVE").await?;
    served(listen).await?;
    poll(&mut child, tmp, &format!("127.0.0.1:{metrics}"), "GET /metrics", "envoy_server_live").await?;
    terminate(child).await
}

/// The whole bootstrap on the command line, admin on port 0 with its address in a file, hot restart on.
async fn envoy_gateway(subject: &Path, tmp: &Path) -> Result<()> {
    let listen = port()?;
    let file = tmp.join("admin-address");
    let mut inner = listener(listen);
    inner["name"] = json!("tcp");
    let config = json!({
        "admin": {"accessLog": [{"name": "envoy.access_loggers.file", "typedConfig":
            {"@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog", "path": "/dev/null"}}],
            "address": address(0)},
        "bootstrapExtensions": [],
        "node": {"locality": {"zone": "$(ENVOY_SERVICE_ZONE)"}},
        "layeredRuntime": {"layers": [{"name": "global_config", "staticLayer":
            {"envoy.restart_features.use_eds_cache_for_ads": true, "re2.max_program_size.error_level": 4294967295_u64}}]},
        "overloadManager": {"refreshInterval": "0.25s", "resourceMonitors": [
            {"name": "envoy.resource_monitors.global_downstream_max_connections", "typedConfig": {
                "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "maxActiveDownstreamConnections": "50000"}}]},
        "deferredStatOptions": {"enableDeferredCreationStats": true},
        "staticResources": {"listeners": [inner]},
    });
    let mut command = Command::new(subject);
    command.args(["--service-cluster", "default/eg", "--service-node", "node-1", "--config-yaml"]);
    command.arg(serde_yaml_ng::to_string(&config)?);
    command.args([
        "--log-level",
        "warn",
        "--cpuset-threads",
        "--drain-strategy",
        "immediate",
        "--concurrency",
        "1",
    ]);
    command.args(["--component-log-level", "misc:error", "--drain-time-s", "1", "--admin-address-path"]);
    command.arg(&file).args(["--", "--run-id", "0"]);
    let mut child = spawn(&mut command, tmp)?;
    let deadline = Instant::now() + PATIENCE;
    let admin = loop {
        match std::fs::read_to_string(&file) {
            Ok(text) if text.contains(':') => break text,
            _ if Instant::now() > deadline => {
                let log = std::fs::read_to_string(tmp.join("stderr.log")).unwrap_or_default();
                bail!("no admin address: {}", log.lines().last().unwrap_or_default());
            }
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    poll(&mut child, tmp, &admin, "GET /ready", "LIVE").await?;
    served(listen).await?;
    let info = poll(&mut child, tmp, &admin, "GET /server_info", "node-1").await?;
    ensure!(info.contains("default/eg") && info.contains("$(ENVOY_SERVICE_ZONE)"), "node in server_info");
    poll(&mut child, tmp, &admin, "GET /config_dump?include_eds", "BootstrapConfigDump").await?;
    terminate(child).await
}

/// Old fields, and little else on the command line.
async fn go_control_plane(subject: &Path, tmp: &Path) -> Result<()> {
    let (admin, xds, als) = (port()?, port()?, port()?);
    let old = |name: &str, port: u16| {
        json!({"name": name, "connect_timeout": "1s", "load_assignment": {"cluster_name": name, "endpoints":
            [{"lb_endpoints": [{"endpoint": {"address": address(port)}}]}]}, "http2_protocol_options": {}})
    };
    let config = json!({
        "admin": {"access_log_path": "/dev/null", "address": address(admin)},
        "dynamic_resources": {
            "cds_config": {"resource_api_version": "V3", "ads": {}, "initial_fetch_timeout": "0.1s"},
            "lds_config": {"resource_api_version": "V3", "ads": {}, "initial_fetch_timeout": "0.1s"},
            "ads_config": {"api_type": "GRPC", "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds_cluster"}}],
                "set_node_on_first_message_only": true}},
        "node": {"cluster": "test-cluster", "id": "test-id"},
        "static_resources": {"clusters": [old("xds_cluster", xds), old("als_cluster", als)]},
    });
    let path = tmp.join("bootstrap-ads.yaml");
    std::fs::write(&path, serde_yaml_ng::to_string(&config)?)?;
    let mut command = Command::new(subject);
    // The driver leaves hot restart on; its base id is the machine's default, so two runs may not overlap.
    command.arg("-c").arg(&path).args(["--drain-time-s", "1", "-l", "debug"]);
    let mut child = spawn(&mut command, tmp)?;
    let admin = format!("127.0.0.1:{admin}");
    poll(&mut child, tmp, &admin, "GET /ready", "LIVE").await?;
    poll(&mut child, tmp, &admin, "GET /clusters", "als_cluster::").await?;
    terminate(child).await
}

//! Where things are in one run of one case file: ports, certificates, the temporary folder; and how the traces
//! of them are taken out of what is recorded.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use anyhow::{Context as _, Result, bail};
use parking_lot::Mutex;
use regex::{Captures, Regex};
use serde_json::Value;

use crate::case::Normalise;
use crate::certs::Certs;

/// Names to values, both ways.
pub(crate) struct Place {
    pub(crate) tmp: PathBuf,
    pub(crate) certs: Arc<Certs>,
    pub(crate) upstreams: BTreeMap<String, u16>,
    /// Ports of listeners, learnt from the admin server; ports of configs, reserved on first use.
    pub(crate) ports: Mutex<BTreeMap<String, u16>>,
    pub(crate) binary: PathBuf,
}

static PLACEHOLDER: LazyLock<Regex> = LazyLock::new(|| pattern(r"\{\{([a-z_0-9]+)(?::([^}]+))?\}\}"));
static UUID: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"));
static DATE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z",
    )
});
static MILLIS: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?i)(x-envoy-upstream-service-time: )\d+"));
/// What is left of the default fifteen seconds.
static LEFT: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"(x-envoy-expected-rq-timeout-ms: )1(4[5-9]\d\d|5000)\b"));
static LOCAL: LazyLock<Regex> = LazyLock::new(|| pattern(r"127\.0\.0\.1:(\d{4,5})\b"));

/// The rig's own expressions are constants.
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant expression")
}

impl Place {
    /// Fills in `{{...}}`.
    pub(crate) fn fill(&self, text: &str) -> Result<String> {
        let mut failure = None;
        let out = PLACEHOLDER.replace_all(text, |c: &Captures<'_>| {
            self.value(&c[1], c.get(2).map_or("", |m| m.as_str())).unwrap_or_else(|e| {
                failure = Some(e);
                String::new()
            })
        });
        match failure {
            Some(e) => Err(e).with_context(|| text.chars().take(200).collect::<String>()),
            None => Ok(out.into_owned()),
        }
    }

    fn value(&self, kind: &str, name: &str) -> Result<String> {
        let cert = || self.certs.get(name).with_context(|| format!("no certificate {name}"));
        Ok(match kind {
            "tmp" => self.tmp.display().to_string(),
            "upstream" => {
                self.upstreams.get(name).with_context(|| format!("no upstream {name}"))?.to_string()
            }
            "port" => self.port(name)?.to_string(),
            "cert" => self.tmp.join(format!("certs/{name}.pem")).display().to_string(),
            "key" => self.tmp.join(format!("certs/{name}.key")).display().to_string(),
            "pem" => cert()?.pem.clone(),
            "key_pem" => cert()?.key_pem.clone(),
            "hash" => cert()?.hash.clone(),
            "spki" => cert()?.spki.clone(),
            _ => bail!("unknown placeholder {kind}"),
        })
    }

    pub(crate) fn port(&self, name: &str) -> Result<u16> {
        let mut ports = self.ports.lock();
        if let Some(port) = ports.get(name) {
            return Ok(*port);
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        ports.insert(name.to_owned(), port);
        Ok(port)
    }

    /// Fills in every string of a tree. A string that is one placeholder of a port becomes a number.
    pub(crate) fn fill_tree(&self, value: &Value) -> Result<Value> {
        Ok(match value {
            Value::String(text) => {
                let filled = self.fill(text)?;
                let whole = text.starts_with("{{") && text.find("}}") == Some(text.len() - 2);
                match filled.parse::<u16>() {
                    Ok(port) if whole => Value::from(port),
                    _ => Value::String(filled),
                }
            }
            Value::Array(items) => {
                Value::Array(items.iter().map(|v| self.fill_tree(v)).collect::<Result<_>>()?)
            }
            Value::Object(map) => Value::Object(
                map.iter().map(|(k, v)| Ok((self.fill(k)?, self.fill_tree(v)?))).collect::<Result<_>>()?,
            ),
            other => other.clone(),
        })
    }

    /// Takes everything out of a recorded tree that differs from run to run.
    pub(crate) fn normalise(&self, value: &mut Value, extra: &[&Normalise]) -> Result<()> {
        let extra: Vec<(Regex, &str)> =
            extra.iter().map(|n| Ok((Regex::new(&n.regex)?, n.with.as_str()))).collect::<Result<_>>()?;
        self.visit(value, &extra);
        Ok(())
    }

    fn visit(&self, value: &mut Value, extra: &[(Regex, &str)]) {
        match value {
            Value::String(text) => *text = self.plain(text, extra),
            Value::Array(items) => items.iter_mut().for_each(|v| self.visit(v, extra)),
            Value::Object(map) => {
                for (key, value) in map {
                    if key == "port_value" && value.is_number() {
                        *value = Value::from("{port}");
                    }
                    self.visit(value, extra);
                }
            }
            _ => {}
        }
    }

    fn plain(&self, text: &str, extra: &[(Regex, &str)]) -> String {
        let mut out = UUID.replace_all(text, "{uuid}").into_owned();
        out = DATE.replace_all(&out, "{date}").into_owned();
        out = MILLIS.replace_all(&out, "$1{ms}").into_owned();
        out = LEFT.replace_all(&out, "${1}15000").into_owned();
        out = LOCAL.replace_all(&out, |c: &Captures<'_>| self.named_port(&c[1])).into_owned();
        for (name, cert) in self.certs.iter() {
            if out.contains(&cert.hash) {
                out = out.replace(&cert.hash, &format!("{{hash:{name}}}"));
            }
            if out.contains(&cert.spki) {
                out = out.replace(&cert.spki, &format!("{{spki:{name}}}"));
            }
        }
        out = out.replace(&self.tmp.display().to_string(), "{tmp}");
        out = out.replace(&self.binary.display().to_string(), "{binary}");
        if let Some(ip) = LOCAL_IP.as_deref() {
            out = out.replace(ip, "{local-ip}");
        }
        for (regex, with) in extra {
            out = regex.replace_all(&out, *with).into_owned();
        }
        out
    }

    fn named_port(&self, port: &str) -> String {
        let Ok(number) = port.parse::<u16>() else { return format!("127.0.0.1:{port}") };
        if let Some((name, _)) = self.upstreams.iter().find(|(_, p)| **p == number) {
            return format!("{{upstream:{name}}}");
        }
        let ports = self.ports.lock();
        match ports.iter().find(|(_, p)| **p == number) {
            Some((name, _)) => format!("{{port:{name}}}"),
            None => "127.0.0.1:{port}".to_owned(),
        }
    }
}

/// Envoy writes the machine's own address into `x-forwarded-for` for a loopback peer. Connecting a datagram
/// socket sends nothing and tells that address.
static LOCAL_IP: LazyLock<Option<String>> = LazyLock::new(|| {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.77:9").ok()?;
    Some(socket.local_addr().ok()?.ip().to_string()).filter(|ip| ip != "127.0.0.1")
});

/// Replaces a file in one step, as every tool that feeds a watched file does.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let fresh = path.with_extension("fresh");
    std::fs::write(&fresh, bytes)?;
    std::fs::rename(fresh, path)?;
    Ok(())
}

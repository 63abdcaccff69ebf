//! The case file: what a person writes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::wire::bytes_of;

/// One YAML file: a configuration and the cases that run against it in one process.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct CaseFile {
    /// What the file is about, for the reader.
    pub(crate) about: Option<String>,
    /// Scripted upstreams by name; each becomes a STATIC cluster of that name.
    pub(crate) upstreams: BTreeMap<String, UpstreamSpec>,
    /// HTTP listeners by name: fields of the connection manager, plus `listener:` and `tls:`.
    pub(crate) http: BTreeMap<String, Value>,
    /// Fields that every HTTP connection manager gets.
    pub(crate) hcm: Value,
    /// The virtual hosts of each HTTP listener that names none.
    pub(crate) virtual_hosts: Value,
    /// The route table of a single `*` virtual host, where that is all there is to say.
    pub(crate) routes: Value,
    pub(crate) listeners: Vec<Value>,
    pub(crate) clusters: Vec<Value>,
    /// Merged over the whole bootstrap.
    pub(crate) bootstrap: Value,
    /// The whole bootstrap as a template instead of everything above.
    pub(crate) config: Option<String>,
    /// Access log format of the HTTP listeners instead of the usual one.
    pub(crate) log_format: Option<String>,
    /// Files put into `{{tmp}}` before the start.
    pub(crate) files: BTreeMap<String, Value>,
    /// Has the embedded management server serve the folder `{{tmp}}/xds` at `{{port:xds}}`; a cluster `xds` leads there.
    pub(crate) xds: bool,
    /// More arguments for the proxy.
    pub(crate) args: Vec<String>,
    /// Only for YAML anchors.
    #[serde(rename = "anchors")]
    _anchors: Value,
    /// A process of its own for each case.
    pub(crate) isolated: bool,
    pub(crate) normalise: Vec<Normalise>,
    cases: Vec<Value>,
    #[serde(skip)]
    pub(crate) parsed: Vec<Case>,
    /// `topic/stem`.
    #[serde(skip)]
    pub(crate) name: String,
}

/// An upstream of the rig.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "Value")]
pub(crate) struct UpstreamSpec {
    pub(crate) kind: Kind,
    /// Name of the certificate when it speaks TLS.
    pub(crate) tls: Option<String>,
    pub(crate) alpn: Vec<String>,
    pub(crate) client_ca: bool,
    /// Fields merged into the generated cluster; `false` for no cluster.
    pub(crate) cluster: Value,
    /// Answers in each case before those of the case itself.
    pub(crate) answers: Vec<Answer>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    H1,
    H2,
    Tcp,
    /// An access log service.
    Als,
    /// A port where nobody listens.
    Refuse,
}

impl TryFrom<Value> for UpstreamSpec {
    type Error = serde_json::Error;
    fn try_from(value: Value) -> Result<Self, Self::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Full {
            kind: Kind,
            tls: Option<String>,
            #[serde(default)]
            alpn: Vec<String>,
            #[serde(default)]
            client_ca: bool,
            #[serde(default)]
            cluster: Value,
            #[serde(default)]
            answers: Vec<Answer>,
        }
        let full = match value {
            Value::String(_) => Full {
                kind: serde_json::from_value(value)?,
                tls: None,
                alpn: vec![],
                client_ca: false,
                cluster: Value::Null,
                answers: vec![],
            },
            other => serde_json::from_value(other)?,
        };
        let Full { kind, tls, alpn, client_ca, cluster, answers } = full;
        Ok(Self { kind, tls, alpn, client_ca, cluster, answers })
    }
}

/// A replacement made in every recorded string.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Normalise {
    pub(crate) regex: String,
    pub(crate) with: String,
}

/// A difference that is known and wanted.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Deviation {
    pub(crate) reason: String,
    /// Where results may differ: prefixes of the paths in the report; `[]` stands for any index.
    pub(crate) at: Vec<String>,
}

/// One case.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) about: Option<String>,
    /// Answers of the upstreams, in the order of their requests.
    pub(crate) upstream: BTreeMap<String, Vec<Answer>>,
    pub(crate) steps: Vec<Step>,
    /// Access log lines to wait for; the number of final responses read unless set.
    pub(crate) logs: Option<usize>,
    /// Counters recorded as differences over the case.
    pub(crate) stats: Vec<String>,
    pub(crate) deviation: Vec<Deviation>,
    pub(crate) normalise: Vec<Normalise>,
    /// Record over which upstream connection each request came.
    pub(crate) connections: bool,
    /// Do not record what upstreams saw, with the reason.
    pub(crate) unseen: Option<String>,
    /// Record only so many of the first requests that each upstream saw: of what repeats by time.
    pub(crate) first_seen: Option<usize>,
}

const CASE_KEYS: [&str; 11] = [
    "name",
    "about",
    "upstream",
    "steps",
    "logs",
    "stats",
    "deviation",
    "normalise",
    "connections",
    "unseen",
    "first_seen",
];

/// What an upstream does for one request or connection.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(try_from = "Value")]
pub(crate) struct Answer(pub(crate) AnswerSpec);

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct AnswerSpec {
    pub(crate) at: At,
    /// Only for requests whose path begins so.
    pub(crate) path: Option<String>,
    /// For all that follow: what it answers is not used up.
    pub(crate) always: bool,
    pub(crate) delay: u64,
    /// Interim heads, such as `103`.
    pub(crate) interim: Vec<String>,
    pub(crate) status: Option<u16>,
    pub(crate) reason: Option<String>,
    pub(crate) version: Option<String>,
    pub(crate) headers: Vec<String>,
    pub(crate) body: Option<Text>,
    pub(crate) chunks: Option<Vec<Text>>,
    pub(crate) trailers: Vec<String>,
    /// HTTP/2: a gRPC response of these messages; `grpc-status: 0` unless there are `trailers`.
    pub(crate) grpc: Option<Vec<Value>>,
    /// Bytes instead of a response.
    pub(crate) raw: Option<Text>,
    /// Bytes after `raw` or the response, each with its delay before it.
    pub(crate) later: Vec<Later>,
    pub(crate) then: Then,
    /// HTTP/2: reset the stream with this code instead of, or after, the answer.
    pub(crate) reset: Option<String>,
    /// HTTP/2: GOAWAY before the answer.
    pub(crate) goaway: bool,
    /// Neither `date` nor framing nor identity is added.
    pub(crate) bare: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Later {
    #[serde(default)]
    pub(crate) delay: u64,
    pub(crate) raw: Text,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum At {
    Accept,
    Head,
    #[default]
    Request,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Then {
    #[default]
    Keep,
    Close,
    Reset,
    /// Say nothing more until the peer goes.
    Hang,
    HalfClose,
    /// A tunnel that echoes.
    Echo,
}

impl TryFrom<Value> for Answer {
    type Error = serde_json::Error;
    fn try_from(value: Value) -> Result<Self, Self::Error> {
        Ok(Self(match value {
            Value::String(_) => AnswerSpec { then: serde_json::from_value(value)?, ..AnswerSpec::default() },
            Value::Number(_) => {
                AnswerSpec { status: serde_json::from_value(value)?, ..AnswerSpec::default() }
            }
            other => serde_json::from_value(other)?,
        }))
    }
}

/// Bytes: a string (each character up to U+00FF is one byte), `{fill: N}` or `{hex: ".."}`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(try_from = "Value")]
pub(crate) struct Text(pub(crate) Vec<u8>);

impl TryFrom<Value> for Text {
    type Error = String;
    fn try_from(value: Value) -> Result<Self, Self::Error> {
        if let Some(text) = value.as_str() {
            return Ok(Self(bytes_of(text)));
        }
        if let Some(n) = value.get("fill").and_then(Value::as_u64) {
            let with = value.get("with").and_then(Value::as_str).unwrap_or("x").as_bytes()[0];
            return Ok(Self(vec![with; n as usize]));
        }
        if let Some(hex) = value.get("hex").and_then(Value::as_str) {
            let digits: String = hex.chars().filter(|c| !c.is_whitespace()).collect();
            let byte = |i| u8::from_str_radix(&digits[i..i + 2], 16).map_err(|e| e.to_string());
            return (0..digits.len() / 2).map(|i| byte(i * 2)).collect::<Result<_, _>>().map(Self);
        }
        Err(format!("not bytes: {value}"))
    }
}

/// One thing the client does. Exactly one of the verbs is set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Step {
    // Verbs.
    /// A request: `GET` to this path.
    pub(crate) get: Option<String>,
    /// A request: `METHOD path`.
    pub(crate) request: Option<String>,
    /// Head lines sent verbatim with CRLF, then `body`.
    pub(crate) head: Option<Vec<String>>,
    /// Bytes sent verbatim.
    pub(crate) raw: Option<Text>,
    /// Only reads on a named connection.
    pub(crate) receive: Option<Value>,
    /// HTTP/2 frames by hand.
    pub(crate) frames: Option<Vec<FrameSpec>>,
    /// `METHOD /path` of the admin server.
    pub(crate) admin: Option<String>,
    /// Stats that must reach a value: `+N` since the start of the case, or a plain number.
    pub(crate) wait: Option<BTreeMap<String, Value>>,
    /// Requests that upstreams must have seen.
    pub(crate) wait_seen: Option<BTreeMap<String, usize>>,
    /// An upstream, of which the first `times` requests since the start are recorded, once there are as many.
    pub(crate) seen: Option<String>,
    /// Answers of upstreams from now on, in place of those that are left.
    pub(crate) answer: Option<BTreeMap<String, Vec<Answer>>>,
    /// What the application log must come to say, as an expression.
    pub(crate) wait_log: Option<String>,
    /// A request repeated until it answers so: `{get: .., status: N, body: text, header: "n: v"}`.
    pub(crate) until: Option<Until>,
    /// A file that the proxy writes; waits for `times` lines and records them.
    pub(crate) file: Option<String>,
    /// Files replaced by an atomic rename.
    pub(crate) write: Option<BTreeMap<String, Value>>,
    pub(crate) signal: Option<String>,
    /// Waits for the proxy to end.
    pub(crate) exit: Option<bool>,
    /// Runs the binary by itself.
    pub(crate) exec: Option<Exec>,
    pub(crate) half_close: Option<String>,
    pub(crate) close: Option<String>,
    pub(crate) reset: Option<String>,
    /// Milliseconds; only for a scenario that *is* slowness, never to wait for an effect.
    pub(crate) pause: Option<u64>,

    // What belongs to a request.
    pub(crate) host: Option<String>,
    pub(crate) headers: Vec<String>,
    pub(crate) body: Option<Text>,
    pub(crate) chunks: Option<Vec<Text>>,
    pub(crate) trailers: Vec<String>,
    pub(crate) version: Option<String>,
    pub(crate) to: Option<String>,
    pub(crate) on: Option<String>,
    pub(crate) h2: bool,
    pub(crate) scheme: Option<String>,
    pub(crate) tls: Option<ClientTls>,
    /// `response` (default), a number of responses, `close`, `nothing`, `{bytes: N}`, `{until: text}`.
    pub(crate) read: Option<Value>,
    /// Record whether the proxy closes the connection after the response.
    pub(crate) then_closed: bool,
    /// Only these response headers are recorded.
    pub(crate) only: Option<Vec<String>>,
    /// Response headers in their order.
    pub(crate) ordered: bool,
    /// Repeats and counts.
    pub(crate) times: Option<usize>,
    /// With `tally`: so many of them at a time, over connections of their own.
    pub(crate) at_once: Option<usize>,
    pub(crate) tally: Option<Tally>,
    /// Admin: `body` (default), `status`, `shape`, `lines: regex`, `json: /pointer`.
    pub(crate) show: Option<Value>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Until {
    #[serde(default)]
    pub(crate) get: Option<String>,
    #[serde(default)]
    pub(crate) admin: Option<String>,
    #[serde(default)]
    pub(crate) host: Option<String>,
    #[serde(default)]
    pub(crate) to: Option<String>,
    #[serde(default)]
    pub(crate) status: Option<u16>,
    #[serde(default)]
    pub(crate) body: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tally {
    /// Header that is counted, `status`, or `body`.
    pub(crate) by: String,
    /// Bounds for each value: `[least, most]`. Other values are recorded as they come.
    #[serde(default)]
    pub(crate) within: BTreeMap<String, (usize, usize)>,
    /// Record only how many values there were.
    #[serde(default)]
    pub(crate) distinct: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ClientTls {
    pub(crate) sni: Option<String>,
    pub(crate) alpn: Vec<String>,
    pub(crate) cert: Option<String>,
    /// `1.2` or `1.3` only.
    pub(crate) version: Option<String>,
    /// Only these suites, in this order, by rustls' names; which one was chosen is recorded.
    pub(crate) ciphers: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct FrameSpec {
    pub(crate) preface: bool,
    pub(crate) stream: u32,
    pub(crate) headers: Option<Vec<String>>,
    pub(crate) data: Option<Text>,
    pub(crate) end: bool,
    pub(crate) rst: Option<String>,
    pub(crate) ping: bool,
    pub(crate) goaway: bool,
    pub(crate) window: Option<u32>,
    /// Any frame: `[type, flags, hex]`.
    pub(crate) any: Option<(u8, u8, String)>,
}

/// The binary run by itself, as a validator or a one-shot.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Exec {
    pub(crate) args: Vec<String>,
    /// Written to `{{tmp}}/config.yaml` (text) or `config.json` (anything else), or to the file named below.
    pub(crate) config: Option<Value>,
    /// Another name for that file.
    pub(crate) file: Option<String>,
    /// Expressions; each is recorded as found in stderr or not.
    pub(crate) stderr: Vec<String>,
    pub(crate) stdout: bool,
    /// Record this many last lines of stderr without their prefixes.
    pub(crate) last: usize,
}

/// Reads every case file below `dir`, sorted by name.
pub(crate) fn load(dir: &Path, filter: Option<&str>) -> Result<Vec<CaseFile>> {
    let mut paths = Vec::new();
    for topic in std::fs::read_dir(dir).with_context(|| format!("cases in {}", dir.display()))? {
        let topic = topic?.path();
        if topic.is_dir() {
            for file in std::fs::read_dir(topic)? {
                let file = file?.path();
                if file.extension().is_some_and(|e| e == "yaml") {
                    paths.push(file);
                }
            }
        }
    }
    paths.sort();
    let mut out = Vec::new();
    for path in paths {
        let mut file = read(dir, &path).with_context(|| path.display().to_string())?;
        if let Some(filter) = filter {
            let name = file.name.clone();
            let (of_file, of_case) = filter.split_once("::").unwrap_or((filter, ""));
            if !name.contains(of_file) {
                file.parsed.retain(|c| of_case.is_empty() && c.name.contains(of_file));
            } else {
                file.parsed.retain(|c| c.name.contains(of_case));
            }
        }
        if !file.parsed.is_empty() {
            out.push(file);
        }
    }
    Ok(out)
}

fn read(dir: &Path, path: &PathBuf) -> Result<CaseFile> {
    let text = std::fs::read_to_string(path)?;
    let mut yaml: serde_yaml_ng::Value = serde_yaml_ng::from_str(&text)?;
    yaml.apply_merge()?;
    let mut file: CaseFile = serde_json::from_value(serde_json::to_value(yaml)?)?;
    file.name = path.strip_prefix(dir)?.with_extension("").display().to_string();
    for value in std::mem::take(&mut file.cases) {
        let case = case(value.clone()).with_context(|| format!("case {value}"))?;
        if file.parsed.iter().any(|c| c.name == case.name) {
            bail!("two cases are named {:?}", case.name);
        }
        file.parsed.push(case);
    }
    Ok(file)
}

/// A case with one step may write the step's keys beside its own.
fn case(value: Value) -> Result<Case> {
    let Value::Object(map) = value else { bail!("a case is a map") };
    let (own, step): (Map<_, _>, Map<_, _>) =
        map.into_iter().partition(|(k, _)| CASE_KEYS.contains(&k.as_str()));
    let mut case: Case = serde_json::from_value(Value::Object(own))?;
    if !step.is_empty() {
        if !case.steps.is_empty() {
            bail!("`steps` and a step's keys together");
        }
        case.steps.push(serde_json::from_value(Value::Object(step))?);
    }
    if case.name.is_empty() || case.steps.is_empty() {
        bail!("a case needs a name and steps");
    }
    Ok(case)
}

//! The admin interface: a thread of its own, so that no scrape delays traffic or xDS.
//!
//! What it shows of the configuration it asks the main thread for, as references to encoded messages. What may be long
//! is rendered and written by threads that stand behind it (`body`): `/ready` waits for nobody's million lines.

pub mod access_log;
mod body;
pub mod certs;
mod clusters;
pub mod config_dump;
mod connection;
mod counting;
mod endpoints;
mod info;
mod logging;
mod page;
mod runtime;
mod stats_body;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderValue, SERVER,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Request, Response, StatusCode, Version};
use percent_encoding::percent_decode_str;
use socket2::Socket;
use waystation_filter_api::address::Address;
use waystation_http::{PathOptions, PathOutcome, normalize_path};
use waystation_matchers::StringMatcher;
use waystation_schema::{JsonStyle, Message, wire_to_json};

use crate::cli::options::Options;
use crate::context::Shared;
use crate::control::MainThread;
use access_log::{AdminLogs, Peers};
use body::{Body, full, render};
use endpoints::ENDPOINTS;
pub(crate) use info::address_proto;

/// A request body (form values of `/runtime_modify`) is read up to this size.
const BODY_LIMIT: usize = 64 * 1024;

/// As Envoy's admin listener treats paths.
const PATHS: PathOptions = PathOptions {
    normalize: true,
    merge_slashes: true,
    escaped_slashes: waystation_http::EscapedSlashes::Keep,
};

/// What the endpoints work with.
#[derive(Clone, Debug)]
pub(crate) struct Admin {
    pub(crate) shared: Arc<Shared>,
    pub(crate) options: Arc<Options>,
    pub(crate) main: MainThread,
    pub(crate) node: Arc<[u8]>,
    /// `allow_paths`; empty allows all.
    allowed: Arc<[StringMatcher]>,
    logs: AdminLogs,
    stats: Arc<counting::AdminStats>,
    /// `/stats/recentlookups`: whether it is said to be tracked. No name is looked up while traffic is served, so there
    /// is nothing to track.
    tracks_lookups: Arc<AtomicBool>,
}

/// A decoded query.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: &str) -> Self {
        // A plus is a plus, as in Envoy: regular expressions are full of them.
        let decode = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (decode(name), decode(value))
                })
                .collect(),
        )
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> + Clone {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

impl Admin {
    fn peers(&self, local: Address, remote: Address) -> Peers {
        Peers { id: self.shared.reserve_connection_ids(1), local, remote }
    }
}

/// Starts the thread that serves `socket`.
pub fn spawn(
    socket: Socket,
    shared: Arc<Shared>,
    options: Arc<Options>,
    main: MainThread,
    node: Arc<[u8]>,
    allowed: Vec<StringMatcher>,
    logs: AdminLogs,
) -> io::Result<()> {
    let stats = counting::AdminStats::new(&shared.stats.root());
    let admin = Admin {
        shared,
        options,
        main,
        node,
        allowed: allowed.into(),
        logs,
        stats,
        tracks_lookups: Arc::default(),
    };
    std::thread::Builder::new().name("admin".to_owned()).spawn(move || {
        let runtime =
            body::with_renderers(tokio::runtime::Builder::new_current_thread().enable_all()).build();
        let result = runtime.and_then(|runtime| runtime.block_on(connection::serve(socket, admin)));
        if let Err(error) = result {
            tracing::error!(target: "admin", "the admin interface ended: {error}");
        }
    })?;
    Ok(())
}

async fn handle(admin: &Admin, request: Request<Incoming>) -> Response<Body> {
    let target = request.uri().path_and_query().map_or("", |target| target.as_str());
    // Envoy matches the path with its query.
    let allowed = |matcher: &StringMatcher| matcher.is_match(target.as_bytes());
    if !admin.allowed.is_empty() && !admin.allowed.iter().any(allowed) {
        return text(StatusCode::FORBIDDEN, format!("request to path {target} not allowed"));
    }
    if let Some(refusal) = refuse(&request) {
        return refusal;
    }
    let path = match normalize_path(request.uri().path().as_bytes(), PATHS) {
        PathOutcome::Unchanged => request.uri().path().to_owned(),
        PathOutcome::Changed(path) => String::from_utf8_lossy(&path).into_owned(),
        PathOutcome::Redirect(_) | PathOutcome::Reject => return bare(StatusCode::BAD_REQUEST, ""),
    };
    let mut query = Query::parse(request.uri().query().unwrap_or_default());
    let Some(endpoint) = ENDPOINTS.iter().find(|endpoint| endpoint.path == path) else {
        return text(StatusCode::NOT_FOUND, format!("invalid path. {}", endpoints::help()));
    };
    if endpoint.post && request.method() != Method::POST {
        let method = request.method();
        let body = format!("Method {method} not allowed, POST required.");
        return text(StatusCode::METHOD_NOT_ALLOWED, body);
    }
    if endpoint.post && is_form(&request) {
        match Limited::new(request.into_body(), BODY_LIMIT).collect().await {
            Ok(body) => {
                let form = String::from_utf8_lossy(&body.to_bytes()).into_owned();
                query.0.extend(Query::parse(&form).0);
            }
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("cannot read the body: {error}\n")),
        }
    }
    match path.as_str() {
        "/" => html(page::home()),
        "/certs" => certs::certs(admin).await,
        "/clusters" => clusters::clusters(admin, &query).await,
        "/config_dump" => config_dump::config_dump(admin, &query).await,
        "/contention" => text(StatusCode::OK, "Mutex contention tracing is not available."),
        "/drain_listeners" => info::drain_listeners(admin, &query).await,
        "/healthcheck/fail" => info::health_check(admin, true).await,
        "/healthcheck/ok" => info::health_check(admin, false).await,
        "/help" => text(StatusCode::OK, endpoints::help()),
        "/hot_restart_version" => text(StatusCode::OK, "disabled"),
        "/init_dump" => info::init_dump(admin).await,
        "/listeners" => info::listeners(admin, &query).await,
        "/logging" => logging::logging(&query),
        "/memory" => info::memory(),
        "/quitquitquit" => info::quit(),
        "/ready" => info::ready(admin),
        "/reopen_logs" => info::reopen_logs(admin),
        "/reset_counters" => {
            admin.shared.stats.reset_counters();
            ok()
        }
        "/runtime" => runtime::runtime(admin),
        "/runtime_modify" => runtime::modify(admin, &query).await,
        "/server_info" => info::server_info(admin),
        "/stats" => stats_body::stats(admin, &query, false),
        "/stats/prometheus" => stats_body::stats(admin, &query, true),
        "/stats/recentlookups" => stats_body::recent_lookups(admin),
        "/stats/recentlookups/clear" => ok(),
        "/stats/recentlookups/disable" => stats_body::track_lookups(admin, false),
        "/stats/recentlookups/enable" => stats_body::track_lookups(admin, true),
        // The table above and this one are compared by a test.
        _ => text(StatusCode::NOT_FOUND, format!("invalid path. {}", endpoints::help())),
    }
}

fn is_form(request: &Request<Incoming>) -> bool {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with("application/x-www-form-urlencoded"))
}

/// What Envoy's codec and connection manager refuse before a path is looked at.
fn refuse(request: &Request<Incoming>) -> Option<Response<Body>> {
    let is_http1 = request.version() <= Version::HTTP_11;
    if request.version() < Version::HTTP_11 {
        return Some(bare(StatusCode::UPGRADE_REQUIRED, "Upgrade Required"));
    }
    if is_http1 && !request.headers().contains_key(HOST) {
        return Some(bare(StatusCode::BAD_REQUEST, ""));
    }
    // An absolute target is for proxies.
    (is_http1 && request.uri().scheme().is_some()).then(|| {
        let mut response = bare(StatusCode::NOT_FOUND, "");
        response.headers_mut().remove(CONNECTION);
        response
    })
}

/// An answer of the codec's, or the connection manager's: it ends its connection.
fn bare(status: StatusCode, body: &'static str) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    if !body.is_empty() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    }
    headers.insert(SERVER, HeaderValue::from_static("envoy"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// The headers that all answers carry.
pub(crate) fn respond(status: StatusCode, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, max-age=0"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(SERVER, HeaderValue::from_static("envoy"));
    response
}

pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    respond(status, "text/plain; charset=UTF-8", full(body))
}

pub(crate) fn ok() -> Response<Body> {
    text(StatusCode::OK, "OK\n")
}

fn html(body: String) -> Response<Body> {
    respond(StatusCode::OK, "text/html; charset=UTF-8", full(body))
}

/// The main thread did not answer: it is on its way out.
pub(crate) fn shutting_down() -> Response<Body> {
    text(StatusCode::SERVICE_UNAVAILABLE, "the process is shutting down\n")
}

/// A protobuf message as Envoy's admin JSON.
pub(crate) fn json(type_name: &str, wire: &[u8], style: JsonStyle) -> Response<Body> {
    let mut body = String::new();
    let rendered = Message::find(type_name).map(|message| wire_to_json(message, wire, &mut body, style));
    match rendered {
        Some(Ok(())) => {
            body.push('\n');
            respond(StatusCode::OK, "application/json", full(body))
        }
        other => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot render {type_name}: {other:?}\n")),
    }
}

/// The bind address of the admin interface, from the bootstrap.
pub fn address(
    admin: &envoy_types::pb::envoy::config::bootstrap::v3::Admin,
) -> Result<Option<crate::listener::config::ListenAddress>, waystation_schema::ConfigError> {
    use waystation_schema::At as _;
    let Some(address) = &admin.address else {
        return Ok(None);
    };
    let options = crate::address::socket_options(&admin.socket_options).at(|| "socket_options")?;
    let address = crate::address::listen(address).at(|| "address")?;
    Ok(Some(crate::listener::config::ListenAddress { address, mode: None, ipv4_compat: false, options }))
}

/// `allow_paths` of the bootstrap.
pub fn allowed_paths(
    admin: &envoy_types::pb::envoy::config::bootstrap::v3::Admin,
) -> Result<Vec<StringMatcher>, waystation_schema::ConfigError> {
    use waystation_schema::At as _;
    let compile = |(i, matcher)| StringMatcher::compile(matcher).at(|| format!("allow_paths[{i}]"));
    admin.allow_paths.iter().enumerate().map(compile).collect()
}

/// What `--admin-address-path` holds: the address without a newline.
pub fn address_text(socket: &Socket) -> io::Result<String> {
    let local = socket.local_addr()?;
    Ok(match local.as_socket() {
        Some(address) => Address::Ip(address).to_string(),
        None => local.as_pathname().map(|path| path.display().to_string()).unwrap_or_default(),
    })
}

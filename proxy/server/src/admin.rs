//! The admin interface: a thread of its own, so that no scrape delays traffic or xDS.
//!
//! What it shows of the configuration it asks the main thread for, as references to encoded messages. What may be long
//! is rendered by threads that stand behind it (`render`): `/ready` waits for nobody's million lines.

pub mod access_log;
mod certs;
mod clusters;
pub mod config_dump;
mod counting;
mod endpoints;
mod info;
mod logging;
mod page;
mod runtime;
mod stats_body;

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Frame, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, SERVER, X_CONTENT_TYPE_OPTIONS};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use socket2::Socket;
use waystation_filter_api::address::Address;
use waystation_matchers::StringMatcher;
use waystation_schema::{JsonStyle, Message, wire_to_json};

use crate::cli::options::Options;
use crate::context::Shared;
use crate::control::MainThread;
use crate::memory;
use access_log::{AdminLogs, Peers};
use endpoints::ENDPOINTS;

/// A request body (form values of `/runtime_modify`) is read up to this size.
const BODY_LIMIT: usize = 64 * 1024;

/// The size of a piece of a long answer.
const CHUNK: usize = 64 * 1024;

/// Threads that render; more requests than these wait for one of them. They end when there is nothing to render.
const RENDERERS: usize = 2;

/// Of the renderers, against 0 of everybody else.
const RENDERER_NICENESS: i32 = 10;

pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

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
}

/// A decoded query.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: &str) -> Self {
        let decode = |part: &str| {
            let spaced = part.replace('+', " ");
            percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
        };
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
    let admin = Admin { shared, options, main, node, allowed: allowed.into(), logs, stats };
    std::thread::Builder::new().name("admin".to_owned()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("admin:render")
            .max_blocking_threads(RENDERERS)
            .on_thread_start(yield_to_others)
            .on_thread_stop(memory::give_back)
            .build();
        let result = runtime.and_then(|runtime| runtime.block_on(serve(socket, admin)));
        if let Err(error) = result {
            tracing::error!(target: "admin", "the admin interface ended: {error}");
        }
    })?;
    Ok(())
}

/// A scrape on a busy processor takes its time from neither traffic nor `/ready`.
fn yield_to_others() {
    // Only Linux keeps the niceness by thread. A sandbox may refuse it: the renderer is then a thread like the others.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::nice(RENDERER_NICENESS);
}

async fn serve(socket: Socket, admin: Admin) -> io::Result<()> {
    let unix = socket.local_addr()?.as_unix().is_some() || socket.local_addr()?.is_unix();
    if unix {
        let listener = tokio::net::UnixListener::from_std(socket.into())?;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let path =
                        stream.local_addr().ok().and_then(|at| Some(at.as_pathname()?.display().to_string()));
                    let path = Address::Pipe(path.unwrap_or_default().into());
                    let peers = admin.peers(path.clone(), path);
                    spawn_connection(TokioIo::new(stream), peers, admin.clone());
                }
                Err(error) => accept_failed(&error).await,
            }
        }
    }
    let listener = tokio::net::TcpListener::from_std(socket.into())?;
    loop {
        match listener.accept().await {
            Ok((stream, remote)) => {
                let local = stream.local_addr().unwrap_or(remote);
                let peers = admin.peers(Address::Ip(local), Address::Ip(remote));
                spawn_connection(TokioIo::new(stream), peers, admin.clone());
            }
            Err(error) => accept_failed(&error).await,
        }
    }
}

/// Out of descriptors, most likely: wait for some to come back rather than spin.
async fn accept_failed(error: &io::Error) {
    tracing::warn!(target: "admin", "cannot accept: {error}");
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
}

fn spawn_connection<I>(io: TokioIo<I>, peers: Peers, admin: Admin)
where
    TokioIo<I>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        let _connection = admin.stats.connection();
        let (main, quits) = (admin.main.clone(), Arc::new(AtomicBool::new(false)));
        let asked = Arc::clone(&quits);
        let service = service_fn(move |request| {
            let (admin, asked) = (admin.clone(), Arc::clone(&asked));
            let logged = admin.logs.note(&peers, &request);
            async move {
                let counted = admin.stats.request();
                let response = handle(&admin, request).await;
                counted.answered(response.status().as_u16());
                if response.extensions().get::<info::Quit>().is_some() {
                    asked.store(true, Ordering::Relaxed);
                }
                Ok::<_, Infallible>(match logged {
                    Some(logged) => logged.answered(response),
                    None => response,
                })
            }
        });
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(io, service);
        if let Err(error) = connection.await {
            tracing::debug!(target: "admin", "admin connection: {error}");
        }
        // Not before the answer is written: nothing of this thread outlives the main one.
        if quits.load(Ordering::Relaxed) {
            main.ask(|server| server.quit()).await;
        }
    });
}

async fn handle(admin: &Admin, request: Request<Incoming>) -> Response<Body> {
    let target = request.uri().path_and_query().map_or("", |target| target.as_str());
    // Envoy matches the path with its query.
    let allowed = |matcher: &StringMatcher| matcher.is_match(target.as_bytes());
    if !admin.allowed.is_empty() && !admin.allowed.iter().any(allowed) {
        return text(StatusCode::FORBIDDEN, format!("request to path {target} not allowed"));
    }
    let path = request.uri().path().to_owned();
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
        "/stats" => stats_body::stats(admin, &query, false).await,
        "/stats/prometheus" => stats_body::stats(admin, &query, true).await,
        // The table above and this one are compared by a test.
        _ => text(StatusCode::NOT_FOUND, format!("invalid path. {}", endpoints::help())),
    }
}

fn is_form(request: &Request<Incoming>) -> bool {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with("application/x-www-form-urlencoded"))
}

/// Does what may take long on a thread that nobody waits for.
pub(crate) async fn render<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // The runtime lives as long as its thread, so nothing is cancelled.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
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

/// A body that is there already, sent chunked as Envoy's admin sends all of its answers.
pub(crate) fn full(body: impl Into<Bytes>) -> Body {
    Rendered(body.into()).boxed_unsync()
}

/// Handed over piece by piece: other requests go between two writes of a long one.
struct Rendered(Bytes);

impl hyper::body::Body for Rendered {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.0.is_empty() {
            return Poll::Ready(None);
        }
        let end = self.0.len().min(CHUNK);
        Poll::Ready(Some(Ok(Frame::data(self.0.split_to(end)))))
    }
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

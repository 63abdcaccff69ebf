//! Access logs of the admin interface (`admin.access_log`).

use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use envoy_types::pb::envoy::config::accesslog::v3 as log_pb;
use envoy_types::pb::envoy::config::bootstrap::v3 as pb;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::FileAccessLog;
use envoy_types::pb::google::protobuf::Any;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Frame, Incoming};
use hyper::{Request, Response};
use prost::{Message as _, Name as _};
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::stream::{Protocol, StreamInfo};
use waystation_format::{AccessLog, AccessLogType, FormatContext};
use waystation_http::{HeaderName, Headers, Known};
use waystation_schema::{At as _, ConfigError};

use super::body::Body;
use crate::context::Shared;
use crate::worker::local_ip;

/// The logs of the admin interface.
#[derive(Clone, Debug, Default)]
pub struct AdminLogs(Option<Arc<Logs>>);

#[derive(Debug)]
struct Logs {
    logs: Vec<AccessLog>,
    /// Stands in `x-forwarded-for` for a client on this host.
    node_ip: IpAddr,
}

/// Who talks to the admin interface.
#[derive(Clone, Debug)]
pub(super) struct Peers {
    pub(super) id: u64,
    pub(super) local: Address,
    pub(super) remote: Address,
}

/// A request that will be logged when its answer has been given.
pub(super) struct Logged {
    logs: Arc<Logs>,
    peers: Peers,
    request: Headers,
    received: u64,
    version: Protocol,
    start: Instant,
    started: SystemTime,
}

impl AdminLogs {
    /// Compiles `access_log`, and the deprecated `access_log_path`.
    #[expect(deprecated, reason = "old configurations still name it")]
    pub fn compile(admin: &pb::Admin, shared: &Shared) -> Result<Self, ConfigError> {
        let compile =
            |proto: &log_pb::AccessLog| AccessLog::compile(proto, &shared.access_logs, &shared.runtime);
        let mut logs = Vec::with_capacity(admin.access_log.len());
        for (i, proto) in admin.access_log.iter().enumerate() {
            logs.push(compile(proto).at(|| format!("access_log[{i}]"))?);
        }
        if !admin.access_log_path.is_empty() {
            let file = FileAccessLog { path: admin.access_log_path.clone(), ..FileAccessLog::default() };
            let any = Any { type_url: FileAccessLog::type_url(), value: file.encode_to_vec() };
            let config_type = Some(log_pb::access_log::ConfigType::TypedConfig(any));
            let proto = log_pb::AccessLog { config_type, ..log_pb::AccessLog::default() };
            logs.push(compile(&proto).at(|| "access_log_path")?);
        }
        let logs = (!logs.is_empty()).then(|| Arc::new(Logs { logs, node_ip: local_ip() }));
        Ok(Self(logs))
    }

    /// Notes a request; `None` when nothing is logged.
    pub(super) fn note(&self, peers: &Peers, request: &Request<Incoming>) -> Option<Logged> {
        let logs = self.0.as_ref()?;
        let mut head = Headers::default();
        head.append(Known::Method, request.method().as_str());
        head.append(Known::Path, request.uri().path_and_query().map_or("", |target| target.as_str()));
        head.append(Known::Scheme, "http");
        copy(request.headers(), &mut head);
        // What Envoy's admin listener, which has no hops before it, makes of a request.
        if let Some(remote) = peers.remote.ip() {
            let client = if remote.ip().is_loopback() { logs.node_ip } else { remote.ip() };
            head.set(Known::XForwardedFor, client.to_string());
        }
        head.set(Known::XForwardedProto, "http");
        Some(Logged {
            logs: Arc::clone(logs),
            peers: peers.clone(),
            request: head,
            received: request.body().size_hint().exact().unwrap_or_default(),
            version: match request.version() {
                hyper::Version::HTTP_10 => Protocol::Http10,
                hyper::Version::HTTP_2 => Protocol::Http2,
                _ => Protocol::Http11,
            },
            start: Instant::now(),
            started: SystemTime::now(),
        })
    }
}

impl Logged {
    /// Has the line written at the end of the answer.
    pub(super) fn answered(self, response: Response<Body>) -> Response<Body> {
        let mut head = Headers::default();
        head.append(Known::Status, response.status().as_str());
        copy(response.headers(), &mut head);
        let code = response.status().as_u16();
        response.map(|inner| Answer { inner, sent: 0, code, head, logged: self }.boxed_unsync())
    }

    fn write(&self, response: &Headers, code: u16, sent: u64) {
        let Peers { id, local, remote } = self.peers.clone();
        let connection = ConnectionInfo::new(id, self.start, local, remote);
        let version = Some(self.version);
        let mut info = StreamInfo::new(id, self.start, self.started, Rc::new(connection), version);
        let now = Instant::now();
        info.response_code = code;
        info.details = Some("admin_filter_response".into());
        info.timing.complete = Some(now);
        info.bytes.body_received = self.received;
        info.bytes.body_sent = sent;
        let cx = FormatContext {
            request: Some(&self.request),
            response: Some(response),
            trailers: None,
            info: &info,
            local_reply_body: "",
            log_type: AccessLogType::DownstreamEnd,
            now,
        };
        for log in &self.logs.logs {
            log.log(&cx, fastrand::u64(..));
        }
    }
}

/// An answer's body; logs when it has ended or nobody wants more of it.
struct Answer {
    inner: Body,
    sent: u64,
    code: u16,
    head: Headers,
    logged: Logged,
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.sent += data.len() as u64;
        }
        Poll::Ready(frame)
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.logged.write(&self.head, self.code, self.sent);
    }
}

fn copy(from: &hyper::HeaderMap, to: &mut Headers) {
    for (name, value) in from {
        // The formatters know a request's host as its authority.
        let name = if *name == hyper::header::HOST {
            Ok(Known::Authority.into())
        } else {
            HeaderName::parse(name.as_str())
        };
        if let Ok(name) = name {
            to.append(&name, value.as_bytes());
        }
    }
}

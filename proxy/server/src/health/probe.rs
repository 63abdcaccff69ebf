//! Asking one host how it is: a check in flight, and the connection that is kept for the next.

mod grpc;
mod http;
mod http2;
mod payload;
mod tcp;

use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::stream::{Protocol, StreamInfo};
use waystation_format::{AccessLogType, FormatContext, HeaderMutations};
use waystation_http::{Headers, Known};
use waystation_tls::ClientOptions;
use waystation_upstream::health_check::{Answer, Failure, HealthCheck};
use waystation_upstream::{Cluster, Host, HostRef};

pub(super) use grpc::GrpcProbe;
pub(super) use http::HttpProbe;
pub(super) use tcp::TcpProbe;

use super::checker::Checker;
use crate::pool::connect::{self, ConnectError, ConnectOptions, UpstreamConnInfo, UpstreamSocket};
use crate::transport::Transport;

/// `user-agent` of HTTP and gRPC checks.
const USER_AGENT: &str = "Envoy/HC";

/// What is asked.
#[derive(Debug)]
pub(super) enum Probe {
    Http(HttpProbe),
    Tcp(TcpProbe),
    Grpc(GrpcProbe),
}

/// Who is asked, and for whom.
pub(super) struct Target<'a> {
    pub(super) cluster: &'a Arc<Cluster>,
    pub(super) checker: &'a Checker,
    pub(super) host: &'a Arc<Host>,
    pub(super) check: &'a HealthCheck,
}

/// What is kept of one check for the next.
#[derive(Default)]
pub(super) enum Connection {
    #[default]
    None,
    Http1(Box<http::Http1>),
    Http2(http2::Http2),
    Tcp(Box<tcp::Tcp>),
}

/// A failure of the connection.
const NETWORK: Answer = Answer::Failed(Failure::Network);

impl Connection {
    /// Asks once. Given up in between, the connection is to be dropped ([`Self::drop_now`]).
    pub(super) async fn check(&mut self, target: &Target<'_>) -> Answer {
        match &target.checker.probe {
            Probe::Http(probe) if probe.is_http2() => probe.check_http2(self, target).await,
            Probe::Http(probe) => probe.check(self, target).await,
            Probe::Grpc(probe) => probe.check(self, target).await,
            Probe::Tcp(probe) => probe.check(self, target).await,
        }
    }

    /// Waits until a connection is gone whose end says something about the host: that of a TCP check.
    pub(super) async fn lost(&mut self) {
        let Self::Tcp(tcp) = self else { return pending().await };
        tcp.lost().await;
        self.drop_now();
    }

    /// Closes it.
    pub(super) fn drop_now(&mut self) {
        *self = Self::None;
    }
}

impl Target<'_> {
    /// Connects to where the host is checked.
    async fn open(&self) -> Result<(Transport, UpstreamConnInfo), ConnectError> {
        let address = self.host.health_check_address();
        let opened = connect::open(&address, self.cluster.connection.as_deref(), &self.cluster.stats).await;
        let connected = match opened {
            Err(error) => Err(error),
            Ok((socket, local_address)) => {
                let info =
                    UpstreamConnInfo { id: 0, local_address, remote_address: address, tls: None, alpn: None };
                let alpn: Vec<&[u8]> = self.checker.alpn.iter().map(|protocol| &**protocol).collect();
                let options = ConnectOptions {
                    tls: ClientOptions { alpn: &alpn, ..ClientOptions::default() },
                    ..ConnectOptions::default()
                };
                let transport = self.checker.transport.as_ref().unwrap_or(self.host.transport());
                connect::secure(socket, info, (transport, self.host.hostname()), options).await
            }
        };
        if let Err(error) = &connected {
            tracing::debug!(target: "hc", "cannot connect to {} for a health check: {error:?}", self.host.address());
        }
        connected
    }

    /// The name of the host in a check: its own, the check's, or the cluster's.
    fn hostname<'a>(&'a self, configured: &'a str) -> &'a str {
        let own = self.host.health_check().map_or("", |target| &*target.hostname);
        [own, configured].into_iter().find(|name| !name.is_empty()).unwrap_or(self.cluster.name())
    }

    fn scheme(&self) -> &'static str {
        let transport = self.checker.transport.as_ref().unwrap_or(self.host.transport());
        let tls = transport.downcast_ref::<UpstreamSocket>().is_some_and(|socket| socket.tls().is_some());
        if tls { "https" } else { "http" }
    }

    /// Changes a request head as the configuration says. Only the host and the time are known to its operators.
    fn mutate(&self, mutations: &HeaderMutations, protocol: Protocol, head: &mut Headers) {
        if mutations.is_empty() {
            return;
        }
        let now = Instant::now();
        let address = self.host.address().clone();
        let connection = Rc::new(ConnectionInfo::new(0, now, address.clone(), address));
        let mut info = StreamInfo::new(0, now, SystemTime::now(), connection, Some(protocol));
        info.upstream.host = Some(Rc::new(HostRef(Arc::clone(self.host))));
        let cx = FormatContext {
            request: None,
            response: None,
            trailers: None,
            info: &info,
            local_reply_body: "",
            log_type: AccessLogType::NotSet,
            now,
        };
        mutations.apply_to_request(head, &cx);
    }

    /// The part of a request head that HTTP and gRPC checks share.
    fn head(&self, method: &str, host: &str, path: &str, head: &mut Headers) {
        head.clear();
        head.append(Known::Method, method);
        head.append(Known::Scheme, self.scheme());
        head.append(Known::Authority, host);
        head.append(Known::Path, path);
    }
}

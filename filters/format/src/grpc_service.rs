//! `envoy.config.core.v3.GrpcService` as filters use it: an `envoy_grpc` target, called over the worker's client.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use core::grpc_service::TargetSpecifier;
use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_filter_api::client::{CallRetries, Clients, Clusters, NamedCluster, Request};
use waystation_filter_api::grpc;
use waystation_filter_api::wire::{timeout, u32_value};
use waystation_schema::{At, ConfigError};

use crate::formatter::FormatContext;
use crate::header_mutation::HeaderMutations;

/// A compiled gRPC service.
#[derive(Debug)]
pub struct GrpcService {
    cluster: NamedCluster,
    authority: Box<str>,
    timeout: Option<Duration>,
    initial_metadata: HeaderMutations,
    retries: Option<CallRetries>,
    /// `max_receive_message_length`; 0 is as much as anything may be.
    max_message: usize,
    envoy_headers: bool,
}

impl GrpcService {
    /// Compiles a service. Calls take at most its `timeout`, `default` if it has none; zero is for ever.
    ///
    /// # Errors
    /// When it is not an `envoy_grpc` one, or something in it is not valid.
    pub fn compile(
        proto: &core::GrpcService,
        default: Option<Duration>,
        clusters: &dyn Clusters,
    ) -> Result<Self, ConfigError> {
        let core::GrpcService { timeout: time, initial_metadata, retry_policy, target_specifier } = proto;
        let envoy = match target_specifier {
            Some(TargetSpecifier::EnvoyGrpc(envoy)) => envoy,
            Some(TargetSpecifier::GoogleGrpc(_)) => {
                let reason = "is not supported: use envoy_grpc with a cluster";
                return Err(ConfigError::field("google_grpc", reason));
            }
            None => return Err(ConfigError::field("target_specifier", "is required")),
        };
        let core::grpc_service::EnvoyGrpc {
            cluster_name,
            authority,
            // Of xDS streams only, as the proto says.
            retry_policy: _,
            max_receive_message_length,
            skip_envoy_headers,
        } = envoy;
        let authority = if authority.is_empty() { cluster_name } else { authority };
        let retries = retry_policy.as_ref().map(|policy| clusters.retry_policy(policy).at(|| "retry_policy"));
        Ok(Self {
            cluster: clusters.cluster(cluster_name),
            authority: authority.as_str().into(),
            timeout: timeout("timeout", time.as_ref(), default)?,
            initial_metadata: HeaderMutations::overwriting(initial_metadata).at(|| "initial_metadata")?,
            retries: retries.transpose()?,
            max_message: u32_value(max_receive_message_length.as_ref()).unwrap_or(0) as usize,
            envoy_headers: !skip_envoy_headers,
        })
    }

    /// The cluster.
    pub fn cluster(&self) -> &str {
        self.cluster.name()
    }

    /// Calls `path` with the one message in `frame`, which [`grpc::frame`] has made. `cx` is of the stream that calls, for the
    /// values of `initial_metadata`.
    pub fn call(
        &self,
        path: &str,
        frame: Bytes,
        cx: &FormatContext<'_>,
        clients: Rc<dyn Clients>,
    ) -> grpc::Stream {
        self.begin(path, Some(frame), cx, clients)
    }

    /// Begins a stream to `path`. It is not retried: what was said on it would have to be said again.
    pub fn stream(&self, path: &str, cx: &FormatContext<'_>, clients: Rc<dyn Clients>) -> grpc::Stream {
        self.begin(path, None, cx, clients)
    }

    fn begin(
        &self,
        path: &str,
        frame: Option<Bytes>,
        cx: &FormatContext<'_>,
        clients: Rc<dyn Clients>,
    ) -> grpc::Stream {
        let mut head = grpc::head(&self.authority, path, self.timeout);
        if !self.initial_metadata.is_empty() {
            self.initial_metadata.apply_to_request(&mut head, cx);
        }
        let request = Request {
            cluster: &self.cluster,
            head,
            timeout: self.timeout,
            retries: self.retries.as_ref(),
            hash: None,
            internal: self.envoy_headers,
            forwarded_for: self.envoy_headers,
        };
        grpc::Stream::new(clients.call(request, frame), self.max_message)
    }
}

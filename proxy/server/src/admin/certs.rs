//! `/certs`.

use std::sync::Arc;

use envoy_types::pb::envoy::admin::v3 as pb;
use hyper::Response;
use prost::Message as _;
use waystation_schema::JsonStyle;
use waystation_upstream::Cluster;

use super::{Admin, Body, json, render, shutting_down};
use crate::listener::config::FilterChain;
use crate::pool::connect::UpstreamSocket;

/// Filter chains and clusters with TLS contexts.
#[derive(Debug)]
pub struct TlsUsers {
    /// Those that terminate TLS.
    pub chains: Vec<Arc<FilterChain>>,
    /// All of them: what their sockets are, they know.
    pub clusters: Vec<Arc<Cluster>>,
}

impl TlsUsers {
    /// The certificates of every context, wherever they come from. A context that nobody has used yet is built for this,
    /// keys and all.
    fn certificates(&self) -> Vec<pb::Certificate> {
        let of_listeners = self.chains.iter().filter_map(|chain| chain.tls.as_ref()?.describe());
        let sockets = self.clusters.iter().flat_map(|cluster| cluster.transports());
        let sockets = sockets.filter_map(|socket| socket.downcast_ref::<UpstreamSocket>());
        let of_clusters = sockets.filter_map(|socket| socket.tls()?.describe());
        of_listeners.chain(of_clusters).collect()
    }
}

pub(super) async fn certs(admin: &Admin) -> Response<Body> {
    let Some(users) = admin.main.ask(|server| server.configuration().tls_users()).await else {
        return shutting_down();
    };
    let style = JsonStyle { proto_names: true, pretty: true, with_defaults: true, redact: false };
    render(move || {
        let wire = pb::Certificates { certificates: users.certificates() }.encode_to_vec();
        json("envoy.admin.v3.Certificates", &wire, style)
    })
    .await
}

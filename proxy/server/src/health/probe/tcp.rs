//! TCP checks: a connection, and bytes on it when some are configured.

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::health_check as pb;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::Scope;
use waystation_upstream::health_check::Answer;

use super::payload::{self, Search};
use super::{Connection, NETWORK, Target};
use crate::transport::Transport;
use crate::upstream_socket::proxy_protocol::ProxyProtocol;

/// A compiled `TcpHealthCheck`.
#[derive(Debug)]
pub(in crate::health) struct TcpProbe {
    send: Bytes,
    receive: Box<[Bytes]>,
    proxy_protocol: Option<ProxyProtocol>,
}

/// A connection between two checks.
pub(in crate::health) struct Tcp {
    transport: Transport,
    search: Search,
}

impl TcpProbe {
    pub(in crate::health) fn compile(proto: &pb::TcpHealthCheck, scope: &Scope) -> Result<Self, ConfigError> {
        let pb::TcpHealthCheck { send, receive, proxy_protocol_config } = proto;
        let config = proxy_protocol_config.as_ref();
        let proxy_protocol = config.map(|config| ProxyProtocol::compile(config, scope)).transpose();
        Ok(Self {
            send: send
                .as_ref()
                .map_or_else(|| Ok(Bytes::new()), |send| payload::compile(send).at(|| "send"))?,
            receive: payload::compile_list(receive)?,
            proxy_protocol: proxy_protocol.at(|| "proxy_protocol_config")?,
        })
    }

    /// Asks once.
    pub(super) async fn check(&self, kept: &mut Connection, target: &Target<'_>) -> Answer {
        let mut connection = match std::mem::take(kept) {
            Connection::Tcp(connection) => connection,
            _ => {
                let Ok((mut transport, info)) = target.open().await else { return NETWORK };
                if self.receive.is_empty() {
                    // That there is a connection is the answer; as in Envoy nothing is sent on it.
                    return Answer::Healthy { degraded: false };
                }
                if let Some(proxy_protocol) = &self.proxy_protocol {
                    let ends = (info.local_address.as_ref(), &info.remote_address);
                    if transport.write_all(&proxy_protocol.header(None, ends)).await.is_err() {
                        return NETWORK;
                    }
                }
                Box::new(Tcp { transport, search: Search::default() })
            }
        };
        if connection.transport.write_all(&self.send).await.is_err() {
            return NETWORK;
        }
        let mut buffer = [0; 2048];
        loop {
            match connection.transport.read(&mut buffer).await {
                Ok(0) | Err(_) => return NETWORK,
                Ok(count) => {
                    if connection.search.feed(&self.receive, &buffer[..count]) {
                        break;
                    }
                }
            }
        }
        connection.search = Search::default();
        if target.check.settings.reuse_connection {
            *kept = Connection::Tcp(connection);
        }
        Answer::Healthy { degraded: false }
    }
}

impl Tcp {
    /// Waits until the peer closes. What it says unasked is no answer to the next check.
    pub(super) async fn lost(&mut self) {
        let mut buffer = [0; 512];
        while self.transport.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    }
}

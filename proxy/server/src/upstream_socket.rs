//! Transport sockets of upstream connections, compiled.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use waystation_filter_api::wire::{type_name, unpack};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::Scope;
use waystation_tls::ClientContext;
use waystation_upstream::cluster::TransportFactory;

use crate::context::CompileContext;
use crate::pool::connect::UpstreamSocket;

/// Compiles a cluster's transport socket; statistics go below `scope` (`cluster.<name>.`).
pub fn compile(
    proto: &core::TransportSocket,
    scope: &Scope,
    context: &CompileContext<'_>,
) -> Result<TransportFactory, ConfigError> {
    let Some(core::transport_socket::ConfigType::TypedConfig(any)) = &proto.config_type else {
        // A cluster without a transport socket asks for raw_buffer by name.
        if proto.name == "envoy.transport_sockets.raw_buffer" {
            return Ok(Arc::new(UpstreamSocket::Plain));
        }
        return Err(ConfigError::field("typed_config", "is required"));
    };
    let compile = || match type_name(any) {
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => Ok(UpstreamSocket::Plain),
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => {
            let proto: tls::UpstreamTlsContext = unpack(any)?;
            let tls = ClientContext::compile(&proto, context, scope)?;
            Ok(UpstreamSocket::Tls(Box::new(tls)))
        }
        other => Err(ConfigError::new(format!("unknown upstream transport socket type '{other}'"))),
    };
    Ok(Arc::new(compile().at(|| "typed_config")?))
}

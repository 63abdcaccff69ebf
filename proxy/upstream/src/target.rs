//! Addresses of endpoints, compiled.

use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_filter_api::address::Address;
use waystation_filter_api::wire::refuse;
use waystation_schema::{At, ConfigError};

/// Where an endpoint is: an address, or a name that DNS resolves.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Target {
    /// Already an address.
    Address(Address),
    /// A host name and port.
    Name(Box<str>, u16),
}

/// Compiles an endpoint's address.
pub(crate) fn target(proto: &core::Address) -> Result<Target, ConfigError> {
    use core::address::Address as Kind;
    match &proto.address {
        Some(Kind::SocketAddress(address)) => socket_target(address).at(|| "socket_address"),
        Some(Kind::Pipe(pipe)) => {
            refuse("mode", pipe.mode != 0, "only a listening socket has a mode").at(|| "pipe")?;
            if pipe.path.is_empty() {
                return Err(ConfigError::field("pipe.path", "must not be empty"));
            }
            Ok(Target::Address(Address::Pipe(pipe.path.as_str().into())))
        }
        Some(Kind::EnvoyInternalAddress(internal)) => {
            let Some(core::envoy_internal_address::AddressNameSpecifier::ServerListenerName(listener)) =
                &internal.address_name_specifier
            else {
                return Err(ConfigError::field("envoy_internal_address.server_listener_name", "must be set"));
            };
            Ok(Target::Address(Address::Internal {
                listener: listener.as_str().into(),
                endpoint_id: internal.endpoint_id.as_str().into(),
            }))
        }
        None => Err(ConfigError::new("address must be set")),
    }
}

/// Compiles a socket address, which may name a host.
pub(crate) fn socket_target(address: &core::SocketAddress) -> Result<Target, ConfigError> {
    use core::socket_address::PortSpecifier;
    refuse("protocol", address.protocol != core::socket_address::Protocol::Tcp as i32, "only TCP")?;
    refuse(
        "network_namespace_filepath",
        !address.network_namespace_filepath.is_empty(),
        "network namespaces",
    )?;
    let ip_resolver = matches!(address.resolver_name.as_str(), "" | "envoy.ip");
    refuse("resolver_name", !ip_resolver, "custom resolvers")?;
    let port = match &address.port_specifier {
        Some(PortSpecifier::PortValue(port)) => {
            u16::try_from(*port).map_err(|_| ConfigError::field("port_value", "must be at most 65535"))?
        }
        Some(PortSpecifier::NamedPort(_)) => {
            return Err(ConfigError::field("named_port", "not supported: ports are numbers"));
        }
        None => 0,
    };
    if address.address.is_empty() {
        return Err(ConfigError::field("address", "must not be empty"));
    }
    Ok(match address.address.parse() {
        Ok(ip) => Target::Address(Address::Ip(std::net::SocketAddr::new(ip, port))),
        Err(_) => Target::Name(address.address.as_str().into(), port),
    })
}

/// Compiles an address that must not need DNS.
pub(crate) fn resolved(proto: &core::Address) -> Result<Address, ConfigError> {
    match target(proto)? {
        Target::Address(address) => Ok(address),
        Target::Name(name, _) => Err(ConfigError::new(format!(
            "malformed IP address: {name}. Consider setting resolver_name or setting cluster type to 'STRICT_DNS' or \
             'LOGICAL_DNS'"
        ))),
    }
}

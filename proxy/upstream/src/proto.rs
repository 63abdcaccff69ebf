//! Readers for the small protobuf types that every converter meets.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::address::Address;
use waystation_schema::{At, ConfigError};

/// A duration that must not be negative.
pub(crate) fn duration(field: &str, value: Option<&wkt::Duration>) -> Result<Option<Duration>, ConfigError> {
    value
        .map(|value| match (u64::try_from(value.seconds), u32::try_from(value.nanos)) {
            (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Duration::new(seconds, nanos)),
            _ => Err(ConfigError::field(field, "duration out of range")),
        })
        .transpose()
}

/// A duration that must be positive.
pub(crate) fn positive(field: &str, value: Option<&wkt::Duration>) -> Result<Option<Duration>, ConfigError> {
    match duration(field, value)? {
        Some(Duration::ZERO) => Err(ConfigError::field(field, "must be positive")),
        other => Ok(other),
    }
}

/// The value of a wrapped `uint32`.
pub(crate) fn u32_value(value: Option<&wkt::UInt32Value>) -> Option<u32> {
    value.map(|value| value.value)
}

/// The value of a wrapped `bool`.
pub(crate) fn bool_value(value: Option<&wkt::BoolValue>, default: bool) -> bool {
    value.map_or(default, |value| value.value)
}

/// Refuses a field that is set but not supported.
pub(crate) fn refuse(field: &str, set: bool, why: &str) -> Result<(), ConfigError> {
    if set { Err(ConfigError::field(field, format!("not supported: {why}"))) } else { Ok(()) }
}

/// Decodes the message in an `Any` whose type was already looked at.
pub(crate) fn unpack<M: prost::Message + Default>(any: &wkt::Any) -> Result<M, ConfigError> {
    M::decode(any.value.as_slice())
        .map_err(|error| ConfigError::new(format!("cannot decode {}: {error}", any.type_url)))
}

/// The message name of a type URL.
pub(crate) fn type_name(any: &wkt::Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

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

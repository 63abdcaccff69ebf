//! Socket options of upstream connections.

#![expect(deprecated, reason = "control planes still send deprecated fields, and Envoy reads them")]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_filter_api::address::Address;
use waystation_filter_api::wire::{refuse, u32_value};
use waystation_schema::{At, ConfigError};

use crate::target::{Target, socket_target};

/// What is done to the socket of an upstream connection.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConnectionOptions {
    /// TCP keepalive.
    pub keepalive: Option<TcpKeepalive>,
    /// Source address and socket options.
    pub bind: Option<BindOptions>,
    /// The order of an endpoint's addresses.
    pub happy_eyeballs: HappyEyeballs,
}

/// `HappyEyeballsConfig`: in which order the addresses of one endpoint are tried.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HappyEyeballs {
    /// Whether IPv6 comes first; `None` is the family of the first address.
    pub ipv6_first: Option<bool>,
    /// How many addresses of that family come before one of the other.
    pub first_count: u32,
}

impl Default for HappyEyeballs {
    fn default() -> Self {
        Self { ipv6_first: None, first_count: 1 }
    }
}

impl HappyEyeballs {
    fn compile(proto: &pb::upstream_connection_options::HappyEyeballsConfig) -> Result<Self, ConfigError> {
        use pb::upstream_connection_options::FirstAddressFamilyVersion as Version;
        Ok(Self {
            ipv6_first: match proto.first_address_family_version() {
                Version::Default => None,
                Version::V4 => Some(false),
                Version::V6 => Some(true),
                Version::Pipe | Version::Internal => {
                    return Err(ConfigError::field("first_address_family_version", "must be V4 or V6"));
                }
            },
            first_count: u32_value(proto.first_address_family_count.as_ref()).unwrap_or(1),
        })
    }

    /// The addresses with their families interleaved (RFC 8305 section 4), each family in its own order.
    pub fn sort<'a>(self, addresses: &[&'a Address]) -> Vec<&'a Address> {
        let is_ipv6 = |address: &&Address| address.ip().is_some_and(|ip| ip.is_ipv6());
        let ipv6_first = self.ipv6_first.unwrap_or_else(|| addresses.first().is_some_and(is_ipv6));
        let of = |ipv6| addresses.iter().copied().filter(move |address| is_ipv6(address) == ipv6);
        let (mut first, mut other) = (of(ipv6_first).peekable(), of(!ipv6_first).peekable());
        let mut sorted = Vec::with_capacity(addresses.len());
        while first.peek().is_some() || other.peek().is_some() {
            sorted.extend(first.by_ref().take(self.first_count as usize));
            sorted.extend(other.next());
        }
        sorted
    }
}

/// `envoy.config.core.v3.TcpKeepalive`; `None` leaves the system's default.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TcpKeepalive {
    /// Unanswered probes before the connection is dropped.
    pub probes: Option<u32>,
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
}

/// `envoy.config.core.v3.BindConfig`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BindOptions {
    /// The address to connect from. Only used for hosts of its address family.
    pub source: Option<SocketAddr>,
    /// Whether the address need not be one of this machine's (`IP_FREEBIND`).
    pub freebind: bool,
    /// Further options.
    pub options: Vec<SocketOption>,
}

/// A raw socket option, set before the socket is bound.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SocketOption {
    /// The level.
    pub level: i32,
    /// The option's number.
    pub name: i32,
    /// The value: an `int` in the machine's byte order, or the bytes that were configured.
    pub value: Vec<u8>,
    /// When it is set.
    pub state: SocketState,
}

/// When a socket option is set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SocketState {
    /// Before bind.
    Prebind,
    /// After bind, before the connection is made.
    Bound,
}

impl BindOptions {
    /// Compiles the protobuf form, which clusters and the cluster manager share.
    ///
    /// # Errors
    /// When a field is invalid, or set but not supported.
    pub fn compile(proto: &core::BindConfig) -> Result<Self, ConfigError> {
        let core::BindConfig {
            source_address,
            freebind,
            socket_options,
            extra_source_addresses,
            additional_source_addresses,
            local_address_selector,
            validate_network_namespaces,
        } = proto;
        refuse("extra_source_addresses", !extra_source_addresses.is_empty(), "one source address")?;
        refuse("additional_source_addresses", !additional_source_addresses.is_empty(), "one source address")?;
        refuse("local_address_selector", local_address_selector.is_some(), "one source address")?;
        refuse("validate_network_namespaces", *validate_network_namespaces, "network namespaces")?;
        let source = source_address
            .as_ref()
            .map(|address| match socket_target(address)? {
                Target::Address(Address::Ip(address)) => Ok(address),
                _ => Err(ConfigError::field("address", "must be an IP address")),
            })
            .transpose()
            .at(|| "source_address")?;
        let options = socket_options
            .iter()
            .enumerate()
            .map(|(i, option)| SocketOption::compile(option).at(|| format!("socket_options[{i}]")))
            .collect::<Result<_, _>>()?;
        Ok(Self { source, freebind: freebind.as_ref().is_some_and(|flag| flag.value), options })
    }

    /// The address to bind to for a connection to `target`.
    pub fn source_for(&self, target: IpAddr) -> Option<SocketAddr> {
        self.source.filter(|source| source.is_ipv4() == target.is_ipv4())
    }
}

impl SocketOption {
    fn compile(proto: &core::SocketOption) -> Result<Self, ConfigError> {
        let core::SocketOption { description: _, level, name, state, r#type, ip_version, value } = proto;
        refuse("type", r#type.is_some(), "upstream sockets are streams")?;
        refuse("ip_version", *ip_version != 0, "socket options apply to both families")?;
        let narrow = |field: &str, value: i64| {
            i32::try_from(value).map_err(|_| ConfigError::field(field.to_owned(), "out of range"))
        };
        let value = match value {
            Some(core::socket_option::Value::IntValue(value)) => {
                narrow("int_value", *value)?.to_ne_bytes().to_vec()
            }
            Some(core::socket_option::Value::BufValue(value)) => value.clone(),
            None => return Err(ConfigError::field("value", "must be set")),
        };
        let state = match core::socket_option::SocketState::try_from(*state) {
            Ok(core::socket_option::SocketState::StatePrebind) => SocketState::Prebind,
            Ok(core::socket_option::SocketState::StateBound) => SocketState::Bound,
            _ => return Err(ConfigError::field("state", "an upstream socket never listens")),
        };
        Ok(Self { level: narrow("level", *level)?, name: narrow("name", *name)?, value, state })
    }
}

/// Compiles `upstream_connection_options` and `upstream_bind_config`.
pub(super) fn compile(
    options: Option<&pb::UpstreamConnectionOptions>,
    bind: Option<&core::BindConfig>,
    default_bind: Option<&BindOptions>,
) -> Result<Option<Box<ConnectionOptions>>, ConfigError> {
    let mut compiled = ConnectionOptions::default();
    if let Some(options) = options {
        let pb::UpstreamConnectionOptions {
            tcp_keepalive,
            set_local_interface_name_on_upstream_connections: interface_name,
            happy_eyeballs_config,
        } = options;
        let at = || "upstream_connection_options";
        refuse("set_local_interface_name_on_upstream_connections", *interface_name, "interface names")
            .at(at)?;
        compiled.happy_eyeballs = happy_eyeballs_config
            .as_ref()
            .map(HappyEyeballs::compile)
            .transpose()
            .at(|| "happy_eyeballs_config")
            .at(at)?
            .unwrap_or_default();
        compiled.keepalive = tcp_keepalive.as_ref().map(|keepalive| TcpKeepalive {
            probes: keepalive.keepalive_probes.as_ref().map(|value| value.value),
            time: keepalive.keepalive_time.as_ref().map(|value| Duration::from_secs(value.value.into())),
            interval: keepalive
                .keepalive_interval
                .as_ref()
                .map(|value| Duration::from_secs(value.value.into())),
        });
    }
    compiled.bind = match bind {
        Some(bind) => Some(BindOptions::compile(bind).at(|| "upstream_bind_config")?),
        None => default_bind.cloned(),
    };
    Ok((compiled != ConnectionOptions::default()).then(|| Box::new(compiled)))
}

#[cfg(test)]
mod tests {
    use super::{Address, HappyEyeballs};

    #[test]
    fn address_families_take_turns() {
        let addresses = ["1.1.1.1:1", "2.2.2.2:1", "3.3.3.3:1", "[::1]:1", "[::2]:1"];
        let addresses = addresses.map(|text| Address::Ip(text.parse().unwrap()));
        let all: Vec<&Address> = addresses.iter().collect();
        for (ipv6_first, first_count, order) in [
            (None, 1, [0, 3, 1, 4, 2]),
            (Some(false), 2, [0, 1, 3, 2, 4]),
            (Some(true), 1, [3, 0, 4, 1, 2]),
            (Some(true), 9, [3, 4, 0, 1, 2]),
        ] {
            let sorted = HappyEyeballs { ipv6_first, first_count }.sort(&all);
            assert_eq!(sorted, order.map(|index: usize| all[index]), "{ipv6_first:?} {first_count}");
        }
    }
}

//! Addresses and socket options of the configuration, and what they are to the kernel.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};
use waystation_filter_api::address::Address;
use waystation_schema::{At as _, ConfigError};

use crate::listener::config::ListenAddress;

/// A socket option that applies to a listener.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SocketOption {
    /// `IP_TRANSPARENT`.
    Transparent,
    /// `IP_FREEBIND`.
    Freebind,
    /// `TCP_FASTOPEN` with its queue length.
    FastOpen(u32),
    /// `core.v3.SocketOption` with an integer value.
    Raw {
        /// Level.
        level: i32,
        /// Name.
        name: i32,
        /// Value.
        value: i32,
        /// When it is set.
        state: SocketState,
    },
}

/// When a socket option is set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SocketState {
    /// Before `bind`.
    Prebind,
    /// After `bind`.
    Bound,
    /// After `listen`.
    Listening,
}

/// The address of a listener.
pub fn listen(proto: &core::Address) -> Result<Address, ConfigError> {
    match &proto.address {
        Some(core::address::Address::SocketAddress(socket)) => socket_address(socket).at(|| "socket_address"),
        Some(core::address::Address::Pipe(pipe)) => {
            let limit = 107;
            if pipe.path.len() > limit {
                let reason =
                    format!("path \"{}\" exceeds maximum UNIX domain socket path size of {limit}", pipe.path);
                return Err(ConfigError::field("path", reason).at("pipe"));
            }
            Ok(Address::Pipe(pipe.path.as_str().into()))
        }
        Some(core::address::Address::EnvoyInternalAddress(_)) => {
            Err(ConfigError::field("envoy_internal_address", "not supported in this version"))
        }
        None => Err(ConfigError::field("address", "is required")),
    }
}

fn socket_address(proto: &core::SocketAddress) -> Result<Address, ConfigError> {
    if proto.protocol() == core::socket_address::Protocol::Udp {
        return Err(ConfigError::field("protocol", "UDP is not supported"));
    }
    if !proto.resolver_name.is_empty() {
        return Err(ConfigError::field("resolver_name", "custom resolvers are not supported here"));
    }
    if !proto.network_namespace_filepath.is_empty() {
        return Err(ConfigError::field("network_namespace_filepath", "not supported"));
    }
    let ip: IpAddr = proto.address.parse().map_err(|_| {
        let reason = format!("malformed IP address: {}", proto.address);
        ConfigError::field("address", reason)
    })?;
    let port = match &proto.port_specifier {
        Some(core::socket_address::PortSpecifier::PortValue(port)) => {
            u16::try_from(*port).map_err(|_| ConfigError::field("port_value", "is not a port"))?
        }
        Some(core::socket_address::PortSpecifier::NamedPort(_)) => {
            return Err(ConfigError::field(
                "named_port",
                "needs a custom resolver, which is not supported here",
            ));
        }
        None => 0,
    };
    Ok(Address::Ip(SocketAddr::new(ip, port)))
}

/// Integer socket options in order.
pub fn socket_options(protos: &[core::SocketOption]) -> Result<Vec<SocketOption>, ConfigError> {
    use core::socket_option::{SocketState as State, Value};
    let option = |(i, proto): (usize, &core::SocketOption)| {
        let parse = || {
            let integer = |value: i64, field: &str| {
                i32::try_from(value).map_err(|_| ConfigError::field(field, "out of range"))
            };
            let value = match &proto.value {
                Some(Value::IntValue(value)) => integer(*value, "int_value")?,
                Some(Value::BufValue(_)) => {
                    return Err(ConfigError::field("buf_value", "only int_value is supported"));
                }
                None => return Err(ConfigError::field("int_value", "is required")),
            };
            if proto.r#type.is_some() {
                return Err(ConfigError::field("type", "options by socket type are not supported"));
            }
            Ok(SocketOption::Raw {
                level: integer(proto.level, "level")?,
                name: integer(proto.name, "name")?,
                value,
                state: match State::try_from(proto.state) {
                    Ok(State::StatePrebind) => SocketState::Prebind,
                    Ok(State::StateBound) => SocketState::Bound,
                    Ok(State::StateListening) => SocketState::Listening,
                    Err(_) => return Err(ConfigError::field("state", "unknown value")),
                },
            })
        };
        parse().at(|| format!("[{i}]"))
    };
    protos.iter().enumerate().map(option).collect()
}

/// Keep-alive probes; what is not set is the kernel's default.
pub fn keepalive(proto: &core::TcpKeepalive) -> TcpKeepalive {
    let seconds = |value: u32| Duration::from_secs(value.into());
    let mut keepalive = TcpKeepalive::new();
    if let Some(time) = &proto.keepalive_time {
        keepalive = keepalive.with_time(seconds(time.value));
    }
    if let Some(interval) = &proto.keepalive_interval {
        keepalive = keepalive.with_interval(seconds(interval.value));
    }
    if let Some(probes) = &proto.keepalive_probes {
        keepalive = keepalive.with_retries(probes.value);
    }
    keepalive
}

/// Opens and binds. `reuse_port` lets each worker have a socket of its own. Nobody can connect yet: see [`listen_on`].
pub fn bind(listen: &ListenAddress, reuse_port: bool) -> io::Result<Socket> {
    let (domain, address) = match &listen.address {
        Address::Ip(address) => (Domain::for_address(*address), SockAddr::from(*address)),
        Address::Pipe(path) => (Domain::UNIX, unix_address(path)?),
        Address::Internal { .. } => return Err(io::ErrorKind::AddrNotAvailable.into()),
    };
    let socket = Socket::new(domain, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    if let Address::Ip(ip) = &listen.address {
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(reuse_port)?;
        if ip.is_ipv6() {
            socket.set_only_v6(!listen.ipv4_compat)?;
        }
    }
    apply(&socket, domain, &listen.options, SocketState::Prebind)?;
    if let Address::Pipe(path) = &listen.address
        && !path.starts_with('@')
    {
        // A socket file that a dead process left behind would make the bind fail; Envoy removes it as well.
        match std::fs::remove_file(&**path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    socket.bind(&address)?;
    apply(&socket, domain, &listen.options, SocketState::Bound)?;
    Ok(socket)
}

/// Lets clients connect to a bound socket, or sets the backlog of one that they connect to.
pub fn listen_on(socket: &Socket, listen: &ListenAddress, backlog: i32) -> io::Result<()> {
    if let (Address::Pipe(path), Some(mode)) = (&listen.address, listen.mode) {
        std::fs::set_permissions(&**path, std::fs::Permissions::from_mode(mode))?;
    }
    socket.listen(backlog)?;
    apply(socket, socket.domain()?, &listen.options, SocketState::Listening)
}

/// A Unix socket address; `@name` is the abstract namespace.
pub fn unix_address(path: &str) -> io::Result<SockAddr> {
    match path.strip_prefix('@') {
        Some(name) => SockAddr::unix(format!("\0{name}")),
        None => SockAddr::unix(path),
    }
}

fn apply(socket: &Socket, domain: Domain, options: &[SocketOption], now: SocketState) -> io::Result<()> {
    for option in options {
        match option {
            SocketOption::Transparent if now == SocketState::Prebind => {
                if domain == Domain::IPV6 {
                    set(socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)?;
                } else {
                    socket.set_ip_transparent_v4(true)?;
                }
            }
            SocketOption::Freebind if now == SocketState::Prebind => {
                if domain == Domain::IPV6 {
                    socket.set_freebind_v6(true)?;
                } else {
                    socket.set_freebind_v4(true)?;
                }
            }
            SocketOption::FastOpen(length) if now == SocketState::Listening => {
                set(
                    socket,
                    libc::IPPROTO_TCP,
                    libc::TCP_FASTOPEN,
                    i32::try_from(*length).unwrap_or(i32::MAX),
                )?;
            }
            SocketOption::Raw { level, name, value, state } if *state == now => {
                set(socket, *level, *name, *value)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Sets a socket option by number.
#[expect(
    unsafe_code,
    reason = "the configuration names socket options by number, for which no safe wrapper exists"
)]
pub fn set_option(socket: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let descriptor = socket.as_fd();
    // SAFETY: the descriptor is open for as long as it is borrowed, and `value` is `length` readable bytes that the call
    // only reads.
    let result =
        unsafe { libc::setsockopt(descriptor.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn set(socket: &Socket, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_option(socket, level, name, &value.to_ne_bytes())
}

/// The destination that a connection had before the kernel redirected it (`SO_ORIGINAL_DST`), if it was.
pub fn original_destination(socket: &tokio::net::TcpStream) -> Option<SocketAddr> {
    let socket = socket2::SockRef::from(socket);
    let v6 = socket.local_addr().ok()?.is_ipv6();
    let original = if v6 { socket.original_dst_v6() } else { socket.original_dst_v4() };
    original.ok()?.as_socket()
}

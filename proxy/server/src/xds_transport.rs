//! How the xDS client reaches its servers, and reads configuration in text.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpStream, UnixStream};
use waystation_filter_api::address::Address;
use waystation_schema::{Format, JsonStyle, Message, TextOptions, json_to_wire, to_wire, wire_to_json};
use waystation_tls::ClientOptions;
use waystation_upstream::{Cluster, Health, Host};
use waystation_xds::{BoxedIo, ConfigCodec, Connect, Transport};

use crate::config_source::GOOGLE_GRPC;
use crate::context::Shared;
use crate::pool::connect::UpstreamSocket;
use crate::transport::Socket;

const REQUEST: &str = "envoy.service.discovery.v3.DiscoveryRequest";
const RESPONSE: &str = "envoy.service.discovery.v3.DiscoveryResponse";

/// How long dialling an address that no cluster describes may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// What the client is given.
pub fn transport(shared: &Arc<Shared>) -> Transport {
    Transport { connect: Arc::new(ClusterConnect(Arc::clone(shared))), codec: Arc::new(TextCodec) }
}

/// Connects to a host of the cluster that a gRPC or REST service names.
struct ClusterConnect(Arc<Shared>);

impl Connect for ClusterConnect {
    fn connect(
        &self,
        target: &str,
        http2: bool,
    ) -> Pin<Box<dyn Future<Output = io::Result<BoxedIo>> + Send>> {
        if let Some(address) = target.strip_prefix(GOOGLE_GRPC) {
            let address = address.to_owned();
            return Box::pin(async move {
                let dialled = tokio::time::timeout(DIAL_TIMEOUT, dial(&address)).await;
                dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            });
        }
        let cluster = self.0.clusters.find(target).and_then(|cell| cell.get());
        let target = target.to_owned();
        Box::pin(async move {
            let cluster = cluster
                .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no cluster '{target}'")))?;
            let host = choose(&cluster).ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotConnected, "no healthy upstream".to_owned())
            })?;
            let connected = tokio::time::timeout(cluster.connect_timeout, open(&host, http2)).await;
            connected.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "connection timeout")))
        })
    }
}

/// A random host among the healthy ones: control streams are few and long.
fn choose(cluster: &Cluster) -> Option<Arc<Host>> {
    let snapshot = cluster.endpoints().snapshot();
    let healthy: Vec<&Arc<Host>> =
        snapshot.hosts().filter(|host| host.health() != Health::Unhealthy).collect();
    fastrand::choice(&healthy).map(|host| Arc::clone(host))
}

async fn open(host: &Host, http2: bool) -> io::Result<BoxedIo> {
    let socket = match host.address() {
        Address::Ip(address) => Socket::tcp(TcpStream::connect(address).await?),
        Address::Pipe(path) => Socket::unix(unix(path).await?),
        Address::Internal { .. } => {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "internal listeners serve no xDS"));
        }
    };
    let Some(UpstreamSocket::Tls(context)) = host.transport().downcast_ref::<UpstreamSocket>() else {
        return Ok(Box::new(socket));
    };
    let alpn: &[&[u8]] = if http2 { &[b"h2"] } else { &[b"http/1.1"] };
    let options = ClientOptions { alpn, ..ClientOptions::default() };
    let Some((config, name)) = context.connect(options) else {
        return Err(io::Error::new(io::ErrorKind::NotConnected, "TLS error: Secret is not supplied by SDS"));
    };
    let connector = tokio_rustls::TlsConnector::from(config);
    match connector.connect(name, socket).await {
        Ok(stream) => Ok(Box::new(stream)),
        Err(error) => Err(io::Error::new(error.kind(), context.handshake_failed(&error))),
    }
}

async fn unix(path: &str) -> io::Result<UnixStream> {
    match path.strip_prefix('@') {
        None => UnixStream::connect(path).await,
        Some(_) => {
            let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
            socket.connect(&crate::address::unix_address(path)?)?;
            socket.set_nonblocking(true)?;
            UnixStream::from_std(socket.into())
        }
    }
}

/// A `google_grpc` target in gRPC's naming: `host:port`, `dns:///host:port`, `ipv4:..`, `unix:path`.
async fn dial(target: &str) -> io::Result<BoxedIo> {
    if let Some(path) = target.strip_prefix("unix:") {
        return Ok(Box::new(Socket::unix(unix(path.trim_start_matches("//")).await?)));
    }
    let address = ["dns:///", "dns:", "ipv4:", "ipv6:"]
        .iter()
        .find_map(|scheme| target.strip_prefix(scheme))
        .unwrap_or(target);
    Ok(Box::new(Socket::tcp(TcpStream::connect(address).await?)))
}

struct TextCodec;

impl ConfigCodec for TextCodec {
    fn decode_file(&self, path: &Path, content: &[u8]) -> Result<Bytes, String> {
        // Unknown fields of resources are judged when the resource is walked; here they would hide its name.
        let options = TextOptions { allow_unknown: true };
        let format = Format::of_path(path).unwrap_or(Format::Json);
        let encoded = to_wire(message(RESPONSE)?, format, content, options);
        Ok(encoded.map_err(|error| error.to_string())?.wire.into())
    }

    fn request_to_json(&self, request: &[u8]) -> Result<String, String> {
        let mut text = String::new();
        let style = JsonStyle { proto_names: true, ..JsonStyle::default() };
        wire_to_json(message(REQUEST)?, request, &mut text, style).map_err(|error| error.to_string())?;
        Ok(text)
    }

    fn response_from_json(&self, json: &[u8]) -> Result<Bytes, String> {
        let text = std::str::from_utf8(json).map_err(|error| error.to_string())?;
        let options = TextOptions { allow_unknown: true };
        let encoded = json_to_wire(message(RESPONSE)?, text, options).map_err(|error| error.to_string())?;
        Ok(encoded.wire.into())
    }
}

fn message(name: &str) -> Result<Message, String> {
    Message::find(name).ok_or_else(|| format!("{name} is not in the schema"))
}

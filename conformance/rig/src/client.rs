//! The client side of a case.

pub(crate) mod h2;
pub(crate) mod tls;

use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio::net::TcpStream;

use self::h2::Session;
use crate::case::ClientTls;
use crate::certs::Certs;
use crate::wire::{Conn, duplicate};

/// A connection of a client, of either protocol.
pub(crate) enum Client {
    H1(Conn),
    H2(Box<Session>),
}

/// An opened connection, or how opening failed.
pub(crate) struct Opened {
    pub(crate) conn: Option<Conn>,
    /// What the handshake settled, to be recorded.
    pub(crate) tls: Option<Value>,
}

/// Connects to a port of the proxy.
pub(crate) async fn open(port: u16, tls: Option<&ClientTls>, certs: &Certs) -> Result<Opened> {
    let stream =
        TcpStream::connect(("127.0.0.1", port)).await.with_context(|| format!("connect to {port}"))?;
    let _ = stream.set_nodelay(true);
    let Some(tls) = tls else { return Ok(Opened { conn: Some(Conn::tcp(stream)), tls: None }) };
    let socket = duplicate(&stream);
    Ok(match tls::connect(stream, tls, certs).await? {
        Ok((stream, info)) => Opened { conn: Some(Conn::new(Box::new(stream), socket)), tls: Some(info) },
        Err(failure) => Opened { conn: None, tls: Some(failure) },
    })
}

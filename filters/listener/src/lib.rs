//! Listener filters: tls_inspector, http_inspector, proxy_protocol, original_dst.
//!
//! They look at the first bytes of a connection before its filter chain is chosen. Deciding is sans-io: the driver
//! reads into one buffer and asks each filter in turn; what a filter does not consume is handed on to the transport.

#![forbid(unsafe_code)]

use std::net::SocketAddr;

use waystation_filter_api::connection::ConnectionInfo;
use waystation_schema::ConfigError;
use waystation_stats::Scope;

/// A compiled listener filter.
#[derive(Debug)]
pub enum ListenerFilter {}

/// What a filter makes of the bytes so far.
#[derive(Debug, Eq, PartialEq)]
pub enum Verdict {
    /// It needs more bytes to decide.
    NeedMore,
    /// Done; so many bytes from the front of the buffer belong to it and are dropped.
    Done {
        /// Bytes that the filter consumed (a PROXY header).
        consumed: usize,
    },
    /// The connection is to be closed; `downstream_listener_filter_error`.
    Reject(&'static str),
}

impl ListenerFilter {
    /// Compiles the filter of this type URL (without `type.googleapis.com/`).
    pub fn compile(type_name: &str, config: &[u8], scope: &Scope) -> Result<Self, ConfigError> {
        let _ = (config, scope);
        Err(ConfigError::new(format!("unknown listener filter type '{type_name}'")))
    }

    /// Whether the filter needs bytes of the client (and so waits for them).
    pub fn wants_bytes(&self) -> bool {
        match *self {}
    }

    /// Looks at what has come in; `original_destination` is the kernel's answer (SO_ORIGINAL_DST) if the driver could
    /// get one; `end` when the client sends no more.
    pub fn inspect(
        &self,
        buffer: &[u8],
        end: bool,
        original_destination: Option<SocketAddr>,
        info: &mut ConnectionInfo,
    ) -> Verdict {
        let _ = (buffer, end, original_destination, info);
        match *self {}
    }
}

//! HTTP/1.0 and HTTP/1.1 without I/O: bytes in, events out; heads and data in, bytes out.
//!
//! [`ServerConn`] is the side that reads requests, [`ClientConn`] the side that reads responses. A driver owns the
//! socket and both buffers: it appends what it reads to a `BytesMut`, calls `receive` until that says
//! [`NeedMore`](Received::NeedMore), and writes out what the `send_*` methods append. The states hold no buffer, so
//! an idle connection costs its state alone.
//!
//! # Framing
//!
//! RFC 9112 section 6, with the choices of Envoy 1.40 (its Balsa parser) where the RFC leaves one: `transfer-encoding`
//! is exactly `chunked`; it never stands beside `content-length` unless
//! [`allow_chunked_length`](Config::allow_chunked_length) says that the length is to be dropped; one `content-length`
//! of digits only. Heads are read leniently as Envoy does (bare LF, tabs, obs-fold, bare CR), since that cannot move
//! a message boundary; chunk framing is read strictly, since it can. Where it is
//! stricter than Envoy 1.40 on purpose: the data of a chunk must be followed by CRLF (Envoy skips to the next LF),
//! behind a chunk size only an extension with its semicolon may stand, extensions are at most 16 KiB a chunk, framing
//! fields hold no bare CR, and a server may not switch protocols unasked.

mod body;
mod client;
mod encode;
mod error;
mod head;
mod lenient;
mod server;
mod target;

pub(crate) use target::is_valid_authority;

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

pub use client::{ClientConn, ResponseHead};
pub use encode::DataFrame;
pub use error::Error;
pub use server::{RequestHead, ServerConn};

/// Says whether an `upgrade` token is to be ignored.
pub type UpgradeMatcher = Arc<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// What a codec allows: `Http1ProtocolOptions` and the header limits of `HttpProtocolOptions`.
#[derive(Clone)]
pub struct Config {
    /// Most header lines in a head (`max_headers_count`).
    pub max_headers: u32,
    /// Most bytes in a head (`max_request_headers_kb`, in bytes here).
    pub max_head_bytes: u32,
    /// Serve HTTP/1.0 and unversioned requests instead of answering 426.
    pub accept_http_10: bool,
    /// The authority of HTTP/1.0 requests that name none.
    pub default_host_for_http_10: Option<Box<str>>,
    /// Pass trailers on instead of dropping them.
    pub enable_trailers: bool,
    /// Drop `content-length` beside `transfer-encoding: chunked` instead of refusing the message.
    pub allow_chunked_length: bool,
    /// Split absolute-form targets into scheme, authority and path.
    pub allow_absolute_url: bool,
    /// Take any token as a method instead of the registered ones.
    pub allow_custom_methods: bool,
    /// What to do with header names that hold an underscore.
    pub underscores: Underscores,
    /// How header names are spelled when they are written.
    pub header_case: HeaderCase,
    /// Write the whole URL in the request line, as to a forward proxy.
    pub send_fully_qualified_url: bool,
    /// `upgrade` tokens that are removed on arrival, so that the request is served as plain HTTP/1.1.
    pub ignored_upgrades: Option<UpgradeMatcher>,
}

impl Config {
    /// The defaults of the side that reads responses: Envoy lets a response head be 80 KiB.
    pub fn upstream() -> Self {
        Self { max_head_bytes: 80 * 1024, ..Self::default() }
    }
}

/// How header names are spelled when they are written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum HeaderCase {
    /// In lower case.
    #[default]
    Lower,
    /// As they were read; the case is kept beside the lower-case form.
    Preserve(Preserve),
    /// `Content-Type`: letters at the start and after anything that is not a letter or digit in upper case.
    Proper,
}

/// What else is kept with the case of names (`PreserveCaseFormatterConfig`). It is the side that reads a message that
/// decides how it is written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Preserve {
    /// The reason phrase of a response (`forward_reason_phrase`).
    pub reason_phrase: bool,
    /// Names of headers that are added on the way are spelled as by [`HeaderCase::Proper`]
    /// (`formatter_type_on_envoy_headers`).
    pub proper_added: bool,
}

impl HeaderCase {
    fn is_proper(self) -> bool {
        self == Self::Proper
    }

    fn is_kept(self) -> bool {
        matches!(self, Self::Preserve(_))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_headers: 100,
            max_head_bytes: 60 * 1024,
            accept_http_10: false,
            default_host_for_http_10: None,
            enable_trailers: false,
            allow_chunked_length: false,
            allow_absolute_url: true,
            allow_custom_methods: false,
            underscores: Underscores::Allow,
            header_case: HeaderCase::Lower,
            send_fully_qualified_url: false,
            ignored_upgrades: None,
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("max_headers", &self.max_headers)
            .field("max_head_bytes", &self.max_head_bytes)
            .field("accept_http_10", &self.accept_http_10)
            .field("enable_trailers", &self.enable_trailers)
            .field("allow_chunked_length", &self.allow_chunked_length)
            .field("allow_custom_methods", &self.allow_custom_methods)
            .field("underscores", &self.underscores)
            .field("header_case", &self.header_case)
            .finish_non_exhaustive()
    }
}

/// `headers_with_underscores_action`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Underscores {
    /// Keep them.
    #[default]
    Allow,
    /// Answer 400.
    Reject,
    /// Leave them out, silently.
    Drop,
}

/// The protocol version of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0, and anything else that is not HTTP/1.1.
    Http10,
    /// HTTP/1.1
    Http11,
}

/// What the next bytes of the input meant. `H` is the head: [`RequestHead`] or [`ResponseHead`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received<H> {
    /// Nothing complete; read more, or wait for the other direction.
    NeedMore,
    /// A head; the headers are in the map that was passed in.
    Head(H),
    /// Part of the body, or of the tunnel's bytes.
    Data(Bytes),
    /// The trailers are in the map that was passed in; nothing follows in this message.
    Trailers,
    /// The message is complete. Not reported when the head or the trailers said so already.
    End,
}

/// How the body of a message is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// So many bytes.
    Length(u64),
    /// `transfer-encoding: chunked`
    Chunked,
    /// Up to the end of the connection: responses only.
    UntilClose,
    /// Not HTTP any more: CONNECT or an upgrade.
    Tunnel,
}

impl Framing {
    /// Whether the message is complete with its head.
    pub fn is_end_stream(self) -> bool {
        matches!(self, Framing::None | Framing::Length(0))
    }
}

/// What becomes of a connection once a message has been exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// It can carry another.
    KeepAlive,
    /// It has to be closed.
    Close,
}

#[cfg(test)]
mod tests;

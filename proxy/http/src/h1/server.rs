//! The side that reads requests and writes responses.

use std::sync::Arc;

use bytes::BytesMut;

use super::body::{Body, Piece};
use super::encode::{self, DataFrame, Outgoing, Persistence, Start};
use super::{After, Config, Error, Framing, Received, Version, head, target};
use crate::headers::Headers;
use crate::known::Known;
use crate::sanitize;

/// A downstream connection.
#[derive(Debug)]
pub struct ServerConn {
    config: Arc<Config>,
    incoming: Incoming,
    outgoing: Outgoing,
    request: RequestState,
}

/// What of the current request matters for its response.
#[derive(Clone, Copy, Debug)]
struct RequestState {
    version: Version,
    keep_alive: bool,
    head: bool,
    connect: bool,
    upgrade: bool,
}

impl RequestState {
    /// Before anything is known of a request: what an answer to garbage is written by.
    const NONE: Self =
        Self { version: Version::Http11, keep_alive: true, head: false, connect: false, upgrade: false };
}

#[derive(Debug)]
enum Incoming {
    /// Waiting for a head of which so many bytes have been searched for the end.
    Head {
        searched: u32,
    },
    Body(Body),
    /// The request is complete; the next one is read when the response is.
    Complete,
    Failed,
}

/// A request head, without the headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// The version; [`Version::Http10`] stands for everything that is not HTTP/1.1.
    pub version: Version,
    /// How the body is delimited; [`Framing::Tunnel`] for CONNECT and upgrades.
    pub framing: Framing,
    /// Whether the client wants to keep the connection.
    pub keep_alive: bool,
    /// The client asks for the protocol in `upgrade`, and `connection` says so too.
    pub upgrade: bool,
    /// The method is CONNECT.
    pub connect: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub expect_continue: bool,
    /// How many headers were left out for an underscore in their name.
    pub dropped_headers: u32,
}

impl ServerConn {
    /// A connection on which nothing has been read.
    pub fn new(config: Arc<Config>) -> Self {
        Self {
            config,
            incoming: Incoming::Head { searched: 0 },
            outgoing: Outgoing::Idle,
            request: RequestState::NONE,
        }
    }

    /// Takes the next event off the front of `input`.
    ///
    /// `headers` is overwritten by a head, and by trailers; a caller that still needs the head passes another map
    /// once it has it. After an error nothing more is read.
    pub fn receive(
        &mut self,
        input: &mut BytesMut,
        headers: &mut Headers,
    ) -> Result<Received<RequestHead>, Error> {
        let received = match &mut self.incoming {
            Incoming::Head { searched } => {
                match head::receive_request(input, searched, headers, &self.config) {
                    Ok(None) => Ok(Received::NeedMore),
                    Ok(Some(line)) => self.begin(&line, headers).map(Received::Head),
                    Err(error) => Err(error),
                }
            }
            Incoming::Body(body) => {
                let piece = body.receive(input, headers, &self.config);
                if matches!(piece, Ok(Piece::Trailers | Piece::End)) {
                    self.incoming = Incoming::Complete;
                }
                piece.map(Received::from)
            }
            Incoming::Complete | Incoming::Failed => Ok(Received::NeedMore),
        };
        if received.is_err() {
            self.incoming = Incoming::Failed;
            self.request.keep_alive = false;
        }
        received
    }

    /// Tells that the client has closed its side. `End` ends a tunnel; an error says that a request was cut short.
    pub fn receive_eof(&mut self) -> Result<Received<RequestHead>, Error> {
        self.request.keep_alive = false;
        match &self.incoming {
            Incoming::Head { searched: 0 } | Incoming::Complete | Incoming::Failed => Ok(Received::NeedMore),
            Incoming::Body(body) if body.ends_with_connection() => {
                self.incoming = Incoming::Complete;
                Ok(Received::End)
            }
            Incoming::Head { .. } | Incoming::Body(_) => {
                self.incoming = Incoming::Failed;
                Err(Error::Incomplete)
            }
        }
    }

    /// Whether no message is under way: nothing of a request read, no response owed.
    pub fn is_idle(&self) -> bool {
        matches!(self.incoming, Incoming::Head { searched: 0 }) && matches!(self.outgoing, Outgoing::Idle)
    }

    /// Whether the request has been read completely.
    pub fn is_request_complete(&self) -> bool {
        matches!(self.incoming, Incoming::Complete)
    }

    /// Whether the next response head will carry `connection: close`, unless the client leaves its request unfinished.
    pub fn is_last(&self) -> bool {
        !self.request.keep_alive
    }

    /// Makes the next response head carry `connection: close`: drain, limits, protocol errors.
    pub fn close_after_response(&mut self) {
        self.request.keep_alive = false;
    }

    /// Writes an informational response: 100, 102 or 103 with the regular headers of `headers`.
    pub fn send_informational(&mut self, status: u16, headers: &Headers, out: &mut BytesMut) {
        let from = out.len();
        encode::status_line(self.request.version, status, headers.reason(), out);
        encode::fields(headers, Start::Informational, !self.config.header_case.is_proper(), out);
        out.extend_from_slice(b"\r\n");
        encode::spell_head(self.config.header_case, &mut out[from..]);
    }

    /// Writes a response head; `:status` says which, 200 when it does not. With `end_stream` nothing follows.
    ///
    /// Framing headers are written here, whatever `headers` says about `transfer-encoding`. The head says
    /// `connection: close` when the connection can't be kept: the client did not ask for it, the request has not
    /// been read to its end, or [`close_after_response`](Self::close_after_response). Tells whether it does.
    pub fn send_head(&mut self, headers: &Headers, end_stream: bool, out: &mut BytesMut) -> bool {
        let status = headers.status().unwrap_or(200);
        let connect = self.request.connect && (200..300).contains(&status);
        let tunnel = connect || (self.request.upgrade && status == 101);
        let closes = headers.get(Known::Connection).is_some_and(|value| has_token(value, b"close"));
        // To HTTP/1.0, a body of unknown length ends with the connection.
        let until_close = self.request.version == Version::Http10
            && !end_stream
            && !self.request.head
            && !matches!(status, 100..200 | 204 | 304)
            && headers.content_length().is_none();
        if closes || until_close || (!tunnel && !matches!(self.incoming, Incoming::Complete)) {
            self.request.keep_alive = false;
        }
        let persistence = match (tunnel, self.request.version, self.request.keep_alive) {
            (true, ..) | (false, Version::Http11, true) => Persistence::Unsaid,
            (false, Version::Http10, true) => Persistence::KeepAlive,
            (false, _, false) => Persistence::Close,
        };
        let from = out.len();
        encode::status_line(self.request.version, status, headers.reason(), out);
        let start = Start::Response {
            status,
            version: self.request.version,
            head: self.request.head,
            tunnel,
            connect,
            persistence,
        };
        encode::fields(headers, start, !self.config.header_case.is_proper(), out);
        self.outgoing = encode::framing(headers, start, end_stream, out);
        out.extend_from_slice(b"\r\n");
        encode::spell_head(self.config.header_case, &mut out[from..]);
        if tunnel && !matches!(self.incoming, Incoming::Body(Body::Unbounded)) {
            self.incoming = Incoming::Body(Body::Unbounded);
        }
        persistence == Persistence::Close
    }

    /// Says what to write around `len` bytes of body, so that the bytes themselves need not be copied.
    pub fn frame_data(&mut self, len: usize) -> DataFrame {
        self.outgoing.frame(len)
    }

    /// Writes body bytes with their framing.
    pub fn send_data(&mut self, data: &[u8], out: &mut BytesMut) {
        self.outgoing.frame(data.len()).write(data, out);
    }

    /// Ends the body, when the head did not.
    pub fn send_end(&mut self, out: &mut BytesMut) {
        self.finish(None, out);
    }

    /// Ends the body with trailers, which are left out unless the body is chunked and trailers are enabled.
    pub fn send_trailers(&mut self, trailers: &Headers, out: &mut BytesMut) {
        self.finish(Some(trailers), out);
    }

    /// Says whether the connection can carry another request, and if so makes it ready to; to be asked when the
    /// response is complete.
    pub fn after_message(&mut self) -> After {
        let complete = matches!(self.incoming, Incoming::Complete) && matches!(self.outgoing, Outgoing::Done);
        if complete && self.request.keep_alive && !self.request.upgrade && !self.request.connect {
            self.incoming = Incoming::Head { searched: 0 };
            self.outgoing = Outgoing::Idle;
            self.request = RequestState::NONE;
            After::KeepAlive
        } else {
            After::Close
        }
    }

    fn finish(&mut self, trailers: Option<&Headers>, out: &mut BytesMut) {
        let trailers = trailers.filter(|_| self.config.enable_trailers);
        if !self.outgoing.finish(trailers, !self.config.header_case.is_proper(), out) {
            self.request.keep_alive = false;
        }
    }

    /// Everything that a request head decides beyond its syntax, in the order of Envoy's codec.
    fn begin(&mut self, line: &head::RequestLine, headers: &mut Headers) -> Result<RequestHead, Error> {
        let config = &self.config;
        let fields = &line.fields;
        let connect = headers.method() == Some(b"CONNECT");
        let keep_alive = keeps_alive(line.version, headers, fields.has_connection);
        self.request = RequestState {
            // A version that is not accepted is answered in the one that is.
            version: if config.accept_http_10 { line.version } else { Version::Http11 },
            keep_alive,
            head: headers.method() == Some(b"HEAD"),
            connect,
            upgrade: false,
        };
        if fields.bad_content_length && !fields.has_transfer_encoding {
            return Err(Error::Codec);
        }
        let mut upgrade = fields.has_upgrade
            && fields.has_connection
            && line.version == Version::Http11
            && headers.get(Known::Connection).is_some_and(|value| has_token(value, b"upgrade"));
        if upgrade {
            upgrade = !ignore_upgrade(headers, config);
        }
        if connect && fields.has_content_length {
            if headers.get(Known::ContentLength) != Some(b"0") {
                return Err(Error::BodyDisallowed);
            }
            headers.remove(Known::ContentLength);
        }
        let has_length = fields.has_content_length && !connect;
        head::Fields { has_content_length: has_length, ..*fields }.check(headers, config)?;
        if connect && fields.has_transfer_encoding {
            return Err(Error::InvalidTransferEncoding);
        }
        if line.form == head::Form::Other {
            resolve_target(connect, headers, config)?;
        } else if connect {
            return Err(Error::InvalidUrl);
        }
        if line.version == Version::Http10 {
            if !config.accept_http_10 {
                return Err(Error::LowVersion);
            }
            if let (None, Some(host)) = (headers.authority(), &config.default_host_for_http_10) {
                headers.append(Known::Authority, &**host);
            }
        }
        if headers.authority().is_some_and(|authority| !target::is_valid_authority(authority)) {
            return Err(Error::InvalidAuthority);
        }
        if fields.has_connection {
            sanitize::remove_nominated(headers)?;
        }
        self.request.upgrade = upgrade;
        let framing = match fields.content_length {
            _ if upgrade || connect => Framing::Tunnel,
            _ if fields.chunked => Framing::Chunked,
            None | Some(0) => Framing::None,
            Some(length) => Framing::Length(length),
        };
        self.incoming = match framing {
            Framing::None => Incoming::Complete,
            framing => Incoming::Body(Body::new(framing)),
        };
        let expects = |value: &[u8]| value.eq_ignore_ascii_case(b"100-continue");
        let expect_continue = headers.get(Known::Expect).is_some_and(expects);
        Ok(RequestHead {
            version: line.version,
            framing,
            keep_alive,
            upgrade,
            connect,
            expect_continue,
            dropped_headers: fields.dropped,
        })
    }
}

/// Whether one of the comma-separated tokens of `value` is `token`, in any case.
pub(super) fn has_token(value: &[u8], token: &[u8]) -> bool {
    value.split(|byte| *byte == b',').any(|part| part.trim_ascii().eq_ignore_ascii_case(token))
}

/// RFC 9112 section 9.3; `proxy-connection: close` counts too, as it does for Envoy.
pub(super) fn keeps_alive(version: Version, headers: &Headers, has_connection: bool) -> bool {
    let connection = if has_connection { headers.get(Known::Connection) } else { None };
    let says = |token: &[u8]| connection.is_some_and(|value| has_token(value, token));
    let wants = match version {
        Version::Http10 => says(b"keep-alive") && !says(b"close"),
        Version::Http11 => !says(b"close"),
    };
    wants && !headers.get(Known::ProxyConnection).is_some_and(|value| has_token(value, b"close"))
}

/// Removes an upgrade to h2c, which Envoy does not do, and those that the configuration ignores. Tells whether no
/// upgrade is left.
fn ignore_upgrade(headers: &mut Headers, config: &Config) -> bool {
    let Some(value) = headers.get(Known::Upgrade) else { return true };
    if value.trim_ascii().is_empty() {
        return true;
    }
    let h2c = value.eq_ignore_ascii_case(b"h2c");
    if !h2c && config.ignored_upgrades.is_none() {
        return false;
    }
    let ignored =
        |token: &[u8]| h2c || config.ignored_upgrades.as_ref().is_some_and(|ignores| ignores(token));
    let kept = sanitize::filter_tokens(value, |token| !ignored(token));
    if !kept.is_empty() {
        headers.set(Known::Upgrade, kept);
        return false;
    }
    headers.remove(Known::Upgrade);
    let connection = headers.get(Known::Connection).unwrap_or_default();
    let rest = sanitize::filter_tokens(connection, |token| {
        let gone: &[&[u8]] = if h2c { &[b"upgrade", b"http2-settings"] } else { &[b"upgrade"] };
        !gone.iter().any(|gone| token.eq_ignore_ascii_case(gone))
    });
    if rest.is_empty() {
        headers.remove(Known::Connection);
    } else {
        headers.set(Known::Connection, rest);
    }
    if h2c {
        headers.remove(Known::Http2Settings);
    }
    true
}

/// RFC 9112 section 3.2: the host of an absolute-form target replaces `host`; CONNECT names its peer.
fn resolve_target(connect: bool, headers: &mut Headers, config: &Config) -> Result<(), Error> {
    if !connect && !config.allow_absolute_url {
        return Ok(());
    }
    let written = headers.path().unwrap_or_default().to_vec();
    let parsed = if connect {
        target::parse_authority(&written).ok_or(Error::InvalidUrl)?
    } else {
        match target::parse_absolute(&written) {
            Some(parsed) => parsed,
            // A bare word is not even an attempt at a URL: Envoy's parser refuses it before its codec looks.
            None if !written.windows(3).any(|window| window == b"://") => return Err(Error::Codec),
            None => return Err(Error::InvalidUrl),
        }
    };
    headers.set(Known::Authority, parsed.authority);
    if connect {
        headers.remove(Known::Path);
        return Ok(());
    }
    if !parsed.scheme.eq_ignore_ascii_case(b"http") && !parsed.scheme.eq_ignore_ascii_case(b"https") {
        return Err(Error::InvalidScheme);
    }
    headers.set(Known::Scheme, parsed.scheme.to_ascii_lowercase());
    headers.set(Known::Path, if parsed.path.is_empty() { b"/" } else { parsed.path });
    Ok(())
}

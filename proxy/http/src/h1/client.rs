//! The side that writes requests and reads responses.

use std::sync::Arc;

use bytes::BytesMut;

use super::body::{Body, Piece};
use super::encode::{self, DataFrame, Outgoing, Start};
use super::server::{has_token, keeps_alive};
use super::{After, Config, Error, Framing, Received, Version, head};
use crate::headers::Headers;
use crate::known::Known;

/// An upstream connection: one request at a time.
#[derive(Debug)]
pub struct ClientConn {
    config: Arc<Config>,
    incoming: Incoming,
    outgoing: Outgoing,
    keep_alive: bool,
    head: bool,
    connect: bool,
    upgrade: bool,
}

#[derive(Debug)]
enum Incoming {
    /// No request has been sent, so there is nothing to answer.
    Idle,
    Head {
        searched: u32,
    },
    Body(Body),
    Complete,
    Failed,
}

/// A response head, without the headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    /// The status, also in `:status`.
    pub status: u16,
    /// The version the server speaks.
    pub version: Version,
    /// How the body is delimited.
    pub framing: Framing,
    /// A 1xx response other than 101: the actual response follows.
    pub informational: bool,
    /// Whether the server wants to keep the connection.
    pub keep_alive: bool,
}

impl ClientConn {
    /// A connection on which nothing has been sent.
    pub fn new(config: Arc<Config>) -> Self {
        Self {
            config,
            incoming: Incoming::Idle,
            outgoing: Outgoing::Idle,
            keep_alive: true,
            head: false,
            connect: false,
            upgrade: false,
        }
    }

    /// Writes a request head from the pseudo-headers and the rest. With `end_stream` nothing follows.
    ///
    /// A request with an `upgrade` header, and CONNECT, are sent without framing: what follows is the tunnel's.
    pub fn send_head(&mut self, headers: &Headers, end_stream: bool, out: &mut BytesMut) {
        let method = headers.method().unwrap_or(b"GET");
        self.head = method == b"HEAD";
        self.connect = method == b"CONNECT";
        self.upgrade = headers.contains(Known::Upgrade)
            && headers.get(Known::Connection).is_some_and(|value| has_token(value, b"upgrade"));
        self.keep_alive = !headers.get(Known::Connection).is_some_and(|value| has_token(value, b"close"));
        let from = out.len();
        encode::request_line(method, headers, &self.config, out);
        let start = Start::Request {
            tunnel: self.connect || self.upgrade,
            bodiless: matches!(method, b"GET" | b"HEAD" | b"DELETE" | b"TRACE" | b"CONNECT"),
        };
        encode::fields(headers, start, !self.config.header_case.is_proper(), out);
        self.outgoing = encode::framing(headers, start, end_stream, out);
        out.extend_from_slice(b"\r\n");
        encode::spell_head(self.config.header_case, &mut out[from..]);
        self.incoming = Incoming::Head { searched: 0 };
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

    /// Takes the next event off the front of `input`; as [`ServerConn::receive`](super::ServerConn::receive).
    ///
    /// Bytes that arrive without a request are an error, and those behind a response close the connection: they are
    /// not an answer to anything.
    pub fn receive(
        &mut self,
        input: &mut BytesMut,
        headers: &mut Headers,
    ) -> Result<Received<ResponseHead>, Error> {
        let received = match &mut self.incoming {
            Incoming::Idle if !input.is_empty() => Err(Error::Codec),
            Incoming::Complete if !input.is_empty() => {
                self.keep_alive = false;
                Ok(Received::NeedMore)
            }
            Incoming::Idle | Incoming::Complete | Incoming::Failed => Ok(Received::NeedMore),
            Incoming::Head { searched } => {
                match head::receive_response(input, searched, headers, &self.config) {
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
        };
        if received.is_err() {
            self.incoming = Incoming::Failed;
            self.keep_alive = false;
        }
        received
    }

    /// Tells that the server has closed its side. `End` ends a body that lasts until then; an error says that a
    /// response was cut short, `NeedMore` that none was under way.
    pub fn receive_eof(&mut self) -> Result<Received<ResponseHead>, Error> {
        self.keep_alive = false;
        match &self.incoming {
            Incoming::Idle | Incoming::Complete | Incoming::Failed => Ok(Received::NeedMore),
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

    /// Whether the response has been read completely.
    pub fn is_response_complete(&self) -> bool {
        matches!(self.incoming, Incoming::Complete)
    }

    /// Whether the connection is unused and could take a request.
    pub fn is_idle(&self) -> bool {
        matches!(self.incoming, Incoming::Idle)
    }

    /// Says whether the connection can carry another request, and if so makes it ready to; to be asked when the
    /// response is complete. A response that came before the request was sent to its end closes the connection.
    pub fn after_message(&mut self) -> After {
        let complete = matches!(self.incoming, Incoming::Complete) && matches!(self.outgoing, Outgoing::Done);
        if complete && self.keep_alive && !self.connect && !self.upgrade {
            self.incoming = Incoming::Idle;
            self.outgoing = Outgoing::Idle;
            After::KeepAlive
        } else {
            After::Close
        }
    }

    fn finish(&mut self, trailers: Option<&Headers>, out: &mut BytesMut) {
        let trailers = trailers.filter(|_| self.config.enable_trailers);
        if !self.outgoing.finish(trailers, !self.config.header_case.is_proper(), out) {
            self.keep_alive = false;
        }
    }

    /// RFC 9112 section 6.3, for responses.
    fn begin(&mut self, line: &head::StatusLine, headers: &mut Headers) -> Result<ResponseHead, Error> {
        let fields = &line.fields;
        let status = line.status;
        fields.check(headers, &self.config)?;
        let informational = status < 200 && status != 101;
        let tunnel = (self.connect && (200..300).contains(&status)) || (self.upgrade && status == 101);
        // A server that switches unasked is speaking to somebody else.
        if status == 101 && !self.upgrade {
            return Err(Error::Codec);
        }
        if status < 200 || status == 204 {
            if fields.has_transfer_encoding {
                return Err(Error::TransferEncodingNotAllowed);
            }
            if fields.content_length.is_some_and(|length| length > 0) {
                return Err(Error::ContentLengthNotAllowed);
            }
            headers.remove(Known::ContentLength);
        }
        let framing = match fields.content_length {
            _ if tunnel => Framing::Tunnel,
            _ if self.head || status < 200 || status == 204 || status == 304 => Framing::None,
            _ if fields.chunked => Framing::Chunked,
            Some(0) => Framing::None,
            Some(length) => Framing::Length(length),
            None => Framing::UntilClose,
        };
        let keep_alive = keeps_alive(line.version, headers, fields.has_connection);
        self.keep_alive &= keep_alive && framing != Framing::UntilClose;
        self.incoming = match framing {
            Framing::None if informational => Incoming::Head { searched: 0 },
            Framing::None => Incoming::Complete,
            framing => Incoming::Body(Body::new(framing)),
        };
        Ok(ResponseHead { status, version: line.version, framing, informational, keep_alive })
    }
}

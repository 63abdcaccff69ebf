//! HTTP checks, over HTTP/1 here and over HTTP/2 with `http2`.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::core::v3::health_check as pb;
use envoy_types::pb::envoy::r#type::v3::{CodecClientType, Int64Range};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use waystation_filter_api::runtime::{Fraction, Runtime, RuntimeFraction};
use waystation_filter_api::stream::Protocol;
use waystation_format::HeaderMutations;
use waystation_http::h1::{self, After, ClientConn, Received};
use waystation_http::{Headers, Known};
use waystation_matchers::StringMatcher;
use waystation_schema::{At as _, ConfigError};
use waystation_upstream::health_check::{Answer, Failure};

use super::payload::{self, Search};
use super::{Connection, NETWORK, Target, USER_AGENT};
use crate::transport::{Liveness, Transport};

/// A compiled `HttpHealthCheck`.
#[derive(Debug)]
pub(in crate::health) struct HttpProbe {
    host: Box<str>,
    path: Box<str>,
    method: &'static str,
    send: Bytes,
    receive: Box<[Bytes]>,
    /// How much of a body is looked at; nothing is all of it.
    looked_at: Option<u64>,
    mutations: HeaderMutations,
    expected: Box<[Range<u64>]>,
    retriable: Box<[Range<u64>]>,
    http2: bool,
    service_name: Option<StringMatcher>,
    /// Runtime `health_check.verify_cluster`.
    verify_cluster: RuntimeFraction,
    codec: Arc<h1::Config>,
}

/// How much of a body is looked at when the configuration does not say.
const LOOKED_AT: u64 = 1024;

/// A connection between two checks.
pub(in crate::health) struct Http1 {
    transport: Transport,
    codec: ClientConn,
}

/// What only a check in flight needs.
#[derive(Default)]
struct Scratch {
    head: Headers,
    input: BytesMut,
    output: BytesMut,
}

/// A read should find room for a whole response.
const READ_ROOM: usize = 1024;

/// Kept for the next checks.
const SPARE: usize = 64;

thread_local! {
    static SCRATCH: RefCell<Vec<Scratch>> = const { RefCell::new(Vec::new()) };
}

/// The response as it comes.
#[derive(Default)]
pub(super) struct Response {
    status: u16,
    degraded: bool,
    excluded: bool,
    service_matches: bool,
    search: Search,
    matched: bool,
    seen: u64,
}

impl HttpProbe {
    pub(in crate::health) fn compile(
        proto: &pb::HttpHealthCheck,
        runtime: &Runtime,
    ) -> Result<Self, ConfigError> {
        let method = match core::RequestMethod::try_from(proto.method) {
            Ok(core::RequestMethod::MethodUnspecified) => "GET",
            Ok(method) => method.as_str_name(),
            Err(_) => return Err(ConfigError::field("method", "unknown value")),
        };
        let send = match &proto.send {
            None => Bytes::new(),
            Some(payload) => payload::compile(payload).at(|| "send")?,
        };
        if !send.is_empty() && !matches!(method, "POST" | "PUT" | "PATCH" | "OPTIONS") {
            return Err(ConfigError::new(format!(
                "HTTP health check cannot specify a request payload with method '{method}'. Only methods that support \
                 a request body (POST, PUT, PATCH, OPTIONS) can be used with payload."
            )));
        }
        let http2 = match CodecClientType::try_from(proto.codec_client_type) {
            Ok(CodecClientType::Http1) => false,
            Ok(CodecClientType::Http2) => true,
            _ => return Err(ConfigError::field("codec_client_type", "HTTP/3 is not implemented")),
        };
        let mut expected = ranges("expected", &proto.expected_statuses)?;
        if expected.is_empty() {
            expected.push(200..201);
        }
        let add = &proto.request_headers_to_add;
        let mutations = HeaderMutations::compile(add, &[]).at(|| "request_headers_to_add")?;
        // Errors of the one list and of the other are told apart by their fields.
        HeaderMutations::compile(&[], &proto.request_headers_to_remove).at(|| "request_headers_to_remove")?;
        let mutations = if proto.request_headers_to_remove.is_empty() {
            mutations
        } else {
            HeaderMutations::compile(add, &proto.request_headers_to_remove)?
        };
        let service_name = proto.service_name_matcher.as_ref().map(StringMatcher::compile).transpose();
        Ok(Self {
            host: proto.host.as_str().into(),
            path: proto.path.as_str().into(),
            method,
            send,
            receive: payload::compile_list(&proto.receive)?,
            looked_at: match proto.response_buffer_size.as_ref().map_or(LOOKED_AT, |size| size.value) {
                0 => None,
                size => Some(size),
            },
            mutations,
            expected: expected.into(),
            retriable: ranges("retriable", &proto.retriable_statuses)?.into(),
            http2,
            service_name: service_name.at(|| "service_name_matcher")?,
            verify_cluster: runtime.fraction("health_check.verify_cluster", Fraction::ALWAYS),
            codec: Arc::new(h1::Config::upstream()),
        })
    }

    pub(super) fn is_http2(&self) -> bool {
        self.http2
    }

    pub(super) fn body(&self) -> &Bytes {
        &self.send
    }

    /// The head of a check.
    pub(super) fn write_head(&self, target: &Target<'_>, head: &mut Headers) {
        target.head(self.method, target.hostname(&self.host), &self.path, head);
        head.append(Known::UserAgent, USER_AGENT);
        let protocol = if self.http2 { Protocol::Http2 } else { Protocol::Http11 };
        target.mutate(&self.mutations, protocol, head);
        if !self.send.is_empty() {
            head.set_number(Known::ContentLength, self.send.len() as u64);
        }
    }

    /// Asks over HTTP/1.
    pub(super) async fn check(&self, kept: &mut Connection, target: &Target<'_>) -> Answer {
        let kept_one = match std::mem::take(kept) {
            // One closed in the meantime says nothing about the host, which may be tired of idle connections.
            Connection::Http1(mut kept) => (kept.transport.liveness() == Liveness::Idle).then_some(kept),
            _ => None,
        };
        let mut connection = match kept_one {
            Some(connection) => connection,
            None => match target.open().await {
                Err(_) => return NETWORK,
                Ok((transport, _)) => {
                    Box::new(Http1 { transport, codec: ClientConn::new(Arc::clone(&self.codec)) })
                }
            },
        };
        let mut scratch = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
        let answer = self.exchange(&mut connection, &mut scratch, target).await;
        let is_left = answer.is_some()
            && scratch.input.is_empty()
            && connection.codec.after_message() == After::KeepAlive
            && target.check.settings.reuse_connection;
        if is_left {
            *kept = Connection::Http1(connection);
        }
        scratch.input.clear();
        scratch.output.clear();
        SCRATCH.with_borrow_mut(|spare| {
            if spare.len() < SPARE {
                spare.push(scratch);
            }
        });
        answer.unwrap_or(NETWORK)
    }

    /// One request and its response; nothing when the connection fails.
    async fn exchange(
        &self,
        connection: &mut Http1,
        scratch: &mut Scratch,
        target: &Target<'_>,
    ) -> Option<Answer> {
        let Http1 { transport, codec } = connection;
        let Scratch { head, input, output } = scratch;
        self.write_head(target, head);
        codec.send_head(head, self.send.is_empty(), output);
        if !self.send.is_empty() {
            codec.send_data(&self.send, output);
            codec.send_end(output);
        }
        transport.write_all(output).await.ok()?;
        let mut response = Response::default();
        loop {
            match codec.receive(input, head).ok()? {
                Received::NeedMore => {
                    // What earlier responses took of the buffer comes back, so that one read takes a whole response.
                    input.reserve(READ_ROOM);
                    if transport.read_buf(input).await.ok()? == 0 {
                        match codec.receive_eof().ok()? {
                            Received::End => return Some(self.decide(response, target)),
                            _ => return None,
                        }
                    }
                }
                Received::Head(line) if line.informational => {}
                Received::Head(line) => {
                    self.on_head(line.status, head, &mut response);
                    if codec.is_response_complete() {
                        return Some(self.decide(response, target));
                    }
                }
                Received::Data(data) => self.on_data(&data, &mut response),
                Received::Trailers | Received::End => return Some(self.decide(response, target)),
            }
        }
    }

    pub(super) fn on_head(&self, status: u16, head: &Headers, response: &mut Response) {
        response.status = status;
        response.degraded = head.contains(Known::XEnvoyDegraded);
        response.excluded = head.contains(Known::XEnvoyImmediateHealthCheckFail);
        if let Some(matcher) = &self.service_name {
            let name = head.get(Known::XEnvoyUpstreamHealthcheckedCluster).unwrap_or_default();
            response.service_matches = matcher.is_match(name);
        }
        response.matched = response.search.feed(&self.receive, b"");
    }

    pub(super) fn on_data(&self, data: &[u8], response: &mut Response) {
        let room = self.looked_at.map_or(u64::MAX, |most| most.saturating_sub(response.seen));
        let data = &data[..data.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
        response.seen += data.len() as u64;
        if !response.matched {
            response.matched = response.search.feed(&self.receive, data);
        }
    }

    /// What a complete response says.
    pub(super) fn decide(&self, response: Response, target: &Target<'_>) -> Answer {
        let Response { status, degraded, excluded, service_matches, matched, .. } = response;
        let is_in = |ranges: &[Range<u64>]| ranges.iter().any(|range| range.contains(&u64::from(status)));
        let failed = |retriable, excluded| Answer::Failed(Failure::Active { retriable, excluded, status });
        if !is_in(&self.expected) {
            return failed(is_in(&self.retriable), excluded);
        }
        if !matched {
            return failed(false, false);
        }
        if self.service_name.is_some() && self.verify_cluster.contains(fastrand::u64(..)) {
            target.check.stats.verify_cluster().inc();
            if !service_matches {
                return failed(false, false);
            }
        }
        Answer::Healthy { degraded }
    }
}

fn ranges(kind: &str, protos: &[Int64Range]) -> Result<Vec<Range<u64>>, ConfigError> {
    let range = |proto: &Int64Range| {
        let Int64Range { start, end } = *proto;
        let refuse = |why: String| Err(ConfigError::new(format!("Invalid http {kind} status range: {why}")));
        if start >= end {
            return refuse(format!("expecting start < end, but found start={start} and end={end}"));
        }
        if start < 100 {
            return refuse(format!("expecting start >= 100, but found start={start}"));
        }
        if end > 600 {
            return refuse(format!("expecting end <= 600, but found end={end}"));
        }
        Ok(start.unsigned_abs()..end.unsigned_abs())
    };
    protos.iter().map(range).collect()
}

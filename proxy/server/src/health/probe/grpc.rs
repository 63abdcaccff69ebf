//! gRPC checks: `grpc.health.v1.Health/Check`.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use envoy_types::pb::envoy::config::core::v3::health_check as pb;
use http::HeaderMap;
use prost::Message as _;
use waystation_filter_api::stream::Protocol;
use waystation_format::HeaderMutations;
use waystation_http::{Headers, Known};
use waystation_schema::{At as _, ConfigError};
use waystation_upstream::health_check::{Answer, Failure};

use super::http2::{Exchange, Http2, data};
use super::{Connection, NETWORK, Target, USER_AGENT};

const PATH: &str = "/grpc.health.v1.Health/Check";

/// What stands before a message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// A status is two bytes; what claims to be more than this is none.
const MAX_MESSAGE: usize = 64 * 1024;

/// A compiled `GrpcHealthCheck`.
#[derive(Debug)]
pub(in crate::health) struct GrpcProbe {
    authority: Box<str>,
    metadata: HeaderMutations,
    request: Bytes,
}

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SERVING`
const SERVING: i32 = 1;

/// Why there is no status.
enum Broken {
    /// The stream or its connection ended.
    Network,
    /// What came is not an answer; `open` when the stream is not over.
    NotAnAnswer { open: bool },
}

impl GrpcProbe {
    pub(in crate::health) fn compile(proto: &pb::GrpcHealthCheck) -> Result<Self, ConfigError> {
        let pb::GrpcHealthCheck { service_name, authority, initial_metadata } = proto;
        let message = HealthCheckRequest { service: service_name.clone() }.encode_to_vec();
        let mut request = BytesMut::with_capacity(PREFIX + message.len());
        request.put_u8(0);
        let length =
            u32::try_from(message.len()).map_err(|_| ConfigError::field("service_name", "is too long"))?;
        request.put_u32(length);
        request.put_slice(&message);
        Ok(Self {
            authority: authority.as_str().into(),
            metadata: HeaderMutations::compile(initial_metadata, &[]).at(|| "initial_metadata")?,
            request: request.freeze(),
        })
    }

    /// Asks once.
    pub(super) async fn check(&self, kept: &mut Connection, target: &Target<'_>) -> Answer {
        let mut head = Headers::new();
        target.head("POST", target.hostname(&self.authority), PATH, &mut head);
        head.append(Known::Te, "trailers");
        head.append(Known::ContentType, "application/grpc");
        head.append(Known::UserAgent, USER_AGENT);
        target.mutate(&self.metadata, Protocol::Http2, &mut head);
        head.set(Known::GrpcTimeout, timeout(target.check.settings.timeout));
        let answer = match Http2::send(kept, target, &head, self.request.clone()).await {
            None => NETWORK,
            Some(mut exchange) => match self.receive(&mut exchange).await {
                Ok(true) => Answer::Healthy { degraded: false },
                Ok(false) => unhealthy(),
                Err(Broken::Network) => NETWORK,
                Err(Broken::NotAnAnswer { open }) => {
                    if open {
                        exchange.reset();
                    }
                    unhealthy()
                }
            },
        };
        if !target.check.settings.reuse_connection {
            kept.drop_now();
        }
        answer
    }

    /// Whether the service says that it serves.
    async fn receive(&self, exchange: &mut Exchange) -> Result<bool, Broken> {
        let network = |_| Broken::Network;
        let (head, mut body) = (&mut exchange.response).await.map_err(network)?.into_parts();
        let is_over = body.is_end_stream();
        let is_grpc = head.status == http::StatusCode::OK
            && head.headers.get(http::header::CONTENT_TYPE).is_some_and(|value| is_grpc(value.as_bytes()));
        if !is_grpc || is_over {
            // Without a message it cannot be good news, whatever its `grpc-status` is.
            return Err(Broken::NotAnAnswer { open: !is_over });
        }
        let mut received = BytesMut::new();
        while let Some(bytes) = data(&mut body).await {
            received.extend_from_slice(&bytes.map_err(network)?);
            if received.len() > MAX_MESSAGE {
                return Err(Broken::NotAnAnswer { open: true });
            }
        }
        let trailers = body.trailers().await.map_err(network)?.unwrap_or_default();
        let serving = message(&received).ok_or(Broken::NotAnAnswer { open: false })? == SERVING;
        Ok(serving && is_ok(&trailers))
    }
}

fn unhealthy() -> Answer {
    Answer::Failed(Failure::Active { retriable: false, excluded: false, status: 0 })
}

fn is_grpc(content_type: &[u8]) -> bool {
    content_type.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest, [] | [b'+', ..]))
}

fn is_ok(trailers: &HeaderMap) -> bool {
    trailers.get("grpc-status").is_some_and(|status| status == "0")
}

/// The status in the one message of a response; empty messages are passed over.
fn message(mut bytes: &[u8]) -> Option<i32> {
    let mut status = None;
    while !bytes.is_empty() {
        let (prefix, rest) = bytes.split_at_checked(PREFIX)?;
        let [0 | 1, length @ ..] = prefix else { return None };
        let length = u32::from_be_bytes(length.try_into().ok()?) as usize;
        let (message, rest) = rest.split_at_checked(length)?;
        bytes = rest;
        if !message.is_empty() {
            let response = HealthCheckResponse::decode(message).ok()?;
            if status.replace(response.status).is_some() {
                return None;
            }
        }
    }
    status
}

/// `grpc-timeout`: at most eight digits and a unit.
fn timeout(time: Duration) -> String {
    let mut value = time.as_millis().max(1);
    let mut unit = 'm';
    for (next, divisor) in [('S', 1000), ('M', 60), ('H', 60)] {
        if value <= 99_999_999 {
            break;
        }
        (value, unit) = (value / divisor, next);
    }
    format!("{}{unit}", value.min(99_999_999))
}

#[cfg(test)]
mod tests {
    use super::{message, timeout};
    use std::time::Duration;

    #[test]
    fn one_message_is_an_answer() {
        for (bytes, status) in [
            (&b"\0\0\0\0\x02\x08\x01"[..], Some(1)),
            (b"\0\0\0\0\0\0\0\0\0\x02\x08\x02", Some(2)),
            (b"\0\0\0\0\x02\x08\x01\0\0\0\0\x02\x08\x01", None),
            (b"\0\0\0\0\x02\x08", None),
            (b"\x02\0\0\0\x02\x08\x01", None),
            (b"\0\0\0\0\x01\x08", None),
            (b"\0\0\0", None),
            (b"", None),
        ] {
            assert_eq!(message(bytes), status, "{bytes:?}");
        }
    }

    #[test]
    fn timeouts_have_eight_digits() {
        for (time, text) in [
            (Duration::from_millis(1500), "1500m"),
            (Duration::from_secs(99_999), "99999000m"),
            (Duration::from_secs(100_000), "100000S"),
            (Duration::from_micros(10), "1m"),
        ] {
            assert_eq!(timeout(time), text);
        }
    }
}

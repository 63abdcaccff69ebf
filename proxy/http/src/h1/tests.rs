//! Every row marked "Envoy" was produced by Envoy 1.40.0.

use std::sync::Arc;

use bytes::BytesMut;

use super::*;
use crate::headers::Headers;
use crate::known::Known;

mod requests;
mod responses;
mod roundtrip;

/// What a peer would make of some bytes, in one comparable value.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen<H> {
    Head(H, Vec<(String, String)>),
    Data(Vec<u8>),
    Trailers(Vec<(String, String)>),
    End,
    Error(Error),
}

fn listed(headers: &Headers) -> Vec<(String, String)> {
    headers
        .iter()
        .map(|(name, value)| (name.to_string(), value.iter().map(|byte| char::from(*byte)).collect()))
        .collect()
}

/// Merges neighbouring data, so that the way the input was cut does not show.
fn note<H>(seen: &mut Vec<Seen<H>>, received: Received<H>, headers: &Headers) {
    match received {
        Received::NeedMore => {}
        Received::Head(head) => seen.push(Seen::Head(head, listed(headers))),
        Received::Data(data) => match seen.last_mut() {
            Some(Seen::Data(before)) => before.extend_from_slice(&data),
            _ => seen.push(Seen::Data(data.to_vec())),
        },
        Received::Trailers => seen.push(Seen::Trailers(listed(headers))),
        Received::End => seen.push(Seen::End),
    }
}

/// Reads requests from `pieces`, answering each with 204 so that the next can be read.
fn read_requests(config: &Config, pieces: &[&[u8]]) -> Vec<Seen<RequestHead>> {
    let mut conn = ServerConn::new(Arc::new(config.clone()));
    let (mut input, mut headers, mut seen) = (BytesMut::new(), Headers::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match conn.receive(&mut input, &mut headers) {
                Ok(Received::NeedMore) if conn.is_request_complete() => {
                    let answer: Headers = [(":status", "204")].into_iter().collect();
                    conn.send_head(&answer, true, &mut BytesMut::new());
                    if conn.after_message() == After::Close {
                        return seen;
                    }
                }
                Ok(Received::NeedMore) => break,
                Ok(received) => note(&mut seen, received, &headers),
                Err(error) => {
                    seen.push(Seen::Error(error));
                    return seen;
                }
            }
        }
    }
    seen
}

/// Reads the response to a request with `method` from `pieces`, and the end of the connection behind them.
fn read_response(config: &Config, method: &str, pieces: &[&[u8]]) -> Vec<Seen<ResponseHead>> {
    let mut conn = ClientConn::new(Arc::new(config.clone()));
    let mut request: Headers =
        [(":method", method), (":path", "/"), (":authority", "a")].into_iter().collect();
    if method == "UPGRADE" {
        request.set(Known::Method, "GET");
        request.append(Known::Connection, "upgrade");
        request.append(Known::Upgrade, "websocket");
    }
    conn.send_head(&request, true, &mut BytesMut::new());
    let (mut input, mut headers, mut seen) = (BytesMut::new(), Headers::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match conn.receive(&mut input, &mut headers) {
                Ok(Received::NeedMore) => break,
                Ok(received) => note(&mut seen, received, &headers),
                Err(error) => {
                    seen.push(Seen::Error(error));
                    return seen;
                }
            }
        }
    }
    match conn.receive_eof() {
        Ok(received) => note(&mut seen, received, &headers),
        Err(error) => seen.push(Seen::Error(error)),
    }
    seen
}

fn relaxed() -> Config {
    Config {
        accept_http_10: true,
        default_host_for_http_10: Some("dflt".into()),
        allow_chunked_length: true,
        enable_trailers: true,
        allow_custom_methods: true,
        ..Config::default()
    }
}

#[test]
fn an_idle_connection_is_small() {
    assert!(size_of::<ServerConn>() <= 72, "{}", size_of::<ServerConn>());
    assert!(size_of::<ClientConn>() <= 72, "{}", size_of::<ClientConn>());
}

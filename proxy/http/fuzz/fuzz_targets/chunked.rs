//! A chunked body: no panic, and the same data wherever it is cut.
#![no_main]

use std::sync::Arc;

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use waystation_http::Headers;
use waystation_http::h1::{Config, Received, ServerConn};

fn read(pieces: [&[u8]; 2]) -> (Vec<u8>, String) {
    let mut conn = ServerConn::new(Arc::new(Config { enable_trailers: true, ..Config::default() }));
    let mut input = BytesMut::from("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n");
    let mut headers = Headers::new();
    let mut data = Vec::new();
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match conn.receive(&mut input, &mut headers) {
                Ok(Received::NeedMore) => break,
                Ok(Received::Head(_)) => {}
                Ok(Received::Data(bytes)) => data.extend_from_slice(&bytes),
                Ok(Received::Trailers) => return (data, format!("{headers:?}")),
                Ok(Received::End) => return (data, "end".to_owned()),
                Err(error) => return (data, error.details().to_owned()),
            }
        }
    }
    (data, String::new())
}

fuzz_target!(|input: (u16, &[u8])| {
    let (cut, bytes) = input;
    let (left, right) = bytes.split_at(usize::from(cut).min(bytes.len()));
    assert_eq!(read([bytes, b""]), read([left, right]));
});

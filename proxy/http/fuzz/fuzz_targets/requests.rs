//! A stream of requests: no panic, and the same events wherever the input is cut.
#![no_main]

use std::sync::Arc;

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use waystation_http::Headers;
use waystation_http::h1::{After, Config, HeaderCase, Preserve, Received, ServerConn};

fn read(config: &Arc<Config>, pieces: [&[u8]; 2]) -> (usize, Vec<u8>, String) {
    let mut conn = ServerConn::new(config.clone());
    let (mut input, mut headers) = (BytesMut::new(), Headers::new());
    let (mut messages, mut data, mut log) = (0, Vec::new(), String::new());
    let answer: Headers = [(":status", "204")].into_iter().collect();
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match conn.receive(&mut input, &mut headers) {
                Ok(Received::NeedMore) if conn.is_request_complete() => {
                    conn.send_head(&answer, true, &mut BytesMut::new());
                    if conn.after_message() == After::Close {
                        return (messages, data, log);
                    }
                }
                Ok(Received::NeedMore) => break,
                Ok(Received::Data(bytes)) => data.extend_from_slice(&bytes),
                Ok(Received::Head(head)) => {
                    messages += 1;
                    log.push_str(&format!("{head:?} {headers:?}\n"));
                }
                Ok(Received::Trailers) => log.push_str(&format!("{headers:?}\n")),
                Ok(Received::End) => log.push_str("end\n"),
                Err(error) => {
                    log.push_str(error.details());
                    return (messages, data, log);
                }
            }
        }
    }
    (messages, data, log)
}

fuzz_target!(|input: (u16, bool, &[u8])| {
    let (cut, relaxed, bytes) = input;
    let config = Arc::new(Config {
        accept_http_10: relaxed,
        allow_chunked_length: relaxed,
        allow_custom_methods: relaxed,
        enable_trailers: relaxed,
        header_case: if relaxed { HeaderCase::Preserve(Preserve::default()) } else { HeaderCase::Lower },
        ..Config::default()
    });
    let (left, right) = bytes.split_at(usize::from(cut).min(bytes.len()));
    assert_eq!(read(&config, [bytes, b""]), read(&config, [left, right]));
});

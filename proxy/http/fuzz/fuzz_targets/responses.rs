//! A response: no panic, and what is forwarded reads the same to the next client.
#![no_main]

use std::sync::Arc;

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use waystation_http::h1::{ClientConn, Config, Received, ServerConn};
use waystation_http::{Headers, sanitize_response};

type Message = (Option<Headers>, Vec<u8>, bool);

fn read(bytes: &[u8]) -> Option<Message> {
    let mut conn = ClientConn::new(Arc::new(Config { max_headers: 200, ..Config::default() }));
    let request: Headers = [(":method", "GET"), (":path", "/"), (":authority", "a")].into_iter().collect();
    conn.send_head(&request, true, &mut BytesMut::new());
    let (mut input, mut headers) = (BytesMut::from(bytes), Headers::new());
    let (mut head, mut body) = (None, Vec::new());
    let mut trailers = Headers::new();
    loop {
        let into = if head.is_some() { &mut trailers } else { &mut headers };
        match conn.receive(&mut input, into).ok()? {
            Received::NeedMore if conn.is_response_complete() => return Some((head, body, true)),
            Received::NeedMore => {
                let ended = conn.receive_eof() == Ok(Received::End);
                return ended.then_some((head, body, true));
            }
            Received::Head(read) if read.informational => {}
            Received::Head(_) => head = Some(headers.clone()),
            Received::Data(data) => body.extend_from_slice(&data),
            Received::Trailers | Received::End => return Some((head, body, true)),
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((Some(mut head), body, _)) = read(bytes) else { return };
    sanitize_response(&mut head, false);
    let mut server = ServerConn::new(Arc::default());
    let mut request = BytesMut::from("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
    server.receive(&mut request, &mut Headers::new()).expect("a plain request");
    let mut out = BytesMut::new();
    server.send_head(&head, false, &mut out);
    server.send_data(&body, &mut out);
    server.send_end(&mut out);
    let (again, body_again, _) = read(&out).expect("what was written can be read");
    assert_eq!(body_again, body);
    assert_eq!(again.and_then(|head| head.status()), head.status());
});

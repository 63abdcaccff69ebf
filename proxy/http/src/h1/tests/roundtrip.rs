use proptest::prelude::*;

use super::*;

/// Requests that sit on the borders of framing. The corpus of smuggling attempts: whatever is not refused must be
/// seen as exactly one message, however it is cut.
const STREAMS: &[&str] = &[
    "GET / HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HTTP/1.1\r\nhost: b\r\nx: y\r\n\r\n",
    "\r\n\nPOST /x HTTP/1.1\r\nHost: a\r\ncontent-length: 5\r\n\r\nhelloGET /2 HTTP/1.1\r\nhost: b\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nt: 1\r\n\r\nGET /2 HTTP/1.1\r\nhost: b\r\n\r\n",
    "POST / HTTP/1.1\nhost: a\nx: a\n b\ntransfer-encoding: chunked\n\n1\r\na\r\n0\r\n\n",
    "GET / HTTP/1.1\r\nhost: a\r\n\r\r\nx: y\r\n\r\n",
    "GET / HTTP/1.1\r\nhost: a\r\nx: y\rGET /smuggled HTTP/1.1\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /s HTTP/1.1\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ncontent-length : 5\r\n\r\nhello",
    "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding\u{b}: chunked\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\u{b}chunked\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chu\rnked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\nx: y\r\n transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\nhi",
    "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\r\n chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhiX0\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff1\r\nhi",
    "GET / HTTP/1.0\r\n\r\n",
    "CONNECT a:1 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    "GET /\r\n\r\n",
];

#[test]
fn cutting_the_input_anywhere_changes_nothing() {
    for config in [Config::default(), relaxed()] {
        for stream in STREAMS {
            let bytes = stream.as_bytes();
            let whole = read_requests(&config, &[bytes]);
            for cut in 0..=bytes.len() {
                let (left, right) = bytes.split_at(cut);
                assert_eq!(read_requests(&config, &[left, right]), whole, "{stream:?} at {cut}");
            }
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(read_requests(&config, &single), whole, "{stream:?} byte by byte");
        }
    }
    for stream in [
        "HTTP/1.1 100 C\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nt: 1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nx: a\r\n b\r\n\r\nuntil the end",
        "HTTP/1.1 200 OK\ncontent-length: 3\n\nabc",
    ] {
        let whole = read_response(&relaxed(), "GET", &[stream.as_bytes()]);
        for cut in 0..=stream.len() {
            let (left, right) = stream.as_bytes().split_at(cut);
            assert_eq!(read_response(&relaxed(), "GET", &[left, right]), whole, "{stream:?} at {cut}");
        }
    }
}

#[test]
fn nothing_is_smuggled() {
    for stream in STREAMS {
        for event in read_requests(&relaxed(), &[stream.as_bytes()]) {
            if let Seen::Head(_, headers) = event {
                let path = headers.iter().find(|(name, _)| name == ":path").map(|(_, path)| path.as_str());
                // Only the stream whose length was dropped on request may go on to a second message there.
                let allowed =
                    path != Some("/smuggled") && (path != Some("/s") || stream.contains("content-length: 5"));
                assert!(allowed, "{stream:?}");
            }
        }
    }
}

#[test]
fn mutated_streams_do_no_harm() {
    let mut rng = fastrand::Rng::with_seed(42);
    let tokens: &[&[u8]] = &[
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b"\0",
        b":",
        b",",
        b"chunked",
        b"transfer-encoding: chunked\r\n",
        b"content-length: 3\r\n",
        b"connection: close, te\r\n",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"0\r\n\r\n",
        b"\xff",
        b"upgrade: h2c\r\n",
        b"http://a:1/",
        b"host: b\r\n",
    ];
    for round in 0..30_000 {
        let mut bytes = STREAMS[rng.usize(..STREAMS.len())].as_bytes().to_vec();
        for _ in 0..rng.usize(1..5) {
            let at = rng.usize(..=bytes.len());
            match rng.u8(..4) {
                0 if at < bytes.len() => bytes[at] = rng.u8(..),
                1 if at < bytes.len() => drop(bytes.remove(at)),
                2 => bytes.truncate(at.max(1)),
                _ => drop(bytes.splice(at..at, tokens[rng.usize(..tokens.len())].iter().copied())),
            }
        }
        let config = if rng.bool() { Config::default() } else { relaxed() };
        let whole = read_requests(&config, &[&bytes]);
        let (left, right) = bytes.split_at(rng.usize(..=bytes.len()));
        assert_eq!(read_requests(&config, &[left, right]), whole, "round {round}: {}", bytes.escape_ascii());
        read_response(&config, "GET", &[&bytes]);
    }
}

fn name() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9-]{0,12}".prop_filter("not framing or hop-by-hop", |name| {
        !matches!(name.as_str(), "te" | "host" | "upgrade" | "connection" | "date" | "age")
            && crate::Known::lookup(name.as_bytes()).is_none()
    })
}

fn value() -> impl Strategy<Value = String> {
    "([!-~]([ -~]{0,20}[!-~])?)?"
}

#[derive(Clone, Debug)]
struct Message {
    fields: Vec<(String, String)>,
    body: Vec<Vec<u8>>,
    with_length: bool,
    trailers: Vec<(String, String)>,
}

fn message() -> impl Strategy<Value = Message> {
    let fields = || proptest::collection::vec((name(), value()), 0..6);
    let body = proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..4);
    (fields(), body, any::<bool>(), fields()).prop_map(|(fields, body, with_length, trailers)| {
        let trailers = if with_length { Vec::new() } else { trailers };
        Message { fields, body, with_length, trailers }
    })
}

impl Message {
    fn head(&self, start: &[(&str, &str)]) -> Headers {
        let mut headers: Headers = start.iter().copied().collect();
        headers.extend(self.fields.iter().map(|(name, value)| (name.as_str(), value)));
        if self.with_length {
            headers.set_number(Known::ContentLength, self.body.concat().len() as u64);
        }
        headers
    }

    /// What the reader sees behind the head.
    fn rest<H>(&self) -> Vec<Seen<H>> {
        let mut rest = Vec::new();
        let body = self.body.concat();
        let empty = body.is_empty();
        if !empty {
            rest.push(Seen::Data(body));
        }
        if !self.trailers.is_empty() {
            rest.push(Seen::Trailers(self.trailers.clone()));
        } else if !(self.with_length && empty) {
            rest.push(Seen::End);
        }
        rest
    }

    fn trailers(&self) -> Headers {
        self.trailers.iter().map(|(name, value)| (name.as_str(), value)).collect()
    }
}

/// Checks that `seen` is `head` and then `rest`.
fn compare<H: PartialEq + std::fmt::Debug>(seen: &[Seen<H>], head: &Headers, rest: &[Seen<H>]) {
    let Some(Seen::Head(_, headers)) = seen.first() else { panic!("{seen:?}") };
    assert_eq!(headers, &listed(head));
    assert_eq!(&seen[1..], rest);
}

proptest! {
    #[test]
    fn a_request_is_read_as_it_was_written(message in message(), cut in any::<proptest::sample::Index>()) {
        let head = message.head(&[(":method", "POST"), (":authority", "a.example"), (":path", "/x?y")]);
        let mut client = ClientConn::new(Arc::new(relaxed()));
        let mut out = BytesMut::new();
        client.send_head(&head, false, &mut out);
        for piece in &message.body {
            client.send_data(piece, &mut out);
        }
        client.send_trailers(&message.trailers(), &mut out);
        let (left, right) = out.split_at(cut.index(out.len() + 1));
        let seen = read_requests(&relaxed(), &[left, right]);
        compare(&seen, &head, &message.rest());
    }

    #[test]
    fn a_response_is_read_as_it_was_written(message in message(), cut in any::<proptest::sample::Index>()) {
        let head = message.head(&[(":status", "200")]);
        let mut server = ServerConn::new(Arc::new(relaxed()));
        let mut input = BytesMut::from("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
        server.receive(&mut input, &mut Headers::new()).unwrap();
        let mut out = BytesMut::new();
        server.send_head(&head, false, &mut out);
        for piece in &message.body {
            server.send_data(piece, &mut out);
        }
        server.send_trailers(&message.trailers(), &mut out);
        prop_assert_eq!(server.after_message(), After::KeepAlive);
        let (left, right) = out.split_at(cut.index(out.len() + 1));
        let seen = read_response(&relaxed(), "GET", &[left, right]);
        compare(&seen, &head, &message.rest());
    }
}

use super::*;

const OK: &str = "HTTP/1.1 200 OK\r\n";

fn read(bytes: &str) -> Vec<Seen<ResponseHead>> {
    read_response(&Config::default(), "GET", &[bytes.as_bytes()])
}

fn error(seen: &[Seen<ResponseHead>]) -> Option<Error> {
    seen.iter().find_map(|event| if let Seen::Error(error) = event { Some(*error) } else { None })
}

#[test]
fn framing_like_envoy() {
    let abc = || Seen::Data(b"abc".to_vec());
    for bytes in [
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\n\r\nabc",
        "HTTP/1.0 200 OK\r\n\r\nabc",
        "HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.2 200 OK\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/2.0 200 OK\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 \r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1  200  x\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1\t200\tx y\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\ncontent-length: 3\n\nabc",
        "HTTP/1.1 200 OK\r\nx: a\rb\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nx: a\r\n  b\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-t: 1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nconnection: upgrade\r\nupgrade: websocket\r\ncontent-length: 3\r\n\r\nabc",
    ] {
        let seen = read(bytes);
        assert_eq!(seen[1..], [abc(), Seen::End], "{bytes:?}");
    }
}

#[test]
fn refused_like_envoy() {
    for (bytes, want) in [
        ("abc\r\n\r\n", Error::Codec),
        ("HTTP/1.1 99 x\r\n\r\n", Error::Codec),
        ("HTTP/1.1 2x0 x\r\n\r\n", Error::Codec),
        ("HTTP/1.1 000 x\r\n\r\n", Error::Codec),
        ("http/1.1 200 x\r\n\r\n", Error::Codec),
        ("\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", Error::Codec),
        ("HTTP/1.1 200 O\u{1}K\r\n\r\n", Error::InvalidCharacters),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
            Error::ContentLengthAndChunked,
        ),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n", Error::InvalidTransferEncoding),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\n\r\n", Error::InvalidTransferEncoding),
        ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc", Error::Codec),
        ("HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nabc", Error::Codec),
        ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc", Error::Incomplete),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabc", Error::Incomplete),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", Error::Codec),
        ("HTTP/1.1 204 No\r\ncontent-length: 3\r\n\r\nabc", Error::ContentLengthNotAllowed),
        ("HTTP/1.1 204 No\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", Error::TransferEncodingNotAllowed),
        ("HTTP/1.1 100 Continue\r\ncontent-length: 3\r\n\r\n", Error::ContentLengthNotAllowed),
        ("HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\n", Error::InvalidCharacters),
        ("HTTP/1.1 200 OK\r\nx : a\r\n\r\n", Error::Codec),
        ("HTTP/1.1 200 OK\r\nxyz\r\n\r\n", Error::Codec),
        ("HTTP/1.1 200 OK\r\nx: y", Error::Incomplete),
        // Envoy passes this on; see `ClientConn::begin`.
        ("HTTP/1.1 101 S\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", Error::Codec),
    ] {
        assert_eq!(error(&read(bytes)), Some(want), "{bytes:?}");
    }
    let lines = format!("{OK}{}\r\n", "x: 1\r\n".repeat(101));
    assert_eq!(error(&read(&lines)), Some(Error::TooManyHeaders));
}

#[test]
fn bytes_behind_a_response_close_the_connection() {
    let mut headers = Headers::new();
    for (bytes, after) in [("", After::KeepAlive), ("def", After::Close)] {
        let mut conn = ClientConn::new(Arc::new(Config::upstream()));
        let request: Headers =
            [(":method", "GET"), (":path", "/"), (":authority", "a")].into_iter().collect();
        conn.send_head(&request, true, &mut BytesMut::new());
        let mut input = BytesMut::from(format!("{OK}content-length: 3\r\n\r\nabc{bytes}").as_bytes());
        assert!(matches!(conn.receive(&mut input, &mut headers), Ok(Received::Head(_))));
        assert_eq!(conn.receive(&mut input, &mut headers), Ok(Received::Data("abc".into())));
        assert_eq!(conn.receive(&mut input, &mut headers), Ok(Received::End));
        assert_eq!(conn.receive(&mut input, &mut headers), Ok(Received::NeedMore));
        assert_eq!(conn.after_message(), after);
    }
    let mut unused = ClientConn::new(Arc::new(Config::upstream()));
    assert_eq!(
        unused.receive(&mut BytesMut::from("HTTP/1.1 408 T\r\n\r\n"), &mut headers),
        Err(Error::Codec)
    );
}

#[test]
fn garbage_is_answered_in_http_11_and_closes() {
    for garbage in ["nonsense\r\n\r\n", "GET / HTTP/1.0\r\n\r\n"] {
        let mut conn = ServerConn::new(Arc::default());
        let (mut headers, mut out) = (Headers::new(), BytesMut::new());
        conn.receive(&mut BytesMut::from("HEAD / HTTP/1.1\r\nhost: a\r\n\r\n"), &mut headers).unwrap();
        conn.send_head(&[(":status", "204")].into_iter().collect(), true, &mut out);
        assert_eq!(conn.after_message(), After::KeepAlive);
        let error = conn.receive(&mut BytesMut::from(garbage), &mut headers).unwrap_err();
        out.clear();
        headers.clear();
        headers.set_status(error.status());
        headers.set_number(Known::ContentLength, error.body().len() as u64);
        conn.send_head(&headers, false, &mut out);
        conn.send_data(error.body().as_bytes(), &mut out);
        let (status, body) = (error.status(), error.body());
        let length = body.len();
        let want = format!(
            "HTTP/1.1 {status} {body}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        );
        assert_eq!(&out[..], want.as_bytes());
        assert_eq!(conn.after_message(), After::Close);
    }
}

#[test]
fn responses_without_a_body() {
    for (method, bytes) in [
        ("GET", "HTTP/1.1 204 No\r\n\r\n"),
        ("GET", "HTTP/1.1 204 No\r\ncontent-length: 0\r\n\r\n"),
        ("GET", "HTTP/1.1 304 No\r\n\r\n"),
        ("GET", "HTTP/1.1 304 No\r\ncontent-length: 3\r\n\r\n"),
        ("GET", "HTTP/1.1 304 No\r\ntransfer-encoding: chunked\r\n\r\n"),
        ("GET", "HTTP/1.1 205 No\r\ncontent-length: 0\r\n\r\n"),
        ("HEAD", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n"),
        ("HEAD", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
        ("HEAD", "HTTP/1.1 200 OK\r\n\r\n"),
    ] {
        let seen = read_response(&Config::default(), method, &[bytes.as_bytes()]);
        assert_eq!(seen.len(), 1, "{bytes:?}: {seen:?}");
        let Seen::Head(head, headers) = &seen[0] else { panic!() };
        assert_eq!(head.framing, Framing::None);
        let length = headers.iter().any(|(name, _)| name == "content-length");
        assert_eq!(length, !bytes.contains(" 204 ") && bytes.contains("content-length"), "{bytes:?}");
    }
}

#[test]
fn informational_responses_come_first() {
    for status in [100, 102, 103, 199] {
        let bytes = format!("HTTP/1.1 {status} X\r\nlink: a\r\n\r\n{OK}content-length: 1\r\n\r\na");
        let seen = read(&bytes);
        let Seen::Head(first, _) = &seen[0] else { panic!() };
        assert!(first.informational && first.status == status);
        let Seen::Head(second, _) = &seen[1] else { panic!() };
        assert!(!second.informational && second.status == 200);
        assert_eq!(seen[2..], [Seen::Data(b"a".to_vec()), Seen::End]);
    }
}

#[test]
fn tunnels() {
    let seen =
        read_response(&Config::default(), "UPGRADE", &[b"HTTP/1.1 101 S\r\nupgrade: websocket\r\n\r\nraw"]);
    let Seen::Head(head, _) = &seen[0] else { panic!("{seen:?}") };
    assert_eq!(head.framing, Framing::Tunnel);
    assert_eq!(seen[1..], [Seen::Data(b"raw".to_vec()), Seen::End]);
    let seen =
        read_response(&Config::default(), "CONNECT", &[b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nraw"]);
    assert_eq!(seen[1..], [Seen::Data(b"raw".to_vec()), Seen::End]);
    let seen =
        read_response(&Config::default(), "CONNECT", &[b"HTTP/1.1 403 No\r\ncontent-length: 1\r\n\r\nr"]);
    assert_eq!(seen[1..], [Seen::Data(b"r".to_vec()), Seen::End]);
}

/// What a server writes for a request line, extra request lines, and a response.
fn answer(request: &str, config: Config, response: &[(&str, &str)], end_stream: bool) -> (String, After) {
    let mut conn = ServerConn::new(Arc::new(config));
    let (mut input, mut headers, mut out) = (BytesMut::from(request), Headers::new(), BytesMut::new());
    conn.receive(&mut input, &mut headers).unwrap();
    let response: Headers = response.iter().copied().collect();
    conn.send_head(&response, end_stream, &mut out);
    if !end_stream {
        conn.send_data(b"abc", &mut out);
        conn.send_end(&mut out);
    }
    (String::from_utf8(out.to_vec()).unwrap(), conn.after_message())
}

#[test]
fn written_like_envoy() {
    let get = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let head = "HEAD / HTTP/1.1\r\nhost: a\r\n\r\n";
    let close = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let old = "GET / HTTP/1.0\r\nhost: a\r\n\r\n";
    let old_kept = "GET / HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\n\r\n";
    let unfinished = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n";
    let ok = (":status", "200");
    let three = ("content-length", "3");
    type Row<'a> = (&'a str, &'a [(&'a str, &'a str)], bool, &'a str, After);
    let rows: &[Row<'_>] = &[
        (get, &[ok, three], false, "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc", After::KeepAlive),
        (
            get,
            &[ok, ("x", "y")],
            false,
            "HTTP/1.1 200 OK\r\nx: y\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            After::KeepAlive,
        ),
        (get, &[ok], true, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", After::KeepAlive),
        (get, &[(":status", "204")], true, "HTTP/1.1 204 No Content\r\n\r\n", After::KeepAlive),
        (
            get,
            &[(":status", "304"), three],
            true,
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 3\r\n\r\n",
            After::KeepAlive,
        ),
        (get, &[(":status", "304")], true, "HTTP/1.1 304 Not Modified\r\n\r\n", After::KeepAlive),
        (
            get,
            &[(":status", "418"), three],
            false,
            "HTTP/1.1 418 Unknown\r\ncontent-length: 3\r\n\r\nabc",
            After::KeepAlive,
        ),
        (head, &[ok, three], true, "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", After::KeepAlive),
        (head, &[ok], true, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", After::KeepAlive),
        (head, &[ok], false, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", After::KeepAlive),
        (
            close,
            &[ok],
            false,
            "HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            After::Close,
        ),
        (
            old,
            &[ok, three],
            false,
            "HTTP/1.0 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc",
            After::Close,
        ),
        (
            old_kept,
            &[ok, three],
            false,
            "HTTP/1.0 200 OK\r\ncontent-length: 3\r\nconnection: keep-alive\r\n\r\nabc",
            After::KeepAlive,
        ),
        (old_kept, &[ok], false, "HTTP/1.0 200 OK\r\nconnection: close\r\n\r\nabc", After::Close),
        (
            unfinished,
            &[ok, three],
            false,
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc",
            After::Close,
        ),
        // A body that is longer or shorter than declared must not be mistaken for the next message.
        (
            get,
            &[ok, ("content-length", "2")],
            false,
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab",
            After::KeepAlive,
        ),
        (
            get,
            &[ok, ("content-length", "5")],
            false,
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc",
            After::Close,
        ),
    ];
    for (request, response, end_stream, want, after) in rows {
        let got = answer(request, relaxed(), response, *end_stream);
        assert_eq!(got, ((*want).to_owned(), *after), "{request:?} {response:?}");
    }
}

#[test]
fn requests_are_written_like_envoy() {
    let write = |entries: &[(&str, &str)], end_stream: bool| {
        let mut conn = ClientConn::new(Arc::new(relaxed()));
        let mut out = BytesMut::new();
        conn.send_head(&entries.iter().copied().collect(), end_stream, &mut out);
        if !end_stream {
            conn.send_data(b"hi", &mut out);
            conn.send_data(b"", &mut out);
            conn.send_trailers(&[("x-t", "1")].into_iter().collect(), &mut out);
        }
        String::from_utf8(out.to_vec()).unwrap()
    };
    let (a, p) = ((":authority", "a"), (":path", "/x"));
    assert_eq!(
        write(&[(":method", "GET"), a, p, ("x", "y")], true),
        "GET /x HTTP/1.1\r\nhost: a\r\nx: y\r\n\r\n"
    );
    assert_eq!(
        write(&[(":method", "POST"), a, p], true),
        "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"
    );
    assert_eq!(
        write(&[(":method", "OPTIONS"), a, p], true),
        "OPTIONS /x HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"
    );
    assert_eq!(
        write(&[(":method", "POST"), a, p], false),
        "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx-t: 1\r\n\r\n"
    );
    assert_eq!(
        write(&[(":method", "POST"), a, p, ("content-length", "2")], false),
        "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi"
    );
    assert_eq!(
        write(&[(":method", "CONNECT"), (":authority", "b:80")], false),
        "CONNECT b:80 HTTP/1.1\r\nhost: b:80\r\n\r\nhi"
    );
    assert_eq!(
        write(&[(":method", "GET"), a, p, ("connection", "upgrade"), ("upgrade", "websocket")], false),
        "GET /x HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhi"
    );
}

#[test]
fn accepted_tunnels_are_written_bare() {
    let upgrade = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let (text, after) = answer(
        upgrade,
        relaxed(),
        &[(":status", "101"), ("upgrade", "websocket"), ("connection", "upgrade")],
        false,
    );
    assert_eq!(
        text,
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nabc"
    );
    assert_eq!(after, After::Close);
    let (text, _) = answer(upgrade, relaxed(), &[(":status", "403")], true);
    assert_eq!(text, "HTTP/1.1 403 Forbidden\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    let connect = "CONNECT b:80 HTTP/1.1\r\n\r\n";
    let (text, _) = answer(connect, relaxed(), &[(":status", "200"), ("content-length", "7")], false);
    assert_eq!(text, "HTTP/1.1 200 OK\r\n\r\nabc");
}

#[test]
fn case_is_preserved_on_request() {
    let config = Config { header_case: HeaderCase::Preserve(Preserve::default()), ..Config::default() };
    let mut server = ServerConn::new(Arc::new(config.clone()));
    let (mut headers, mut out) = (Headers::new(), BytesMut::new());
    let text = "GET / HTTP/1.1\r\nHOST: a\r\nX-Foo: 1\r\nACCept: b\r\nplain: c\r\n\r\n";
    server.receive(&mut BytesMut::from(text), &mut headers).unwrap();
    assert_eq!(headers.get("x-foo"), Some(&b"1"[..]));
    ClientConn::new(Arc::new(config)).send_head(&headers, true, &mut out);
    assert_eq!(&out[..], text.as_bytes());
}

#[test]
fn names_that_are_added_are_spelled_as_who_read_the_message_wants() {
    let preserve = Preserve { proper_added: true, reason_phrase: true };
    let config = Arc::new(Config { header_case: HeaderCase::Preserve(preserve), ..Config::default() });
    let mut server = ServerConn::new(Arc::clone(&config));
    let (mut headers, mut out) = (Headers::new(), BytesMut::new());
    let text = "POST / HTTP/1.1\r\nHOST: a\r\nplain: c\r\nX-fOO: 1\r\ntransfer-encoding: chunked\r\n\r\n";
    server.receive(&mut BytesMut::from(text), &mut headers).unwrap();
    headers.append("x-added", "1");
    headers.append(Known::XRequestId, "2");
    ClientConn::new(Arc::new(Config::default())).send_head(&headers, false, &mut out);
    let expected = "POST / HTTP/1.1\r\nHOST: a\r\nplain: c\r\nX-fOO: 1\r\nX-Added: 1\r\nX-Request-Id: 2\r\n\
                    transfer-encoding: chunked\r\n\r\n";
    assert_eq!(std::str::from_utf8(&out), Ok(expected));

    let mut client = ClientConn::new(config);
    out.clear();
    client.send_head(&[(":method", "GET"), (":path", "/")].into_iter().collect(), true, &mut out);
    let text = "HTTP/1.1 200 Fine by me\r\nX-Up: 1\r\ncontent-length: 0\r\n\r\n";
    client.receive(&mut BytesMut::from(text), &mut headers).unwrap();
    headers.append("x-down", "2");
    let mut server = ServerConn::new(Arc::new(Config::default()));
    server.receive(&mut BytesMut::from("GET / HTTP/1.1\r\nhost: a\r\n\r\n"), &mut Headers::new()).unwrap();
    server.close_after_response();
    out.clear();
    server.send_head(&headers, true, &mut out);
    let expected =
        "HTTP/1.1 200 Fine by me\r\nX-Up: 1\r\ncontent-length: 0\r\nX-Down: 2\r\nConnection: close\r\n\r\n";
    assert_eq!(std::str::from_utf8(&out), Ok(expected));
    headers.clear();
    assert!(headers.reason().is_none() && !headers.spells_added());
}

#[test]
fn whole_url_for_who_wants_it() {
    let config = Arc::new(Config { send_fully_qualified_url: true, ..Config::default() });
    for (method, expected) in [
        ("GET", "GET https://a:81/p?q HTTP/1.1\r\nhost: a:81\r\n\r\n"),
        ("CONNECT", "CONNECT a:81 HTTP/1.1\r\nhost: a:81\r\n\r\n"),
    ] {
        let head = [(":method", method), (":scheme", "https"), (":authority", "a:81"), (":path", "/p?q")];
        let mut out = BytesMut::new();
        ClientConn::new(Arc::clone(&config)).send_head(&head.into_iter().collect(), true, &mut out);
        assert_eq!(std::str::from_utf8(&out), Ok(expected));
    }
}

#[test]
fn informational_and_chunk_frames() {
    let mut conn = ServerConn::new(Arc::new(Config::default()));
    let (mut headers, mut out) = (Headers::new(), BytesMut::new());
    let text = "POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\n";
    conn.receive(&mut BytesMut::from(text), &mut headers).unwrap();
    conn.send_informational(100, &Headers::new(), &mut out);
    assert_eq!(&out[..], b"HTTP/1.1 100 Continue\r\n\r\n");
    conn.send_head(&[(":status", "200")].into_iter().collect(), false, &mut out);
    for (len, prefix) in [(1, "1\r\n"), (16, "10\r\n"), (0xabcdef, "abcdef\r\n")] {
        let frame = conn.frame_data(len);
        assert_eq!((frame.prefix(), frame.take(), frame.suffix()), (prefix.as_bytes(), len, &b"\r\n"[..]));
    }
    assert_eq!(conn.frame_data(usize::MAX).prefix(), format!("{:x}\r\n", usize::MAX).as_bytes());
}

#[test]
fn proper_case_spells_names_and_nothing_else() {
    let config = Arc::new(Config { header_case: HeaderCase::Proper, ..Config::default() });
    let mut client = ClientConn::new(config);
    let mut headers = Headers::new();
    headers.append(":method", b"POST");
    headers.append(":path", b"/a-b");
    headers.append(":authority", b"case.test");
    headers.append("x-foo$b", b"keep-me: as-is");
    let mut out = BytesMut::new();
    client.send_head(&headers, false, &mut out);
    let expected = "POST /a-b HTTP/1.1\r\nHost: case.test\r\nX-Foo$B: keep-me: as-is\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(std::str::from_utf8(&out), Ok(expected));
}

#[test]
fn what_a_rewrite_makes_cannot_begin_another_message() {
    let mut client = ClientConn::new(Arc::new(Config::default()));
    let mut headers = Headers::new();
    headers.append(":method", b"GET");
    headers.append(":path", b"/y HTTP/1.1\r\nhost: b\r\n\r\nGET /admin");
    headers.append(":authority", b"a\r\nx: y");
    headers.append("location", b"/a\r\nset-cookie: b");
    headers.append("content-length", b"x");
    let mut out = BytesMut::new();
    client.send_head(&headers, true, &mut out);
    let expected = "GET /y%20HTTP/1.1%0D%0Ahost:%20b%0D%0A%0D%0AGET%20/admin HTTP/1.1\r\nhost: a%0D%0Ax:%20y\r\n\
                    location: /a  set-cookie: b\r\n\r\n";
    assert_eq!(std::str::from_utf8(&out), Ok(expected));
}

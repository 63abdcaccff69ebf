use super::*;

fn read(config: &Config, bytes: &[u8]) -> Vec<Seen<RequestHead>> {
    read_requests(config, &[bytes])
}

fn first_error(seen: &[Seen<RequestHead>]) -> Option<Error> {
    seen.iter().find_map(|event| if let Seen::Error(error) = event { Some(*error) } else { None })
}

fn header(seen: &[Seen<RequestHead>], name: &str) -> Option<String> {
    let Some(Seen::Head(_, headers)) = seen.first() else { panic!("no head: {seen:?}") };
    let values: Vec<&str> =
        headers.iter().filter(|(other, _)| other == name).map(|(_, value)| value.as_str()).collect();
    (!values.is_empty()).then(|| values.join("|"))
}

/// Start of a request with a body.
const POST: &str = "POST / HTTP/1.1\r\nhost: a\r\n";
const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n";

#[test]
fn refused_like_envoy() {
    use Error as E;
    let strict = Config::default();
    let rows: &[(&str, String, E)] = &[
        (
            "CL+TE",
            format!("{POST}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"),
            E::ContentLengthAndChunked,
        ),
        (
            "TE+CL",
            format!("{POST}transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n"),
            E::ContentLengthAndChunked,
        ),
        (
            "TE gzip + CL",
            format!("{POST}transfer-encoding: gzip\r\ncontent-length: 5\r\n\r\n"),
            E::ContentLengthAndChunked,
        ),
        (
            "TE empty + CL",
            format!("{POST}transfer-encoding:\r\ncontent-length: 5\r\n\r\n"),
            E::ContentLengthAndChunked,
        ),
        ("no colon", format!("{GET}xy\r\n\r\n"), E::Codec),
        ("fold first", "GET / HTTP/1.1\r\n x: y\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("space before colon", format!("{GET}x : 1\r\n\r\n"), E::Codec),
        ("tab before colon", format!("{GET}x\t: 1\r\n\r\n"), E::Codec),
        ("space in name", format!("{GET}x y: 1\r\n\r\n"), E::Codec),
        ("empty name", format!("{GET}: 1\r\n\r\n"), E::Codec),
        ("name with paren", format!("{GET}x(y: 1\r\n\r\n"), E::Codec),
        ("name with at", format!("{GET}x@y: 1\r\n\r\n"), E::Codec),
        ("name with slash", format!("{GET}x/y: 1\r\n\r\n"), E::Codec),
        ("name with quote", format!("{GET}x\"y: 1\r\n\r\n"), E::Codec),
        ("name not ASCII", format!("{GET}x\u{e9}y: 1\r\n\r\n"), E::Codec),
        ("CR in name", format!("{GET}x\ry: 1\r\n\r\n"), E::Codec),
        ("only CRs in a line", format!("{GET}\r\r\nx: y\r\n\r\n"), E::Codec),
        ("CR before a fold", format!("{GET}x: a\r\n\r b\r\n\r\n"), E::Codec),
        ("CR before colon", format!("{GET}x\r: a\r\n\r\n"), E::Codec),
        ("CR in length", format!("{POST}content-length: 1\r2\r\n\r\n"), E::Codec),
        // Envoy 1.40 takes this as a request without a body.
        ("CR in coding", format!("{POST}transfer-encoding: chu\rnked\r\n\r\n0\r\n\r\n"), E::Codec),
        ("CTL in name", format!("{GET}x\u{1}: 1\r\n\r\n"), E::InvalidCharacters),
        ("NUL in name", format!("{GET}x\0: 1\r\n\r\n"), E::InvalidCharacters),
        ("DEL in name", format!("{GET}x\u{7f}: 1\r\n\r\n"), E::InvalidCharacters),
        ("NUL in value", format!("{GET}x: a\0b\r\n\r\n"), E::InvalidCharacters),
        ("CTL in value", format!("{GET}x: a\u{1}b\r\n\r\n"), E::InvalidCharacters),
        ("DEL in value", format!("{GET}x: a\u{7f}b\r\n\r\n"), E::InvalidCharacters),
        ("leading space", format!(" {GET}\r\n"), E::Codec),
        ("four words", "GET / x HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("HTTP/0.9", "GET /\r\nhost: a\r\n\r\n".into(), E::LowVersion),
        ("HTTP/1.0", "GET / HTTP/1.0\r\nhost: a\r\n\r\n".into(), E::LowVersion),
        ("HTTP/1.2", "GET / HTTP/1.2\r\nhost: a\r\n\r\n".into(), E::LowVersion),
        ("HTTP/2.0", "GET / HTTP/2.0\r\nhost: a\r\n\r\n".into(), E::LowVersion),
        ("http/1.1", "GET / http/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("HTTP/1.10", "GET / HTTP/1.10\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("HTTP/11", "GET / HTTP/11\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("HTTP/01.1", "GET / HTTP/01.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("FOO/1.1", "GET / FOO/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("lower-case method", "get / HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("unknown method", "FOO / HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("M-SEARCH", "M-SEARCH / HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("TLS", "\u{16}\u{3}\u{1}\u{2}\0\u{1}".into(), E::Codec),
        ("HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), E::Codec),
        ("garbage line", "GET / FOO\r\n".into(), E::Codec),
        ("relative path", "GET foo HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("GET *", "GET * HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("authority form", "GET b.com:80 HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("not ASCII in target", "GET /\u{e9} HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("CTL in target", "GET /a\u{1}b HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidCharacters),
        ("DEL in target", "GET /a\u{7f}b HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidCharacters),
        ("CR in target", "GET /a\rb HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::Codec),
        ("ftp", "GET ftp://b.com/x HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidScheme),
        ("port too large", "GET http://b.com:99999/x HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidUrl),
        ("port not a number", "GET http://b.com:x/x HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidUrl),
        ("port empty", "GET http://b.com:/x HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidUrl),
        ("host empty in URL", "GET http:///x HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidUrl),
        ("fragment behind host", "GET http://b.com#q HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidUrl),
        ("CONNECT without port", "CONNECT b.com HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidUrl),
        ("CONNECT to a path", "CONNECT /x HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidUrl),
        ("CONNECT to a URL", "CONNECT http://b.com:80/ HTTP/1.1\r\nhost: a\r\n\r\n".into(), E::InvalidUrl),
        (
            "CONNECT with body",
            "CONNECT b.com:80 HTTP/1.1\r\ncontent-length: 5\r\n\r\n".into(),
            E::BodyDisallowed,
        ),
        (
            "CONNECT chunked",
            "CONNECT b.com:80 HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n".into(),
            E::InvalidTransferEncoding,
        ),
        ("bad host", "GET / HTTP/1.1\r\nhost: a b\r\n\r\n".into(), E::InvalidAuthority),
        ("host not ASCII", "GET / HTTP/1.1\r\nhost: \u{e9}\r\n\r\n".into(), E::InvalidAuthority),
        ("nominated xff", format!("{GET}connection: x-forwarded-for\r\n\r\n"), E::ConnectionHeaderRejected),
        ("nominated pseudo", format!("{GET}connection: :path\r\n\r\n"), E::ConnectionHeaderRejected),
    ];
    for (what, bytes, want) in rows {
        assert_eq!(first_error(&read(&strict, bytes.as_bytes())), Some(*want), "{what}");
    }
    for coding in [
        "identity",
        "gzip",
        "gzip, chunked",
        "chunked, gzip",
        "xchunked",
        "chunked, chunked",
        "\"chunked\"",
        "",
    ] {
        let bytes = format!("{POST}transfer-encoding: {coding}\r\n\r\n");
        assert_eq!(
            first_error(&read(&strict, bytes.as_bytes())),
            Some(E::InvalidTransferEncoding),
            "{coding}"
        );
    }
    let twice = format!("{POST}transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n");
    assert_eq!(first_error(&read(&strict, twice.as_bytes())), Some(E::InvalidTransferEncoding));
    for length in ["abc", "-1", "+5", "5 5", "5, 5", "0x5", "5;", "99999999999999999999", ""] {
        let bytes = format!("{POST}content-length: {length}\r\n\r\nhello");
        assert_eq!(first_error(&read(&strict, bytes.as_bytes())), Some(E::Codec), "{length}");
    }
    let twice = format!("{POST}content-length: 5\r\ncontent-length: 5\r\n\r\nhello");
    assert_eq!(first_error(&read(&strict, twice.as_bytes())), Some(E::Codec));
}

#[test]
fn refused_chunks() {
    let strict = Config::default();
    for body in [
        " 5\r\nhello\r\n0\r\n\r\n",
        "5;a\nb\r\nhello\r\n0\r\n\r\n",
        "5;a\rb\r\nhello\r\n0\r\n\r\n",
        "5\nhello\r\n0\r\n\r\n",
        "5\rhello\r\n0\r\n\r\n",
        "5\r\r\nhello\r\n0\r\n\r\n",
        "10000000000000000\r\nhello",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "\r\nhello\r\n0\r\n\r\n",
        ";5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "g\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello\r\n0\n\n",
        "5\r\nhello\r\n0\r\nbad trailer: x\r\n\r\n",
        "5\r\nhello\r\n0\r\nbad trailer\r\n\r\n",
        "5 x\r\nhello\r\n0\r\n\r\n",
        "5  x\r\nhello\r\n0\r\n\r\n",
        // Envoy 1.40 takes these; see the module's documentation.
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhelloX\r\n0\r\n\r\n",
    ] {
        let bytes = format!("{POST}transfer-encoding: chunked\r\n\r\n{body}");
        let seen = read(&strict, bytes.as_bytes());
        assert_eq!(first_error(&seen), Some(Error::Codec), "{body:?}");
    }
    let nul = format!("{POST}transfer-encoding: chunked\r\n\r\n0\r\nx: a\0b\r\n\r\n");
    assert_eq!(first_error(&read(&strict, nul.as_bytes())), Some(Error::InvalidCharacters));
    let long = format!("{POST}transfer-encoding: chunked\r\n\r\n5;{}\r\nhello", "a".repeat(17_000));
    assert_eq!(first_error(&read(&strict, long.as_bytes())), Some(Error::Codec));
    let big = format!("{POST}transfer-encoding: chunked\r\n\r\n0\r\nx: {}\r\n\r\n", "a".repeat(70_000));
    assert_eq!(first_error(&read(&strict, big.as_bytes())), Some(Error::HeadersTooLarge));
}

#[test]
fn accepted_chunks() {
    for body in [
        "5\r\nhello\r\n0\r\n\r\n",
        "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        "5;a=b;c=\"d\"\r\nhello\r\n0;x\r\n\r\n",
        "5 ; a = b\r\nhello\r\n0\r\n\r\n",
        "5 \r\nhello\r\n0\r\n\r\n",
        "5\t\r\nhello\r\n0\r\n\r\n",
        "5;a\0b\r\nhello\r\n0\r\n\r\n",
        "0000000000000000000000005\r\nhello\r\n000\r\n\r\n",
        "5\r\nhello\r\n0\r\n\n",
        "5\r\nhello\r\n0\r\nX-T: 1\r\n\r\n",
        "5\r\nhello\r\n0\r\nX-T: 1\n\r\n",
    ] {
        let bytes = format!("{POST}transfer-encoding:   Chunked\r\n\r\n{body}");
        let seen = read(&Config::default(), bytes.as_bytes());
        assert_eq!(seen[1..], [Seen::Data(b"hello".to_vec()), Seen::End], "{body:?}");
        assert_eq!(header(&seen, "transfer-encoding"), None);
    }
}

#[test]
fn trailers_are_dropped_unless_enabled() {
    let block = "0\r\nX-T: 1\r\nx-u: a\r\n b\r\ntransfer-encoding: x\r\ncontent-length: 7\r\nhost: z\r\n\r\n";
    let bytes = format!("{POST}transfer-encoding: chunked\r\n\r\n{block}");
    let seen = read(&Config::default(), bytes.as_bytes());
    assert_eq!(seen[1..], [Seen::End]);
    let seen = read(&relaxed(), bytes.as_bytes());
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(seen[1..], [Seen::Trailers(vec![pair("x-t", "1"), pair("x-u", "a b")])]);
    let many = format!("{POST}transfer-encoding: chunked\r\n\r\n0\r\n{}\r\n", "x: a\r\n".repeat(120));
    assert_eq!(read(&Config::default(), many.as_bytes())[1..], [Seen::End]);
    assert_eq!(first_error(&read(&relaxed(), many.as_bytes())), Some(Error::TooManyHeaders));
}

#[test]
fn accepted_like_envoy() {
    let strict = Config::default();
    let x = |bytes: &str| header(&read(&strict, bytes.as_bytes()), "x").unwrap();
    assert_eq!(x(&format!("{GET}x: a\r\n b\r\n\tc\r\n\r\n")), "a b\tc");
    assert_eq!(x(&format!("{GET}x: a  \r\n \t  b\r\n\r\n")), "a   \t  b");
    assert_eq!(x(&format!("{GET}x: a\r\n \r\n b\r\n\r\n")), "a  b");
    assert_eq!(x(&format!("{GET}x:\r\n b\r\n\r\n")), "b");
    assert_eq!(x(&format!("{GET}x: a\rb\r\n\r\n")), "ab");
    assert_eq!(x(&format!("{GET}x: \rc\r\n\r\n")), "c");
    assert_eq!(x(&format!("{GET}x: d\r\r\n\r\n")), "d");
    assert_eq!(x("GET / HTTP/1.1\nhost: a\nx: 1\n\n"), "1");
    assert_eq!(x("GET / HTTP/1.1\r\nhost: a\nx: 1\r\n\n"), "1");
    assert_eq!(x("\r\n\r\n\n\nGET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n\r\n"), "1");
    assert_eq!(x("GET\t/\tHTTP/1.1\r\nhost: a\r\nx: 1\r\n\r\n"), "1");
    assert_eq!(x("GET  /  HTTP/1.1  \r\nhost: a\r\nx: 1\r\n\r\n"), "1");
    assert_eq!(x(&format!("{GET}X:  \t padded \t \r\n\r\n")), "padded");
    let seen = read(&strict, b"GET / HTTP/1.1\r\nhost: a\r\nx: a\xffb\r\n\r\n");
    assert_eq!(header(&seen, "x").unwrap(), "a\u{ff}b");
    let seen = read(&strict, b"GET /a\"<>{}|^`\\ HTTP/1.1\r\nhost: a\r\n\r\n");
    assert_eq!(header(&seen, ":path").unwrap(), "/a\"<>{}|^`\\");
    let seen = read(
        &strict,
        format!("{GET}x-a: 1\r\nX-A: 2\r\naccept: a\r\nAccept: b\r\ncookie: 1\r\ncookie: 2\r\n\r\n")
            .as_bytes(),
    );
    assert_eq!(header(&seen, "x-a").unwrap(), "1|2");
    assert_eq!(header(&seen, "accept").unwrap(), "a,b");
    assert_eq!(header(&seen, "cookie").unwrap(), "1|2");
    let seen = read(&strict, b"GET / HTTP/1.1\r\nhost: a\r\nHost: b\r\n\r\n");
    assert_eq!(header(&seen, ":authority").unwrap(), "a,b");
    let seen = read(&strict, format!("{GET}proxy-status: a\r\nproxy-status: b\r\n\r\n").as_bytes());
    assert_eq!(header(&seen, "proxy-status").unwrap(), "a,b");
    assert_eq!(header(&read(&strict, b"GET / HTTP/1.1\r\nhost:\r\n\r\n"), ":authority").unwrap(), "");
    assert_eq!(header(&read(&strict, b"GET / HTTP/1.1\r\n\r\n"), ":authority"), None);
    assert_eq!(header(&read(&strict, b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n"), ":path").unwrap(), "*");
    for length in ["005", "\t5\t"] {
        let seen = read(&strict, format!("{POST}content-length: {length}\r\n\r\nhello").as_bytes());
        assert_eq!(seen[1..], [Seen::Data(b"hello".to_vec()), Seen::End]);
    }
}

#[test]
fn chunked_wins_over_length_when_allowed() {
    for length in ["5", "abc"] {
        let bytes = format!("{POST}content-length: {length}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n");
        let seen = read(&relaxed(), bytes.as_bytes());
        assert_eq!(header(&seen, "content-length"), None);
        assert_eq!(seen[1..], [Seen::End]);
    }
}

#[test]
fn absolute_targets() {
    let row = |target: &str| {
        let seen = read(&Config::default(), format!("GET {target} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes());
        [":scheme", ":authority", ":path"].map(|name| header(&seen, name).unwrap_or_default())
    };
    assert_eq!(row("http://b.com/x?y"), ["http", "b.com", "/x?y"]);
    assert_eq!(row("http://b.com"), ["http", "b.com", "/"]);
    assert_eq!(row("http://b.com?q"), ["http", "b.com", "?q"]);
    assert_eq!(row("HTTP://B.com:80/x"), ["http", "B.com:80", "/x"]);
    assert_eq!(row("https://u:p@b.com/x"), ["https", "b.com", "/x"]);
    let off = Config { allow_absolute_url: false, ..Config::default() };
    let seen = read(&off, b"GET http://b.com/x HTTP/1.1\r\nhost: a\r\n\r\n");
    assert_eq!(header(&seen, ":path").unwrap(), "http://b.com/x");
    assert_eq!(header(&seen, ":authority").unwrap(), "a");
}

#[test]
fn http_10() {
    let seen = read(&relaxed(), b"GET /x HTTP/1.0\r\n\r\n");
    assert_eq!(header(&seen, ":authority").unwrap(), "dflt");
    let Seen::Head(head, _) = &seen[0] else { panic!() };
    assert_eq!((head.version, head.keep_alive), (Version::Http10, false));
    for first in ["GET /x", "GET /x HTTP/0.9", "GET /x HTTP/1.2", "GET /x HTTP/2.0"] {
        let seen =
            read(&relaxed(), format!("{first}\r\nhost: a\r\nconnection: keep-alive\r\n\r\n").as_bytes());
        let Seen::Head(head, _) = &seen[0] else { panic!("{first}") };
        assert_eq!((head.version, head.keep_alive), (Version::Http10, true), "{first}");
    }
    let seen = read(&relaxed(), b"POST /x HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n");
    assert_eq!(seen[1..], [Seen::Data(b"a".to_vec()), Seen::End]);
}

#[test]
fn limits_count_raw_bytes_and_lines() {
    let strict = Config::default();
    let with_value = |len: usize| format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "a".repeat(len));
    assert_eq!(first_error(&read(&strict, with_value(61_408).as_bytes())), None);
    assert_eq!(first_error(&read(&strict, with_value(61_409).as_bytes())), Some(Error::HeadersTooLarge));
    let with_path = |len: usize| format!("GET {} HTTP/1.1\r\nhost: a\r\n\r\n", "/".repeat(len));
    assert_eq!(first_error(&read(&strict, with_path(61_414).as_bytes())), None);
    assert_eq!(first_error(&read(&strict, with_path(61_415).as_bytes())), Some(Error::HeadersTooLarge));
    let endless = "a".repeat(61_500);
    assert_eq!(first_error(&read(&strict, endless.as_bytes())), Some(Error::HeadersTooLarge));
    let with_lines = |lines: usize| format!("{GET}{}\r\n", "x: 1\r\n".repeat(lines));
    assert_eq!(first_error(&read(&strict, with_lines(99).as_bytes())), None);
    assert_eq!(first_error(&read(&strict, with_lines(100).as_bytes())), Some(Error::TooManyHeaders));
    assert_eq!(first_error(&read(&strict, with_lines(300).as_bytes())), Some(Error::TooManyHeaders));
    let wide = Config { max_headers: 1000, ..Config::default() };
    assert_eq!(first_error(&read(&wide, with_lines(999).as_bytes())), None);
    assert_eq!(first_error(&read(&wide, with_lines(1000).as_bytes())), Some(Error::TooManyHeaders));
}

#[test]
fn underscores() {
    let bytes = format!("{GET}x_y: 1\r\nz: 2\r\n\r\n");
    let with = |underscores| read(&Config { underscores, ..Config::default() }, bytes.as_bytes());
    assert_eq!(header(&with(Underscores::Allow), "x_y").unwrap(), "1");
    assert_eq!(header(&with(Underscores::Drop), "x_y"), None);
    assert_eq!(header(&with(Underscores::Drop), "z").unwrap(), "2");
    assert_eq!(first_error(&with(Underscores::Reject)), Some(Error::UnexpectedUnderscore));
}

#[test]
fn methods() {
    let custom = "FOO / HTTP/1.1\r\nhost: a\r\n\r\n";
    assert_eq!(header(&read(&relaxed(), custom.as_bytes()), ":method").unwrap(), "FOO");
    assert_eq!(first_error(&read(&relaxed(), b"F(O / HTTP/1.1\r\nhost: a\r\n\r\n")), Some(Error::Codec));
    for method in ["QUERY", "TRACE", "PATCH", "MSEARCH", "PROPFIND"] {
        let seen = read(&Config::default(), format!("{method} / HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes());
        assert_eq!(header(&seen, ":method").unwrap(), method);
    }
}

#[test]
fn upgrades_and_connect_are_tunnels() {
    let websocket = "GET / HTTP/1.1\r\nhost: a\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n";
    let seen = read(&Config::default(), format!("{websocket}raw").as_bytes());
    let Seen::Head(head, _) = &seen[0] else { panic!() };
    assert!(head.upgrade && head.framing == Framing::Tunnel);
    assert_eq!(seen[1], Seen::Data(b"raw".to_vec()));

    let seen =
        read(&Config::default(), b"CONNECT b.com:80 HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\nraw");
    let Seen::Head(head, _) = &seen[0] else { panic!() };
    assert!(head.connect && head.framing == Framing::Tunnel);
    assert_eq!(header(&seen, ":authority").unwrap(), "b.com:80");
    assert_eq!((header(&seen, ":path"), header(&seen, "content-length")), (None, None));
    assert_eq!(seen[1], Seen::Data(b"raw".to_vec()));

    let h2c = "GET / HTTP/1.1\r\nhost: a\r\nConnection: Upgrade, HTTP2-Settings, x-hop\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\nx-hop: 1\r\n\r\n";
    let seen = read(&Config::default(), h2c.as_bytes());
    let Seen::Head(head, headers) = &seen[0] else { panic!() };
    assert!(!head.upgrade && head.framing == Framing::None);
    assert_eq!(headers.len(), 3, "{headers:?}");

    let ignoring = Config {
        ignored_upgrades: Some(Arc::new(|token: &[u8]| token.eq_ignore_ascii_case(b"websocket"))),
        ..Config::default()
    };
    let seen = read(&ignoring, websocket.as_bytes());
    let Seen::Head(head, _) = &seen[0] else { panic!() };
    assert!(!head.upgrade);
    assert_eq!(header(&seen, "upgrade"), None);
    assert_eq!(header(&seen, "connection"), None);

    let seen = read(&Config::default(), b"GET / HTTP/1.1\r\nhost: a\r\nUpgrade: websocket\r\n\r\n");
    let Seen::Head(head, _) = &seen[0] else { panic!() };
    assert!(!head.upgrade);
}

#[test]
fn keep_alive_and_expect() {
    let flags = |lines: &str| {
        let seen = read(&Config::default(), format!("{GET}{lines}\r\n").as_bytes());
        let Seen::Head(head, _) = &seen[0] else { panic!() };
        (head.keep_alive, head.expect_continue)
    };
    assert_eq!(flags(""), (true, false));
    assert_eq!(flags("connection: foo, Close\r\n"), (false, false));
    assert_eq!(flags("proxy-connection: close\r\n"), (false, false));
    assert_eq!(flags("expect: 100-Continue\r\n"), (true, true));
    assert_eq!(flags("expect: foo\r\n"), (true, false));
}

#[test]
fn pipelined_requests_wait_for_their_turn() {
    let mut conn = ServerConn::new(Arc::new(Config::default()));
    let mut input = BytesMut::from("GET /1 HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\n");
    let (mut headers, mut out) = (Headers::new(), BytesMut::new());
    assert!(conn.is_idle());
    for path in ["/1", "/2"] {
        assert!(matches!(conn.receive(&mut input, &mut headers), Ok(Received::Head(_))));
        assert_eq!(headers.path(), Some(path.as_bytes()));
        assert_eq!(conn.receive(&mut input, &mut headers), Ok(Received::NeedMore));
        conn.send_head(&[(":status", "204")].into_iter().collect(), true, &mut out);
        assert_eq!(conn.after_message(), After::KeepAlive);
    }
    assert!(conn.is_idle() && input.is_empty());
    assert_eq!(&out[..], b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n");
}

#[test]
fn errors_carry_the_answer() {
    assert_eq!((Error::Codec.status(), Error::Codec.body()), (400, "Bad Request"));
    assert_eq!((Error::LowVersion.status(), Error::LowVersion.body()), (426, "Upgrade Required"));
    assert_eq!(
        (Error::InvalidTransferEncoding.status(), Error::InvalidTransferEncoding.body()),
        (501, "Not Implemented")
    );
    assert_eq!(
        (Error::TooManyHeaders.status(), Error::TooManyHeaders.body()),
        (431, "Request Header Fields Too Large")
    );
    assert_eq!(Error::InvalidAuthority.details(), "http.invalid_authority");
}

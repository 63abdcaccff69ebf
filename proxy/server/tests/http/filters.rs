//! What a filter's verdicts do to a stream, phase by phase.

use std::fmt;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use waystation_filter_api::http::{
    BodyData, FilterConfig, Flow, Hold, HttpFilter, HttpFilterFactory, LocalReply, Phases, StreamCx,
};
use waystation_http::Headers;

use super::harness::{Proxy, Upstream, run};

/// What a filter of a test is asked.
enum Ask<'a> {
    Head { end: bool },
    Data { data: &'a mut BodyData, end: bool },
    Trailers,
}

type Answer = fn(&mut StreamCx<'_>, Ask<'_>) -> Flow;

/// A filter that is one function for each direction.
#[derive(Clone, Copy)]
struct Scripted {
    decode: Option<Answer>,
    encode: Option<Answer>,
}

impl Scripted {
    fn decode(answer: Answer) -> Arc<Self> {
        Arc::new(Self { decode: Some(answer), encode: None })
    }

    fn encode(answer: Answer) -> Arc<Self> {
        Arc::new(Self { decode: None, encode: Some(answer) })
    }
}

impl fmt::Debug for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scripted")
    }
}

impl HttpFilterFactory for Scripted {
    fn phases(&self) -> Phases {
        let (decode, encode) = (self.decode.is_some(), self.encode.is_some());
        Phases {
            request_headers: decode,
            request_body: decode,
            request_trailers: decode,
            response_headers: encode,
            response_body: encode,
            response_trailers: encode,
            complete: false,
        }
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(*self))
    }
}

impl HttpFilter for Scripted {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, _: &mut Headers, end: bool) -> Flow {
        self.decode.map_or(Flow::Continue, |answer| answer(cx, Ask::Head { end }))
    }

    fn decode_data(&mut self, cx: &mut StreamCx<'_>, data: &mut BodyData, end: bool) -> Flow {
        self.decode.map_or(Flow::Continue, |answer| answer(cx, Ask::Data { data, end }))
    }

    fn decode_trailers(&mut self, cx: &mut StreamCx<'_>, _: &mut Headers) -> Flow {
        self.decode.map_or(Flow::Continue, |answer| answer(cx, Ask::Trailers))
    }

    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, _: &mut Headers, end: bool) -> Flow {
        self.encode.map_or(Flow::Continue, |answer| answer(cx, Ask::Head { end }))
    }

    fn encode_data(&mut self, cx: &mut StreamCx<'_>, data: &mut BodyData, end: bool) -> Flow {
        self.encode.map_or(Flow::Continue, |answer| answer(cx, Ask::Data { data, end }))
    }

    fn encode_trailers(&mut self, cx: &mut StreamCx<'_>, _: &mut Headers) -> Flow {
        self.encode.map_or(Flow::Continue, |answer| answer(cx, Ask::Trailers))
    }
}

/// Holds the message until its end, then marks the whole of it.
fn buffers(_: &mut StreamCx<'_>, ask: Ask<'_>) -> Flow {
    match ask {
        Ask::Head { end: true } => Flow::Continue,
        Ask::Data { data, end: true } => {
            data.to_mut().extend_from_slice(b"!");
            Flow::Continue
        }
        Ask::Head { .. } | Ask::Data { .. } => Flow::Pause(Hold::Buffer),
        Ask::Trailers => Flow::Continue,
    }
}

/// Lets the first data go when somebody else says so.
fn resumed_later(cx: &mut StreamCx<'_>, ask: Ask<'_>) -> Flow {
    match ask {
        Ask::Data { data, .. } if !data.as_slice().is_empty() => {
            let resume = cx.resume_handle();
            tokio::task::spawn_local(async move {
                tokio::task::yield_now().await;
                resume.resume(Flow::Continue);
            });
            Flow::Pause(Hold::Watermark)
        }
        _ => Flow::Continue,
    }
}

fn waits(_: &mut StreamCx<'_>, ask: Ask<'_>) -> Flow {
    match ask {
        Ask::Head { .. } | Ask::Data { .. } => Flow::Wait(Box::pin(async {
            tokio::task::yield_now().await;
            Flow::Continue
        })),
        Ask::Trailers => Flow::Continue,
    }
}

/// Waits over every part of the message, and changes it when it is shown the part once more.
fn changes_what_it_waited_over(cx: &mut StreamCx<'_>, ask: Ask<'_>) -> Flow {
    let wait = || {
        Flow::Wait(Box::pin(async {
            tokio::task::yield_now().await;
            Flow::Again
        }))
    };
    let marked = |data: &[u8]| data.contains(&b'~');
    match ask {
        Ask::Head { .. } => {
            let first = cx.info.health_check;
            cx.info.health_check = true;
            if first { Flow::Continue } else { wait() }
        }
        Ask::Data { data, .. } if data.as_slice().is_empty() || marked(data.as_slice()) => Flow::Continue,
        Ask::Data { data, .. } => {
            data.to_mut().extend_from_slice(b"~");
            wait()
        }
        Ask::Trailers => Flow::Continue,
    }
}

/// Lets data go byte by byte, with a wait after each.
fn trickles(cx: &mut StreamCx<'_>, ask: Ask<'_>) -> Flow {
    match ask {
        Ask::Data { data, .. } if data.as_slice().len() > 1 => {
            let first = data.split_to(1);
            cx.pass_on(first);
            let pause = cx.driver.sleep(std::time::Duration::ZERO);
            Flow::Wait(Box::pin(async {
                pause.await;
                Flow::Again
            }))
        }
        _ => Flow::Continue,
    }
}

/// Holds the head until there is a body, and then says in it how long the first piece is.
fn describes_the_body(cx: &mut StreamCx<'_>, ask: Ask<'_>) -> Flow {
    match ask {
        Ask::Head { end: false } => Flow::Pause(Hold::Watermark),
        Ask::Data { data, .. } => {
            let head = cx.response.as_deref_mut().or(cx.request.as_deref_mut()).unwrap();
            head.set("x-first", data.as_slice().len().to_string());
            Flow::Continue
        }
        _ => Flow::Continue,
    }
}

/// Waits over the head, then pauses until the end of the body.
fn waits_then_pauses(_: &mut StreamCx<'_>, ask: Ask<'_>) -> Flow {
    match ask {
        Ask::Head { end: false } => Flow::Wait(Box::pin(async {
            tokio::task::yield_now().await;
            Flow::Pause(Hold::Watermark)
        })),
        Ask::Data { end: false, .. } => Flow::Pause(Hold::Watermark),
        _ => Flow::Continue,
    }
}

fn replies_at_the_end(_: &mut StreamCx<'_>, ask: Ask<'_>) -> Flow {
    let ends = matches!(ask, Ask::Trailers | Ask::Data { end: true, .. });
    if ends { Flow::Reply(Box::new(LocalReply::new(418, "no", "short_and_stout"))) } else { Flow::Continue }
}

/// Nothing for most requests; for one with a body the instance that marks the response.
#[derive(Clone, Copy, Debug)]
struct Awaits;

impl HttpFilterFactory for Awaits {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, ..Phases::default() }
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(*self))
    }
}

impl HttpFilter for Awaits {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, _: &mut Headers, end: bool) -> Flow {
        if !end {
            let phases = Phases { response_body: true, ..Phases::default() };
            let filter = Scripted { decode: None, encode: Some(buffers) };
            cx.succeed_by(Box::new(filter), phases);
        }
        Flow::Continue
    }
}

/// Has others stand beside it, from the head of a request or of its response on.
#[derive(Debug)]
struct Delegates {
    to: [Arc<Scripted>; 3],
    at_response: bool,
}

struct Delegating;

impl HttpFilterFactory for Delegates {
    fn phases(&self) -> Phases {
        Phases { request_headers: !self.at_response, response_headers: self.at_response, ..Phases::default() }
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(Delegating))
    }
}

impl Delegating {
    fn delegate(cx: &mut StreamCx<'_>) -> Flow {
        let to = cx.config::<Delegates>().to.clone();
        cx.delegate_to(to.map(|factory| factory as _));
        Flow::Continue
    }
}

impl HttpFilter for Delegating {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, _: &mut Headers, _: bool) -> Flow {
        Self::delegate(cx)
    }

    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, _: &mut Headers, _: bool) -> Flow {
        Self::delegate(cx)
    }
}

fn refuses(_: &mut StreamCx<'_>, _: Ask<'_>) -> Flow {
    Flow::Reply(Box::new(LocalReply::new(403, "no", "refused")))
}

const CHUNKED: &str = "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n\
                       3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n";

const CHUNKED_ANSWER: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
                              3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n";

async fn ask(filter: Arc<Scripted>, limit: usize, request: &str) -> (String, String) {
    let upstream = Upstream::echo().await;
    let proxy = Proxy::start_with(&upstream, filter, limit).await;
    (proxy.exchange(request).await, upstream.seen())
}

#[test]
fn a_request_is_held_until_its_end() {
    run(async {
        let (answer, _) = ask(Scripted::decode(buffers), 100, CHUNKED).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nabcdefg!"), "{answer}");
        let (answer, _) = ask(Scripted::decode(buffers), 5, CHUNKED).await;
        assert!(answer.starts_with("HTTP/1.1 413 ") && answer.ends_with("Payload Too Large"), "{answer}");
        let get = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let (answer, _) = ask(Scripted::decode(buffers), 5, get).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    });
}

#[test]
fn a_response_is_held_until_its_end() {
    run(async {
        let upstream = Upstream::answering(CHUNKED_ANSWER).await;
        let get = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let proxy = Proxy::start_with(&upstream, Scripted::encode(buffers), 100).await;
        let answer = proxy.exchange(get).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("abcdefg!"), "{answer}");
        let proxy = Proxy::start_with(&upstream, Scripted::encode(buffers), 5).await;
        let answer = proxy.exchange(get).await;
        assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
    });
}

#[test]
fn data_wait_for_the_resume_handle_and_for_futures() {
    run(async {
        for answer in [resumed_later as Answer, waits] {
            for filter in [Scripted::decode(answer), Scripted::encode(answer)] {
                // A byte is more than may be buffered: reading stops meanwhile, and nothing is lost.
                for limit in [1, 100] {
                    let (answer, _) = ask(Arc::clone(&filter), limit, CHUNKED).await;
                    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
                    assert!(answer.contains("abcdefg"), "{answer}");
                }
            }
        }
    });
}

#[test]
fn what_was_waited_over_is_shown_once_more() {
    run(async {
        let letters = |c: &char| ('a'..='g').contains(c);
        for limit in [1, 100] {
            let (request, _) = ask(Scripted::decode(changes_what_it_waited_over), limit, CHUNKED).await;
            let upstream = Upstream::answering(CHUNKED_ANSWER).await;
            let proxy =
                Proxy::start_with(&upstream, Scripted::encode(changes_what_it_waited_over), limit).await;
            let response = proxy.exchange("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
            for answer in [request, response] {
                assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
                let body = answer.split_once("\r\n\r\n").unwrap().1;
                assert!(body.contains('~'), "{answer}");
                assert_eq!(body.chars().filter(letters).collect::<String>(), "abcdefg", "{answer}");
            }
        }
    });
}

#[test]
fn what_came_during_a_wait_is_shown_to_the_pause_behind_it() {
    run(async {
        let (answer, _) = ask(Scripted::decode(waits_then_pauses), 100, CHUNKED).await;
        assert!(answer.ends_with("\r\n\r\nabcdefg"), "{answer}");
        let upstream = Upstream::answering(CHUNKED_ANSWER).await;
        let proxy = Proxy::start_with(&upstream, Scripted::encode(waits_then_pauses), 100).await;
        let answer = proxy.exchange("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        assert!(answer.contains("abcdefg"), "{answer}");
    });
}

#[test]
fn a_part_of_the_data_goes_ahead_while_the_rest_is_held() {
    run(async {
        for filter in [Scripted::decode(trickles), Scripted::encode(trickles)] {
            for limit in [1, 100] {
                let length =
                    "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 7\r\n\r\nabcdefg";
                let (answer, _) = ask(Arc::clone(&filter), limit, length).await;
                assert!(
                    answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nabcdefg"),
                    "{answer}"
                );
            }
        }
    });
}

#[test]
fn a_head_that_is_held_may_be_changed_by_a_later_phase() {
    run(async {
        let upstream = Upstream::answering("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let proxy = Proxy::start_with(&upstream, Scripted::decode(describes_the_body), 100).await;
        proxy.exchange(CHUNKED).await;
        assert!(upstream.seen().contains("x-first: "), "{}", upstream.seen());
        let (answer, _) = ask(Scripted::encode(describes_the_body), 100, CHUNKED).await;
        assert!(answer.contains("x-first: "), "{answer}");
    });
}

#[test]
fn an_instance_gives_its_place_to_another_with_other_phases() {
    run(async {
        let upstream = Upstream::answering(CHUNKED_ANSWER).await;
        let proxy = Proxy::start_with(&upstream, Arc::new(Awaits), 100).await;
        assert_eq!(proxy.exchange(CHUNKED).await.matches('!').count(), 1);
        let get = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let answer = proxy.exchange(get).await;
        assert!(answer.contains("defg") && !answer.contains('!'), "{answer}");
    });
}

#[test]
fn filters_that_are_put_beside_another_are_walked_as_any() {
    run(async {
        let decode = [waits as Answer, resumed_later, buffers].map(Scripted::decode);
        let upstream = Upstream::echo().await;
        let filter = Delegates { to: decode, at_response: false };
        let proxy = Proxy::start_with(&upstream, Arc::new(filter), 100).await;
        let answer = proxy.exchange(CHUNKED).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("abcdefg!"), "{answer}");
        // The last one is the first that a response comes to.
        let encode = [waits as Answer, trickles, buffers].map(Scripted::encode);
        for at_response in [true, false] {
            let upstream = Upstream::answering(CHUNKED_ANSWER).await;
            let filter = Delegates { to: encode.clone(), at_response };
            let proxy = Proxy::start_with(&upstream, Arc::new(filter), 100).await;
            let answer = proxy.exchange("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
            let letters = |c: &char| "abcdefg!".contains(*c);
            let body = answer.split_once("\r\n\r\n").unwrap().1;
            assert_eq!(body.chars().filter(letters).collect::<String>(), "abcdefg!", "{answer}");
        }
    });
}

#[test]
fn a_filter_beside_one_that_waits_is_not_forgotten() {
    run(async {
        let upstream = Upstream::echo().await;
        let to = [waits as Answer, refuses, waits].map(Scripted::decode);
        let filter = Delegates { to, at_response: false };
        let proxy = Proxy::start_with(&upstream, Arc::new(filter), 100).await;
        let answer = proxy.exchange("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    });
}

#[test]
fn a_filter_answers_at_the_end_of_the_request() {
    run(async {
        let (answer, _) = ask(Scripted::decode(replies_at_the_end), 100, CHUNKED).await;
        assert!(answer.starts_with("HTTP/1.1 418 ") && answer.ends_with("\r\n\r\nno"), "{answer}");
    });
}

#[test]
fn a_filter_that_answers_in_the_middle_of_a_response_cuts_it() {
    run(async {
        let upstream = Upstream::echo().await;
        let proxy = Proxy::start_with(&upstream, Scripted::encode(replies_at_the_end), 100).await;
        let answer = proxy.exchange(CHUNKED).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && !answer.contains("418"), "{answer}");
        proxy.stat("http.in.downstream_rq_tx_reset", 1);
    });
}

#[test]
fn a_response_that_stands_is_not_retried() {
    run(async {
        let upstream = Upstream::cutting("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc").await;
        // The head waits for the end, which does not come: nothing of it has gone to the client by then.
        let proxy = Proxy::start_with(&upstream, Scripted::encode(buffers), 100).await;
        let answer = proxy.exchange("GET /retry HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 50"), "{answer}");
        assert_eq!(upstream.seen().matches("GET /retry ").count(), 1, "{}", upstream.seen());
        proxy.stat("cluster.up.upstream_rq_retry", 0);
        proxy.stat("cluster.up.upstream_rq_total", 1);
    });
}

/// Does what no filter should, to messages that have a body.
fn panics(_: &mut StreamCx<'_>, ask: Ask<'_>) -> Flow {
    match ask {
        Ask::Head { end: true } => Flow::Continue,
        _ => panic!("as the test wants it"),
    }
}

const NOT_ACTIVE: [&str; 6] = [
    "http.in.downstream_rq_active",
    "http.in.downstream_cx_active",
    "http.in.downstream_cx_http1_active",
    "http.in.downstream_cx_http2_active",
    "cluster.up.upstream_rq_active",
    "cluster.up.upstream_rq_pending_active",
];

#[test]
fn a_panic_ends_its_own_connection_and_is_not_left_counted() {
    run(async {
        for filter in [Scripted::decode(panics), Scripted::encode(panics)] {
            let upstream = Upstream::echo().await;
            let proxy = Proxy::start_with(&upstream, filter, 1 << 20).await;
            let mut other = proxy.connect().await;
            let asks = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
            assert!(exchange_on(&mut other, asks).await.starts_with("HTTP/1.1 200 OK"));
            let answer = proxy.exchange("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc").await;
            assert_eq!(answer, "");
            assert!(exchange_on(&mut other, asks).await.starts_with("HTTP/1.1 200 OK"));
            drop(other);
            proxy.until_closed().await;
            NOT_ACTIVE.iter().for_each(|gauge| proxy.stat(gauge, 0));
            proxy.stat("http.in.downstream_rq_total", 3);
        }
    });
}

#[test]
fn a_panic_ends_its_own_http2_stream_and_no_other() {
    run(async {
        for filter in [Scripted::decode(panics), Scripted::encode(panics)] {
            let upstream = Upstream::echo().await;
            let proxy = Proxy::start_with(&upstream, filter, 1 << 20).await;
            let (mut sender, connection) = h2::client::handshake(proxy.connect().await).await.unwrap();
            let connection = tokio::task::spawn_local(connection);
            let request = |method| http::Request::builder().method(method).uri("http://a/").body(()).unwrap();
            let (waiting, mut rest) = sender.send_request(request("POST"), false).unwrap();
            rest.send_data("abc".into(), true).unwrap();
            assert!(waiting.await.unwrap_err().is_reset());
            let (answer, _) = sender.send_request(request("GET"), true).unwrap();
            assert_eq!(answer.await.unwrap().status(), 200);
            drop((sender, rest));
            connection.await.unwrap().unwrap();
            proxy.until_closed().await;
            NOT_ACTIVE.iter().for_each(|gauge| proxy.stat(gauge, 0));
        }
    });
}

async fn exchange_on(stream: &mut TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let count = stream.read(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer[..count]).into_owned()
}

//! The HTTP engine in process: raw bytes in, a scripted upstream, raw bytes out.

mod http {
    mod allocations;
    mod breakers;
    mod filters;
    pub(crate) mod harness;
    mod on_demand;
}

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use http::harness::{Proxy, Upstream, run};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nserver: up\r\n\r\nhello";

/// One request on a connection of its own, and the whole answer.
async fn ask(proxy: &Proxy, request: &str) -> String {
    proxy.exchange(&format!("{request}\r\nhost: a\r\nconnection: close\r\n\r\n")).await
}

#[test]
fn a_request_goes_through() {
    run(async {
        let upstream = Upstream::answering(OK).await;
        let proxy = Proxy::start(&upstream, "").await;
        let answer = ask(&proxy, "GET /x?y=1 HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n"), "{answer}");
        let (head, _) = answer.split_once("\r\n\r\n").unwrap();
        let names: Vec<&str> = head.lines().skip(1).map(|line| line.split(':').next().unwrap()).collect();
        let expected = ["content-length", "server", "x-envoy-upstream-service-time", "date", "connection"];
        assert_eq!(names, expected, "{answer}");
        assert!(head.contains("\r\nserver: envoy\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\nhello"), "{answer}");
        let seen = upstream.seen();
        assert!(
            seen.starts_with("GET /x?y=1 HTTP/1.1\r\nhost: a\r\nx-forwarded-proto: http\r\nx-request-id: "),
            "{seen}"
        );
        assert!(seen.ends_with("\r\nx-envoy-expected-rq-timeout-ms: 15000\r\n\r\n"), "{seen}");
        proxy.stat("http.in.downstream_rq_total", 1);
        proxy.stat("http.in.downstream_rq_2xx", 1);
        proxy.stat("cluster.up.upstream_rq_200", 1);
        proxy.stat("cluster.up.upstream_cx_http1_total", 1);
    });
}

#[test]
fn keep_alive_and_pipelining_use_one_upstream_connection() {
    run(async {
        let upstream = Upstream::answering(OK).await;
        let proxy = Proxy::start(&upstream, "").await;
        let one = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        let last = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let answer = proxy.exchange(&format!("{one}{one}{last}")).await;
        assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 3, "{answer}");
        assert_eq!(answer.matches("connection: close").count(), 1, "{answer}");
        proxy.stat("cluster.up.upstream_cx_total", 1);
        proxy.stat("cluster.up.upstream_rq_total", 3);
        proxy.stat("http.in.downstream_cx_total", 1);
    });
}

#[test]
fn bodies_pass_both_ways() {
    run(async {
        let upstream = Upstream::echo().await;
        let proxy = Proxy::start(&upstream, "").await;
        let answer = proxy
            .exchange("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\nconnection: close\r\n\r\nabcdef")
            .await;
        assert!(answer.ends_with("abcdef"), "{answer}");
        let chunked = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n\
                       3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n";
        let answer = proxy.exchange(chunked).await;
        assert!(answer.ends_with("abcdef"), "{answer}");
        let big = "z".repeat(3_000_000);
        let request = format!(
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{big}",
            big.len()
        );
        let answer = proxy.exchange(&request).await;
        assert!(answer.ends_with(&big), "{}", &answer[..200]);
    });
}

#[test]
fn pauses_in_reading_are_counted() {
    run(async {
        // More than the kernel holds for two sockets.
        let body = "z".repeat(32 << 20);
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
        let upstream = Upstream::answering(format!("{head}{body}").leak()).await;
        let proxy = Proxy::start(&upstream, "").await;
        let stat = |name: &str| proxy.shared.stats.find(name).unwrap();
        let mut client = proxy.connect().await;
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        while stat("cluster.up.upstream_flow_control_paused_reading_total") == 0 {
            tokio::task::yield_now().await;
        }
        client.read_to_end(&mut Vec::new()).await.unwrap();
        assert_eq!(
            stat("cluster.up.upstream_flow_control_paused_reading_total"),
            stat("cluster.up.upstream_flow_control_resumed_reading_total")
        );
        proxy.stat("http.in.downstream_flow_control_paused_reading_total", 0);

        let upstream = Upstream::silent().await;
        let proxy = Proxy::start(&upstream, "").await;
        let (_read, mut write) = proxy.connect().await.into_split();
        let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", body.len());
        tokio::task::spawn_local(async move {
            write.write_all(head.as_bytes()).await.unwrap();
            let _ = write.write_all(body.as_bytes()).await;
        });
        for name in [
            "http.in.downstream_flow_control_paused_reading_total",
            "cluster.up.upstream_flow_control_backed_up_total",
        ] {
            while proxy.shared.stats.find(name) == Some(0) {
                tokio::task::yield_now().await;
            }
        }
        proxy.stat("cluster.up.upstream_flow_control_paused_reading_total", 0);
    });
}

#[test]
fn local_replies() {
    run(async {
        let upstream = Upstream::answering(OK).await;
        let proxy = Proxy::start(&upstream, "").await;
        let answer = ask(&proxy, "GET /missing HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\ndate: "), "{answer}");
        assert!(answer.contains("\r\nserver: envoy\r\n"), "{answer}");
        let answer = ask(&proxy, "GET /teapot HTTP/1.1").await;
        assert!(
            answer.starts_with("HTTP/1.1 418 Unknown\r\ncontent-length: 5\r\ncontent-type: text/plain\r\n"),
            "{answer}"
        );
        let answer = ask(&proxy, "GET /moved HTTP/1.1").await;
        assert!(
            answer.starts_with("HTTP/1.1 301 Moved Permanently\r\nlocation: http://other/moved\r\n"),
            "{answer}"
        );
        let answer = ask(&proxy, "GET /nocluster HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        let answer = proxy.exchange("garbage\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\ncontent-length: 11\r\n"), "{answer}");
        assert!(answer.contains("connection: close"), "{answer}");
        let answer = proxy.exchange("GET / HTTP/1.0\r\n\r\n").await;
        assert!(answer.contains(" 426 Upgrade Required\r\n"), "{answer}");
        proxy.stat("http.in.downstream_cx_protocol_error", 2);
        let grpc = "POST /missing HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc\r\n\
                    content-length: 0\r\nconnection: close\r\n\r\n";
        let answer = proxy.exchange(grpc).await;
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 12\r\n"),
            "{answer}"
        );
    });
}

#[test]
fn refused_connections_and_retries() {
    run(async {
        let upstream = Upstream::refusing().await;
        let proxy = Proxy::start(&upstream, "").await;
        let answer = ask(&proxy, "GET / HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{answer}");
        assert!(answer.ends_with(
            "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure"
        ), "{answer}");
        let retried = "GET / HTTP/1.1\r\nhost: a\r\nx-envoy-retry-on: connect-failure\r\n\
                       x-envoy-max-retries: 2\r\nconnection: close\r\n\r\n";
        // Only internal requests may ask for retries.
        assert!(!proxy.exchange(retried).await.contains("retried"));
        let answer = ask(&proxy, "GET /retry HTTP/1.1").await;
        assert!(
            answer.contains("retried and the latest reset reason: remote connection failure"),
            "{answer}"
        );
        proxy.stat("cluster.up.upstream_rq_retry", 2);
        proxy.stat("cluster.up.upstream_rq_retry_limit_exceeded", 1);
        proxy.stat("cluster.up.upstream_cx_connect_fail", 5);
        proxy.stat("cluster.up.upstream_rq_active", 0);
        proxy.stat("cluster.up.upstream_cx_active", 0);
    });
}

#[test]
fn a_5xx_is_retried_with_its_body() {
    run(async {
        let upstream =
            Upstream::script(vec!["HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", OK]).await;
        let proxy = Proxy::start(&upstream, "").await;
        let answer = proxy
            .exchange("POST /retry HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc")
            .await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert_eq!(upstream.seen().matches("\r\n\r\nabc").count(), 2, "{}", upstream.seen());
        proxy.stat("cluster.up.upstream_rq_retry_success", 1);
    });
}

#[test]
fn timeouts() {
    run(async {
        let upstream = Upstream::silent().await;
        let proxy = Proxy::start(&upstream, "").await;
        let answer = ask(&proxy, "GET /slow HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 504 Gateway Timeout\r\n"), "{answer}");
        assert!(answer.ends_with("upstream request timeout"), "{answer}");
        proxy.stat("cluster.up.upstream_rq_timeout", 1);
        proxy.stat("cluster.up.upstream_cx_active", 0);
    });
}

#[test]
fn upstream_resets() {
    run(async {
        let upstream = Upstream::closing().await;
        let proxy = Proxy::start(&upstream, "").await;
        let answer = ask(&proxy, "GET / HTTP/1.1").await;
        assert!(answer.ends_with("reset reason: connection termination"), "{answer}");
        let upstream = Upstream::answering("what is this\r\n\r\n").await;
        let proxy = Proxy::start(&upstream, "").await;
        let answer = ask(&proxy, "GET / HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{answer}");
        assert!(answer.ends_with("reset reason: protocol error"), "{answer}");
    });
}

#[test]
fn websocket_tunnels() {
    run(async {
        let upstream = Upstream::websocket().await;
        let proxy = Proxy::start(&upstream, "upgrade_configs: [{upgrade_type: websocket}]").await;
        let answer = proxy
            .exchange_some(
                "GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nping",
                "ping",
            )
            .await;
        assert!(answer.starts_with("HTTP/1.1 101 Switching Protocols\r\n"), "{answer}");
        let plain = Proxy::start(&upstream, "").await;
        let answer = plain
            .exchange("GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
            .await;
        assert!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{answer}");
    });
}

#[test]
fn tunnel_bytes_wait_for_the_upstream_to_accept() {
    const SECOND: &str = "GET /second HTTP/1.1\r\nhost: a\r\n\r\n";
    run(async {
        for declined in ["HTTP/1.1 405 No\r\ncontent-length: 0\r\n\r\n", OK] {
            let upstream = Upstream::answering(declined).await;
            let proxy = Proxy::start(&upstream, "upgrade_configs: [{upgrade_type: websocket}]").await;
            let upgrade = "GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
            let answer = proxy.exchange(&format!("{upgrade}{SECOND}")).await;
            assert!(answer.starts_with(&declined[..12]), "{answer}");
            assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
            assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
            let seen = upstream.seen();
            assert!(!seen.contains("/second"), "{seen}");
            proxy.stat("cluster.up.upstream_rq_total", 1);
        }
    });
}

#[test]
fn connect_bytes_wait_for_the_upstream_to_accept() {
    const HIDDEN: &str = "GET /second HTTP/1.1\r\nhost: a\r\n\r\n";
    run(async {
        let connect = "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n";
        let upgrades = "upgrade_configs: [{upgrade_type: CONNECT}]";
        let upstream = Upstream::answering("HTTP/1.1 405 No\r\ncontent-length: 0\r\n\r\n").await;
        let proxy = Proxy::start(&upstream, upgrades).await;
        let answer = proxy.exchange(&format!("{connect}{HIDDEN}")).await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        let seen = upstream.seen();
        assert!(seen.starts_with("CONNECT ") && !seen.contains("/second"), "{seen}");
        proxy.stat("cluster.up.upstream_rq_total", 1);

        // Once it has accepted they flow, though the client had sent them before.
        let upstream = Upstream::tunnel().await;
        let proxy = Proxy::start(&upstream, upgrades).await;
        let answer = proxy.exchange_some(&format!("{connect}{HIDDEN}"), HIDDEN).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    });
}

#[test]
fn a_connection_outlives_a_request_beyond_max_requests() {
    run(async {
        let upstream = Upstream::answering(OK).await;
        let none = "circuit_breakers: {thresholds: [{max_requests: 0}]}";
        let proxy = Proxy::start_cluster(&upstream, none).await;
        for refused in 1..=3 {
            let answer = ask(&proxy, "GET / HTTP/1.1").await;
            assert!(answer.ends_with("reset reason: overflow"), "{answer}");
            proxy.stat("cluster.up.upstream_rq_active_overflow", refused);
            // The connection that was made for the first is there for the others.
            proxy.stat("cluster.up.upstream_cx_total", 1);
            proxy.stat("cluster.up.upstream_cx_active", 1);
        }
        assert_eq!(upstream.seen(), "");
    });
}

#[test]
fn requests_that_wait_for_a_stream_get_it() {
    run(async {
        let upstream = Upstream::http2_echo().await;
        let proxy = Proxy::start_http2_narrow(&upstream).await;
        let ask = |body: &'static str| proxy.http2("POST", "/", body);
        let (a, b, c) = tokio::join!(ask("a"), ask("b"), ask("c"));
        assert_eq!([a, b, c].map(|(status, body)| format!("{status}{body}")), ["200a", "200b", "200c"]);
        proxy.stat("cluster.up.upstream_cx_total", 1);
        proxy.stat("cluster.up.upstream_rq_total", 3);
    });
}

#[test]
fn an_http2_connection_ends_with_its_pool() {
    run(async {
        let upstream = Upstream::http2_echo().await;
        let cluster = r#"circuit_breakers: {thresholds: [{max_connection_pools: 1}]}
typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    upstream_http_protocol_options: {auto_sni: true}
    explicit_http_config: {http2_protocol_options: {}}"#;
        let proxy = Proxy::start_cluster(&upstream, cluster).await;
        // Each name has a pool of its own, and the one before makes way.
        for (host, ended) in [("a", 0), ("b", 1), ("c", 2)] {
            let request = format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            let answer = proxy.exchange(&request).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
            proxy.stat("cluster.up.upstream_cx_active", 1);
            proxy.stat("cluster.up.upstream_cx_destroy_local", ended);
        }
    });
}

#[test]
fn a_connection_that_said_goaway_takes_no_request() {
    run(async {
        let (upstream, left) = Upstream::http2_leaving().await;
        let proxy = Proxy::start_http2(&upstream, "").await;
        let second = async {
            left.notified().await;
            let (status, body) = proxy.http2("GET", "/", "").await;
            assert_eq!(status, 204, "{body}");
        };
        let ((status, _), ()) = tokio::join!(proxy.http2("GET", "/", ""), second);
        assert_eq!(status, 204);
        proxy.stat("cluster.up.upstream_cx_total", 2);
        proxy.stat("cluster.up.upstream_rq_204", 2);
    });
}

#[test]
fn http2_downstream_reaches_http1_upstream() {
    run(async {
        let upstream = Upstream::echo().await;
        let proxy = Proxy::start(&upstream, "").await;
        let (status, body) = proxy.http2("POST", "/", "hello over h2").await;
        assert_eq!((status, body.as_str()), (200, "hello over h2"));
        let (status, _) = proxy.http2("GET", "/missing", "").await;
        assert_eq!(status, 404);
        proxy.stat("http.in.downstream_cx_http2_total", 2);
        proxy.stat("http.in.downstream_rq_http2_total", 2);
    });
}

#[test]
fn http1_downstream_reaches_http2_upstream() {
    run(async {
        let upstream = Upstream::http2_echo().await;
        let proxy = Proxy::start_http2(&upstream, "").await;
        let answer = proxy
            .exchange("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\nconnection: close\r\n\r\nabcdef")
            .await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("abcdef"), "{answer}");
        let (status, body) = proxy.http2("POST", "/", "both").await;
        assert_eq!((status, body.as_str()), (200, "both"));
        proxy.stat("cluster.up.upstream_cx_http2_total", 1);
        proxy.stat("cluster.up.upstream_rq_total", 2);
    });
}

#[test]
fn header_mutation_filter_runs() {
    run(async {
        let upstream = Upstream::answering(OK).await;
        let proxy = Proxy::start_filtered(&upstream).await;
        let answer = ask(&proxy, "GET / HTTP/1.1").await;
        assert!(answer.contains("\r\nx-resp: 2\r\n"), "{answer}");
        assert!(upstream.seen().contains("\r\nx-req: 1\r\n"), "{}", upstream.seen());
    });
}

#[test]
fn internal_redirects_are_followed() {
    run(async {
        let upstream = Upstream::script(vec![
            "HTTP/1.1 302 Found\r\nlocation: http://other/new?q=1\r\ncontent-length: 0\r\n\r\n",
            OK,
        ])
        .await;
        let proxy = Proxy::start(&upstream, "").await;
        let answer = ask(&proxy, "GET /follow HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        let seen = upstream.seen();
        assert!(seen.contains("GET /new?q=1 HTTP/1.1\r\nhost: other\r\n"), "{seen}");
        assert!(seen.contains("\r\nx-envoy-original-url: http://a/follow\r\n"), "{seen}");
        proxy.stat("cluster.up.upstream_internal_redirect_succeeded_total", 1);
    });
}

#[test]
fn websocket_over_http2_reaches_http1_upstream() {
    run(async {
        let upstream = Upstream::websocket().await;
        let proxy = Proxy::start(
            &upstream,
            "upgrade_configs: [{upgrade_type: websocket}]\nhttp2_protocol_options: {allow_connect: true}",
        )
        .await;
        assert_eq!(proxy.http2_websocket("ping").await, (200, "ping".to_owned()));
    });
}

/// The preface, empty SETTINGS and a GET, by a client that acknowledges nothing.
const SILENT_HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
    \x00\x00\x00\x04\x00\x00\x00\x00\x00\
    \x00\x00\x06\x01\x05\x00\x00\x00\x01\x82\x86\x84\x41\x01a";

/// Reads frames up to one of this type.
async fn until_frame(stream: &mut TcpStream, kind: u8) {
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        stream.read_exact(&mut vec![0; length]).await.unwrap();
        if head[3] == kind {
            return;
        }
    }
}

/// The type of GOAWAY.
const GOAWAY: u8 = 7;

#[test]
fn an_http2_client_that_does_not_acknowledge_goaway_holds_nobody_up() {
    run(async {
        let upstream = Upstream::echo().await;
        let timeouts = "drain_timeout: 100s\ncommon_http_protocol_options: {idle_timeout: 0.05s";
        for more in ["}", ", max_requests_per_connection: 1}"] {
            let proxy = Proxy::start(&upstream, &format!("{timeouts}{more}")).await;
            let mut stream = proxy.connect().await;
            stream.write_all(SILENT_HTTP2).await.unwrap();
            until_frame(&mut stream, GOAWAY).await;
            // Its idle timeout comes, and others are served.
            for _ in 0..3 {
                let mut other = proxy.connect().await;
                other.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
                let mut answer = Vec::new();
                other.read_to_end(&mut answer).await.unwrap();
                assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
            }
        }
    });
}

#[test]
fn a_client_that_only_sends_malformed_heads_is_sent_away() {
    run(async {
        let upstream = Upstream::echo().await;
        let lenient = "http2_protocol_options: {override_stream_error_on_invalid_http_message: true}";
        let proxy = Proxy::start(&upstream, lenient).await;
        let mut stream = proxy.connect().await;
        stream.write_all(&SILENT_HTTP2[..24 + 9]).await.unwrap();
        // Half of `overload.premature_reset_total_stream_count`.
        for number in 0..250_u32 {
            let mut frame = b"\0\0\x18\x01\x05".to_vec();
            frame.extend((2 * number + 1).to_be_bytes());
            // With `connection: close`, which HTTP/2 does not have.
            frame.extend(b"\x82\x86\x84\x41\x01a\0\x0aconnection\x05close");
            stream.write_all(&frame).await.unwrap();
        }
        proxy.until("http.in.downstream_rq_too_many_premature_resets", 1).await;
        proxy.until_closed().await;
        proxy.stat("http.in.downstream_rq_total", 250);
        proxy.stat("http.in.downstream_cx_destroy_local", 1);
    });
}

#[test]
fn an_http2_connection_without_a_preface_ends_by_the_idle_timeout() {
    run(async {
        let upstream = Upstream::silent().await;
        let options = "codec_type: HTTP2\ncommon_http_protocol_options: {idle_timeout: 0.05s}";
        let proxy = Proxy::start(&upstream, options).await;
        // What comes are SETTINGS, and the end.
        proxy.connect().await.read_to_end(&mut Vec::new()).await.unwrap();
        proxy.until_closed().await;
        proxy.stat("http.in.downstream_cx_idle_timeout", 1);
    });
}

#[test]
fn a_drain_tells_before_it_closes() {
    run(async {
        let upstream = Upstream::echo().await;
        let proxy = Proxy::start(&upstream, "").await;
        let mut first = proxy.connect().await;
        let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        first.write_all(request).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            assert_ne!(first.read_buf(&mut head).await.unwrap(), 0);
        }
        assert!(!head.windows(17).any(|part| part == b"connection: close"));
        let mut second = proxy.connect().await;
        second.write_all(SILENT_HTTP2).await.unwrap();
        until_frame(&mut second, 1).await;
        proxy.drain.start(Instant::now(), Duration::ZERO);
        until_frame(&mut second, GOAWAY).await;
        // The idle connection was not closed under the request that was on its way.
        first.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        first.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        assert!(answer.windows(17).any(|part| part == b"connection: close"));
    });
}

#[test]
fn an_upstream_connection_of_one_downstream_goes_with_it() {
    run(async {
        let upstream = Upstream::answering(OK).await;
        let proxy = Proxy::start_cluster(&upstream, "connection_pool_per_downstream_connection: true").await;
        assert!(ask(&proxy, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        proxy.until("cluster.up.upstream_cx_active", 0).await;
        proxy.stat("cluster.up.upstream_cx_destroy_local", 1);
        proxy.stat("cluster.up.upstream_cx_idle_timeout", 0);
    });
}

#[test]
fn a_request_that_its_client_abandons_is_not_malformed() {
    run(async {
        let upstream = Upstream::silent().await;
        let proxy = Proxy::start(&upstream, "").await;
        let mut stream = proxy.connect().await;
        let (preface, request) = SILENT_HTTP2.split_at(24 + 9);
        stream.write_all(preface).await.unwrap();
        until_frame(&mut stream, 4).await;
        // The proxy, on the same thread, sees the request and the reset at once.
        assert_eq!(stream.try_write(request).unwrap(), request.len());
        stream.set_zero_linger().unwrap();
        drop(stream);
        proxy.until_closed().await;
        proxy.stat("http.in.downstream_cx_protocol_error", 0);
        proxy.stat("http.in.downstream_cx_destroy_remote", 1);
    });
}

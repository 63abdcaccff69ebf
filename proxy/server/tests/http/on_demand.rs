//! Requests that wait for their cluster. The test is the main thread, which answers.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use waystation::on_demand::{Answer, Question, Wanted};

use super::harness::{Proxy, Upstream, run};

fn name_of(question: &Question) -> &str {
    match &question.wanted {
        Wanted::Cluster { source, name } => {
            assert_eq!(source.timeout.as_secs(), 2);
            name
        }
        other => panic!("{other:?}"),
    }
}

async fn body_of(proxy: &Proxy, request: &str) -> (String, String) {
    let answer = proxy.exchange(request).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[test]
fn requests_wait_with_their_bodies_until_the_cluster_is_there() {
    run(async {
        let upstream = Upstream::echo().await;
        let proxy = Proxy::start_on_demand(&upstream, 1 << 20).await;
        let mut questions = proxy.shared.on_demand.take_questions().unwrap();
        let whole =
            "POST /nocluster HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello";
        let named = "POST /named HTTP/1.1\r\nhost: a\r\nx-cluster: nobody\r\ntransfer-encoding: chunked\r\n\
                     connection: close\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        let serve = async {
            let question = questions.recv().await.unwrap();
            proxy.until("http.in.downstream_rq_active", 2).await;
            tokio::task::yield_now().await;
            assert_eq!((name_of(&question), questions.try_recv().is_err()), ("nobody", true));
            proxy.add_cluster("nobody");
            question.reply.send(Answer::Found);
        };
        let (one, two, ()) = tokio::join!(body_of(&proxy, whole), body_of(&proxy, named), serve);
        assert_eq!(one, ("HTTP/1.1 200 OK".to_owned(), "hello".to_owned()));
        assert_eq!(two, ("HTTP/1.1 200 OK".to_owned(), "abcde".to_owned()));
        assert_eq!(proxy.shared.on_demand.inquiries(), 0);
        // The next one finds it there.
        assert_eq!(body_of(&proxy, whole).await.1, "hello");
        assert!(questions.try_recv().is_err());
        proxy.stat("http.in.no_cluster", 0);
    });
}

#[test]
fn a_body_beyond_the_limit_waits_for_the_cluster_too() {
    run(async {
        let upstream = Upstream::echo().await;
        let proxy = Proxy::start_on_demand(&upstream, 100).await;
        let mut questions = proxy.shared.on_demand.take_questions().unwrap();
        let body = "x".repeat(100_000);
        let request = format!(
            "POST /nocluster HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        let serve = async {
            let question = questions.recv().await.unwrap();
            proxy.add_cluster("nobody");
            question.reply.send(Answer::Found);
        };
        let (answer, ()) = tokio::join!(body_of(&proxy, &request), serve);
        assert_eq!(answer, ("HTTP/1.1 200 OK".to_owned(), body));
    });
}

#[test]
fn what_does_not_exist_and_what_may_not_be_fetched_is_not_found() {
    run(async {
        let upstream = Upstream::echo().await;
        let proxy = Proxy::start_on_demand(&upstream, 100).await;
        let mut questions = proxy.shared.on_demand.take_questions().unwrap();
        let get = |path: &str| {
            format!("GET {path} HTTP/1.1\r\nhost: a\r\nx-cluster: \r\nconnection: close\r\n\r\n")
        };
        for answer in [Answer::Missing, Answer::TimedOut] {
            let serve = async { questions.recv().await.unwrap().reply.send(answer) };
            let request = get("/nocluster");
            let ((status, _), ()) = tokio::join!(body_of(&proxy, &request), serve);
            assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
        }
        // There are too many who ask.
        let request = get("/nocluster");
        let serve = async { questions.recv().await.unwrap().reply.send(Answer::Full) };
        let ((status, body), ()) = tokio::join!(body_of(&proxy, &request), serve);
        let expected = ("HTTP/1.1 503 Service Unavailable", "too many requests wait for their configuration");
        assert_eq!((&*status, &*body), expected);
        // The route says no; there is no name; there is nobody to ask any longer.
        assert!(body_of(&proxy, &get("/notfetched")).await.0.contains("503"));
        assert!(body_of(&proxy, &get("/named")).await.0.contains("503"));
        assert!(questions.try_recv().is_err());
        drop(questions);
        assert!(body_of(&proxy, &get("/nocluster")).await.0.contains("503"));
        proxy.stat("http.in.no_cluster", 4);
        assert_eq!(proxy.shared.on_demand.inquiries(), 0);
    });
}

#[test]
fn a_client_that_leaves_gives_up_waiting() {
    run(async {
        let upstream = Upstream::echo().await;
        let proxy = Proxy::start_on_demand(&upstream, 100).await;
        let mut questions = proxy.shared.on_demand.take_questions().unwrap();
        let mut client = proxy.connect().await;
        client.write_all(b"GET /nocluster HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let question = questions.recv().await.unwrap();
        drop(client);
        question.reply.closed().await;
        assert_eq!(proxy.shared.on_demand.inquiries(), 0);
        // The same over HTTP/2, where only the stream goes.
        let (mut sender, connection) = h2::client::handshake(proxy.connect().await).await.unwrap();
        let connection = tokio::task::spawn_local(connection);
        let request = http::Request::get("http://a/nocluster").body(()).unwrap();
        let (_, mut stream) = sender.send_request(request, true).unwrap();
        let question = questions.recv().await.unwrap();
        stream.send_reset(h2::Reason::CANCEL);
        question.reply.closed().await;
        assert_eq!(proxy.shared.on_demand.inquiries(), 0);
        connection.abort();
        // A connection that is still there is served on.
        let mut client = proxy.connect().await;
        client.write_all(b"GET /teapot HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 418"), "{answer}");
    });
}

//! What filters that do nothing cost a request: `cargo bench -p waystation --bench filters`.
//!
//! Client and proxy share a thread, whose CPU time is measured over pipelined requests that the proxy answers itself; chains
//! of none, one and ten filters take turns, and the median of the rounds' differences is told. The target is 20 ns for one
//! and 0.3 µs for ten.

#[expect(dead_code, reason = "made for tests, most of which want more of it")]
#[path = "../tests/http/harness.rs"]
mod harness;

use std::sync::Arc;
use std::time::Duration;

use harness::{Proxy, Upstream, run};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use waystation_filter_api::http::{
    FilterConfig, Flow, HttpFilter, HttpFilterFactory, LocalReply, Phases, StreamCx,
};
use waystation_http::Headers;

const REQUEST: &[u8] = b"GET /direct HTTP/1.1\r\nhost: a\r\n\r\n";

/// Requests in one write.
const BATCH: usize = 100;
const BATCHES: usize = 100;
const ROUNDS: usize = 21;

/// Wants the heads of both directions and the end, and does nothing with them.
#[derive(Clone, Copy, Debug)]
struct Nothing;

impl HttpFilterFactory for Nothing {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, response_headers: true, complete: true, ..Phases::default() }
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(*self))
    }
}

impl HttpFilter for Nothing {}

/// Answers in the router's place.
#[derive(Clone, Copy, Debug)]
struct Answers;

impl HttpFilterFactory for Answers {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, ..Phases::default() }
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(*self))
    }
}

impl HttpFilter for Answers {
    fn decode_headers(&mut self, _: &mut StreamCx<'_>, _: &mut Headers, _: bool) -> Flow {
        Flow::Reply(Box::new(LocalReply::new(200, "", "answered")))
    }
}

fn main() {
    run(async {
        let upstream = Upstream::answering("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let mut chains = Vec::new();
        for count in [0, 1, 10] {
            let mut filters: Vec<Arc<dyn HttpFilterFactory>> = Vec::new();
            filters.extend((0..count).map(|_| Arc::new(Nothing) as Arc<dyn HttpFilterFactory>));
            filters.push(Arc::new(Answers));
            let proxy = Proxy::start_with_all(&upstream, filters).await;
            chains.push((count, proxy.connect().await, Vec::new(), proxy));
        }
        for _ in 0..ROUNDS {
            for (_, stream, nanoseconds, _) in &mut chains {
                nanoseconds.push(round(stream).await);
            }
        }
        let none = chains[0].2.clone();
        println!("no filter that does nothing: {:.0} ns of CPU per request", median(none.clone()));
        for (count, _, with, _) in &chains[1..] {
            let added = median(with.iter().zip(&none).map(|(with, none)| with - none).collect());
            println!("{count} of them: {added:.0} ns more, {:.1} ns each", added / f64::from(*count));
        }
    });
}

/// Nanoseconds of the thread's CPU per request.
async fn round(stream: &mut TcpStream) -> f64 {
    let requests = REQUEST.repeat(BATCH);
    let mut answers = vec![0; 64 * 1024];
    let before = thread_time();
    for _ in 0..BATCHES {
        stream.write_all(&requests).await.expect("the proxy reads");
        let mut heads = 0;
        while heads < BATCH {
            let count = stream.read(&mut answers).await.expect("the proxy answers");
            // A head that is cut in two is not counted twice: each begins with the only H of its kind.
            heads += answers[..count].windows(5).filter(|bytes| bytes == b"HTTP/").count();
        }
    }
    let used = thread_time() - before;
    used.as_nanos() as f64 / (BATCH * BATCHES) as f64
}

/// The time that this thread has had on a core.
fn thread_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells it");
    let nanoseconds = text.split(' ').next().and_then(|count| count.parse().ok());
    Duration::from_nanos(nanoseconds.expect("a count comes first"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

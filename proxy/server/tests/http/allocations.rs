//! What filters cost the streams that they do not hold. The thread of a test runs all of it: client, proxy and upstream.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use waystation_filter_api::http::{
    BodyData, FilterConfig, Flow, HttpFilter, HttpFilterFactory, Phases, StreamCx,
};
use waystation_http::Headers;

use super::harness::{Proxy, Upstream, run};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract. The count on the side is a
// thread-local that neither allocates nor has a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise about `layout` is the one that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System`, by `alloc` above, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Looks at all but the response body, and at its configuration on the route, and lets everything go. May ask for its handle.
#[derive(Debug)]
struct Looks {
    asks: bool,
}

/// One of its instances, which have no state of their own.
struct Looking;

impl HttpFilterFactory for Looks {
    fn phases(&self) -> Phases {
        Phases {
            request_headers: true,
            request_body: true,
            request_trailers: true,
            response_headers: true,
            response_trailers: true,
            complete: true,
            ..Phases::default()
        }
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(Looking))
    }
}

impl Looking {
    fn look(&self, cx: &StreamCx<'_>) -> Flow {
        assert_eq!(cx.route_config.len(), 1);
        if cx.config::<Looks>().asks {
            drop(cx.resume_handle());
        }
        Flow::Continue
    }
}

impl HttpFilter for Looking {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, _: &mut Headers, _: bool) -> Flow {
        self.look(cx)
    }

    fn decode_data(&mut self, cx: &mut StreamCx<'_>, _: &mut BodyData, _: bool) -> Flow {
        self.look(cx)
    }

    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, _: &mut Headers, _: bool) -> Flow {
        self.look(cx)
    }

    fn on_complete(&mut self, cx: &mut StreamCx<'_>) {
        self.look(cx);
    }
}

/// Allocations of one request and its response on connections that have had some.
async fn each(proxy: &Proxy) -> u64 {
    let mut stream = proxy.connect().await;
    let mut answer = [0; 1024];
    let mut least = u64::MAX;
    for _ in 0..8 {
        let before = COUNT.get();
        stream
            .write_all(b"POST /configured HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc")
            .await
            .unwrap();
        let mut count = 0;
        while !answer[..count].ends_with(b"\r\n\r\nabc") {
            count += stream.read(&mut answer[count..]).await.unwrap();
        }
        // Lists that grow now and then do so for no one request.
        least = least.min(COUNT.get() - before);
    }
    least
}

#[test]
fn a_filter_that_does_not_pause_allocates_nothing() {
    run(async {
        let upstream = Upstream::echo().await;
        let none = each(&Proxy::start(&upstream, "").await).await;
        let looks = each(&Proxy::start_with(&upstream, Arc::new(Looks { asks: false }), 1 << 20).await).await;
        let asks = each(&Proxy::start_with(&upstream, Arc::new(Looks { asks: true }), 1 << 20).await).await;
        assert_eq!(looks, none);
        let filters = (0..10).map(|_| Arc::new(Looks { asks: false }) as Arc<dyn HttpFilterFactory>);
        assert_eq!(each(&Proxy::start_with_all(&upstream, filters.collect()).await).await, none);
        // One handle for each direction, however often it is asked for.
        assert_eq!(asks - looks, 2, "{none}, {looks}, {asks}");
    });
}

/// What no request here asks for.
const FAULTS: &str = r#"
- name: fault
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault
    delay: {header_delay: {}, percentage: {numerator: 100}}
    abort: {http_status: 503, percentage: {numerator: 0}}
    response_rate_limit: {header_limit: {}, percentage: {numerator: 100}}
    headers: [{name: host}, {name: x-none, present_match: false}]"#;

#[test]
fn a_fault_that_is_not_injected_costs_no_instance() {
    run(async {
        let upstream = Upstream::echo().await;
        let none = each(&Proxy::start(&upstream, "").await).await;
        let faults = each(&Proxy::start_filters(&upstream, FAULTS).await).await;
        assert_eq!(faults, none);
    });
}

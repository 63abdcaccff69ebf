//! A connection in its steady state reads and writes heads without allocating.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use bytes::BytesMut;
use waystation_http::Headers;
use waystation_http::h1::{After, ClientConn, Config, Received, ServerConn};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed on unchanged to the system allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise about `layout` is the one `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System`, by `alloc` above, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn heads_cost_no_allocation() {
    let mut server = ServerConn::new(Arc::new(Config::default()));
    let mut client = ClientConn::new(Arc::new(Config::upstream()));
    let (mut request, mut response) = (Headers::new(), Headers::new());
    let (mut down_in, mut down_out) = (BytesMut::with_capacity(4096), BytesMut::with_capacity(4096));
    let (mut up_in, mut up_out) = (BytesMut::with_capacity(4096), BytesMut::with_capacity(4096));
    let mut exchange = || {
        for buffer in [&mut down_in, &mut down_out, &mut up_in, &mut up_out] {
            buffer.clear();
            buffer.reserve(2048);
        }
        down_in.extend_from_slice(
            b"GET /x HTTP/1.1\r\nHost: a\r\nUser-Agent: curl/8\r\nAccept: */*\r\nX-A: b\r\n\r\n",
        );
        assert!(matches!(server.receive(&mut down_in, &mut request), Ok(Received::Head(_))));
        client.send_head(&request, true, &mut up_out);
        up_in.extend_from_slice(b"HTTP/1.1 200 OK\r\nServer: s\r\nContent-Length: 0\r\n\r\n");
        assert!(matches!(client.receive(&mut up_in, &mut response), Ok(Received::Head(_))));
        server.send_head(&response, true, &mut down_out);
        assert_eq!((server.after_message(), client.after_message()), (After::KeepAlive, After::KeepAlive));
    };
    for _ in 0..4 {
        exchange();
    }
    let before = COUNT.with(Cell::get);
    for _ in 0..1000 {
        exchange();
    }
    assert_eq!(COUNT.with(Cell::get) - before, 0);
}

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::http::NodeInfo;
use waystation_filter_api::network::{CloseKind, Flow, NetworkCx, NetworkFilter, Resume, Wants};
use waystation_stats::Store;

use super::{Filtered, Filters};
use crate::cli::options::{self, Command};
use crate::config_source::Backing;
use crate::context::Shared;
use crate::transport::{Socket, Transport};
use crate::worker::Worker;

type Notes = Rc<RefCell<Vec<String>>>;
type Decide = Box<dyn FnMut(&mut NetworkCx<'_>, &mut BytesMut, bool) -> Flow>;

/// Notes what it sees and does as it is told.
struct Scripted {
    name: &'static str,
    notes: Notes,
    open: Option<Flow>,
    data: Decide,
    write: Decide,
}

impl Scripted {
    fn new(name: &'static str, notes: &Notes) -> Self {
        let through = || -> Decide { Box::new(|_, _, _| Flow::Continue) };
        Self { name, notes: Rc::clone(notes), open: None, data: through(), write: through() }
    }

    fn note(&self, what: &str) {
        self.notes.borrow_mut().push(format!("{} {what}", self.name));
    }
}

impl NetworkFilter for Scripted {
    fn on_new_connection(&mut self, _: &mut NetworkCx<'_>) -> Flow {
        self.note("open");
        self.open.take().unwrap_or(Flow::Continue)
    }

    fn on_data(&mut self, cx: &mut NetworkCx<'_>, data: &mut BytesMut, end: bool) -> Flow {
        self.note(&format!("data {}{}", String::from_utf8_lossy(data), if end { "." } else { "" }));
        (self.data)(cx, data, end)
    }

    fn on_write(&mut self, cx: &mut NetworkCx<'_>, data: &mut BytesMut, end: bool) -> Flow {
        self.note(&format!("write {}{}", String::from_utf8_lossy(data), if end { "." } else { "" }));
        (self.write)(cx, data, end)
    }

    fn on_close(&mut self, _: &ConnectionInfo) {
        self.note("close");
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bounded =
        async { tokio::time::timeout(Duration::from_secs(10), test).await.expect("the test hangs") };
    tokio::task::LocalSet::new().block_on(&runtime, bounded);
}

fn worker() -> Rc<Worker> {
    let args = ["waystation".into(), "--config-yaml".into(), "{}".into()];
    let Ok(Command::Run(options)) = options::parse(args) else { panic!("the command line is valid") };
    let shared = Shared::new(Store::default(), NodeInfo::default(), Backing::default(), &options);
    Worker::new(0, Arc::clone(&shared), Some(1))
}

fn info() -> ConnectionInfo {
    let address = Address::Ip("127.0.0.1:1".parse().unwrap());
    ConnectionInfo::new(1, Instant::now(), address.clone(), address)
}

fn filters(scripted: impl IntoIterator<Item = Scripted>) -> Box<Filters> {
    Box::new(Filters {
        worker: worker(),
        filters: scripted.into_iter().map(|one| Box::new(one) as _).collect(),
        wants: Wants { data: true, write: true },
        buffer_limit: 8,
        half_close: true,
        resume: Resume::default(),
        out: BytesMut::new(),
    })
}

/// The filtered transport, and its peer.
fn pair(scripted: impl IntoIterator<Item = Scripted>) -> (Transport, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let ours = Transport::Plain(Socket::unix(ours));
    (Transport::Filtered(Box::new(Filtered::new(ours, filters(scripted), Rc::new(info())))), theirs)
}

#[test]
fn bytes_pass_in_order_and_in_reverse_and_the_end_is_told() {
    run(async {
        let notes = Notes::default();
        let (mut ours, mut theirs) = pair([Scripted::new("a", &notes), Scripted::new("b", &notes)]);
        theirs.write_all(b"ping").await.unwrap();
        let mut seen = [0; 4];
        ours.read_exact(&mut seen).await.unwrap();
        ours.write_all(b"pong").await.unwrap();
        theirs.shutdown().await.unwrap();
        assert_eq!(ours.read(&mut seen).await.unwrap(), 0);
        ours.shutdown().await.unwrap();
        drop(ours);
        let mut answer = Vec::new();
        theirs.read_to_end(&mut answer).await.unwrap();
        assert_eq!((&seen, &*answer), (b"ping", &b"pong"[..]));
        let expected = [
            "a data ping",
            "b data ping",
            "b write pong",
            "a write pong",
            "a data .",
            "b data .",
            "b write .",
            "a write .",
            "a close",
            "b close",
        ];
        assert_eq!(*notes.borrow(), expected);
    });
}

#[test]
fn a_filter_holds_bytes_until_it_has_enough_and_may_take_some() {
    run(async {
        let notes = Notes::default();
        let mut head = Scripted::new("head", &notes);
        let mut taken = false;
        head.data = Box::new(move |cx, data, _| {
            if taken {
                return Flow::Continue;
            }
            if data.len() < 4 {
                return Flow::Stop;
            }
            taken = true;
            let _ = data.split_to(2);
            cx.write(b"hi:");
            Flow::Continue
        });
        let (mut ours, mut theirs) = pair([head, Scripted::new("b", &notes)]);
        let client = async {
            theirs.write_all(b"xy").await.unwrap();
            // The proxy has seen these when it asks for more.
            while notes.borrow().is_empty() {
                tokio::task::yield_now().await;
            }
            theirs.write_all(b"rest").await.unwrap();
            let mut greeting = [0; 3];
            theirs.read_exact(&mut greeting).await.unwrap();
            assert_eq!(&greeting, b"hi:");
        };
        let mut seen = [0; 4];
        let (read, ()) = tokio::join!(ours.read_exact(&mut seen), async {
            client.await;
        });
        read.unwrap();
        assert_eq!(&seen, b"rest");
        assert_eq!(*notes.borrow(), ["head data xy", "head data xyrest", "b data rest"]);
    });
}

#[test]
fn what_is_held_goes_on_behind_its_filter_when_resumed_and_is_bounded() {
    run(async {
        let notes = Notes::default();
        let handle: Rc<RefCell<Option<Resume>>> = Rc::default();
        let mut stops = Scripted::new("stops", &notes);
        let kept = Rc::clone(&handle);
        stops.data = Box::new(move |cx, _, _| {
            *kept.borrow_mut() = Some(cx.resume_handle());
            Flow::Stop
        });
        let (mut ours, mut theirs) = pair([stops, Scripted::new("b", &notes)]);
        theirs.write_all(b"123456789").await.unwrap();
        let mut seen = [0; 9];
        let resume = async {
            while handle.borrow().is_none() {
                tokio::task::yield_now().await;
            }
            // Beyond the limit of 8: not read as long as the filter holds that.
            theirs.write_all(b"more").await.unwrap();
            tokio::task::yield_now().await;
            handle.borrow_mut().take().unwrap().resume();
        };
        tokio::join!(async { ours.read_exact(&mut seen).await.unwrap() }, resume);
        assert_eq!(&seen, b"123456789");
        assert_eq!(*notes.borrow(), ["stops data 123456789", "b data 123456789"]);
    });
}

#[test]
fn a_wait_ends_in_a_verdict_and_a_closed_connection_is_broken() {
    run(async {
        let notes = Notes::default();
        let (verdict, wait) = oneshot::channel();
        let mut wait = Some(wait);
        let mut asks = Scripted::new("asks", &notes);
        asks.data = Box::new(move |_, _, _| {
            let wait = wait.take().unwrap();
            Flow::Wait(Box::pin(async { wait.await.unwrap() }))
        });
        let (mut ours, mut theirs) = pair([asks, Scripted::new("b", &notes)]);
        theirs.write_all(b"who").await.unwrap();
        let mut seen = [0; 4];
        {
            let mut read = std::pin::pin!(ours.read(&mut seen));
            tokio::select! {
                biased;
                _ = &mut read => panic!("nobody has decided"),
                () = tokio::task::yield_now() => {}
            }
            verdict.send(Flow::close(CloseKind::NoFlush, "not you")).unwrap();
            assert!(read.await.is_err());
        }
        assert!(ours.write(b"x").await.is_err());
        drop(ours);
        assert_eq!(*notes.borrow(), ["asks data who", "asks close", "b close"]);
        assert_eq!(theirs.read(&mut seen).await.unwrap_or(0), 0);
    });
}

#[test]
fn a_new_connection_is_shown_until_a_filter_closes_it_or_its_peer_goes() {
    run(async {
        let notes = Notes::default();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let socket = Socket::unix(ours);
        let mut refuses = Scripted::new("b", &notes);
        refuses.open = Some(Flow::close(CloseKind::NoFlush, "full"));
        let mut chain = filters([Scripted::new("a", &notes), refuses, Scripted::new("c", &notes)]);
        let close = chain.new_connection(&info(), &socket).await.unwrap_err().unwrap();
        assert_eq!((close.kind, &*close.reason), (CloseKind::NoFlush, "full"));
        assert_eq!(*notes.borrow(), ["a open", "b open"]);

        let mut stops = Scripted::new("a", &notes);
        stops.open = Some(Flow::Stop);
        let mut chain = filters([stops]);
        drop(theirs);
        assert_eq!(chain.new_connection(&info(), &socket).await, Err(None));
    });
}

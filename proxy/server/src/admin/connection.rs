//! Connections to the admin interface: HTTP/1.1, or HTTP/2 by prior knowledge.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hyper::rt::{Executor, Read, Write};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use socket2::Socket;
use tokio::net::TcpStream;
use waystation_filter_api::address::Address;

use super::access_log::Peers;
use super::body::moving;
use super::counting::CountedConnection;
use super::{Admin, handle, info};

/// How a connection of HTTP/2 begins, and no request of HTTP/1.
const PREFACE: &[u8] = b"PRI";

pub(super) async fn serve(socket: Socket, admin: Admin) -> io::Result<()> {
    let unix = socket.local_addr()?.as_unix().is_some() || socket.local_addr()?.is_unix();
    if unix {
        let listener = tokio::net::UnixListener::from_std(socket.into())?;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let path =
                        stream.local_addr().ok().and_then(|at| Some(at.as_pathname()?.display().to_string()));
                    let path = Address::Pipe(path.unwrap_or_default().into());
                    let peers = admin.peers(path.clone(), path);
                    let admin = admin.clone();
                    let counted = admin.stats.connection();
                    tokio::spawn(run(TokioIo::new(stream), false, peers, admin, counted));
                }
                Err(error) => accept_failed(&error).await,
            }
        }
    }
    let listener = tokio::net::TcpListener::from_std(socket.into())?;
    loop {
        match listener.accept().await {
            Ok((stream, remote)) => {
                let local = stream.local_addr().unwrap_or(remote);
                let peers = admin.peers(Address::Ip(local), Address::Ip(remote));
                let admin = admin.clone();
                let counted = admin.stats.connection();
                tokio::spawn(async move {
                    let http2 = speaks_http2(&stream).await;
                    run(TokioIo::new(stream), http2, peers, admin, counted).await;
                });
            }
            Err(error) => accept_failed(&error).await,
        }
    }
}

/// Out of descriptors, most likely: wait for some to come back rather than spin.
async fn accept_failed(error: &io::Error) {
    tracing::warn!(target: "admin", "cannot accept: {error}");
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
}

/// Whether the first bytes of the client are those of HTTP/2.
async fn speaks_http2(stream: &TcpStream) -> bool {
    let mut first = [0; PREFACE.len()];
    stream.peek(&mut first).await.is_ok_and(|count| &first[..count] == PREFACE)
}

async fn run<I>(io: TokioIo<I>, http2: bool, peers: Peers, admin: Admin, mut counted: CountedConnection)
where
    TokioIo<I>: Read + Write + Unpin + Send + 'static,
{
    counted.speaks(http2);
    let (main, quits) = (admin.main.clone(), Arc::new(AtomicBool::new(false)));
    let asked = Arc::clone(&quits);
    let service = service_fn(move |request| {
        let (admin, asked) = (admin.clone(), Arc::clone(&asked));
        let logged = admin.logs.note(&peers, &request);
        async move {
            let counted = admin.stats.request(http2);
            let response = handle(&admin, request).await;
            counted.answered(response.status().as_u16());
            if response.extensions().get::<info::Quit>().is_some() {
                asked.store(true, Ordering::Relaxed);
            }
            Ok::<_, Infallible>(match logged {
                Some(logged) => logged.answered(response),
                None => response,
            })
        }
    });
    let result = if http2 {
        hyper::server::conn::http2::Builder::new(Streams).serve_connection(io, service).await
    } else {
        moving(Box::pin(hyper::server::conn::http1::Builder::new().serve_connection(io, service))).await
    };
    if let Err(error) = result {
        tracing::debug!(target: "admin", "admin connection: {error}");
    }
    drop(counted);
    // Not before the answer is written: nothing of this thread outlives the main one.
    if quits.load(Ordering::Relaxed) {
        main.ask(|server| server.quit()).await;
    }
}

/// Runs the streams of an HTTP/2 connection.
#[derive(Clone, Copy, Debug)]
struct Streams;

impl<F> Executor<F> for Streams
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, stream: F) {
        tokio::spawn(moving(Box::pin(stream)));
    }
}

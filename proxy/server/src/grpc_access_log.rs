//! Sends the entries of access logs to their services.
//!
//! One thread for all of them, with a task for each queue: it connects when there is something to send, keeps one stream
//! open as long as that lasts, and makes it anew with a back-off. What was handed to a stream that breaks is lost, as from
//! Envoy; what waits in the queue is not.

use std::pin::pin;
use std::sync::{Arc, OnceLock, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{BufMut as _, Bytes, BytesMut};
use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3::CommonGrpcAccessLogConfig;
use prost::encoding::{WireType, encode_key, encode_varint};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use waystation_format::{EntryKind, GrpcLogDriver, GrpcQueue, Next};
use waystation_schema::{At, ConfigError};
use waystation_upstream::jitter::back_off;
use waystation_xds::{BackoffSpec, Connect, GrpcChannel, GrpcService};

use crate::config_source::{grpc_service, stream_backoff};
use crate::context::Shared;
use crate::xds_transport;

const METHOD: &str = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";

/// The back-off between streams, where `grpc_stream_retry_policy` has none.
const BASE: Duration = Duration::from_millis(500);
const MAX: Duration = Duration::from_secs(30);

/// The driver of all access logs of the process.
#[derive(Debug)]
pub struct GrpcLogs {
    shared: Weak<Shared>,
    node: Bytes,
    /// The thread is there from the first log on.
    runtime: OnceLock<Handle>,
}

/// Where a log goes.
struct Target {
    service: GrpcService,
    connect: Arc<dyn Connect>,
    /// `Identifier`, for the first message of each stream.
    identifier: Bytes,
    /// The field of the entries in a message.
    field: u32,
    base: Duration,
    max: Duration,
}

impl GrpcLogs {
    /// Tells services that this is `node`, an encoded `envoy.config.core.v3.Node`.
    pub fn new(shared: &Arc<Shared>, node: Bytes) -> Self {
        Self { shared: Arc::downgrade(shared), node, runtime: OnceLock::new() }
    }

    fn runtime(&self) -> Result<&Handle, ConfigError> {
        if let Some(handle) = self.runtime.get() {
            return Ok(handle);
        }
        let failed = |error: std::io::Error| ConfigError::new(format!("unable to start a thread: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let handle = runtime.handle().clone();
        std::thread::Builder::new()
            .name("grpc-access-log".into())
            .spawn(move || runtime.block_on(std::future::pending::<()>()))
            .map_err(failed)?;
        Ok(self.runtime.get_or_init(|| handle))
    }
}

impl GrpcLogDriver for GrpcLogs {
    fn start(
        &self,
        config: &CommonGrpcAccessLogConfig,
        kind: EntryKind,
        queue: Arc<GrpcQueue>,
    ) -> Result<(), ConfigError> {
        let mut wait = BackoffSpec { base: BASE, max: MAX };
        let service = config.grpc_service.as_ref().ok_or_else(|| ConfigError::new("is required"));
        let service = service.and_then(|service| grpc_service(service, &mut wait)).at(|| "grpc_service")?;
        if let Some(own) = &config.grpc_stream_retry_policy {
            stream_backoff(own, &mut wait).at(|| "grpc_stream_retry_policy")?;
        }
        let Some(shared) = self.shared.upgrade() else { return Ok(()) };
        let mut identifier = BytesMut::new();
        put_bytes(&mut identifier, 1, &self.node);
        put_bytes(&mut identifier, 2, config.log_name.as_bytes());
        let target = Target {
            service,
            connect: xds_transport::transport(&shared).connect,
            identifier: identifier.freeze(),
            field: if kind == EntryKind::Http { 2 } else { 3 },
            base: wait.base,
            max: wait.max,
        };
        self.runtime()?.spawn(send(target, queue));
        Ok(())
    }
}

/// Sends what comes into the queue until it is closed.
async fn send(target: Target, queue: Arc<GrpcQueue>) {
    let mut failures = 0;
    // Nothing is connected for nothing.
    while ready(&queue).await {
        match GrpcChannel::connect(&target.service, Arc::clone(&target.connect)).await {
            Ok(channel) => {
                if stream(&target, &queue, channel).await {
                    failures = 0;
                }
            }
            Err(error) => tracing::debug!(target: "grpc", "access log service: {error}"),
        }
        failures += 1;
        tokio::time::sleep(back_off(target.base, target.max, failures, fastrand::u64(..))).await;
    }
}

/// Sends batches on one stream until that ends or the queue is closed. Whether any was taken.
async fn stream(target: &Target, queue: &GrpcQueue, channel: GrpcChannel) -> bool {
    let (messages, outgoing) = mpsc::channel(1);
    let mut call = pin!(channel.send(METHOD, outgoing));
    let mut sent = 0_u64;
    loop {
        // Only what the stream takes is taken from the queue.
        let next = async { (messages.reserve().await, ready(queue).await) };
        let (room, open) = tokio::select! {
            ended = &mut call => {
                tracing::debug!(target: "grpc", "access log stream ended: {ended}");
                return sent > 1;
            }
            next = next => next,
        };
        let Ok(room) = room else { return sent > 1 };
        if !open {
            drop(room);
            break;
        }
        let first = (sent == 0).then_some(&target.identifier);
        room.send(message(first, target.field, &queue.take()));
        sent += 1;
    }
    // What was sent goes out before the end does.
    drop(messages);
    call.await;
    true
}

/// Whether there is a batch, or nothing will ever come.
async fn ready(queue: &GrpcQueue) -> bool {
    let mut timer = pin!(tokio::time::sleep(Duration::ZERO));
    std::future::poll_fn(|task| {
        loop {
            match queue.poll(Instant::now(), task.waker()) {
                Next::Send => return Poll::Ready(true),
                Next::Closed => return Poll::Ready(false),
                Next::Idle => return Poll::Pending,
                Next::At(due) => {
                    timer.as_mut().reset(due.into());
                    if timer.as_mut().poll(task).is_pending() {
                        return Poll::Pending;
                    }
                }
            }
        }
    })
    .await
}

/// `StreamAccessLogsMessage`
fn message(identifier: Option<&Bytes>, field: u32, entries: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(entries.len() + 16 + identifier.map_or(0, Bytes::len));
    if let Some(identifier) = identifier {
        put_bytes(&mut out, 1, identifier);
    }
    put_bytes(&mut out, field, entries);
    out.freeze()
}

fn put_bytes(out: &mut BytesMut, field: u32, value: &[u8]) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(value.len() as u64, out);
    out.put_slice(value);
}

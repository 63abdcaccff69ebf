//! The xDS client: a sans-io subscription state machine and its transports.
//!
//! [`Core`] decides everything: which streams exist, what is asked on them and in which order, which resources
//! of a response are new, when a response is acknowledged or refused, when to try again. It does no I/O, reads
//! no clock and rolls no dice of its own: time and the random seed are inputs, and it answers with [`Action`]s
//! for the transport and [`Event`]s for whoever compiles the configuration. [`Client`] drives it on a tokio
//! runtime: gRPC streams over connections that the caller supplies, watched files, REST polling.
//!
//! What is exchanged on the wire, and in which order, is what Envoy 1.40 does (recorded runs of it are replayed
//! by the tests), with three deliberate differences:
//!
//! * A resource that is already held is handed at once to a new subscription. Envoy lets a changed EDS cluster
//!   wait for a push that many servers do not send, and then for a 15 second timeout.
//! * A resource is accepted or refused on its own. A validation error in one does not take the others of the
//!   same response down; the response is still refused as a whole towards the server.
//! * A resource whose bytes have not changed is not handed out again.
//!
//! A configuration plane on the main thread, in short:
//!
//! ```no_run
//! use std::time::Duration;
//! use waystation_xds::{
//!     Client, Event, Interest, Options, Rejection, ResourceType, Source, SubscriptionSpec, Transport,
//! };
//!
//! # trait Manager { fn apply(&mut self, client: &mut Client, resource: &waystation_xds::Resource) -> Result<(), String>;
//! #     fn remove(&mut self, name: &str); }
//! async fn run(options: Options, transport: Transport, mut clusters: impl Manager) {
//!     let mut client = Client::new(options, transport);
//!     let cds = SubscriptionSpec {
//!         kind: ResourceType::Cluster,
//!         source: Source::Ads,
//!         interest: Interest::Wildcard,
//!         init_fetch_timeout: Some(Duration::from_secs(15)),
//!     };
//!     let _cds = client.subscribe(cds).expect("the bootstrap has ads_config");
//!     loop {
//!         match client.next().await {
//!             Event::Update(update) => {
//!                 let mut rejected = Vec::new();
//!                 for resource in &update.resources {
//!                     // May subscribe, e.g. to the endpoints of this cluster: their request goes out before the
//!                     // acknowledgement of this update.
//!                     if let Err(reason) = clusters.apply(&mut client, resource) {
//!                         rejected.push(Rejection { name: resource.name.clone(), reason });
//!                     }
//!                 }
//!                 update.removed.iter().for_each(|name| clusters.remove(name));
//!                 client.applied(update.token, rejected);
//!             }
//!             Event::Failed { sub, failure } => tracing::warn!(?sub, ?failure, "initialised without"),
//!             Event::Connected { .. } => {}
//!             Event::Disconnected { target, code, message, .. } => {
//!                 tracing::warn!("no configuration from {target}: {code}, {message}");
//!             }
//!         }
//!     }
//! }
//! ```
//!
//! Memory: each accepted resource is held once, copied out of its response, and shared with the consumer as
//! [`bytes::Bytes`]. Queues towards the server are never materialised: a request is built from the state of its
//! type at the moment when it can be sent.

#![forbid(unsafe_code)]

mod core;
mod driver;
mod resource_type;
mod source;
pub mod wire;

pub use crate::core::{
    Action, ControlPlaneStats, Core, Event, Failure, HeldResource, MuxId, Options, Rejection, Resource,
    StreamId, SubId, SubscribeError, SubscriptionStats, Update, UpdateToken, Via,
};
pub use driver::file::is_move_into;
pub use driver::grpc::GrpcChannel;
pub use driver::raw_codec::RawCodec;
pub use driver::{BoxedIo, Client, ConfigCodec, Connect, Io, Transport};
pub use resource_type::ResourceType;
pub use source::{
    BackoffSpec, GrpcService, GrpcSource, Interest, PathSource, Protocol, RateLimit, RestSource, Source,
    SubscriptionSpec,
};

#[cfg(test)]
mod tests;

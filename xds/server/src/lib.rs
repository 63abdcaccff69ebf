//! The embedded management server: a folder of YAML and JSON resources, served over xDS.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use tokio::net::TcpListener;
//! use waystation_xds_server::Server;
//!
//! let server = Server::builder("examples/xds").start()?;
//! server.serve(TcpListener::bind("127.0.0.1:18000").await?).await;
//! # Ok(())
//! # }
//! ```
//!
//! The way of a change: the watcher hears of it and reads the folder (`watch`); each file that is another one is
//! parsed and checked against the schema (`file`), a bad one keeps its last good content, and all good content makes
//! a [`Snapshot`] (`folder`), whose references are looked at (`links`); [`core::Core`] compares it with what
//! each client has and sends the difference in an order in which nothing ever points at what is not there. The
//! core does no I/O and reads no clock; `serve` drives it with gRPC and REST, `admin` shows its state.

#![forbid(unsafe_code)]

mod admin;
pub mod cli;
pub mod core;
mod file;
mod folder;
mod links;
mod resource;
mod serve;
mod server;
mod snapshot;
pub mod status;
mod tls;
mod watch;

pub use resource::Resource;
pub use server::{Builder, Server, StartError};
pub use snapshot::Snapshot;
pub use tls::{TlsError, TlsFiles};

//! The proxy: process, listeners, connections, HTTP, admin.
//!
//! * The process: [`cli`], [`bootstrap`], [`server`] (the main thread), [`workers`], [`signals`], [`log`], [`admin`];
//! * configuration in force: [`manager`], [`context`], [`runtime_layers`], [`config_source`], [`registry`];
//! * the way of a connection: [`listener`], then [`http`], [`tcp_proxy`] or [`network`], then [`pool`];
//! * what a worker thread owns: [`worker`].
//!
//! `ARCHITECTURE.md` at the root of the repository walks one request and one config update through these modules.

#![deny(unsafe_code)]

pub mod address;
pub mod admin;
pub mod bootstrap;
pub mod cli;
pub mod config_source;
pub mod context;
pub mod control;
pub mod dns;
pub mod drain;
pub mod duplex;
pub mod grpc_access_log;
pub mod health;
pub mod http;
pub mod listener;
pub mod log;
pub mod manager;
pub mod memory;
pub mod network;
pub mod on_demand;
pub mod overload;
pub mod pool;
pub mod registry;
pub mod runtime_layers;
pub mod server;
pub mod server_stats;
pub mod signals;
pub mod stats_config;
pub mod tcp_proxy;
pub mod transport;
pub mod upstream_socket;
pub mod version;
pub mod worker;
pub mod workers;
pub mod xds_transport;

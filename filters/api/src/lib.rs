//! What a filter sees, and what the data plane and its extensions share.
//!
//! * [`cell`]: named cells, the one way in which a resource that can change under a name is referred to;
//! * [`runtime`]: Envoy's layered runtime, compiled to atomics that the request path reads;
//! * [`connection`], [`stream`]: what is known of a connection and of a stream;
//! * [`http`]: the phase traits of HTTP filters; [`network`]: those of network filters;
//! * [`client`], [`grpc`]: calls to clusters that filters make;
//! * [`singletons`]: what there is once for all configurations of an extension;
//! * [`value`], [`filter_state`]: metadata and filter state;
//! * [`address`]: Envoy's addresses;
//! * [`data_source`]: bytes from the configuration, a file or the environment;
//! * [`wire`]: readers for the small protobuf messages that every converter meets.
//!
//! Filters see heads, metadata, filter state and stream information; never sockets, never the runtime that
//! drives them. Everything here is `!Send` where it belongs to a stream: a stream lives on one worker.

#![forbid(unsafe_code)]

pub mod address;
pub mod cell;
pub mod client;
pub mod connection;
pub mod data_source;
pub mod filter_state;
pub mod flags;
pub mod grpc;
pub mod http;
pub mod network;
pub mod runtime;
pub mod singletons;
pub mod stream;
pub mod value;
pub mod wire;

//! Envoy's native HTTP filters, one module each: a compiled configuration that makes an instance for each stream.
//!
//! What decides is free of I/O: it takes the time, a random source and the head or data, and returns a verdict. The binary's
//! registry lists the extensions.

#![forbid(unsafe_code)]

pub mod adaptive_concurrency;
pub mod admission_control;
pub mod bandwidth_limit;
pub mod buffer;
pub mod composite;
pub mod ext_authz;
pub mod fault;
pub mod header_mutation;
pub mod health_check;
pub mod match_delegate;
pub mod stream_rate_limiter;

//! The proxy: process, listeners, connections, HTTP, admin.

pub mod context;
pub mod drain;
pub mod http;
pub mod pool;
pub mod transport;
pub mod worker;

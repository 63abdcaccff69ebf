//! Listeners: compiled form, sockets, accepting, and the way of a connection to its filter chain.

pub mod accept;
pub mod chain_match;
pub mod config;
pub mod sockets;
pub mod stats;

//! Listeners: compiled form, sockets, accepting, and the way of a connection to its filter chain.

pub mod accept;
mod active;
pub mod chain_match;
pub mod chain_select;
pub mod config;
pub mod load;
pub mod sockets;
pub mod stats;

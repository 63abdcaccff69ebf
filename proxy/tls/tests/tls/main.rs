//! Handshakes in memory, with certificates made for each test.

mod refused;
mod resumption;
mod rotation;
mod selection;
mod support;
mod verification;

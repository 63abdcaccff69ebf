//! What the client does, seen from both ends: a consumer that behaves like Envoy's managers, and a server.

mod harness;
mod integration;
mod random;
mod replay;
mod scripted;
mod sources;

//! Role-based access control.
//!
//! * [`Engine`]: policies or a matcher tree, compiled; what it decides is pure, allocates nothing, and is the same as that of
//!   trying the policies one by one in the order of their names;
//! * [`http`]: `envoy.filters.http.rbac`; [`network`]: `envoy.filters.network.rbac`.
//!
//! Whatever a configuration says that is not understood in full is refused: a policy without one of its conditions is
//! another policy.

#![forbid(unsafe_code)]

mod engine;
pub mod http;
mod index;
pub mod network;
mod policies;
mod record;
mod rule;

pub use engine::{Decision, Engine};
pub use rule::Level;

//! The engine through its public interface: what it decides, against trying policies one by one, and what it refuses.

mod allocations;
mod naive;
mod refused;
mod request;

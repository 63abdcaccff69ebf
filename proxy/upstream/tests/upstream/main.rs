//! Clusters through their public interface: compiled from protobuf, fed with assignments, picked from.

#![expect(deprecated, reason = "control planes still send deprecated fields")]

mod admission;
mod balancing;
mod compile;
mod discovery;
mod hashing;
mod health;
mod outlier;
mod subsets;
mod support;

//! Local rate limiting.
//!
//! * [`bucket`]: the token bucket, exact however many workers take from it;
//! * [`descriptor`]: what requests are counted as, of the `rate_limits` of routes and filters;
//! * [`limiter`]: buckets by descriptor;
//! * [`http`], which is `envoy.filters.http.local_ratelimit`;
//! * [`network`], [`listener`]: `envoy.filters.network.local_ratelimit` and `envoy.filters.listener.local_ratelimit`;
//! * [`connection_limit`], which is `envoy.filters.network.connection_limit`.
//!
//! What decides takes the time and returns a verdict; it reads no clock and holds no lock.

#![forbid(unsafe_code)]

pub mod bucket;
pub mod connection_limit;
pub mod descriptor;
pub mod http;
pub mod limiter;
pub mod listener;
pub mod network;

use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_filter_api::runtime::{Runtime, RuntimeFlag};

/// `runtime_enabled`: without it a filter is enabled.
fn enabled(runtime: &Runtime, proto: Option<&core::RuntimeFeatureFlag>) -> RuntimeFlag {
    match proto {
        None => RuntimeFlag::fixed(true),
        Some(flag) => {
            let default = flag.default_value.as_ref().is_none_or(|default| default.value);
            runtime.flag(&flag.runtime_key, default)
        }
    }
}

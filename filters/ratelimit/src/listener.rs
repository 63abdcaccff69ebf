//! `envoy.filters.listener.local_ratelimit`: a token for each accepted socket.

use std::time::Instant;

use envoy_types::pb::envoy::extensions::filters::listener::local_ratelimit::v3 as pb;
use waystation_filter_api::runtime::{Runtime, RuntimeFlag};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::Scope;

use crate::bucket::{BucketConfig, TokenBucket};
use crate::enabled;
use crate::network::{BUCKET, Stats};

/// A compiled `LocalRateLimit`.
#[derive(Debug)]
pub struct LocalRateLimit {
    bucket: TokenBucket,
    enabled: RuntimeFlag,
    stats: Stats,
}

impl LocalRateLimit {
    /// Compiles the filter; `root` is the root of all statistics.
    ///
    /// # Errors
    /// As [`BucketConfig::compile`].
    pub fn compile(proto: &pb::LocalRateLimit, root: &Scope, runtime: &Runtime) -> Result<Self, ConfigError> {
        let pb::LocalRateLimit { stat_prefix, token_bucket, runtime_enabled } = proto;
        let bucket =
            token_bucket.as_ref().ok_or_else(|| ConfigError::field("token_bucket", "is required"))?;
        let bucket = BucketConfig::compile(bucket, BUCKET).at(|| "token_bucket")?;
        let scope =
            root.scope("listener_local_ratelimit").tag("envoy.local_listener_ratelimit_prefix", stat_prefix);
        Ok(Self {
            bucket: TokenBucket::new(bucket, Instant::now()),
            enabled: enabled(runtime, runtime_enabled.as_ref()),
            stats: scope.group(),
        })
    }

    /// Whether a socket that was accepted at `now` may go on.
    pub fn admits(&self, now: Instant) -> bool {
        let admitted = !self.enabled.get() || self.bucket.take(now, 1, 1);
        if !admitted {
            self.stats.rate_limited().inc();
        }
        admitted
    }
}

//! `envoy.filters.network.local_ratelimit`: a token for each connection.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use envoy_types::pb::envoy::extensions::filters::network::local_ratelimit::v3 as pb;
use parking_lot::Mutex;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::network::{
    CloseKind, Flow, NetworkCx, NetworkFactoryContext, NetworkFilter, NetworkFilterExtension,
    NetworkFilterFactory, Wants,
};
use waystation_filter_api::runtime::RuntimeFlag;
use waystation_filter_api::wire::decode;
use waystation_schema::{At as _, ConfigError};
use waystation_stats::stats_group;

use crate::bucket::{BucketConfig, TokenBucket};
use crate::enabled;

/// For the binary's table.
pub const EXTENSION: NetworkFilterExtension = NetworkFilterExtension {
    name: "envoy.filters.network.local_ratelimit",
    type_name: "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit",
    compile,
};

/// How Envoy names a bucket whose interval is too short.
pub(crate) const BUCKET: &str = "local rate limit token bucket";

stats_group! {
    /// `local_rate_limit.<stat_prefix>.`
    pub(crate) struct Stats {
        counters { rate_limited }
    }
}

#[derive(Debug)]
struct Config {
    bucket: Arc<TokenBucket>,
    enabled: RuntimeFlag,
    stats: Stats,
}

/// Buckets that filters share: those with the same key and the same configuration.
#[derive(Default)]
struct SharedBuckets(Mutex<HashMap<(String, BucketConfig), Weak<TokenBucket>>>);

impl SharedBuckets {
    fn get(&self, key: &str, config: BucketConfig) -> Arc<TokenBucket> {
        let mut buckets = self.0.lock();
        buckets.retain(|_, bucket| bucket.strong_count() > 0);
        let entry = buckets.entry((key.to_owned(), config)).or_default();
        entry.upgrade().unwrap_or_else(|| {
            let bucket = Arc::new(TokenBucket::new(config, Instant::now()));
            *entry = Arc::downgrade(&bucket);
            bucket
        })
    }
}

fn compile(
    wire: &[u8],
    cx: &NetworkFactoryContext<'_>,
) -> Result<Arc<dyn NetworkFilterFactory>, ConfigError> {
    let pb::LocalRateLimit { stat_prefix, token_bucket, runtime_enabled, share_key } = decode(wire)?;
    let bucket = token_bucket.ok_or_else(|| ConfigError::field("token_bucket", "is required"))?;
    let bucket = BucketConfig::compile(&bucket, BUCKET).at(|| "token_bucket")?;
    let scope = cx.root.scope("local_rate_limit").tag("envoy.local_network_ratelimit_prefix", &stat_prefix);
    Ok(Arc::new(Factory(Arc::new(Config {
        bucket: match share_key.as_str() {
            "" => Arc::new(TokenBucket::new(bucket, Instant::now())),
            key => cx.singletons.get::<SharedBuckets>().get(key, bucket),
        },
        enabled: enabled(cx.runtime, runtime_enabled.as_ref()),
        stats: scope.group(),
    }))))
}

struct Filter(Arc<Config>);

/// Its instances refer to the configuration.
#[derive(Debug)]
struct Factory(Arc<Config>);

impl NetworkFilterFactory for Factory {
    fn wants(&self) -> Wants {
        Wants::default()
    }

    fn create(&self) -> Box<dyn NetworkFilter> {
        Box::new(Filter(Arc::clone(&self.0)))
    }
}

impl NetworkFilter for Filter {
    fn on_new_connection(&mut self, cx: &mut NetworkCx<'_>) -> Flow {
        let Config { bucket, enabled, stats } = &*self.0;
        if !enabled.get() || bucket.take(cx.now, 1, 1) {
            return Flow::Continue;
        }
        stats.rate_limited().inc();
        // Envoy's own choice of a flag.
        cx.set_flag(ResponseFlag::UpstreamRetryLimitExceeded);
        Flow::close(CloseKind::NoFlush, "local_ratelimit_close_over_limit")
    }
}

#[cfg(test)]
mod tests {
    use super::{BucketConfig, SharedBuckets};
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn equal_keys_and_buckets_are_shared_as_long_as_somebody_holds_them() {
        let shared = SharedBuckets::default();
        let config =
            BucketConfig { max_tokens: 1, tokens_per_fill: 1, fill_interval: Duration::from_secs(1) };
        let first = shared.get("a", config);
        assert!(Arc::ptr_eq(&first, &shared.get("a", config)));
        assert!(!Arc::ptr_eq(&first, &shared.get("b", config)));
        assert!(!Arc::ptr_eq(&first, &shared.get("a", BucketConfig { max_tokens: 2, ..config })));
        let old = Arc::downgrade(&first);
        drop(first);
        assert!(old.upgrade().is_none());
        drop(shared.get("a", config));
        assert_eq!(shared.0.lock().len(), 1);
    }
}

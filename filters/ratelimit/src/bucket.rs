//! The token bucket.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::r#type::v3 as types;
use waystation_filter_api::wire;
use waystation_schema::ConfigError;

/// The slowest bucket of Envoy fills a token a year.
const SLOWEST: u128 = 365 * 24 * 3600 * NANOSECONDS;
const NANOSECONDS: u128 = 1_000_000_000;

/// How finely a nanosecond is divided at most. The clock of a bucket so divided runs for ten years.
const FINEST: u128 = 58;

/// What a full bucket is worth at most, so that its clock has as much left to run.
const DEEPEST: u128 = 1 << 62;

/// A compiled `envoy.type.v3.TokenBucket`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct BucketConfig {
    /// What a full bucket has, and a new one. Of an empty one (0) nothing can be taken.
    pub max_tokens: u32,
    /// What comes in in each interval; not at its end, but spread over it.
    pub tokens_per_fill: u32,
    /// The interval.
    pub fill_interval: Duration,
}

/// Tokens that come in steadily and are taken by anybody.
///
/// The state is one number, a point in time: that at which the bucket would have been empty, had it filled ever since. Taking
/// a token moves it on by what a token takes to come in, and there are tokens as long as it does not pass the present. So
/// whoever wins a compare-and-swap has his tokens, time is counted in whole units, and nothing is ever rounded: a unit is the
/// fraction of a nanosecond that divides a token's time evenly. Where that would be too fine (58 parts or more), a token's
/// time is rounded up: tokens are never made, and come late by less than a 58th of a nanosecond each.
#[derive(Debug)]
pub struct TokenBucket {
    /// When the bucket would have been empty, in units on its own clock.
    empty_at: AtomicU64,
    start: Instant,
    /// What the clock showed at `start`: as much as a full bucket is worth.
    capacity: u64,
    /// Units that a token takes to come in.
    cost: u64,
    /// Units per nanosecond, in `1 << shift` parts.
    scale: u32,
    shift: u32,
    config: BucketConfig,
}

impl BucketConfig {
    /// Compiles the protobuf form. Envoy refuses intervals below 50 ms, which it names by `whose` ("local rate limit token
    /// bucket").
    ///
    /// # Errors
    /// When the interval is missing, not positive or too short.
    pub fn compile(proto: &types::TokenBucket, whose: &str) -> Result<Self, ConfigError> {
        let types::TokenBucket { max_tokens, tokens_per_fill, fill_interval } = proto;
        let fill_interval = wire::positive("fill_interval", fill_interval.as_ref())?
            .ok_or_else(|| ConfigError::field("fill_interval", "is required"))?;
        // Envoy counts whole milliseconds.
        let fill_interval =
            Duration::from_millis(u64::try_from(fill_interval.as_millis()).unwrap_or(u64::MAX));
        if *max_tokens > 0 && fill_interval < Duration::from_millis(50) {
            return Err(ConfigError::new(format!("{whose} fill timer must be >= 50ms")));
        }
        Ok(Self {
            max_tokens: *max_tokens,
            tokens_per_fill: wire::u32_value(tokens_per_fill.as_ref()).unwrap_or(1),
            fill_interval,
        })
    }

    /// Tokens a second, by which Envoy orders buckets.
    pub fn rate(&self) -> f64 {
        f64::from(self.tokens_per_fill) / self.fill_interval.as_secs_f64()
    }
}

impl TokenBucket {
    /// A full bucket at `now`.
    pub fn new(config: BucketConfig, now: Instant) -> Self {
        let (mut time, mut tokens) =
            (config.fill_interval.as_nanos(), u128::from(config.tokens_per_fill.max(1)));
        let common = gcd(time, tokens).max(1);
        (time, tokens) = (time / common, tokens / common);
        if time / tokens >= SLOWEST {
            (time, tokens) = (SLOWEST, 1);
        }
        let parts = tokens.min(FINEST);
        let cost = (time * parts).div_ceil(tokens).max(1);
        let mut shift = 0;
        while (cost * u128::from(config.max_tokens)) >> shift > DEEPEST {
            shift += 1;
        }
        // Both fit: a token takes a year in 58ths of a nanosecond at most, which is below 2^61; and see `DEEPEST`.
        let cost = fit(cost.div_ceil(1 << shift));
        let capacity = fit(u128::from(cost) * u128::from(config.max_tokens));
        let scale = parts as u32;
        Self { empty_at: AtomicU64::new(0), start: now, capacity, cost, scale, shift, config }
    }

    /// What it was made from.
    pub fn config(&self) -> &BucketConfig {
        &self.config
    }

    /// Takes `hits` tokens at `now`, each of which counts as `weight` tokens; all of them or none. Returns whether it did:
    /// none are never taken, as in Envoy.
    pub fn take(&self, now: Instant, hits: u64, weight: u64) -> bool {
        let Some(price) = self.cost.checked_mul(hits).and_then(|price| price.checked_mul(weight)) else {
            return false;
        };
        let now = self.clock(now);
        let taken = self.empty_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |empty_at| {
            let next = self.base(empty_at, now).checked_add(price)?;
            (next <= now).then_some(next)
        });
        price > 0 && taken.is_ok()
    }

    /// Gives `hits` tokens back, as far as there is room for them.
    pub fn give(&self, now: Instant, hits: u64) {
        let worth = self.cost.saturating_mul(hits);
        let now = self.clock(now);
        let given = self.empty_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |empty_at| {
            Some(self.base(empty_at, now).saturating_sub(worth).max(now.saturating_sub(self.capacity)))
        });
        debug_assert!(given.is_ok(), "it always has an answer");
    }

    /// Whole tokens that are there.
    pub fn remaining(&self, now: Instant) -> u64 {
        self.filled(now) / self.cost
    }

    /// How long until there is a token.
    pub fn next_token(&self, now: Instant) -> Duration {
        let missing = u128::from(self.cost.saturating_sub(self.filled(now)));
        let nanoseconds = (missing << self.shift).div_ceil(u128::from(self.scale));
        Duration::from_nanos(fit(nanoseconds))
    }

    /// What is in the bucket, in units.
    fn filled(&self, now: Instant) -> u64 {
        let now = self.clock(now);
        now.saturating_sub(self.base(self.empty_at.load(Ordering::Relaxed), now))
    }

    /// A bucket that has been full for a while is as full as one that is full now.
    fn base(&self, empty_at: u64, now: u64) -> u64 {
        empty_at.max(now.saturating_sub(self.capacity))
    }

    fn clock(&self, now: Instant) -> u64 {
        let elapsed = now.saturating_duration_since(self.start).as_nanos() * u128::from(self.scale);
        fit(elapsed >> self.shift).saturating_add(self.capacity)
    }
}

fn fit(units: u128) -> u64 {
    u64::try_from(units).unwrap_or(u64::MAX)
}

fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests;

//! The local limiter: a bucket for requests in general, and others for what descriptors say.

mod dynamic;

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::extensions::common::ratelimit::v3 as pb;
use smallvec::SmallVec;
use waystation_schema::{At as _, ConfigError};

use crate::bucket::{BucketConfig, TokenBucket};
use crate::descriptor::{Descriptor, Entries, HeadersOption};
use dynamic::DynamicBuckets;

/// A bucket, and whether those whom it refuses are let through nevertheless.
#[derive(Debug)]
pub struct Limit {
    /// The bucket.
    pub bucket: TokenBucket,
    /// `shadow_mode`.
    pub shadow: bool,
}

/// What limits there are; buckets are made of it.
#[derive(Clone, Debug)]
pub struct LimiterConfig {
    /// For requests without a bucket of their own, or for all of them. `None`: there is no limit.
    pub default: Option<BucketConfig>,
    /// `always_consume_default_token_bucket`.
    pub always_take_default: bool,
    /// `max_dynamic_descriptors`: buckets of each descriptor with a wildcard.
    pub max_dynamic: usize,
    rules: Box<[Rule]>,
}

/// A `LocalRateLimitDescriptor`.
#[derive(Clone, Debug)]
struct Rule {
    entries: Entries,
    /// Whether a value is left open: each that comes up gets a bucket of its own.
    is_wildcard: bool,
    bucket: BucketConfig,
    shadow: bool,
}

/// Buckets by descriptor. Shared by all workers.
#[derive(Debug)]
pub struct Limiter {
    default: Default,
    fixed: HashMap<Box<[u8]>, Arc<Limit>>,
    dynamic: Box<[DynamicBuckets]>,
    always_take_default: bool,
}

#[derive(Debug)]
enum Default {
    Unlimited,
    /// A bucket that holds nothing.
    Deny,
    Limit(Arc<Limit>),
}

/// A limit of a limiter. Those that are configured are borrowed: a count that all workers share would be one more line of
/// memory for them to fight over.
#[derive(Clone, Debug)]
pub enum Found<'a> {
    /// Configured.
    Fixed(&'a Arc<Limit>),
    /// Made for what came up.
    Dynamic(Arc<Limit>),
}

impl Found<'_> {
    /// The limit, to keep.
    pub fn to_kept(&self) -> Arc<Limit> {
        Arc::clone(self)
    }
}

impl Deref for Found<'_> {
    type Target = Arc<Limit>;

    fn deref(&self) -> &Arc<Limit> {
        match self {
            Self::Fixed(limit) => limit,
            Self::Dynamic(limit) => limit,
        }
    }
}

/// What a limiter decided.
#[derive(Clone, Debug)]
pub struct Decision<'a> {
    /// Whether there was enough.
    pub allowed: bool,
    /// Whether the request may go on although there was not: only shadow limits have refused it.
    pub shadow: bool,
    /// Whose answer it is: that which refused, or the tightest of those that did not.
    pub by: Option<Found<'a>>,
    /// What the descriptor that decided says about headers.
    pub headers: HeadersOption,
}

impl LimiterConfig {
    /// Compiles the descriptors.
    ///
    /// # Errors
    /// When one is there twice or fills too often.
    pub fn compile(
        default: Option<BucketConfig>,
        always_take_default: bool,
        max_dynamic: usize,
        protos: &[pb::LocalRateLimitDescriptor],
    ) -> Result<Self, ConfigError> {
        let mut rules: Vec<Rule> = Vec::with_capacity(protos.len());
        for (i, proto) in protos.iter().enumerate() {
            let rule = Rule::compile(proto).at(|| format!("descriptors[{i}]"))?;
            if rules.iter().any(|other| other.entries == rule.entries) {
                let reason = format!("duplicate descriptor in the local rate descriptor: {}", rule.entries);
                return Err(ConfigError::new(reason).at(format!("descriptors[{i}]")));
            }
            rules.push(rule);
        }
        Ok(Self { default, always_take_default, max_dynamic, rules: rules.into() })
    }

    /// Whether there are limits for descriptors.
    pub fn has_descriptors(&self) -> bool {
        !self.rules.is_empty()
    }

    /// Full buckets.
    pub fn limiter(&self, now: Instant) -> Limiter {
        let limit = |bucket, shadow| Arc::new(Limit { bucket: TokenBucket::new(bucket, now), shadow });
        let mut fixed = HashMap::new();
        let mut dynamic = Vec::new();
        for Rule { entries, is_wildcard, bucket, shadow } in &self.rules {
            if *is_wildcard {
                dynamic.push(DynamicBuckets::new(entries.clone(), *bucket, *shadow, self.max_dynamic));
            } else {
                fixed.insert(entries.as_bytes().into(), limit(*bucket, *shadow));
            }
        }
        Limiter {
            default: match self.default {
                None => Default::Unlimited,
                Some(bucket) if bucket.max_tokens == 0 => Default::Deny,
                Some(bucket) => Default::Limit(limit(bucket, false)),
            },
            fixed,
            dynamic: dynamic.into(),
            always_take_default: self.always_take_default,
        }
    }
}

impl Rule {
    fn compile(proto: &pb::LocalRateLimitDescriptor) -> Result<Self, ConfigError> {
        let pb::LocalRateLimitDescriptor { entries, token_bucket, shadow_mode } = proto;
        let bucket =
            token_bucket.as_ref().ok_or_else(|| ConfigError::field("token_bucket", "is required"))?;
        let mut compiled = Entries::default();
        for pb::rate_limit_descriptor::Entry { key, value } in entries {
            compiled.push(key.as_bytes(), value.as_bytes());
        }
        Ok(Self {
            is_wildcard: entries.iter().any(|entry| entry.value.is_empty()),
            entries: compiled,
            bucket: BucketConfig::compile(bucket, "local rate limit descriptor token bucket")
                .at(|| "token_bucket")?,
            shadow: *shadow_mode,
        })
    }
}

impl<'a> Decision<'a> {
    fn refused(by: Option<Found<'a>>, headers: HeadersOption) -> Self {
        Self { allowed: false, shadow: false, by, headers }
    }
}

impl Limiter {
    /// Asks the bucket of each descriptor, the slowest first, and then the default one if there was none or always. The first
    /// that refuses decides, and the first shadow limit if no other does; what others have given before is gone, as in
    /// Envoy. `share` is how many instances share the limits.
    pub fn decide(&self, descriptors: &[Descriptor], share: u64, now: Instant) -> Decision<'_> {
        let mut found: SmallVec<[(&Descriptor, Found<'_>); 4]> = SmallVec::new();
        for descriptor in descriptors {
            found.extend(self.find(&descriptor.entries, now).map(|limit| (descriptor, limit)));
        }
        if found.len() > 1 {
            let rate = |(_, limit): &(_, Found<'_>)| limit.bucket.config().rate();
            found.sort_by(|a, b| rate(a).total_cmp(&rate(b)));
        }
        let mut shadow = None;
        for (descriptor, limit) in &found {
            let hits = descriptor.hits.unwrap_or(1);
            if descriptor.gives_back && descriptor.hits.is_some() {
                limit.bucket.give(now, hits);
            } else if !limit.bucket.take(now, hits, share) {
                if !limit.shadow {
                    return Decision::refused(Some(limit.clone()), descriptor.headers);
                }
                shadow.get_or_insert((descriptor.headers, limit.clone()));
            }
        }
        let mut allowed_by = found.into_iter().next().map(|(descriptor, limit)| (descriptor.headers, limit));
        if allowed_by.is_none() || self.always_take_default {
            match &self.default {
                Default::Unlimited => {}
                Default::Deny => return Decision::refused(None, HeadersOption::Inherit),
                Default::Limit(limit) => {
                    if !limit.bucket.take(now, 1, share) {
                        return Decision::refused(Some(Found::Fixed(limit)), HeadersOption::Inherit);
                    }
                    allowed_by.get_or_insert((HeadersOption::Inherit, Found::Fixed(limit)));
                }
            }
        }
        if let Some((headers, limit)) = shadow {
            return Decision { shadow: true, ..Decision::refused(Some(limit), headers) };
        }
        let (headers, by) = allowed_by.unzip();
        Decision { allowed: true, shadow: false, by, headers: headers.unwrap_or_default() }
    }

    fn find(&self, entries: &Entries, now: Instant) -> Option<Found<'_>> {
        if let Some(limit) = self.fixed.get(entries.as_bytes()) {
            return Some(Found::Fixed(limit));
        }
        let dynamic = self.dynamic.iter().find(|dynamic| dynamic.matches(entries))?;
        Some(Found::Dynamic(dynamic.get(entries, now)))
    }
}

#[cfg(test)]
mod tests;

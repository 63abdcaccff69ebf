use std::time::{Duration, Instant};

use envoy_types::pb::envoy::extensions::common::ratelimit::v3 as pb;
use envoy_types::pb::envoy::r#type::v3::TokenBucket as BucketProto;
use envoy_types::pb::google::protobuf as wkt;

use super::{Limiter, LimiterConfig};
use crate::bucket::BucketConfig;
use crate::descriptor::{Descriptor, Entries};

fn proto(pairs: &[(&str, &str)], max_tokens: u32, seconds: i64) -> pb::LocalRateLimitDescriptor {
    let entry = |(key, value): &(&str, &str)| pb::rate_limit_descriptor::Entry {
        key: (*key).into(),
        value: (*value).into(),
    };
    pb::LocalRateLimitDescriptor {
        entries: pairs.iter().map(entry).collect(),
        token_bucket: Some(BucketProto {
            max_tokens,
            tokens_per_fill: None,
            fill_interval: Some(wkt::Duration { seconds, nanos: 0 }),
        }),
        shadow_mode: false,
    }
}

fn descriptor(pairs: &[(&str, &str)]) -> Descriptor {
    let mut entries = Entries::default();
    for (key, value) in pairs {
        entries.push(key.as_bytes(), value.as_bytes());
    }
    Descriptor::of(entries)
}

fn limiter(
    default: Option<u32>,
    always: bool,
    protos: &[pb::LocalRateLimitDescriptor],
) -> (Limiter, Instant) {
    let now = Instant::now();
    let default = default.map(|max_tokens| BucketConfig {
        max_tokens,
        tokens_per_fill: 1,
        fill_interval: Duration::from_secs(3600),
    });
    (LimiterConfig::compile(default, always, 20, protos).unwrap().limiter(now), now)
}

#[test]
fn without_a_bucket_nothing_is_limited_and_with_an_empty_one_everything() {
    let (unlimited, now) = limiter(None, true, &[]);
    assert!(unlimited.decide(&[], 1, now).allowed);
    let (denied, now) = limiter(Some(0), true, &[]);
    let decision = denied.decide(&[], 1, now);
    assert!(!decision.allowed && decision.by.is_none());
}

#[test]
fn a_descriptors_bucket_comes_before_the_default_one() {
    for always in [true, false] {
        let (limiter, now) = limiter(Some(2), always, &[proto(&[("a", "1")], 3, 3600)]);
        let request = [descriptor(&[("a", "1")])];
        let allowed = (0..5).filter(|_| limiter.decide(&request, 1, now).allowed).count();
        // With the default one always asked, it is the tighter one here.
        assert_eq!(allowed, if always { 2 } else { 3 });
        let other = [descriptor(&[("a", "2")])];
        let allowed = (0..5).filter(|_| limiter.decide(&other, 1, now).allowed).count();
        assert_eq!(allowed, if always { 0 } else { 2 });
    }
}

#[test]
fn the_slowest_bucket_is_asked_first() {
    let protos = [proto(&[("fast", "1")], 5, 1), proto(&[("slow", "1")], 1, 3600)];
    let (limiter, now) = limiter(None, true, &protos);
    let request = [descriptor(&[("fast", "1")]), descriptor(&[("slow", "1")])];
    assert!(limiter.decide(&request, 1, now).allowed);
    let refused = limiter.decide(&request, 1, now);
    assert!(!refused.allowed);
    assert_eq!(refused.by.unwrap().bucket.config().fill_interval, Duration::from_secs(3600));
    // The refused one has taken nothing of the fast bucket.
    let fast = [descriptor(&[("fast", "1")])];
    assert_eq!(limiter.decide(&fast, 1, now).by.unwrap().bucket.remaining(now), 3);
}

#[test]
fn shares_hits_and_wildcards() {
    let protos = [proto(&[("user", "")], 4, 3600)];
    let (limiter, now) = limiter(None, true, &protos);
    let request = |user| [Descriptor { hits: Some(2), ..descriptor(&[("user", user)]) }];
    assert!(limiter.decide(&request("a"), 2, now).allowed);
    assert!(!limiter.decide(&request("a"), 1, now).allowed);
    assert!(limiter.decide(&request("b"), 1, now).allowed);
    let back = [Descriptor { gives_back: true, ..request("a")[0].clone() }];
    assert!(limiter.decide(&back, 1, now).allowed);
    assert!(limiter.decide(&request("a"), 1, now).allowed);
}

#[test]
fn a_descriptor_there_twice_is_refused_by_its_entries() {
    let protos = [proto(&[("a", "1"), ("b", "")], 1, 1), proto(&[("a", "1"), ("b", "")], 2, 1)];
    let error = LimiterConfig::compile(None, true, 1, &protos).unwrap_err();
    assert_eq!(
        error.to_string(),
        "descriptors[1]: duplicate descriptor in the local rate descriptor: a=1, b="
    );
}

#[test]
fn a_shadow_limit_refuses_nobody_and_stops_no_other() {
    let shadow = pb::LocalRateLimitDescriptor { shadow_mode: true, ..proto(&[("shadow", "1")], 0, 7200) };
    let (limiter, now) = limiter(Some(3), true, &[shadow, proto(&[("real", "1")], 1, 3600)]);
    let alone = limiter.decide(&[descriptor(&[("shadow", "1")])], 1, now);
    assert!(!alone.allowed && alone.shadow && alone.by.unwrap().shadow);
    let both = [descriptor(&[("shadow", "1")]), descriptor(&[("real", "1")])];
    assert!(limiter.decide(&both, 1, now).shadow);
    let refused = limiter.decide(&both, 1, now);
    assert!(!refused.allowed && !refused.shadow && !refused.by.unwrap().shadow);
    // The default bucket has given two, and decides once it is empty.
    assert!(limiter.decide(&[descriptor(&[("shadow", "1")])], 1, now).shadow);
    assert!(!limiter.decide(&[descriptor(&[("shadow", "1")])], 1, now).shadow);
}

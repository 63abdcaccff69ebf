//! `stats_config` of the bootstrap, compiled.

use envoy_types::pb::envoy::config::bootstrap::v3 as bootstrap;
use envoy_types::pb::envoy::config::metrics::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use std::sync::Arc;
use waystation_matchers::StringMatcher;
use waystation_schema::{At as _, ConfigError};
use waystation_stats::{BucketSettings, StatsConfig, StatsMatcher, TagRule};

use crate::cli::options::Options;

/// Compiles what the bootstrap and `--stats-tag` say about statistics.
pub fn compile(proto: &bootstrap::Bootstrap, options: &Options) -> Result<StatsConfig, ConfigError> {
    let config = proto.stats_config.clone().unwrap_or_default();
    let mut compiled = StatsConfig { workers: options.concurrency, ..StatsConfig::default() };
    compiled.use_all_default_tags = config.use_all_default_tags.as_ref().is_none_or(|flag| flag.value);
    for (tag, value) in &options.stats_tags {
        compiled.tags.push(TagRule::Fixed { tag: tag.clone(), value: value.clone() });
    }
    for (i, tag) in config.stats_tags.iter().enumerate() {
        compiled.tags.push(tag_rule(tag).at(|| format!("stats_config.stats_tags[{i}]"))?);
    }
    if let Some(matcher) = &config.stats_matcher {
        compiled.matcher = stats_matcher(matcher).at(|| "stats_config.stats_matcher")?;
    }
    for (i, settings) in config.histogram_bucket_settings.iter().enumerate() {
        let compile = || {
            let matcher =
                settings.r#match.as_ref().ok_or_else(|| ConfigError::field("match", "is required"))?;
            let matcher = StringMatcher::compile(matcher).at(|| "match")?;
            Ok(BucketSettings {
                matches: Arc::new(move |name: &str| matcher.is_match(name.as_bytes())),
                buckets: settings.buckets.as_slice().into(),
            })
        };
        compiled.buckets.push(compile().at(|| format!("stats_config.histogram_bucket_settings[{i}]"))?);
    }
    Ok(compiled)
}

fn tag_rule(proto: &pb::TagSpecifier) -> Result<TagRule, ConfigError> {
    use pb::tag_specifier::TagValue;
    let tag = proto.tag_name.clone();
    match &proto.tag_value {
        Some(TagValue::FixedValue(value)) => Ok(TagRule::Fixed { tag, value: value.clone() }),
        Some(TagValue::Regex(regex)) if !regex.is_empty() => {
            let regex =
                regex::Regex::new(regex).map_err(|error| ConfigError::field("regex", error.to_string()))?;
            Ok(TagRule::Extract { tag, regex })
        }
        _ => Ok(TagRule::Default(tag)),
    }
}

fn stats_matcher(proto: &pb::StatsMatcher) -> Result<StatsMatcher, ConfigError> {
    use pb::stats_matcher::StatsMatcher as Kind;
    let compile = |list: &matcher::ListStringMatcher, field: &'static str| {
        let patterns =
            list.patterns.iter().enumerate().map(|(i, pattern)| {
                StringMatcher::compile(pattern).at(|| format!("patterns[{i}]")).at(|| field)
            });
        patterns.collect::<Result<Vec<StringMatcher>, ConfigError>>()
    };
    match &proto.stats_matcher {
        None | Some(Kind::RejectAll(false)) => Ok(StatsMatcher::AcceptAll),
        Some(Kind::RejectAll(true)) => Ok(StatsMatcher::RejectAll),
        Some(Kind::ExclusionList(list)) => {
            let patterns = compile(list, "exclusion_list")?;
            Ok(StatsMatcher::Keep(Arc::new(move |name: &str| {
                !patterns.iter().any(|pattern| pattern.is_match(name.as_bytes()))
            })))
        }
        Some(Kind::InclusionList(list)) => {
            let patterns = compile(list, "inclusion_list")?;
            Ok(StatsMatcher::Keep(Arc::new(move |name: &str| {
                patterns.iter().any(|pattern| pattern.is_match(name.as_bytes()))
            })))
        }
    }
}

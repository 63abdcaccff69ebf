//! What the bootstrap says about stats, free of protobuf.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use regex::Regex;

/// A test on a stat's full text name.
pub type NamePredicate = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// Bootstrap `stats_config` and what goes with it.
#[derive(Clone, Debug)]
pub struct StatsConfig {
    /// How many workers will call [`Store::register_worker`](crate::Store::register_worker) (indices `0..workers`).
    pub workers: u32,
    /// `stats_config.stats_matcher`.
    pub matcher: StatsMatcher,
    /// `stats_config.use_all_default_tags` (default true). When false, only the default tags named by a
    /// [`TagRule::Default`] are extracted.
    pub use_all_default_tags: bool,
    /// `stats_config.stats_tags`, in order.
    pub tags: Vec<TagRule>,
    /// `stats_config.histogram_bucket_settings`; the first entry that matches a histogram's name wins.
    pub buckets: Vec<BucketSettings>,
}

impl Default for StatsConfig {
    fn default() -> Self {
        Self {
            workers: 1,
            matcher: StatsMatcher::AcceptAll,
            use_all_default_tags: true,
            tags: Vec::new(),
            buckets: Vec::new(),
        }
    }
}

impl StatsConfig {
    /// The default tags to extract, or `None` for all of them.
    pub(crate) fn enabled_default_tags(&self) -> Option<BTreeSet<Box<str>>> {
        (!self.use_all_default_tags).then(|| {
            self.tags
                .iter()
                .filter_map(|rule| match rule {
                    TagRule::Default(name) => Some(name.as_str().into()),
                    TagRule::Fixed { .. } | TagRule::Extract { .. } => None,
                })
                .collect()
        })
    }
}

/// Which stats exist at all. Rejected ones swallow what is written to them and are never listed.
#[derive(Clone, Default)]
pub enum StatsMatcher {
    /// No matcher configured.
    #[default]
    AcceptAll,
    /// `reject_all: true`.
    RejectAll,
    /// Inclusion or exclusion lists, compiled: true for names to keep.
    Keep(NamePredicate),
}

impl fmt::Debug for StatsMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AcceptAll => "AcceptAll",
            Self::RejectAll => "RejectAll",
            Self::Keep(_) => "Keep(..)",
        })
    }
}

/// One `stats_tags` entry.
#[derive(Clone, Debug)]
pub enum TagRule {
    /// `fixed_value`: on every stat.
    Fixed {
        /// Tag name.
        tag: String,
        /// Tag value.
        value: String,
    },
    /// `regex`: the first capture group is cut out of the name; the second, or the first when there is but one, is the
    /// tag's value.
    Extract {
        /// Tag name.
        tag: String,
        /// Matched against the full name, at most once per stat.
        regex: Regex,
    },
    /// Neither: the default tag of that name, for `use_all_default_tags: false`.
    Default(String),
}

/// One `histogram_bucket_settings` entry.
#[derive(Clone)]
pub struct BucketSettings {
    /// `match`, on the histogram's full name.
    pub matches: NamePredicate,
    /// Upper bounds, ascending, in the histogram's unit.
    pub buckets: Arc<[f64]>,
}

impl fmt::Debug for BucketSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BucketSettings").field("buckets", &self.buckets).finish_non_exhaustive()
    }
}

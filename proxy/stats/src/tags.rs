//! Tag-extracted names: what Prometheus and tag-aware sinks see instead of the text name.
//!
//! Default tags are known from the structure of a scope. Those of a user's regexes are found by matching full names,
//! once per stat, and kept per entry in the form of [`View`]s: nearly always a regex takes the same part of the prefix
//! out of every name of a group, so that one view describes them all.

use std::collections::HashSet;
use std::ops::Range;

use crate::cells::{Cells, Layout, Leaf};
use crate::config::TagRule;
use crate::scope::{ScopeNode, TagSpan};
use crate::store::StoreInner;

/// A tag and its value.
pub(crate) type Tag = (String, String);

/// How some leaves of an entry look without their tags.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct View {
    pub(crate) name: ViewName,
    /// The tags in Envoy's order, those that the leaf's own name carries aside: these come first.
    pub(crate) tags: Vec<Tag>,
    /// Which leaves, ascending; `None` for all.
    pub(crate) leaves: Option<Box<[Leaf]>>,
}

/// The tag-extracted name of the leaves of a view.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum ViewName {
    /// This, followed by the leaf's name without its own tag.
    Prefix(String),
    /// This: a regex took something out of the leaf's name.
    Exact(String),
}

/// A tag that a leaf's own name carries.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct LeafTag<'a> {
    pub(crate) tag: &'static str,
    pub(crate) value: &'a str,
    /// What is cut out of the leaf.
    pub(crate) cut: Range<usize>,
}

impl LeafTag<'_> {
    /// `leaf` without the tag.
    pub(crate) fn without(&self, leaf: &str) -> String {
        format!("{}{}", &leaf[..self.cut.start], &leaf[self.cut.end..])
    }
}

impl View {
    /// Whether this is how `leaf` looks.
    pub(crate) fn shows(&self, leaf: Leaf) -> bool {
        self.leaves.as_ref().is_none_or(|leaves| leaves.contains(&leaf))
    }

    /// A leaf's name without tags, and all its tags.
    pub(crate) fn tag_extracted(&self, cells: &Cells, leaf: Leaf) -> (String, Vec<Tag>) {
        let leaf_name = cells.leaf_name(leaf);
        let own = cells.scope().store.leaf_tag(&leaf_name);
        let mut name = match &self.name {
            ViewName::Exact(name) => name.clone(),
            ViewName::Prefix(prefix) => match &own {
                Some(own) => format!("{prefix}{}", own.without(&leaf_name)),
                None => format!("{prefix}{leaf_name}"),
            },
        };
        if name.ends_with('.') {
            name.pop();
        }
        let own = own.map(|own| (own.tag.to_owned(), own.value.to_owned()));
        (name, own.into_iter().chain(self.tags.iter().cloned()).collect())
    }
}

impl StoreInner {
    /// `*_rq_200` is `*_rq` with a response code, `*_rq_2xx` is `*_rq_xx` with a class: Envoy's default tags that are
    /// found in the last segment.
    pub(crate) fn leaf_tag<'a>(&self, leaf: &'a str) -> Option<LeafTag<'a>> {
        let at = leaf.len().checked_sub(3)?;
        let (head, code) = (leaf.get(..at)?, leaf.get(at..)?);
        if !head.ends_with("_rq_") {
            return None;
        }
        let tag = match code.as_bytes() {
            [b'0'..=b'9', b'x', b'x'] => {
                LeafTag { tag: "envoy.response_code_class", value: &code[..1], cut: at..at + 1 }
            }
            [b'0'..=b'9', b'0'..=b'9', b'0'..=b'9'] => {
                LeafTag { tag: "envoy.response_code", value: code, cut: at - 1..leaf.len() }
            }
            _ => return None,
        };
        self.default_tag_enabled(tag.tag).then_some(tag)
    }
}

impl ScopeNode {
    /// How every leaf looks when the user has no regexes.
    fn plain_view(&self) -> View {
        let cuts = self.tags.iter().map(|tag| tag.cut()).collect();
        let fixed = self.store.config.tags.iter().filter_map(|rule| match rule {
            TagRule::Fixed { tag, value } => Some((tag.clone(), value.clone())),
            TagRule::Extract { .. } | TagRule::Default(_) => None,
        });
        let tags = self.early_tags().chain(fixed).chain(self.late_tags()).collect();
        View { name: ViewName::Prefix(without(&self.prefix, cuts)), tags, leaves: None }
    }

    /// The tags that Envoy looks for in every name, from the most to the least specific: worker ids, and those that
    /// are a name's first segment.
    fn early_tags(&self) -> impl Iterator<Item = Tag> {
        self.tags.iter().rev().filter(|tag| tag.is_looked_for_everywhere()).map(|tag| self.tag(tag))
    }

    /// The tags that Envoy looks for in names with a certain first segment; then labels, in the order given.
    fn late_tags(&self) -> impl Iterator<Item = Tag> {
        let default =
            || self.tags.iter().rev().filter(|tag| !tag.is_label && !tag.is_looked_for_everywhere());
        // Envoy's list of extractors has the route after its virtual host.
        let default = default()
            .filter(|tag| tag.name != "envoy.route")
            .chain(default().filter(|tag| tag.name == "envoy.route"));
        let labels = self.tags.iter().filter(|tag| tag.is_label);
        default.chain(labels).map(|tag| self.tag(tag))
    }

    fn tag(&self, tag: &TagSpan) -> Tag {
        (tag.name.to_string(), tag.value_in(&self.prefix).to_owned())
    }
}

impl Cells {
    /// Calls `each` with every view of this entry.
    pub(crate) fn each_view(&self, mut each: impl FnMut(&View)) {
        if !self.scope().store.has_tag_regexes {
            each(&self.scope().plain_view());
            return;
        }
        match self.layout() {
            // The codes there are change from scrape to scrape.
            Layout::Codes { .. } => self.user_views(&self.listed()).iter().for_each(each),
            _ => self.views.get_or_init(|| self.user_views(&self.listed())).iter().for_each(each),
        }
    }

    fn user_views(&self, leaves: &[Leaf]) -> Box<[View]> {
        let mut views: Vec<(View, Vec<Leaf>)> = Vec::new();
        for leaf in leaves {
            let view = self.user_view(*leaf);
            match views.iter_mut().find(|(known, _)| known.name == view.name && known.tags == view.tags) {
                Some((_, leaves)) => leaves.push(*leaf),
                None => views.push((view, vec![*leaf])),
            }
        }
        let all = views.len() == 1 && !matches!(self.layout(), Layout::Codes { .. });
        views
            .into_iter()
            .map(|(view, leaves)| View { leaves: (!all).then(|| leaves.into()), ..view })
            .collect()
    }

    fn user_view(&self, leaf: Leaf) -> View {
        let scope = self.scope();
        let mut full = String::new();
        self.write_name(leaf, &mut full);

        // Envoy tries the extractors that may match any name before those that name a first segment, and within
        // either the default ones before the user's.
        let (mut tags, mut late): (Vec<Tag>, Vec<Tag>) = (scope.early_tags().collect(), Vec::new());
        let mut cuts: Vec<Range<usize>> = scope.tags.iter().map(|tag| tag.cut()).collect();
        let mut touches_leaf = false;
        for rule in &scope.store.config.tags {
            let (tag, regex) = match rule {
                TagRule::Default(_) => continue,
                TagRule::Fixed { tag, value } => {
                    tags.push((tag.clone(), value.clone()));
                    continue;
                }
                TagRule::Extract { tag, regex } => (tag, regex),
            };
            let Some(captures) = regex.captures(&full) else { continue };
            let Some(cut) = captures.get(1) else { continue };
            let value = captures.get(2).unwrap_or(cut);
            touches_leaf |= cut.end() > scope.prefix.len();
            cuts.push(cut.range());
            let found = if names_first_segment(regex.as_str()) { &mut late } else { &mut tags };
            found.push((tag.clone(), value.as_str().to_owned()));
        }
        tags.extend(scope.late_tags());
        tags.append(&mut late);
        // A label may appear once: the first value found stays.
        let mut seen = HashSet::new();
        tags.retain(|(tag, _)| seen.insert(tag.clone()));

        if !touches_leaf {
            return View { name: ViewName::Prefix(without(&scope.prefix, cuts)), tags, leaves: None };
        }
        let leaf_name = self.leaf_name(leaf);
        if let Some(own) = scope.store.leaf_tag(&leaf_name) {
            let at = scope.prefix.len();
            cuts.push(at + own.cut.start..at + own.cut.end);
        }
        View { name: ViewName::Exact(without(&full, cuts)), tags, leaves: None }
    }
}

/// Whether a regex begins with `^segment\.` (or is `^segment$`), which makes Envoy index it by that segment.
fn names_first_segment(regex: &str) -> bool {
    let Some(rest) = regex.strip_prefix('^') else { return false };
    let after = rest.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '_');
    after.len() < rest.len() && (after.starts_with(r"\.") || after.starts_with(r"(?=\.)") || after == "$")
}

/// `name` without the given ranges, which may overlap.
fn without(name: &str, mut cuts: Vec<Range<usize>>) -> String {
    cuts.sort_by_key(|cut| cut.start);
    let mut rest = String::with_capacity(name.len());
    let mut from = 0;
    for cut in cuts {
        if cut.start > from {
            rest.push_str(name.get(from..cut.start).unwrap_or_default());
        }
        from = from.max(cut.end.min(name.len()));
    }
    rest.push_str(name.get(from..).unwrap_or_default());
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;

    #[test]
    fn codes_and_classes_are_tags_of_the_last_segment() {
        let store = Store::default();
        let tag = |leaf: &str| {
            store.inner().leaf_tag(leaf).map(|tag| (tag.tag, tag.value.to_owned(), tag.without(leaf)))
        };
        assert_eq!(tag("upstream_rq_200"), Some(("envoy.response_code", "200".into(), "upstream_rq".into())));
        assert_eq!(
            tag("downstream_rq_5xx"),
            Some(("envoy.response_code_class", "5".into(), "downstream_rq_xx".into()))
        );
        assert_eq!(tag("upstream_rq_0rtt"), None);
        assert_eq!(tag("upstream_cx_200"), None);
        assert_eq!(tag("xx"), None);
    }

    #[test]
    fn overlapping_cuts_are_cut_once() {
        assert_eq!(without("cluster.a.b.total", vec![8..10, 8..12]), "cluster.total");
        assert_eq!(without("cluster.a.total", vec![]), "cluster.a.total");
    }
}

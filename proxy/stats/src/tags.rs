//! Tag-extracted names: what Prometheus and tag-aware sinks see instead of the text name.

use std::ops::Range;

use crate::cells::{Cells, Leaf};
use crate::config::TagRule;
use crate::scope::ScopeNode;

/// A name without its tags, and the tags.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) struct Extracted {
    pub(crate) name: String,
    pub(crate) tags: Vec<(String, String)>,
}

/// A tag that a leaf's own name carries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct LeafTag<'a> {
    pub(crate) tag: &'static str,
    pub(crate) value: &'a str,
    /// What is cut out of the leaf.
    pub(crate) cut: (usize, usize),
}

/// `*_rq_200` is `*_rq` with a response code, `*_rq_2xx` is `*_rq_xx` with a class: Envoy's two default tags that are
/// not whole segments.
pub(crate) fn leaf_tag(leaf: &str) -> Option<LeafTag<'_>> {
    let at = leaf.len().checked_sub(3)?;
    let (head, code) = (leaf.get(..at)?, leaf.get(at..)?);
    let head = head.strip_suffix('_')?;
    if !head.ends_with("_rq") {
        return None;
    }
    match code.as_bytes() {
        [b'0'..=b'9', b'x', b'x'] => {
            Some(LeafTag { tag: "envoy.response_code_class", value: &code[..1], cut: (at, at + 1) })
        }
        [b'0'..=b'9', b'0'..=b'9', b'0'..=b'9'] => {
            Some(LeafTag { tag: "envoy.response_code", value: code, cut: (at - 1, leaf.len()) })
        }
        _ => None,
    }
}

impl ScopeNode {
    /// The prefix without its tags; keeps the final dot unless nothing is left.
    pub(crate) fn extracted_prefix(&self) -> String {
        let mut name = String::with_capacity(self.prefix.len());
        let mut from = 0;
        for tag in &self.tags {
            let cut = tag.cut();
            name.push_str(&self.prefix[from..cut.start]);
            from = cut.end;
        }
        name.push_str(&self.prefix[from..]);
        name
    }

    /// The tags in the order in which Envoy extracts them: by and large from the most to the least specific.
    pub(crate) fn ordered_tags(&self) -> Vec<(&str, &str)> {
        let mut tags: Vec<_> =
            self.tags.iter().rev().map(|tag| (tag.name.as_ref(), tag.value_in(&self.prefix))).collect();
        // Labels come in the order in which they were given, after the tags that are extracted from the name.
        tags.sort_by_key(|(name, _)| !name.starts_with("envoy."));
        let labels = tags.iter().position(|(name, _)| !name.starts_with("envoy.")).unwrap_or(tags.len());
        tags[labels..].reverse();
        tags
    }
}

impl Cells {
    /// What the user's tag regexes make of a leaf; `None` when none of them matches it.
    pub(crate) fn user_extracted(&self, leaf: Leaf) -> Option<Extracted> {
        let scope = self.scope();
        let config = &scope.store.config;
        let mut full = String::new();
        self.write_name(leaf, &mut full);

        let mut cuts: Vec<Range<usize>> = Vec::new();
        let mut user_tags = Vec::new();
        for rule in &config.tags {
            let TagRule::Extract { tag, regex } = rule else { continue };
            let Some(captures) = regex.captures(&full) else { continue };
            let Some(cut) = captures.get(1) else { continue };
            let value = captures.get(2).unwrap_or(cut);
            cuts.push(cut.range());
            user_tags.push((tag.clone(), value.as_str().to_owned()));
        }
        if user_tags.is_empty() {
            return None;
        }

        let leaf_name = self.leaf_name(leaf);
        let leaf_tag = leaf_tag(&leaf_name).filter(|tag| scope.store.default_tag_enabled(tag.tag));
        if let Some(tag) = &leaf_tag {
            let at = scope.prefix.len();
            cuts.push(at + tag.cut.0..at + tag.cut.1);
        }
        cuts.extend(scope.tags.iter().map(|tag| tag.cut()));

        let fixed = config.fixed_tags().map(|(tag, value)| (tag.to_owned(), value.to_owned()));
        let own = leaf_tag.iter().map(|tag| (tag.tag.to_owned(), tag.value.to_owned()));
        let structural =
            scope.ordered_tags().into_iter().map(|(tag, value)| (tag.to_owned(), value.to_owned()));
        let mut tags: Vec<(String, String)> = Vec::new();
        for (tag, value) in fixed.chain(own).chain(structural).chain(user_tags) {
            // A tag is a label, and a label may appear once: the first one found stays, as in Envoy.
            if tags.iter().all(|(existing, _)| *existing != tag) {
                tags.push((tag, value));
            }
        }
        Some(Extracted { name: without(&full, cuts), tags })
    }
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
    // A cut at the end leaves the dot before it.
    if rest.ends_with('.') && !name.ends_with('.') {
        rest.pop();
    }
    rest
}

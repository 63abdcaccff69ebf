//! The flat index of a route list.

use waystation_matchers::PrefixMap;

use crate::matching::{PathPattern, RouteMatch};

/// Finds the first route of a list that matches, looking only at routes whose path can match.
///
/// Paths, prefixes and the literal beginnings of regular expressions and templates stand in a radix trie. A walk
/// along the request's path meets every list of candidates; each is in the order of the configuration and is read
/// only as long as it could improve on the best match so far, so the result is the first match of the whole list.
#[derive(Debug)]
pub(crate) struct RouteIndex {
    exact_case: PrefixMap<Candidates>,
    ignore_case: Option<PrefixMap<Candidates>>,
    /// CONNECT matchers: the only ones that need no path.
    connect: Box<[u32]>,
}

/// Routes whose path or literal beginning ends at one node of the trie, in the order of the configuration.
#[derive(Debug, Default)]
struct Candidates {
    /// They match whatever follows.
    prefix: Vec<u32>,
    /// They match when nothing follows.
    exact: Vec<u32>,
    /// They match when nothing or a `/` follows.
    segment: Vec<u32>,
    /// The first route here or above that matches everything below: later ones can never be reached.
    bound: u32,
}

impl RouteIndex {
    /// Indexes `routes`, pairs of a route's number and its matcher, in their order of precedence.
    pub(crate) fn new<'a>(routes: impl IntoIterator<Item = (u32, &'a RouteMatch)>) -> Self {
        let mut exact_case = Vec::new();
        let mut ignore_case = Vec::new();
        let mut connect = Vec::new();
        for (index, matcher) in routes {
            let mut candidates = Candidates { bound: u32::MAX, ..Candidates::default() };
            let (key, folded) = match &matcher.path {
                PathPattern::Connect => {
                    connect.push(index);
                    continue;
                }
                PathPattern::Exact { path, ignore_case } => {
                    candidates.exact.push(index);
                    (&**path, *ignore_case)
                }
                PathPattern::Prefix { prefix, ignore_case } => {
                    candidates.prefix.push(index);
                    if matcher.conditions.is_none() {
                        candidates.bound = index;
                    }
                    (&**prefix, *ignore_case)
                }
                PathPattern::Segment { prefix, ignore_case } => {
                    candidates.segment.push(index);
                    (&**prefix, *ignore_case)
                }
                PathPattern::Regex(regex) => {
                    candidates.prefix.push(index);
                    (regex.literal_prefix(), false)
                }
                PathPattern::Template(template) => {
                    candidates.prefix.push(index);
                    (template.literal_prefix(), false)
                }
            };
            if folded { &mut ignore_case } else { &mut exact_case }.push((key, candidates));
        }
        let ignore_case = (!ignore_case.is_empty()).then(|| build(ignore_case, true));
        Self { exact_case: build(exact_case, false), ignore_case, connect: connect.into() }
    }

    /// The lowest number of a route that matches `path` and for which `test` holds. `path` is `None` for a CONNECT
    /// request without one.
    #[inline]
    pub(crate) fn find(&self, path: Option<&[u8]>, mut test: impl FnMut(u32) -> bool) -> Option<u32> {
        let mut best = u32::MAX;
        scan(&self.connect, &mut best, &mut test);
        if let Some(path) = path {
            walk(&self.exact_case, path, &mut best, &mut test);
            if let Some(map) = &self.ignore_case {
                walk(map, path, &mut best, &mut test);
            }
        }
        (best != u32::MAX).then_some(best)
    }
}

fn build(entries: Vec<(&[u8], Candidates)>, ignore_case: bool) -> PrefixMap<Candidates> {
    let mut map = PrefixMap::build(entries, ignore_case, Candidates::merge);
    map.visit_mut(|above, candidates| {
        candidates.bound = candidates.bound.min(above.map_or(u32::MAX, |above| above.bound));
        let bound = candidates.bound;
        for list in [&mut candidates.prefix, &mut candidates.exact, &mut candidates.segment] {
            list.retain(|index| *index <= bound);
            list.shrink_to_fit();
        }
    });
    map
}

#[inline]
fn walk(map: &PrefixMap<Candidates>, path: &[u8], best: &mut u32, test: &mut impl FnMut(u32) -> bool) {
    for (len, candidates) in map.prefixes(path) {
        scan(&candidates.prefix, best, test);
        match path.get(len) {
            None => {
                scan(&candidates.exact, best, test);
                scan(&candidates.segment, best, test);
            }
            Some(b'/') => scan(&candidates.segment, best, test),
            Some(_) => {}
        }
    }
}

#[inline]
fn scan(list: &[u32], best: &mut u32, test: &mut impl FnMut(u32) -> bool) {
    for index in list {
        if *index >= *best {
            return;
        }
        if test(*index) {
            *best = *index;
            return;
        }
    }
}

impl Candidates {
    fn merge(&mut self, other: Self) {
        self.prefix.extend(other.prefix);
        self.exact.extend(other.exact);
        self.segment.extend(other.segment);
        self.bound = self.bound.min(other.bound);
    }
}

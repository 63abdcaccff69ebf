//! The matcher tree: `xds.type.matcher.v3.Matcher`.

use std::collections::HashMap;
use std::fmt;

use envoy_types::pb::envoy::extensions::matching::input_matchers as input;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use envoy_types::pb::xds::r#type::matcher::v3 as pb;
use prost::Name;
use waystation_filter_api::runtime::{Runtime, RuntimeFraction};
use waystation_filter_api::wire::{type_name, unpack};
use waystation_schema::{At, ConfigError};
use xxhash_rust::xxh64::xxh64;

use crate::cidr::{Cidr, CidrList, CidrMap};
use crate::inputs::{Data, Input, InputScope, Inputs};
use crate::messages::{IpMatcher, ServerNameMatcher};
use crate::prefix_map::PrefixMap;
use crate::string::StringMatcher;
use crate::value::ValueMatcher;

/// Trees may nest this deep.
const MAX_DEPTH: usize = 32;

/// What a tree is compiled with.
pub struct TreeContext<'a, A> {
    /// Which inputs make sense.
    pub scope: InputScope,
    /// Runtime keys of `runtime_fraction`.
    pub runtime: &'a Runtime,
    /// Compiles an action.
    pub action: &'a dyn Fn(&TypedExtensionConfig) -> Result<A, ConfigError>,
}

impl<A> fmt::Debug for TreeContext<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TreeContext").field("scope", &self.scope).finish_non_exhaustive()
    }
}

/// What a tree says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict<'a, A> {
    /// This action.
    Match(&'a A),
    /// Nothing matches.
    NoMatch,
    /// It depends on an input that may still come.
    NotYet,
}

impl<'a, A> Verdict<'a, A> {
    /// The action, if there is one.
    pub fn action(self) -> Option<&'a A> {
        match self {
            Self::Match(action) => Some(action),
            Self::NoMatch | Self::NotYet => None,
        }
    }
}

/// A compiled matcher tree with actions of type `A`.
#[derive(Debug)]
pub struct Matcher<A> {
    kind: Kind<A>,
    on_no_match: Option<OnMatch<A>>,
}

#[derive(Debug)]
enum Kind<A> {
    /// Neither list nor tree: `on_no_match` decides.
    Empty,
    List(Vec<(Predicate, OnMatch<A>)>),
    Exact(Input, HashMap<Box<[u8]>, OnMatch<A>>),
    Prefix(Input, PrefixMap<OnMatch<A>>),
    /// Per range the index of its branch and whether it is exclusive.
    Ip(Input, CidrMap<(u32, bool)>, Vec<OnMatch<A>>),
    ServerName(Input, Domains, Vec<OnMatch<A>>),
}

/// Branches by domain: exact names, then the longest `*.suffix`, then `*`.
#[derive(Debug, Default)]
struct Domains {
    exact: HashMap<Box<[u8]>, u32>,
    /// By the part behind `*`, dot included.
    suffix: HashMap<Box<[u8]>, u32>,
    any: Option<u32>,
}

#[derive(Debug)]
struct OnMatch<A> {
    target: Target<A>,
    keep_matching: bool,
}

#[derive(Debug)]
enum Target<A> {
    Action(A),
    Matcher(Box<Matcher<A>>),
}

#[derive(Debug)]
enum Predicate {
    Single(Input, InputMatcher),
    Any(Vec<Predicate>),
    All(Vec<Predicate>),
    Not(Box<Predicate>),
}

#[derive(Debug)]
enum InputMatcher {
    Text(StringMatcher),
    Ip(CidrList),
    Metadata(ValueMatcher, bool),
    RuntimeFraction { fraction: RuntimeFraction, seed: u64 },
    ConsistentHashing { threshold: u64, modulo: u64, seed: u64 },
}

/// The outcome of a predicate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Truth {
    Yes,
    No,
    NotYet,
}

impl<A> Matcher<A> {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::Matcher, cx: &TreeContext<'_, A>) -> Result<Self, ConfigError> {
        Self::compile_at_depth(proto, cx, 0)
    }

    fn compile_at_depth(
        proto: &pb::Matcher,
        cx: &TreeContext<'_, A>,
        depth: usize,
    ) -> Result<Self, ConfigError> {
        use pb::matcher::MatcherType;
        if depth == MAX_DEPTH {
            return Err(ConfigError::new(format!("nested deeper than {MAX_DEPTH}")));
        }
        let pb::Matcher { on_no_match, matcher_type } = proto;
        let kind = match matcher_type {
            None => Kind::Empty,
            Some(MatcherType::MatcherList(list)) => compile_list(list, cx, depth).at(|| "matcher_list")?,
            Some(MatcherType::MatcherTree(tree)) => compile_tree(tree, cx, depth).at(|| "matcher_tree")?,
        };
        let on_no_match = on_no_match.as_ref();
        let on_no_match = on_no_match
            .map(|on_match| OnMatch::compile(on_match, cx, depth).at(|| "on_no_match"))
            .transpose()?;
        Ok(Self { kind, on_no_match })
    }

    /// Walks the tree.
    pub fn evaluate(&self, inputs: &Inputs<'_>) -> Verdict<'_, A> {
        let verdict = match &self.kind {
            Kind::Empty => Verdict::NoMatch,
            Kind::List(list) => evaluate_list(list, inputs),
            Kind::Exact(input, map) => match input.get(inputs) {
                Data::NotYet => return Verdict::NotYet,
                data => match data.text().and_then(|text| map.get(&*text)) {
                    Some(on_match) => on_match.evaluate(inputs),
                    None => Verdict::NoMatch,
                },
            },
            Kind::Prefix(input, map) => match input.get(inputs) {
                Data::NotYet => return Verdict::NotYet,
                data => match data.text() {
                    Some(text) => evaluate_prefixes(map, &text, inputs),
                    None => Verdict::NoMatch,
                },
            },
            Kind::Ip(input, map, branches) => match input.get(inputs) {
                Data::NotYet => return Verdict::NotYet,
                data => evaluate_ranges(map, branches, &data, inputs),
            },
            Kind::ServerName(input, domains, branches) => match input.get(inputs) {
                Data::NotYet => return Verdict::NotYet,
                data => match data.text() {
                    Some(name) => evaluate_domains(domains, branches, &name, inputs),
                    None => Verdict::NoMatch,
                },
            },
        };
        match (verdict, &self.on_no_match) {
            (Verdict::NoMatch, Some(on_match)) => on_match.evaluate(inputs),
            (verdict, _) => verdict,
        }
    }

    /// Visits every action of the tree.
    pub fn visit_actions<'a>(&'a self, visit: &mut dyn FnMut(&'a A)) {
        match &self.kind {
            Kind::Empty => {}
            Kind::List(list) => list.iter().for_each(|(_, on_match)| on_match.visit(visit)),
            Kind::Exact(_, map) => map.values().for_each(|on_match| on_match.visit(visit)),
            Kind::Prefix(_, map) => map.values().for_each(|on_match| on_match.visit(visit)),
            Kind::Ip(_, _, branches) | Kind::ServerName(_, _, branches) => {
                branches.iter().for_each(|on_match| on_match.visit(visit));
            }
        }
        if let Some(on_match) = &self.on_no_match {
            on_match.visit(visit);
        }
    }
}

/// A branch whose nested tree says nothing counts as not taken: the next one is tried.
fn evaluate_list<'a, A>(list: &'a [(Predicate, OnMatch<A>)], inputs: &Inputs<'_>) -> Verdict<'a, A> {
    for (predicate, on_match) in list {
        match predicate.evaluate(inputs) {
            Truth::NotYet => return Verdict::NotYet,
            Truth::No => {}
            Truth::Yes => match on_match.evaluate(inputs) {
                Verdict::NoMatch => {}
                verdict => return verdict,
            },
        }
    }
    Verdict::NoMatch
}

/// The longest prefix first; a shorter one when its subtree says nothing.
fn evaluate_prefixes<'a, A>(
    map: &'a PrefixMap<OnMatch<A>>,
    text: &[u8],
    inputs: &Inputs<'_>,
) -> Verdict<'a, A> {
    let mut longest = text.len();
    loop {
        let Some((len, on_match)) = map.prefixes(text).take_while(|(len, _)| *len <= longest).last() else {
            return Verdict::NoMatch;
        };
        match on_match.evaluate(inputs) {
            Verdict::NoMatch if len > 0 => longest = len - 1,
            verdict => return verdict,
        }
    }
}

fn evaluate_ranges<'a, A>(
    map: &CidrMap<(u32, bool)>,
    branches: &'a [OnMatch<A>],
    data: &Data<'_>,
    inputs: &Inputs<'_>,
) -> Verdict<'a, A> {
    let Some(address) = data.address() else { return Verdict::NoMatch };
    for (branch, exclusive) in map.matches(address) {
        match branches[*branch as usize].evaluate(inputs) {
            Verdict::NoMatch if !exclusive => {}
            verdict => return verdict,
        }
    }
    Verdict::NoMatch
}

fn evaluate_domains<'a, A>(
    domains: &Domains,
    branches: &'a [OnMatch<A>],
    name: &[u8],
    inputs: &Inputs<'_>,
) -> Verdict<'a, A> {
    let exact = domains.exact.get(name);
    let dots = name.iter().enumerate().filter(|(_, byte)| **byte == b'.');
    let suffixes = dots.filter_map(|(at, _)| domains.suffix.get(&name[at..]));
    for branch in exact.into_iter().chain(suffixes).chain(domains.any.as_ref()) {
        match branches[*branch as usize].evaluate(inputs) {
            Verdict::NoMatch => {}
            verdict => return verdict,
        }
    }
    Verdict::NoMatch
}

impl<A> OnMatch<A> {
    fn compile(
        proto: &pb::matcher::OnMatch,
        cx: &TreeContext<'_, A>,
        depth: usize,
    ) -> Result<Self, ConfigError> {
        use pb::matcher::on_match::OnMatch as Proto;
        let target = match &proto.on_match {
            None => return Err(ConfigError::field("on_match", "is required")),
            Some(Proto::Action(action)) => Target::Action((cx.action)(action).at(|| "action")?),
            Some(Proto::Matcher(matcher)) => {
                Target::Matcher(Box::new(Matcher::compile_at_depth(matcher, cx, depth + 1).at(|| "matcher")?))
            }
        };
        Ok(Self { target, keep_matching: proto.keep_matching })
    }

    /// `keep_matching` turns a match into "go on".
    fn evaluate(&self, inputs: &Inputs<'_>) -> Verdict<'_, A> {
        let verdict = match &self.target {
            Target::Action(action) => Verdict::Match(action),
            Target::Matcher(matcher) => matcher.evaluate(inputs),
        };
        match verdict {
            Verdict::Match(_) if self.keep_matching => Verdict::NoMatch,
            verdict => verdict,
        }
    }

    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a A)) {
        match &self.target {
            Target::Action(action) => visit(action),
            Target::Matcher(matcher) => matcher.visit_actions(visit),
        }
    }
}

impl Predicate {
    fn evaluate(&self, inputs: &Inputs<'_>) -> Truth {
        match self {
            Self::Single(input, matcher) => matcher.evaluate(&input.get(inputs)),
            Self::Any(predicates) => {
                for predicate in predicates {
                    match predicate.evaluate(inputs) {
                        Truth::No => {}
                        truth => return truth,
                    }
                }
                Truth::No
            }
            Self::All(predicates) => {
                for predicate in predicates {
                    match predicate.evaluate(inputs) {
                        Truth::Yes => {}
                        truth => return truth,
                    }
                }
                Truth::Yes
            }
            Self::Not(predicate) => match predicate.evaluate(inputs) {
                Truth::Yes => Truth::No,
                Truth::No => Truth::Yes,
                Truth::NotYet => Truth::NotYet,
            },
        }
    }
}

impl InputMatcher {
    fn evaluate(&self, data: &Data<'_>) -> Truth {
        if matches!(data, Data::NotYet) {
            return Truth::NotYet;
        }
        let matches = match self {
            Self::Text(matcher) => data.text().is_some_and(|text| matcher.is_match(&text)),
            Self::Ip(ranges) => data.address().is_some_and(|address| ranges.contains(address)),
            Self::Metadata(matcher, invert) => {
                let value = match data {
                    Data::Value(value) => Some(&**value),
                    _ => None,
                };
                matcher.is_match(value) != *invert
            }
            Self::RuntimeFraction { fraction, seed } => {
                data.text().is_some_and(|text| fraction.contains(xxh64(&text, *seed)))
            }
            Self::ConsistentHashing { threshold, modulo, seed } => {
                data.text().is_some_and(|text| !text.is_empty() && xxh64(&text, *seed) % modulo >= *threshold)
            }
        };
        if matches { Truth::Yes } else { Truth::No }
    }
}

fn compile_list<A>(
    proto: &pb::matcher::MatcherList,
    cx: &TreeContext<'_, A>,
    depth: usize,
) -> Result<Kind<A>, ConfigError> {
    let compile = |(index, field): (usize, &pb::matcher::matcher_list::FieldMatcher)| {
        let predicate =
            field.predicate.as_ref().ok_or_else(|| ConfigError::field("predicate", "is required"));
        let predicate =
            predicate.and_then(|predicate| compile_predicate(predicate, cx, 0).at(|| "predicate"));
        let on_match = field.on_match.as_ref().ok_or_else(|| ConfigError::field("on_match", "is required"));
        let on_match = on_match.and_then(|on_match| OnMatch::compile(on_match, cx, depth).at(|| "on_match"));
        predicate.and_then(|predicate| Ok((predicate, on_match?))).at(|| format!("matchers[{index}]"))
    };
    Ok(Kind::List(proto.matchers.iter().enumerate().map(compile).collect::<Result<_, _>>()?))
}

fn compile_predicate<A>(
    proto: &pb::matcher::matcher_list::Predicate,
    cx: &TreeContext<'_, A>,
    depth: usize,
) -> Result<Predicate, ConfigError> {
    use pb::matcher::matcher_list::predicate::{MatchType, PredicateList};
    if depth == MAX_DEPTH {
        return Err(ConfigError::new(format!("nested deeper than {MAX_DEPTH}")));
    }
    let list = |list: &PredicateList| -> Result<Vec<Predicate>, ConfigError> {
        let compile = |(index, predicate)| {
            compile_predicate(predicate, cx, depth + 1).at(|| format!("predicate[{index}]"))
        };
        list.predicate.iter().enumerate().map(compile).collect()
    };
    Ok(match &proto.match_type {
        None => return Err(ConfigError::field("match_type", "is required")),
        Some(MatchType::SinglePredicate(single)) => compile_single(single, cx).at(|| "single_predicate")?,
        Some(MatchType::OrMatcher(any)) => Predicate::Any(list(any).at(|| "or_matcher")?),
        Some(MatchType::AndMatcher(all)) => Predicate::All(list(all).at(|| "and_matcher")?),
        Some(MatchType::NotMatcher(not)) => {
            Predicate::Not(Box::new(compile_predicate(not, cx, depth + 1).at(|| "not_matcher")?))
        }
    })
}

fn compile_single<A>(
    proto: &pb::matcher::matcher_list::predicate::SinglePredicate,
    cx: &TreeContext<'_, A>,
) -> Result<Predicate, ConfigError> {
    use pb::matcher::matcher_list::predicate::single_predicate::Matcher as Proto;
    let input = compile_input(proto.input.as_ref(), cx.scope)?;
    let matcher = match &proto.matcher {
        None => return Err(ConfigError::field("matcher", "is required")),
        Some(Proto::ValueMatch(text)) => {
            InputMatcher::Text(StringMatcher::compile_xds(text).at(|| "value_match")?)
        }
        Some(Proto::CustomMatch(custom)) => {
            compile_input_matcher(custom, cx.runtime).at(|| "custom_match")?
        }
    };
    Ok(Predicate::Single(input, matcher))
}

fn compile_input(proto: Option<&TypedExtensionConfig>, scope: InputScope) -> Result<Input, ConfigError> {
    let any = proto.and_then(|extension| extension.typed_config.as_ref());
    let any = any.ok_or_else(|| ConfigError::field("input", "is required"))?;
    Input::compile(any, scope).at(|| "typed_config").at(|| "input")
}

fn compile_input_matcher(
    proto: &TypedExtensionConfig,
    runtime: &Runtime,
) -> Result<InputMatcher, ConfigError> {
    let any = proto.typed_config.as_ref().ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
    let name = type_name(any);
    let is = |full_name: String| name == full_name;
    let compiled = if is(input::ip::v3::Ip::full_name()) {
        // `stat_prefix` counts unparsable inputs in Envoy; an input that is no address does not match here.
        let input::ip::v3::Ip { cidr_ranges, stat_prefix: _ } = unpack(any)?;
        Ok(InputMatcher::Ip(CidrList::compile(&cidr_ranges, "cidr_ranges").at(|| "typed_config")?))
    } else if is(input::metadata::v3::Metadata::full_name()) {
        let input::metadata::v3::Metadata { value, invert } = unpack(any)?;
        let value = value.ok_or_else(|| ConfigError::field("value", "is required"))?;
        ValueMatcher::compile(&value).at(|| "value").map(|value| InputMatcher::Metadata(value, invert))
    } else if is(input::runtime_fraction::v3::RuntimeFraction::full_name()) {
        let input::runtime_fraction::v3::RuntimeFraction { runtime_fraction, seed } = unpack(any)?;
        let fraction =
            runtime_fraction.ok_or_else(|| ConfigError::field("runtime_fraction", "is required"))?;
        Ok(InputMatcher::RuntimeFraction { fraction: runtime.fractional_percent(&fraction), seed })
    } else if is(input::consistent_hashing::v3::ConsistentHashing::full_name()) {
        let input::consistent_hashing::v3::ConsistentHashing { threshold, modulo, seed } = unpack(any)?;
        if modulo == 0 {
            return Err(ConfigError::field("modulo", "must be greater than 0"));
        }
        if threshold > modulo {
            let reason = format!("cannot be greater than modulo: {threshold} > {modulo}");
            return Err(ConfigError::field("threshold", reason));
        }
        Ok(InputMatcher::ConsistentHashing { threshold: threshold.into(), modulo: modulo.into(), seed })
    } else {
        Err(ConfigError::new(format!("not supported: input matcher {name}")))
    };
    compiled.at(|| "typed_config")
}

fn compile_tree<A>(
    proto: &pb::matcher::MatcherTree,
    cx: &TreeContext<'_, A>,
    depth: usize,
) -> Result<Kind<A>, ConfigError> {
    use pb::matcher::matcher_tree::{MatchMap, TreeType};
    let input = compile_input(proto.input.as_ref(), cx.scope)?;
    let entries = |map: &MatchMap| -> Result<Vec<_>, ConfigError> {
        let compile = |(key, on_match): (&String, _)| {
            let on_match = OnMatch::compile(on_match, cx, depth).at(|| format!("map[{key}]"))?;
            Ok((key.as_bytes().to_vec(), on_match))
        };
        map.map.iter().map(compile).collect()
    };
    match &proto.tree_type {
        None => Err(ConfigError::field("tree_type", "is required")),
        Some(TreeType::ExactMatchMap(map)) => {
            let entries = entries(map).at(|| "exact_match_map")?;
            Ok(Kind::Exact(input, entries.into_iter().map(|(key, value)| (key.into(), value)).collect()))
        }
        Some(TreeType::PrefixMatchMap(map)) => {
            let entries = entries(map).at(|| "prefix_match_map")?;
            // A protobuf map has each key once.
            Ok(Kind::Prefix(input, PrefixMap::build(entries, false, |_, _| ())))
        }
        Some(TreeType::CustomMatch(custom)) => {
            compile_custom_tree(input, custom, cx, depth).at(|| "typed_config").at(|| "custom_match")
        }
    }
}

fn compile_custom_tree<A>(
    input: Input,
    proto: &TypedExtensionConfig,
    cx: &TreeContext<'_, A>,
    depth: usize,
) -> Result<Kind<A>, ConfigError> {
    let any = proto.typed_config.as_ref().ok_or_else(|| ConfigError::new("is required"))?;
    match type_name(any) {
        "xds.type.matcher.v3.IPMatcher" => compile_ip_tree(input, &unpack(any)?, cx, depth),
        "xds.type.matcher.v3.ServerNameMatcher" => compile_domain_tree(input, &unpack(any)?, cx, depth),
        name => Err(ConfigError::new(format!("not supported: custom matcher {name}"))),
    }
}

fn compile_ip_tree<A>(
    input: Input,
    proto: &IpMatcher,
    cx: &TreeContext<'_, A>,
    depth: usize,
) -> Result<Kind<A>, ConfigError> {
    let mut branches = Vec::with_capacity(proto.range_matchers.len());
    let mut ranges = Vec::new();
    for (index, matcher) in proto.range_matchers.iter().enumerate() {
        let segment = || format!("range_matchers[{index}]");
        let on_match = matcher.on_match.as_ref().ok_or_else(|| ConfigError::field("on_match", "is required"));
        let on_match = on_match.and_then(|on_match| OnMatch::compile(on_match, cx, depth).at(|| "on_match"));
        branches.push(on_match.at(segment)?);
        for (number, range) in matcher.ranges.iter().enumerate() {
            let range = Cidr::compile(range).at(|| format!("ranges[{number}]")).at(segment)?;
            ranges.push((range, (index as u32, matcher.exclusive)));
        }
    }
    Ok(Kind::Ip(input, CidrMap::new(ranges), branches))
}

fn compile_domain_tree<A>(
    input: Input,
    proto: &ServerNameMatcher,
    cx: &TreeContext<'_, A>,
    depth: usize,
) -> Result<Kind<A>, ConfigError> {
    let mut branches = Vec::with_capacity(proto.domain_matchers.len());
    let mut domains = Domains::default();
    for (index, matcher) in proto.domain_matchers.iter().enumerate() {
        let segment = || format!("domain_matchers[{index}]");
        let on_match = matcher.on_match.as_ref().ok_or_else(|| ConfigError::field("on_match", "is required"));
        let on_match = on_match.and_then(|on_match| OnMatch::compile(on_match, cx, depth).at(|| "on_match"));
        branches.push(on_match.at(segment)?);
        for (number, domain) in matcher.domains.iter().enumerate() {
            domains.add(domain, index as u32).at(|| format!("domains[{number}]")).at(segment)?;
        }
    }
    Ok(Kind::ServerName(input, domains, branches))
}

impl Domains {
    fn add(&mut self, domain: &str, branch: u32) -> Result<(), ConfigError> {
        let taken = if domain == "*" {
            self.any.replace(branch).is_some()
        } else if let Some(suffix) = domain.strip_prefix('*').filter(|suffix| suffix.starts_with('.')) {
            self.suffix.insert(suffix.as_bytes().into(), branch).is_some()
        } else if domain.is_empty() || domain.contains('*') {
            return Err(ConfigError::new(format!("`{domain}` is neither a name, nor `*.name`, nor `*`")));
        } else {
            self.exact.insert(domain.as_bytes().into(), branch).is_some()
        };
        if taken { Err(ConfigError::new(format!("duplicate domain `{domain}`"))) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;

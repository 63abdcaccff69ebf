//! Generated policies: the engine must say what an evaluator says that knows nothing of compiling and indexing.

use std::net::{IpAddr, Ipv4Addr};

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::envoy::r#type::v3::Int32Range;
use envoy_types::pb::google::protobuf::UInt32Value;
use matcher::string_matcher::MatchPattern;
use pb::permission::Rule;
use pb::principal::{Authenticated, Identifier};
use proptest::prelude::*;

use crate::request::{Peer, Request, engine, header, path, permission, principal, rules};

/// A condition, from which both forms of the protobuf are made.
#[derive(Clone, Debug)]
enum Condition<L> {
    Any,
    All(Vec<Condition<L>>),
    OneOf(Vec<Condition<L>>),
    Not(Box<Condition<L>>),
    Leaf(L),
}

#[derive(Clone, Debug)]
enum What {
    Header { name: &'static str, text: Text, invert: bool, missing_is_empty: bool },
    Path(Text),
    Port(u32),
    Ports(i32, i32),
    Destination(Range),
    ServerName(Text),
}

#[derive(Clone, Debug)]
enum Who {
    Header { name: &'static str, text: Text },
    Path(Text),
    Tls(Option<Text>),
    User(Text),
    Source(Range),
    Direct(Range),
    Remote(Range),
}

#[derive(Clone, Debug)]
struct Text {
    pattern: MatchPattern,
    ignore_case: bool,
}

#[derive(Clone, Copy, Debug)]
struct Range(Ipv4Addr, u32);

impl Text {
    fn holds(&self, value: &str) -> bool {
        let fold = |text: &str| if self.ignore_case { text.to_lowercase() } else { text.to_owned() };
        let value = fold(value);
        match &self.pattern {
            MatchPattern::Exact(text) => value == fold(text),
            MatchPattern::Prefix(text) => value.starts_with(&fold(text)),
            MatchPattern::Suffix(text) => value.ends_with(&fold(text)),
            MatchPattern::Contains(text) => value.contains(&fold(text)),
            MatchPattern::SafeRegex(_) | MatchPattern::Custom(_) => unreachable!("not generated"),
        }
    }

    fn proto(&self) -> matcher::StringMatcher {
        matcher::StringMatcher { ignore_case: self.ignore_case, match_pattern: Some(self.pattern.clone()) }
    }
}

impl Range {
    fn holds(self, address: IpAddr) -> bool {
        let IpAddr::V4(address) = address else { return false };
        let mask = u32::MAX.checked_shl(32 - self.1).unwrap_or(0);
        address.to_bits() & mask == self.0.to_bits() & mask
    }

    fn proto(self) -> CidrRange {
        CidrRange { address_prefix: self.0.to_string(), prefix_len: Some(UInt32Value { value: self.1 }) }
    }
}

impl<L> Condition<L> {
    fn holds(&self, leaf: &impl Fn(&L) -> bool) -> bool {
        match self {
            Self::Any => true,
            Self::All(all) => !all.iter().any(|one| !one.holds(leaf)),
            Self::OneOf(any) => any.iter().any(|one| one.holds(leaf)),
            Self::Not(one) => !one.holds(leaf),
            Self::Leaf(one) => leaf(one),
        }
    }
}

fn what(request: &Request, leaf: &What) -> bool {
    match leaf {
        What::Header { name, text, invert, missing_is_empty } => {
            let mut values: Vec<&str> = values(request, name);
            if values.is_empty() && *missing_is_empty {
                values.push("");
            }
            !values.is_empty() && values.iter().any(|value| text.holds(value)) != *invert
        }
        What::Path(text) => text.holds(bare_path(request)),
        What::Port(port) => u32::from(request.destination.port()) == *port,
        What::Ports(start, end) => (*start..*end).contains(&i32::from(request.destination.port())),
        What::Destination(range) => range.holds(request.destination.ip()),
        What::ServerName(text) => text.holds(request.server_name.as_deref().unwrap_or("")),
    }
}

fn who(request: &Request, leaf: &Who) -> bool {
    match leaf {
        Who::Header { name, text } => values(request, name).iter().any(|value| text.holds(value)),
        Who::Path(text) => text.holds(bare_path(request)),
        Who::Tls(None) => request.peer.is_some(),
        Who::Tls(Some(text)) => request.peer.as_ref().is_some_and(|peer| {
            peer.uris.iter().chain(&peer.names).chain([&peer.subject]).any(|name| text.holds(name))
        }),
        Who::User(text) => {
            let [of_stream, of_connection] = &request.users;
            of_stream.as_ref().or(of_connection.as_ref()).is_some_and(|user| text.holds(user))
        }
        Who::Source(range) => range.holds(request.source),
        Who::Direct(range) => range.holds(request.direct),
        Who::Remote(range) => range.holds(request.remote),
    }
}

fn values<'a>(request: &'a Request, name: &str) -> Vec<&'a str> {
    let named = request.headers.iter().filter(|(known, _)| *known == name);
    named.map(|(_, value)| value.as_str()).collect()
}

fn bare_path(request: &Request) -> &str {
    request.path.split(['?', '#']).next().unwrap_or_default()
}

fn to_permission(condition: &Condition<What>) -> pb::Permission {
    let set = |all: &[_]| pb::permission::Set { rules: all.iter().map(to_permission).collect() };
    permission(match condition {
        Condition::Any => Rule::Any(true),
        Condition::All(all) => Rule::AndRules(set(all)),
        Condition::OneOf(any) => Rule::OrRules(set(any)),
        Condition::Not(one) => Rule::NotRule(Box::new(to_permission(one))),
        Condition::Leaf(What::Header { name, text, invert, missing_is_empty }) => {
            let mut header = header(name, text.proto());
            (header.invert_match, header.treat_missing_header_as_empty) = (*invert, *missing_is_empty);
            Rule::Header(header)
        }
        Condition::Leaf(What::Path(text)) => Rule::UrlPath(path(text.proto())),
        Condition::Leaf(What::Port(port)) => Rule::DestinationPort(*port),
        Condition::Leaf(What::Ports(start, end)) => {
            Rule::DestinationPortRange(Int32Range { start: *start, end: *end })
        }
        Condition::Leaf(What::Destination(range)) => Rule::DestinationIp(range.proto()),
        Condition::Leaf(What::ServerName(text)) => Rule::RequestedServerName(text.proto()),
    })
}

#[expect(deprecated, reason = "configurations still use the old specifiers")]
fn to_principal(condition: &Condition<Who>) -> pb::Principal {
    let set = |all: &[_]| pb::principal::Set { ids: all.iter().map(to_principal).collect() };
    principal(match condition {
        Condition::Any => Identifier::Any(true),
        Condition::All(all) => Identifier::AndIds(set(all)),
        Condition::OneOf(any) => Identifier::OrIds(set(any)),
        Condition::Not(one) => Identifier::NotId(Box::new(to_principal(one))),
        Condition::Leaf(Who::Header { name, text }) => Identifier::Header(header(name, text.proto())),
        Condition::Leaf(Who::Path(text)) => Identifier::UrlPath(path(text.proto())),
        Condition::Leaf(Who::Tls(text)) => {
            Identifier::Authenticated(Authenticated { principal_name: text.as_ref().map(Text::proto) })
        }
        Condition::Leaf(Who::User(text)) => {
            let matches = matcher::filter_state_matcher::Matcher::StringMatch(text.proto());
            let user = matcher::FilterStateMatcher { key: "user".into(), matcher: Some(matches) };
            Identifier::FilterState(user)
        }
        Condition::Leaf(Who::Source(range)) => Identifier::SourceIp(range.proto()),
        Condition::Leaf(Who::Direct(range)) => Identifier::DirectRemoteIp(range.proto()),
        Condition::Leaf(Who::Remote(range)) => Identifier::RemoteIp(range.proto()),
    })
}

// Few distinct values everywhere, so that conditions hold, and hold together.

fn text(words: &'static [&'static str]) -> impl Strategy<Value = Text> {
    let pattern = (0..6, prop::sample::select(words)).prop_map(|(kind, word)| match kind {
        0..3 => MatchPattern::Exact(word.into()),
        3 => MatchPattern::Prefix(word.into()),
        4 => MatchPattern::Suffix(word.into()),
        _ => MatchPattern::Contains(word.into()),
    });
    (pattern, prop::bool::weighted(0.3)).prop_map(|(pattern, ignore_case)| Text { pattern, ignore_case })
}

const PATHS: &[&str] = &["/", "/a", "/A", "/a/b", "/a/b/c", "/b"];
const VALUES: &[&str] = &["", "a", "A", "ab", "b", "a,b"];
const NAMES: &[&str] = &["", "spiffe://a", "spiffe://b", "a.test", "CN=a"];
const HEADERS: &[&str] = &["x-a", "x-b"];

fn header_name() -> impl Strategy<Value = &'static str> {
    prop::sample::select(HEADERS)
}

fn address() -> impl Strategy<Value = Ipv4Addr> {
    (0..2u32, 0..3u32).prop_map(|(high, low)| Ipv4Addr::from_bits((10 + high) << 24 | low))
}

fn range() -> impl Strategy<Value = Range> {
    (address(), prop::sample::select(&[0, 7, 8, 31, 32][..])).prop_map(|(address, len)| Range(address, len))
}

fn what_leaf() -> impl Strategy<Value = What> {
    prop_oneof![
        (header_name(), text(VALUES), prop::bool::weighted(0.2), prop::bool::weighted(0.2)).prop_map(
            |(name, text, invert, missing_is_empty)| What::Header { name, text, invert, missing_is_empty }
        ),
        text(PATHS).prop_map(What::Path),
        (80..83u32).prop_map(What::Port),
        (79..82i32, 1..20i32).prop_map(|(start, len)| What::Ports(start, start + len)),
        range().prop_map(What::Destination),
        text(NAMES).prop_map(What::ServerName),
    ]
}

fn who_leaf() -> impl Strategy<Value = Who> {
    prop_oneof![
        (header_name(), text(VALUES)).prop_map(|(name, text)| Who::Header { name, text }),
        text(PATHS).prop_map(Who::Path),
        prop::option::weighted(0.8, text(NAMES)).prop_map(Who::Tls),
        text(VALUES).prop_map(Who::User),
        range().prop_map(Who::Source),
        range().prop_map(Who::Direct),
        range().prop_map(Who::Remote),
    ]
}

fn condition<L: Clone + std::fmt::Debug + 'static>(
    leaf: impl Strategy<Value = L> + 'static,
) -> impl Strategy<Value = Condition<L>> {
    let leaf = prop_oneof![1 => Just(Condition::Any), 8 => leaf.prop_map(Condition::Leaf)];
    leaf.prop_recursive(3, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..3).prop_map(Condition::All),
            prop::collection::vec(inner.clone(), 1..3).prop_map(Condition::OneOf),
            inner.prop_map(|one| Condition::Not(Box::new(one))),
        ]
    })
}

type Policy = (Vec<Condition<What>>, Vec<Condition<Who>>);

fn policy() -> impl Strategy<Value = Policy> {
    (prop::collection::vec(condition(what_leaf()), 1..3), prop::collection::vec(condition(who_leaf()), 1..3))
}

fn request() -> impl Strategy<Value = Request> {
    let headers = prop::collection::vec((header_name(), prop::sample::select(VALUES)), 0..4);
    let names = |count| prop::collection::vec(prop::sample::select(NAMES).prop_map(str::to_owned), count);
    let peer = (names(0..3), names(0..3), prop::sample::select(NAMES))
        .prop_map(|(uris, names, subject)| Peer { uris, names, subject: subject.to_owned() });
    let addresses = (address(), address(), address(), address());
    let place = (prop::sample::select(PATHS), prop::bool::ANY, 80..83u16);
    let name = |names| prop::option::of(prop::sample::select(names).prop_map(str::to_owned));
    let users = [name(VALUES), name(VALUES)];
    (place, headers, addresses, name(NAMES), prop::option::of(peer), users).prop_map(
        |((path, query, port), headers, (to, source, direct, remote), server_name, peer, users)| Request {
            users,
            headers: headers.into_iter().map(|(name, value)| (name, value.to_owned())).collect(),
            destination: (IpAddr::V4(to), port).into(),
            source: source.into(),
            direct: direct.into(),
            remote: remote.into(),
            server_name,
            peer,
            ..Request::get(&if query { format!("{path}?q=/b") } else { path.to_owned() })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn the_engine_agrees_with_trying_policies_one_by_one(
        policies in prop::collection::vec(policy(), 0..24),
        requests in prop::collection::vec(request(), 12),
        action in prop::sample::select(vec![pb::rbac::Action::Allow, pb::rbac::Action::Deny, pb::rbac::Action::Log]),
    ) {
        // Names whose order is not that of the numbers.
        let name = |number: usize| format!("p{}", (number * 7 + 3) % 24);
        let protos = policies.iter().enumerate().map(|(number, (what, who))| (name(number), pb::Policy {
            permissions: what.iter().map(to_permission).collect(),
            principals: who.iter().map(to_principal).collect(),
            ..pb::Policy::default()
        }));
        let engine = engine(&rules(action, protos));
        for request in requests {
            let matches = policies.iter().enumerate().filter(|(_, (what_any, who_any))| {
                what_any.iter().any(|one| one.holds(&|leaf| what(&request, leaf)))
                    && who_any.iter().any(|one| one.holds(&|leaf| who(&request, leaf)))
            });
            let first = matches.map(|(number, _)| name(number)).min();
            let allowed = match action {
                pb::rbac::Action::Allow => first.is_some(),
                pb::rbac::Action::Deny => first.is_none(),
                pb::rbac::Action::Log => true,
            };
            prop_assert_eq!(request.decided(&engine), (allowed, first), "{:?}", request);
        }
    }
}

//! Compiled forms of Envoy's matchers.
//!
//! * [`StringMatcher`], [`Regex`], [`Substitution`]: text;
//! * [`HeaderMatcher`], [`QueryParameterMatcher`], [`CookieMatcher`], [`PathMatcher`], [`UriTemplate`]: parts of a request;
//! * [`SanMatcher`]: names in a certificate;
//! * [`ValueMatcher`], [`MetadataMatcher`], [`FilterStateMatcher`]: metadata and filter state;
//! * [`CidrList`], [`CidrMap`], [`PrefixMap`]: addresses and prefixes, in time that does not grow with the table;
//! * [`Matcher`]: the tree of `xds.type.matcher.v3.Matcher`, generic over its action, with its [`Inputs`].
//!
//! Everything is compiled once from protobuf; matching borrows its input, looks nothing up by configuration name
//! and allocates only where several values of one header must be joined.

#![forbid(unsafe_code)]

mod cidr;
mod cookie;
mod filter_state;
mod header;
mod inputs;
mod messages;
mod metadata;
mod path;
mod prefix_map;
mod query;
mod regex;
mod san;
mod string;
mod tree;
mod uri_template;
mod value;

pub use cidr::{Cidr, CidrList, CidrMap};
pub use cookie::{CookieMatcher, cookie_value};
pub use filter_state::FilterStateMatcher;
pub use header::{HeaderMatcher, all_match};
pub use inputs::{Data, Input, InputScope, Inputs, Text, percent_decode};
pub use metadata::{MetadataMatcher, MetadataPath};
pub use path::{PathMatcher, without_query};
pub use prefix_map::{PrefixMap, Prefixes};
pub use query::{QueryParameterMatcher, query_parameter, query_parameters};
pub use regex::{Regex, Substitution};
pub use san::{SanKind, SanMatcher, dns_name_matches};
pub use string::{Literal, StringMatcher};
pub use tree::{Matcher, TreeContext, Verdict};
pub use uri_template::{UriRewrite, UriTemplate};
pub use value::{DoubleMatcher, ListMatcher, ValueMatcher};

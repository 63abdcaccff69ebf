//! The way from a connection to a filter chain: by the criteria of the chains, or by the matcher of the listener.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::google::protobuf::StringValue;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use prost::Name as _;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::wire::{type_name, unpack};
use waystation_matchers::{InputScope, Inputs, Matcher, TreeContext, Verdict};
use waystation_schema::{At as _, ConfigError};

use super::chain_match::{ChainTable, Facts, segment};

/// Which chain takes a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Selected {
    /// The one with this index.
    Chain(usize),
    /// The default one, if there is one.
    Default,
    /// None, not even the default one.
    Nothing,
}

/// The compiled criteria of all chains of a listener.
#[derive(Debug)]
pub enum ChainSelector {
    /// Each chain says what it matches.
    Criteria(ChainTable),
    /// `filter_chain_matcher`. Its actions name a chain; `None` is a name that no chain has, which closes the connection,
    /// as in Envoy.
    Matcher(Matcher<Option<usize>>),
}

impl ChainSelector {
    /// Compiles what selects among the chains of `proto`.
    pub fn compile(proto: &pb::Listener, runtime: &Runtime) -> Result<Self, ConfigError> {
        let chains = &proto.filter_chains;
        let Some(matcher) = &proto.filter_chain_matcher else {
            return ChainTable::compile(chains).map(Self::Criteria);
        };
        let mut by_name = HashMap::with_capacity(chains.len());
        for (i, chain) in chains.iter().enumerate() {
            let refuse = |reason: String| Err(ConfigError::new(reason).at(segment(chains, i)));
            if chain.name.is_empty() {
                return refuse("\"name\" field is required when using a listener matcher".to_owned());
            }
            if by_name.insert(chain.name.as_str(), i).is_some() {
                return refuse(format!("\"name\" field is duplicated with value '{}'", chain.name));
            }
            if chain.filter_chain_match.is_some() {
                tracing::warn!(
                    target: "config",
                    "listener '{}': the filter_chain_match of chain '{}' is of no effect beside filter_chain_matcher",
                    proto.name, chain.name
                );
            }
        }
        let action = |action: &TypedExtensionConfig| {
            let any = action.typed_config.as_ref();
            let any = any.ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
            if type_name(any) != StringValue::full_name() {
                let reason = format!("unknown action type '{}': only the name of a chain", type_name(any));
                return Err(ConfigError::field("typed_config", reason));
            }
            let StringValue { value } = unpack(any).at(|| "typed_config")?;
            Ok(by_name.get(value.as_str()).copied())
        };
        let cx = TreeContext { scope: InputScope::Network, runtime, action: &action };
        Matcher::compile(matcher, &cx).map(Self::Matcher).at(|| "filter_chain_matcher")
    }

    /// The chain for a connection, of which all is known that is going to be.
    pub fn select(&self, info: &ConnectionInfo) -> Selected {
        match self {
            Self::Criteria(table) => table.find(&Facts::of(info)).map_or(Selected::Default, Selected::Chain),
            Self::Matcher(matcher) => match matcher.evaluate(&Inputs::network(info)) {
                Verdict::Match(Some(index)) => Selected::Chain(*index),
                Verdict::Match(None) => Selected::Nothing,
                Verdict::NoMatch | Verdict::NotYet => Selected::Default,
            },
        }
    }
}

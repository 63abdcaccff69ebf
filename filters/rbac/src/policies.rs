//! Policies in the order of their names, of which the first that matches counts.

use envoy_types::pb::envoy::config::rbac::v3 as pb;
use std::collections::HashMap;
use waystation_filter_api::wire::refuse;
use waystation_matchers::Inputs;
use waystation_schema::{At, ConfigError};

use crate::index::Index;
use crate::rule::{Level, Rule};

/// From so many policies on it pays to look up which of them may match: trying one costs some 35 ns, a look-up as much and
/// what it finds (`benches/policies.rs`).
const INDEXED: usize = 4;

/// The compiled policies.
#[derive(Debug)]
pub(crate) struct Policies {
    policies: Box<[Policy]>,
    index: Option<Index>,
}

#[derive(Debug)]
pub(crate) struct Policy {
    name: Box<str>,
    pub(crate) permission: Rule,
    pub(crate) principal: Rule,
}

impl Policies {
    pub(crate) fn compile(protos: &HashMap<String, pb::Policy>, level: Level) -> Result<Self, ConfigError> {
        let mut protos: Vec<(&String, &pb::Policy)> = protos.iter().collect();
        protos.sort_by_key(|(name, _)| name.as_bytes());
        let compile = |(name, proto): (&String, &pb::Policy)| {
            Policy::compile(name, proto, level).at(|| format!("[{name}]"))
        };
        let policies: Box<[Policy]> = protos.into_iter().map(compile).collect::<Result<_, _>>()?;
        let index = (policies.len() >= INDEXED).then(|| Index::new(&policies));
        Ok(Self { policies, index })
    }

    /// The name of the first policy that matches.
    pub(crate) fn first(&self, inputs: &Inputs<'_>) -> Option<&str> {
        let found = match &self.index {
            Some(index) => index.first(inputs, |policy| self.policies[policy as usize].is_match(inputs))?,
            None => self.policies.iter().position(|policy| policy.is_match(inputs))?,
        };
        Some(&self.policies[found].name)
    }
}

impl Policy {
    fn compile(name: &str, proto: &pb::Policy, level: Level) -> Result<Self, ConfigError> {
        let pb::Policy { permissions, principals, condition, checked_condition, cel_config } = proto;
        for (field, set) in [
            ("condition", condition.is_some()),
            ("checked_condition", checked_condition.is_some()),
            ("cel_config", cel_config.is_some()),
        ] {
            refuse(field, set, "CEL is not implemented")?;
        }
        Ok(Self {
            name: name.into(),
            permission: Rule::permissions(permissions, level)?,
            principal: Rule::principals(principals, level)?,
        })
    }

    fn is_match(&self, inputs: &Inputs<'_>) -> bool {
        self.permission.is_match(inputs) && self.principal.is_match(inputs)
    }
}

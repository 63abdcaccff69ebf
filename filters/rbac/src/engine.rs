//! What decides: policies, or a matcher tree.

use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use envoy_types::pb::xds::r#type::matcher::v3 as xds;
use pb::rbac::Action;
use prost::Name;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::wire::{refuse, type_name, unpack};
use waystation_matchers::{InputScope, Inputs, Matcher, TreeContext};
use waystation_schema::{At, ConfigError};

use crate::policies::Policies;
use crate::rule::Level;

/// Compiled `envoy.config.rbac.v3.RBAC`, or a matcher tree with actions of the type `envoy.config.rbac.v3.Action`.
#[derive(Debug)]
pub struct Engine(Kind);

#[derive(Debug)]
enum Kind {
    Policies { action: Action, policies: Policies },
    Tree { tree: Matcher<Named>, logs: bool },
}

/// An action of a tree.
#[derive(Debug)]
struct Named {
    name: Box<str>,
    action: Action,
}

/// What an engine says of a request or connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Decision<'a> {
    /// Whether it may go on.
    pub allowed: bool,
    /// The policy that matched, or the name of the tree's action.
    pub policy: Option<&'a str>,
    /// With an action `LOG`: whether it is to be logged.
    pub log: Option<bool>,
}

impl Engine {
    /// Compiles policies.
    ///
    /// # Errors
    /// What is wrong with one of them, with its path.
    pub fn compile(proto: &pb::Rbac, level: Level) -> Result<Self, ConfigError> {
        let pb::Rbac { action, policies, audit_logging_options } = proto;
        refuse(
            "audit_logging_options",
            audit_logging_options.is_some(),
            "Envoy does not implement it either",
        )?;
        let action = compile_action(*action)?;
        let policies = Policies::compile(policies, level).at(|| "policies")?;
        Ok(Self(Kind::Policies { action, policies }))
    }

    /// Compiles a matcher tree.
    ///
    /// # Errors
    /// What is wrong with it, with its path.
    pub fn compile_tree(proto: &xds::Matcher, level: Level, runtime: &Runtime) -> Result<Self, ConfigError> {
        let scope = match level {
            Level::Http => InputScope::HttpRbac,
            Level::Network => InputScope::NetworkRbac,
        };
        let tree = Matcher::compile(proto, &TreeContext { scope, runtime, action: &Named::compile })?;
        let mut logs = false;
        tree.visit_actions(&mut |named| logs |= named.action == Action::Log);
        Ok(Self(Kind::Tree { tree, logs }))
    }

    /// Compiles the tree if there is one, otherwise the policies: the former goes over the latter, as in Envoy.
    pub(crate) fn compile_either(
        (rules, rules_field): (Option<&pb::Rbac>, &'static str),
        (matcher, matcher_field): (Option<&xds::Matcher>, &'static str),
        level: Level,
        runtime: &Runtime,
    ) -> Result<Option<Self>, ConfigError> {
        // What is not used must make sense nevertheless: it may be what the author meant.
        let rules = rules.map(|rules| Self::compile(rules, level).at(|| rules_field)).transpose()?;
        let matcher =
            matcher.map(|tree| Self::compile_tree(tree, level, runtime).at(|| matcher_field)).transpose()?;
        Ok(matcher.or(rules))
    }

    /// Decides. What is not known of `inputs` matches nothing.
    pub fn decide(&self, inputs: &Inputs<'_>) -> Decision<'_> {
        match &self.0 {
            Kind::Policies { action, policies } => {
                let name = policies.first(inputs);
                let matched = name.is_some();
                Decision {
                    allowed: match action {
                        Action::Allow => matched,
                        Action::Deny => !matched,
                        Action::Log => true,
                    },
                    policy: name.filter(|name| !name.is_empty()),
                    log: (*action == Action::Log).then_some(matched),
                }
            }
            Kind::Tree { tree, logs } => match tree.evaluate(inputs).action() {
                Some(Named { name, action }) => Decision {
                    allowed: *action != Action::Deny,
                    policy: Some(name),
                    log: logs.then_some(*action == Action::Log),
                },
                None => Decision { allowed: false, policy: None, log: None },
            },
        }
    }
}

impl Named {
    fn compile(proto: &TypedExtensionConfig) -> Result<Self, ConfigError> {
        let any = proto.typed_config.as_ref();
        let any = any.ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
        if type_name(any) != pb::Action::full_name() {
            return Err(unregistered(&proto.name, type_name(any)));
        }
        let pb::Action { name, action } = unpack(any)?;
        Ok(Self { name: name.into(), action: compile_action(action)? })
    }
}

fn compile_action(number: i32) -> Result<Action, ConfigError> {
    Action::try_from(number).map_err(|_| ConfigError::field("action", format!("{number} is not an action")))
}

/// An extension that there is not, in Envoy's words.
pub(crate) fn unregistered(name: &str, type_name: &str) -> ConfigError {
    let reason = format!("Didn't find a registered implementation for '{name}' with type URL: '{type_name}'");
    ConfigError::field("typed_config", reason)
}

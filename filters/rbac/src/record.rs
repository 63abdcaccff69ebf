//! What is told of decisions: counters and dynamic metadata.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use waystation_filter_api::value::{Metadata, Value};
use waystation_stats::{Counter, Scope, stats_group};

use crate::engine::Decision;

stats_group! {
    /// `rbac.<rules_stat_prefix>.`
    pub(crate) struct Enforced {
        counters { allowed, denied }
    }
}

stats_group! {
    /// `rbac.<shadow_rules_stat_prefix>.`
    pub(crate) struct Shadow {
        counters { shadow_allowed, shadow_denied }
    }
}

/// Counters of single policies, each there once its policy has matched, as in Envoy. Routes bring policies that the filter
/// does not know beforehand, so they are found by name; who asks for them with `track_per_rule_stats` pays for that.
#[derive(Debug)]
pub(crate) struct PerPolicy {
    scope: Scope,
    /// What allowed requests and what denied ones are counted under.
    names: [&'static str; 2],
    counters: ArcSwap<HashMap<Box<str>, [Option<Counter>; 2]>>,
}

impl PerPolicy {
    pub(crate) fn new(scope: &Scope, names: [&'static str; 2]) -> Self {
        Self { scope: scope.scope("policy"), names, counters: ArcSwap::default() }
    }

    pub(crate) fn count(&self, decision: &Decision<'_>) {
        let Some(policy) = decision.policy else { return };
        let which = usize::from(!decision.allowed);
        if let Some(Some(counter)) = self.counters.load().get(policy).map(|both| &both[which]) {
            return counter.inc();
        }
        let counter = self.scope.tag("envoy.rbac_policy_name", policy).counter(self.names[which]);
        counter.inc();
        self.counters.rcu(|known| {
            let mut known = HashMap::clone(known);
            known.entry(policy.into()).or_default()[which] = Some(counter.clone());
            known
        });
    }
}

thread_local! {
    /// What is told of allowed requests and of denied ones. Each worker has its own, for the reason below.
    static RESULTS: [Arc<str>; 2] = ["allowed".into(), "denied".into()];
}

/// Keys below the filter's namespace of dynamic metadata.
#[derive(Debug)]
pub(crate) struct Keys {
    policy: Box<str>,
    result: Box<str>,
}

impl Keys {
    pub(crate) fn enforced(prefix: &str) -> Self {
        Self::new(prefix, "enforced")
    }

    pub(crate) fn shadow(prefix: &str) -> Self {
        Self::new(prefix, "shadow")
    }

    fn new(prefix: &str, mode: &str) -> Self {
        Self {
            policy: format!("{prefix}{mode}_effective_policy_id").into(),
            result: format!("{prefix}{mode}_engine_result").into(),
        }
    }

    /// Writes down a decision.
    pub(crate) fn tell(&self, decision: &Decision<'_>, namespace: &str, metadata: &mut Metadata) {
        if let Some(policy) = decision.policy {
            // A copy: all workers would count references to the one name.
            metadata.set(namespace, &self.policy, Value::String(policy.into()));
        }
        let result = RESULTS.with(|results| Arc::clone(&results[usize::from(!decision.allowed)]));
        metadata.set(namespace, &self.result, Value::String(result));
    }
}

/// Writes down whether the access log is to have a line (`access_log_hint`), if a policy says so.
pub(crate) fn hint(decision: &Decision<'_>, metadata: &mut Metadata) {
    if let Some(log) = decision.log {
        metadata.set("envoy.common", "access_log_hint", Value::Bool(log));
    }
}

/// `%RESPONSE_CODE_DETAILS%` and `%CONNECTION_TERMINATION_DETAILS%` of what was denied. White space would break up a log line.
pub(crate) fn details(decision: &Decision<'_>) -> String {
    let mut details = String::from("rbac_access_denied_matched_policy[");
    let name = decision.policy.unwrap_or("none");
    details.extend(name.chars().map(|c| if c.is_ascii_whitespace() || c == '\x0b' { '_' } else { c }));
    details.push(']');
    details
}

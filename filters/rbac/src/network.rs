//! `envoy.filters.network.rbac`: a connection is denied when it says something.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3 as pb;
use pb::rbac::EnforcementType;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::network::{
    CloseKind, Flow, NetworkCx, NetworkFactoryContext, NetworkFilter, NetworkFilterExtension,
    NetworkFilterFactory, Wants,
};
use waystation_filter_api::wire::{self, decode};
use waystation_matchers::Inputs;
use waystation_schema::ConfigError;

use crate::engine::Engine;
use crate::record::{Enforced, Keys, Shadow, details, hint};
use crate::rule::Level;

/// The filter.
pub static EXTENSION: NetworkFilterExtension = NetworkFilterExtension {
    name: "envoy.filters.network.rbac",
    type_name: "envoy.extensions.filters.network.rbac.v3.RBAC",
    compile,
};

const NAMESPACE: &str = "envoy.filters.network.rbac";

#[derive(Debug)]
struct Rules {
    enforced: Option<Engine>,
    shadow: Option<Engine>,
    shadow_keys: Keys,
    enforced_stats: Enforced,
    shadow_stats: Shadow,
    /// Decides whenever something is said, not only the first time.
    continuous: bool,
    /// How long a connection that is denied is kept before it is closed.
    delay: Option<Duration>,
}

/// Its instances refer to the configuration.
#[derive(Debug)]
struct Factory(Arc<Rules>);

struct Filter {
    rules: Arc<Rules>,
    allowed: bool,
}

fn compile(
    wire: &[u8],
    cx: &NetworkFactoryContext<'_>,
) -> Result<Arc<dyn NetworkFilterFactory>, ConfigError> {
    let pb::Rbac {
        rules,
        matcher,
        shadow_rules,
        shadow_matcher,
        shadow_rules_stat_prefix,
        stat_prefix,
        enforcement_type,
        delay_deny,
    } = decode(wire)?;
    let engine = |rules, matcher| Engine::compile_either(rules, matcher, Level::Network, cx.runtime);
    let continuous = match EnforcementType::try_from(enforcement_type) {
        Ok(EnforcementType::OneTimeOnFirstByte) => false,
        Ok(EnforcementType::Continuous) => true,
        Err(_) => {
            return Err(ConfigError::field("enforcement_type", format!("{enforcement_type} is not one")));
        }
    };
    let scope = cx.root.tag("envoy.rbac_prefix", &stat_prefix).scope("rbac");
    Ok(Arc::new(Factory(Arc::new(Rules {
        enforced: engine((rules.as_ref(), "rules"), (matcher.as_ref(), "matcher"))?,
        shadow: engine((shadow_rules.as_ref(), "shadow_rules"), (shadow_matcher.as_ref(), "shadow_matcher"))?,
        shadow_keys: Keys::shadow(&shadow_rules_stat_prefix),
        enforced_stats: scope.group(),
        shadow_stats: scope.scope(&shadow_rules_stat_prefix).group(),
        continuous,
        delay: wire::duration("delay_deny", delay_deny.as_ref())?.filter(|delay| !delay.is_zero()),
    }))))
}

impl Rules {
    fn shadow(&self, connection: &ConnectionInfo) {
        let Some(engine) = &self.shadow else { return };
        let decision = engine.decide(&Inputs::network(connection));
        match decision.allowed {
            true => self.shadow_stats.shadow_allowed().inc(),
            false => self.shadow_stats.shadow_denied().inc(),
        }
        self.shadow_keys.tell(&decision, NAMESPACE, &mut connection.metadata.borrow_mut());
    }

    /// Whether the connection may go on; what logs are to say of it otherwise is set.
    fn enforce(&self, connection: &ConnectionInfo) -> bool {
        let Some(engine) = &self.enforced else { return true };
        let decision = engine.decide(&Inputs::network(connection));
        hint(&decision, &mut connection.metadata.borrow_mut());
        match decision.allowed {
            true => self.enforced_stats.allowed().inc(),
            false => {
                self.enforced_stats.denied().inc();
                *connection.termination_details.borrow_mut() = Some(details(&decision).into());
            }
        }
        decision.allowed
    }
}

impl NetworkFilterFactory for Factory {
    fn wants(&self) -> Wants {
        Wants { data: self.0.enforced.is_some() || self.0.shadow.is_some(), write: false }
    }

    fn create(&self) -> Box<dyn NetworkFilter> {
        Box::new(Filter { rules: Arc::clone(&self.0), allowed: false })
    }
}

impl NetworkFilter for Filter {
    fn on_data(&mut self, cx: &mut NetworkCx<'_>, _data: &mut BytesMut, _end: bool) -> Flow {
        if self.allowed && !self.rules.continuous {
            return Flow::Continue;
        }
        self.rules.shadow(cx.connection);
        self.allowed = self.rules.enforce(cx.connection);
        if self.allowed {
            return Flow::Continue;
        }
        let close = || Flow::close(CloseKind::NoFlush, "rbac_deny_close");
        match self.rules.delay {
            None => close(),
            // Nothing is read meanwhile, so nothing is decided twice.
            Some(delay) => Flow::Wait(Box::pin(async move {
                tokio::time::sleep(delay).await;
                close()
            })),
        }
    }
}

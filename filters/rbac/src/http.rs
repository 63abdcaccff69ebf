//! `envoy.filters.http.rbac`: a request is denied before its route is looked for upstream.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::rbac::v3 as pb;
use waystation_filter_api::http::{
    FactoryContext, FilterConfig, Flow, HttpFilter, HttpFilterExtension, HttpFilterFactory, LocalReply,
    Phases, StreamCx, most_specific,
};
use waystation_filter_api::wire::decode;
use waystation_http::Headers;
use waystation_matchers::Inputs;
use waystation_schema::{At, ConfigError};

use crate::engine::Engine;
use crate::record::{Enforced, Keys, PerPolicy, Shadow, details, hint};
use crate::rule::Level;

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.rbac",
    type_name: "envoy.extensions.filters.http.rbac.v3.RBAC",
    route_type_name: Some("envoy.extensions.filters.http.rbac.v3.RBACPerRoute"),
    compile,
    compile_route,
};

const NAMESPACE: &str = "envoy.filters.http.rbac";

/// What is decided by: the filter's own, or a route's in its place.
#[derive(Debug, Default)]
struct Rules {
    enforced: Option<Engine>,
    shadow: Option<Engine>,
    /// With a prefix of the rules' own.
    enforced_keys: Option<Keys>,
    shadow_keys: Option<Keys>,
    per_policy: bool,
}

#[derive(Debug)]
struct Factory {
    rules: Rules,
    enforced_keys: Keys,
    shadow_keys: Keys,
    // Routes count here, too.
    enforced: Enforced,
    shadow: Shadow,
    enforced_policies: PerPolicy,
    shadow_policies: PerPolicy,
}

struct Filter;

fn compile(wire: &[u8], cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    let proto: pb::Rbac = decode(wire)?;
    let scope = cx.stats.scope("rbac");
    let of = |prefix| scope.tag("envoy.rbac_http_prefix", prefix);
    let (enforced, shadow) = (of(&proto.rules_stat_prefix), of(&proto.shadow_rules_stat_prefix));
    Ok(Arc::new(Factory {
        rules: Rules::compile(&proto, cx)?,
        enforced_keys: Keys::enforced(&proto.rules_stat_prefix),
        shadow_keys: Keys::shadow(&proto.shadow_rules_stat_prefix),
        enforced: enforced.group(),
        shadow: shadow.group(),
        enforced_policies: PerPolicy::new(&enforced, ["allowed", "denied"]),
        shadow_policies: PerPolicy::new(&shadow, ["shadow_allowed", "shadow_denied"]),
    }))
}

fn compile_route(wire: &[u8], cx: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    let pb::RbacPerRoute { rbac } = decode(wire)?;
    // Without one, nothing is decided on the route.
    let rules = rbac.as_ref().map(|rbac| Rules::compile(rbac, cx).at(|| "rbac")).transpose()?;
    Ok(Arc::new(rules.unwrap_or_default()))
}

impl Rules {
    fn compile(proto: &pb::Rbac, cx: &FactoryContext<'_>) -> Result<Self, ConfigError> {
        let pb::Rbac {
            rules,
            rules_stat_prefix,
            matcher,
            shadow_rules,
            shadow_matcher,
            shadow_rules_stat_prefix,
            track_per_rule_stats,
        } = proto;
        let engine = |rules, matcher| Engine::compile_either(rules, matcher, Level::Http, cx.runtime);
        Ok(Self {
            enforced: engine((rules.as_ref(), "rules"), (matcher.as_ref(), "matcher"))?,
            shadow: engine(
                (shadow_rules.as_ref(), "shadow_rules"),
                (shadow_matcher.as_ref(), "shadow_matcher"),
            )?,
            enforced_keys: (!rules_stat_prefix.is_empty()).then(|| Keys::enforced(rules_stat_prefix)),
            shadow_keys: (!shadow_rules_stat_prefix.is_empty())
                .then(|| Keys::shadow(shadow_rules_stat_prefix)),
            per_policy: *track_per_rule_stats,
        })
    }

    fn decides(&self) -> bool {
        self.enforced.is_some() || self.shadow.is_some()
    }
}

impl HttpFilterFactory for Factory {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, ..Phases::default() }
    }

    fn create(&self, route_config: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        let rules = most_specific(route_config).unwrap_or(&self.rules);
        rules.decides().then(|| Box::new(Filter) as _)
    }
}

impl HttpFilter for Filter {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        let factory = cx.config::<Factory>();
        let rules = cx.most_specific::<Rules>().unwrap_or(&factory.rules);
        if let Some(engine) = &rules.shadow {
            let decision = engine.decide(&Inputs::request(cx.info, head));
            match decision.allowed {
                true => factory.shadow.shadow_allowed().inc(),
                false => factory.shadow.shadow_denied().inc(),
            }
            if rules.per_policy {
                factory.shadow_policies.count(&decision);
            }
            let keys = rules.shadow_keys.as_ref().unwrap_or(&factory.shadow_keys);
            keys.tell(&decision, NAMESPACE, &mut cx.info.metadata);
        }
        let Some(engine) = &rules.enforced else { return Flow::Continue };
        let decision = engine.decide(&Inputs::request(cx.info, head));
        match decision.allowed {
            true => factory.enforced.allowed().inc(),
            false => factory.enforced.denied().inc(),
        }
        if rules.per_policy {
            factory.enforced_policies.count(&decision);
        }
        hint(&decision, &mut cx.info.metadata);
        let keys = rules.enforced_keys.as_ref().unwrap_or(&factory.enforced_keys);
        keys.tell(&decision, NAMESPACE, &mut cx.info.metadata);
        if decision.allowed {
            return Flow::Continue;
        }
        Flow::Reply(Box::new(LocalReply::new(403, "RBAC: access denied", details(&decision))))
    }
}

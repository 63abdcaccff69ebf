//! `envoy.filters.http.match_delegate`: a filter with a matcher, which has some streams go past the filter
//! (`ExtensionWithMatcher`), or tells it what to do (composite).
//!
//! The matcher is asked with each head and each trailers until what it looks at is there. Until then the filter sees the
//! stream; from a verdict to skip it on it does not.

use std::any::Any;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::common::matching::v3 as pb;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use envoy_types::pb::xds::r#type::matcher::v3 as xds;
use prost::Message as _;
use waystation_filter_api::http::{
    BodyData, FactoryContext, FilterConfig, Flow, HttpFilter, HttpFilterExtension, HttpFilterFactory,
    LocalReply, Phases, StreamCx,
};
use waystation_filter_api::wire::{decode, type_name, unpack};
use waystation_http::Headers;
use waystation_matchers::{InputScope, Inputs, Matcher, TreeContext, Verdict};
use waystation_schema::{At, ConfigError};

use crate::composite::Execute;

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.match_delegate",
    type_name: "envoy.extensions.common.matching.v3.ExtensionWithMatcher",
    route_type_name: Some("envoy.extensions.common.matching.v3.ExtensionWithMatcherPerRoute"),
    compile,
    compile_route,
};

/// What a matcher may say.
#[derive(Debug)]
pub(crate) enum Action {
    /// `SkipFilter`.
    Skip,
    /// `ExecuteFilterAction`.
    Execute(Execute),
}

/// A matcher of streams.
pub(crate) type Tree = Matcher<Action>;

/// Whose a matcher is: a composite filter may stand in a wrapper, and both may have one of a route's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Of {
    Wrapper,
    Composite,
}

/// A matcher that stands in the filter's own one's place on some routes.
#[derive(Debug)]
struct RouteTree(Of, Tree);

/// A filter and its matcher.
#[derive(Debug)]
pub(crate) struct Delegating {
    of: Of,
    filter: Arc<dyn HttpFilterFactory>,
    /// Without one, and without one of the route's, every stream goes past the filter.
    tree: Option<Tree>,
}

fn compile(wire: &[u8], cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    #[expect(deprecated, reason = "configurations still use the old field")]
    let pb::ExtensionWithMatcher { matcher, xds_matcher, extension_config } = decode(wire)?;
    let config = extension_config.unwrap_or_default();
    let filter = cx.filters.compile(&config.name, config.typed_config.as_ref());
    let tree = match (xds_matcher, matcher) {
        (Some(matcher), _) => Some(compile_tree(&matcher, cx).at(|| "xds_matcher")?),
        // The same message in another package.
        (None, Some(matcher)) => {
            let matcher = decode(&matcher.encode_to_vec()).at(|| "matcher")?;
            Some(compile_tree(&matcher, cx).at(|| "matcher")?)
        }
        (None, None) => None,
    };
    Ok(Arc::new(Delegating { of: Of::Wrapper, filter: filter.at(|| "extension_config")?, tree }))
}

fn compile_route(wire: &[u8], cx: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    let pb::ExtensionWithMatcherPerRoute { xds_matcher } = decode(wire)?;
    let tree = compile_tree(&xds_matcher.unwrap_or_default(), cx).at(|| "xds_matcher")?;
    Ok(route_config(Of::Wrapper, tree))
}

/// The configuration of a route by which this matcher decides there.
pub(crate) fn route_config(of: Of, tree: Tree) -> FilterConfig {
    Arc::new(RouteTree(of, tree))
}

/// Compiles a matcher of streams.
pub(crate) fn compile_tree(proto: &xds::Matcher, cx: &FactoryContext<'_>) -> Result<Tree, ConfigError> {
    let action = |config: &TypedExtensionConfig| {
        let any = config.typed_config.as_ref();
        let any = any.ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
        match type_name(any) {
            "envoy.extensions.filters.common.matcher.action.v3.SkipFilter" => Ok(Action::Skip),
            "envoy.extensions.filters.http.composite.v3.ExecuteFilterAction" => {
                Execute::compile(&unpack(any)?, cx).at(|| "typed_config").map(Action::Execute)
            }
            other => Err(ConfigError::new(format!(
                "Didn't find a registered implementation for '{}' with type URL: '{other}'",
                config.name
            ))),
        }
    };
    Matcher::compile(proto, &TreeContext { scope: InputScope::Http, runtime: cx.runtime, action: &action })
}

impl Delegating {
    pub(crate) fn composite(filter: Arc<dyn HttpFilterFactory>, tree: Option<Tree>) -> Self {
        Self { of: Of::Composite, filter, tree }
    }

    /// The matcher that decides on a route.
    fn tree<'a>(&'a self, route_config: &'a [FilterConfig]) -> Option<&'a Tree> {
        let of_routes = route_config.iter().filter_map(|config| config.downcast_ref::<RouteTree>());
        let mut own = of_routes.filter(|tree| tree.0 == self.of);
        own.next().map(|tree| &tree.1).or(self.tree.as_ref())
    }
}

impl HttpFilterFactory for Delegating {
    fn phases(&self) -> Phases {
        let asked = Phases {
            request_headers: true,
            request_trailers: true,
            response_headers: true,
            response_trailers: true,
            ..Phases::default()
        };
        self.filter.phases().union(asked)
    }

    fn create(&self, route_config: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        let filter = self.filter.create(route_config)?;
        Some(Box::new(Delegate { filter, asked: false, decided: false, skipped: false }))
    }
}

/// A filter on one stream, and what has been decided about it.
struct Delegate {
    filter: Box<dyn HttpFilter>,
    /// With the request head: one that was answered before it came here is not looked at later either, as in Envoy.
    asked: bool,
    decided: bool,
    skipped: bool,
}

/// What of the stream has come with a phase.
#[derive(Clone, Copy, Default)]
struct Seen<'a> {
    request: Option<&'a Headers>,
    request_trailers: Option<&'a Headers>,
    response: Option<&'a Headers>,
    response_trailers: Option<&'a Headers>,
}

impl Delegate {
    fn decide(&mut self, cx: &mut StreamCx<'_>, seen: Seen<'_>) {
        if self.decided {
            return;
        }
        let factory = cx.config::<Delegating>();
        let Some(tree) = factory.tree(cx.route_config) else {
            (self.decided, self.skipped) = (true, true);
            return;
        };
        self.asked |= seen.request.is_some();
        let verdict = tree.evaluate(&Inputs {
            connection: Some(&cx.info.connection),
            stream: Some(cx.info),
            request: seen.request.or(cx.request.as_deref().filter(|_| self.asked)),
            request_trailers: seen.request_trailers,
            response: seen.response.or(cx.response.as_deref()),
            response_trailers: seen.response_trailers,
            local_reply: cx.info.details.as_deref() != Some("via_upstream"),
        });
        self.decided = !matches!(verdict, Verdict::NotYet);
        match verdict.action() {
            Some(Action::Skip) => self.skipped = true,
            Some(Action::Execute(action)) => {
                cx.of(&*factory.filter, &mut self.filter, |filter, cx| filter.on_match(cx, action));
            }
            None => {}
        }
    }

    /// Shows the filter a phase, unless it is skipped.
    fn show(
        &mut self,
        cx: &mut StreamCx<'_>,
        phase: impl FnOnce(&mut dyn HttpFilter, &mut StreamCx<'_>) -> Flow,
    ) -> Flow {
        if self.skipped {
            return Flow::Continue;
        }
        let factory = cx.config::<Delegating>();
        cx.of(&*factory.filter, &mut self.filter, phase)
    }
}

impl HttpFilter for Delegate {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, end: bool) -> Flow {
        self.decide(cx, Seen { request: Some(head), ..Seen::default() });
        self.show(cx, |filter, cx| filter.decode_headers(cx, head, end))
    }

    fn decode_data(&mut self, cx: &mut StreamCx<'_>, data: &mut BodyData, end: bool) -> Flow {
        self.show(cx, |filter, cx| filter.decode_data(cx, data, end))
    }

    fn decode_trailers(&mut self, cx: &mut StreamCx<'_>, trailers: &mut Headers) -> Flow {
        self.decide(cx, Seen { request_trailers: Some(trailers), ..Seen::default() });
        self.show(cx, |filter, cx| filter.decode_trailers(cx, trailers))
    }

    fn encode_informational(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers) {
        self.show(cx, |filter, cx| {
            filter.encode_informational(cx, head);
            Flow::Continue
        });
    }

    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, end: bool) -> Flow {
        self.decide(cx, Seen { response: Some(head), ..Seen::default() });
        self.show(cx, |filter, cx| filter.encode_headers(cx, head, end))
    }

    fn encode_data(&mut self, cx: &mut StreamCx<'_>, data: &mut BodyData, end: bool) -> Flow {
        self.show(cx, |filter, cx| filter.encode_data(cx, data, end))
    }

    fn encode_trailers(&mut self, cx: &mut StreamCx<'_>, trailers: &mut Headers) -> Flow {
        self.decide(cx, Seen { response_trailers: Some(trailers), ..Seen::default() });
        self.show(cx, |filter, cx| filter.encode_trailers(cx, trailers))
    }

    fn on_local_reply(&mut self, cx: &mut StreamCx<'_>, reply: &mut LocalReply) {
        self.show(cx, |filter, cx| {
            filter.on_local_reply(cx, reply);
            Flow::Continue
        });
    }

    /// One around this one has decided.
    fn on_match(&mut self, cx: &mut StreamCx<'_>, action: &dyn Any) {
        let factory = cx.config::<Delegating>();
        cx.of(&*factory.filter, &mut self.filter, |filter, cx| filter.on_match(cx, action));
    }

    /// Also of a filter that is skipped: it may have something to give back.
    fn on_complete(&mut self, cx: &mut StreamCx<'_>) {
        let factory = cx.config::<Delegating>();
        cx.of(&*factory.filter, &mut self.filter, |filter, cx| filter.on_complete(cx));
    }
}

//! `envoy.filters.http.fault`: delays requests, answers them in upstream's place, slows responses down.
//!
//! Whether and how is decided by `Settings`; a stream that is let pass has an instance without state. Only a fault takes
//! memory: the instance that carries it out takes the other's place.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::http::fault::v3::HttpFault;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::http::{
    BodyData, FactoryContext, FilterConfig, Flow, HttpFilter, HttpFilterExtension, HttpFilterFactory,
    LocalReply, Phases, StreamCx, most_specific,
};
use waystation_filter_api::value::Value;
use waystation_filter_api::wire::decode;
use waystation_http::Headers;
use waystation_schema::ConfigError;

use self::active::{Active, Place};
use self::caller::{Caller, Callers};
use self::settings::{Abort, Settings};
use crate::stream_rate_limiter::{FILL_INTERVAL, StreamRateLimiter, let_go};

mod active;
mod caller;
mod settings;

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.fault",
    type_name: "envoy.extensions.filters.http.fault.v3.HTTPFault",
    route_type_name: Some("envoy.extensions.filters.http.fault.v3.HTTPFault"),
    compile,
    compile_route,
};

#[derive(Debug)]
struct Factory {
    settings: Settings,
    active: Arc<Active>,
    callers: Callers,
}

fn compile(wire: &[u8], cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    let scope = cx.stats.scope("fault");
    Ok(Arc::new(Factory {
        settings: Settings::compile(&decode::<HttpFault>(wire)?, cx.runtime)?,
        active: Active::of(&scope, cx.singletons),
        callers: Callers::new(scope, cx.runtime.clone()),
    }))
}

fn compile_route(wire: &[u8], cx: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    Ok(Arc::new(Settings::compile(&decode::<HttpFault>(wire)?, cx.runtime)?))
}

impl HttpFilterFactory for Factory {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, ..Phases::default() }
    }

    fn create(&self, route_config: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        let settings = most_specific(route_config).unwrap_or(&self.settings);
        settings.has_any().then(|| Box::new(Watch) as _)
    }
}

impl Factory {
    /// A place among the active faults, if there is one.
    fn enter(&self, settings: &Settings) -> Option<Place> {
        let place = self.active.enter(settings.max_active());
        if place.is_none() {
            self.active.stats().faults_overflow().inc();
        }
        place
    }

    /// Whether the faults of a request that names its cluster are counted for that cluster, too.
    fn counts_callers(&self, settings: &Settings) -> bool {
        self.settings.counts_callers() && settings.counts_callers()
    }
}

/// Looks at each request head. Takes no memory.
struct Watch;

impl HttpFilter for Watch {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        let factory = cx.config::<Factory>();
        let settings = cx.most_specific().unwrap_or(&factory.settings);
        let cluster = match &cx.info.upstream.cluster {
            Some(cluster) => Some(cluster.name()),
            None => cx.driver.cluster_name(head),
        };
        if !settings.concerns(head, cluster) {
            return Flow::Continue;
        }
        let mut fault = Fault { place: None, caller: factory.callers.of(head), limiter: None };
        if let Some(rate) = settings.response_rate(head, &mut || cx.random())
            && fault.enter(factory, settings)
        {
            fault.limiter = Some(StreamRateLimiter::new(rate, cx.now()));
            factory.active.stats().response_rl_injected().inc();
        }
        let flow = match settings.delay(head, fault.caller.as_deref(), &mut || cx.random()) {
            Some(delay) if fault.enter(factory, settings) => fault.delay(cx, factory, settings, delay),
            _ => fault.abort(cx, factory, settings, head),
        };
        if fault.place.is_some() {
            let response_body = fault.limiter.is_some();
            let phases = Phases { request_headers: true, response_body, complete: true, ..Phases::default() };
            cx.succeed_by(Box::new(fault), phases);
        }
        flow
    }
}

/// The faults of one stream: together they have one place among the active ones.
struct Fault {
    place: Option<Place>,
    caller: Option<Arc<Caller>>,
    limiter: Option<StreamRateLimiter>,
}

impl Fault {
    fn enter(&mut self, factory: &Factory, settings: &Settings) -> bool {
        if self.place.is_none() {
            self.place = factory.enter(settings);
        }
        self.place.is_some()
    }

    fn delay(&self, cx: &mut StreamCx<'_>, factory: &Factory, settings: &Settings, delay: Duration) -> Flow {
        factory.active.stats().delays_injected().inc();
        if let Some(caller) = &self.caller
            && factory.counts_callers(settings)
        {
            caller.count_delay();
        }
        cx.info.flags.set(ResponseFlag::DelayInjected);
        add_metadata(cx, settings);
        let over = cx.driver.sleep(delay);
        Flow::Wait(Box::pin(async {
            over.await;
            Flow::Again
        }))
    }

    fn abort(
        &mut self,
        cx: &mut StreamCx<'_>,
        factory: &Factory,
        settings: &Settings,
        head: &Headers,
    ) -> Flow {
        let abort = settings.abort(head, self.caller.as_deref(), &mut || cx.random());
        let Some(abort) = abort.filter(|_| self.enter(factory, settings)) else { return Flow::Continue };
        factory.active.stats().aborts_injected().inc();
        if let Some(caller) = &self.caller
            && factory.counts_callers(settings)
        {
            caller.count_abort();
        }
        add_metadata(cx, settings);
        let (status, grpc_status) = match abort {
            Abort::Http(status) => (status, None),
            Abort::Grpc(status) => (200, Some(status)),
        };
        let mut reply = LocalReply::new(status, settings.response_body(), "fault_filter_abort");
        (reply.grpc_status, reply.flag) = (grpc_status, Some(ResponseFlag::FaultInjected));
        Flow::Reply(Box::new(reply))
    }
}

impl HttpFilter for Fault {
    /// The delay is over: the head is shown once more.
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        let factory = cx.config::<Factory>();
        let settings = cx.most_specific().unwrap_or(&factory.settings);
        let flow = self.abort(cx, factory, settings, head);
        if matches!(flow, Flow::Continue) && !settings.may_slow_responses() {
            self.place = None;
        }
        flow
    }

    fn encode_data(&mut self, cx: &mut StreamCx<'_>, data: &mut BodyData, _end: bool) -> Flow {
        let Some(limiter) = &mut self.limiter else { return Flow::Continue };
        let allowed = limiter.take(data.as_slice().len(), cx.now());
        let_go(cx, data, allowed, FILL_INTERVAL)
    }

    fn on_complete(&mut self, _cx: &mut StreamCx<'_>) {
        self.place = None;
    }
}

/// `filter_metadata`, below the filter's name. As in Envoy, something is there even if it is empty.
fn add_metadata(cx: &mut StreamCx<'_>, settings: &Settings) {
    let own = cx.info.metadata.filter.entry(cx.name.into());
    let own = own.or_insert_with(|| Value::Struct(Default::default()));
    if let Value::Struct(fields) = own {
        fields.extend(settings.metadata().iter().map(|(key, value)| (Arc::clone(key), value.clone())));
    }
}

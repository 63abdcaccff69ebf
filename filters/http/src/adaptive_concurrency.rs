//! `envoy.filters.http.adaptive_concurrency`: finds out how many requests at a time upstream answers without delay, and lets
//! no more through. One controller for all workers: its limit holds exactly.

use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::extensions::filters::http::adaptive_concurrency::v3 as pb;
use pb::adaptive_concurrency::ConcurrencyControllerConfig;
use waystation_filter_api::http::{
    BodyData, FactoryContext, FilterConfig, Flow, HttpFilter, HttpFilterExtension, HttpFilterFactory,
    LocalReply, Phases, StreamCx,
};
use waystation_filter_api::runtime::RuntimeFlag;
use waystation_filter_api::wire::{self, decode, u32_value};
use waystation_http::Headers;
use waystation_schema::{At as _, ConfigError};

use self::controller::{Controller, MinRtt, Parameters, Place};
use crate::admission_control::flag;

mod controller;
mod latencies;

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.adaptive_concurrency",
    type_name: "envoy.extensions.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency",
    route_type_name: None,
    compile,
    compile_route,
};

#[derive(Debug)]
struct Factory {
    enabled: RuntimeFlag,
    status: u16,
    controller: Arc<Controller>,
}

fn compile(wire: &[u8], cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    let pb::AdaptiveConcurrency {
        concurrency_controller_config,
        enabled,
        concurrency_limit_exceeded_status: status,
    } = decode(wire)?;
    let Some(ConcurrencyControllerConfig::GradientControllerConfig(proto)) = concurrency_controller_config
    else {
        return Err(ConfigError::field("gradient_controller_config", "is required"));
    };
    let parameters = parameters(&proto).at(|| "gradient_controller_config")?;
    let stats = cx.stats.scope("adaptive_concurrency").scope("gradient_controller").group();
    let status = status.and_then(|status| u16::try_from(status.code).ok());
    Ok(Arc::new(Factory {
        enabled: flag(enabled.as_ref(), cx.runtime),
        // What is no error would tell the client that it was served.
        status: status.filter(|status| *status >= 400).unwrap_or(503),
        controller: Arc::new(Controller::new(parameters, stats, Instant::now())),
    }))
}

fn compile_route(_: &[u8], _: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    Err(ConfigError::new("the filter has no configuration on routes"))
}

fn parameters(proto: &pb::GradientControllerConfig) -> Result<Parameters, ConfigError> {
    let limits = proto.concurrency_limit_params.unwrap_or_default();
    let times = proto.min_rtt_calc_params.unwrap_or_default();
    let field = "concurrency_limit_params.concurrency_update_interval";
    let update_interval = wire::positive(field, limits.concurrency_update_interval.as_ref())?
        .ok_or_else(|| ConfigError::field(field, "value is required"))?;
    let interval = wire::duration("min_rtt_calc_params.interval", times.interval.as_ref())?;
    let interval = interval.filter(|interval| !interval.is_zero());
    let fixed = wire::positive("min_rtt_calc_params.fixed_value", times.fixed_value.as_ref())?;
    let percent = |proto: Option<envoy_types::pb::envoy::r#type::v3::Percent>, default: f64| {
        proto.map_or(default, |percent| percent.value) / 100.0
    };
    // The interval goes before the value, as in Envoy.
    let min_rtt = match (interval, fixed) {
        (Some(interval), _) => MinRtt::Sampled {
            interval,
            jitter: percent(times.jitter, 15.0),
            requests: u32_value(times.request_count.as_ref()).unwrap_or(50).into(),
        },
        (None, Some(fixed)) => MinRtt::Fixed(fixed),
        (None, None) => {
            let reason = "adaptive_concurrency: neither `concurrency_update_interval` nor `fixed_value` set";
            return Err(ConfigError::new(reason));
        }
    };
    let first = u32_value(times.min_concurrency.as_ref()).unwrap_or(3);
    Ok(Parameters {
        update_interval,
        min_rtt,
        first_limit: first,
        min_limit: u32_value(limits.min_concurrency_limit.as_ref()).unwrap_or(first),
        max_limit: u32_value(limits.max_concurrency_limit.as_ref()).unwrap_or(1000),
        buffer: percent(times.buffer, 25.0),
        percentile: percent(proto.sample_aggregate_percentile, 50.0),
    })
}

impl HttpFilterFactory for Factory {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, ..Phases::default() }
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(Watch))
    }
}

/// Decides over the request.
struct Watch;

impl HttpFilter for Watch {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, _head: &mut Headers, _end: bool) -> Flow {
        let factory = cx.config::<Factory>();
        if !factory.enabled.get() || cx.info.health_check {
            return Flow::Continue;
        }
        let now = cx.now();
        let Some(place) = Controller::enter(&factory.controller, now, cx.random()) else {
            let reply =
                LocalReply::new(factory.status, "reached concurrency limit", "reached_concurrency_limit");
            return Flow::Reply(Box::new(reply));
        };
        let phases = Phases {
            request_headers: true,
            response_headers: true,
            response_body: true,
            response_trailers: true,
            ..Phases::default()
        };
        cx.succeed_by(Box::new(Timed { place: Some(place), start: now }), phases);
        Flow::Continue
    }
}

/// Holds a place until the response has come to its end, which is how long it took. A stream that ends before that gives the
/// place back and says nothing.
struct Timed {
    place: Option<Place>,
    start: Instant,
}

impl Timed {
    fn ended(&mut self, cx: &StreamCx<'_>) {
        if let Some(place) = self.place.take() {
            let now = cx.now();
            let took: Duration = now.saturating_duration_since(self.start);
            place.served(self.start, took, now, cx.random());
        }
    }
}

impl HttpFilter for Timed {
    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, _head: &mut Headers, end: bool) -> Flow {
        if end {
            self.ended(cx);
        }
        Flow::Continue
    }

    fn encode_data(&mut self, cx: &mut StreamCx<'_>, _data: &mut BodyData, end: bool) -> Flow {
        if end {
            self.ended(cx);
        }
        Flow::Continue
    }

    fn encode_trailers(&mut self, cx: &mut StreamCx<'_>, _trailers: &mut Headers) -> Flow {
        self.ended(cx);
        Flow::Continue
    }
}

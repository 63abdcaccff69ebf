//! `envoy.filters.http.admission_control`: refuses a share of the requests while too few of them succeed.
//!
//! What has become of requests is counted for the whole process, not by worker as in Envoy: the share is right however few
//! connections carry the load.

use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::extensions::filters::http::admission_control::v3 as pb;
use pb::admission_control::EvaluationCriteria;
use waystation_filter_api::http::{
    FactoryContext, FilterConfig, Flow, HttpFilter, HttpFilterExtension, HttpFilterFactory, LocalReply,
    Phases, StreamCx,
};
use waystation_filter_api::runtime::{Runtime, RuntimeDouble, RuntimeFlag, RuntimeInteger};
use waystation_filter_api::wire::{self, decode};
use waystation_http::{Headers, Known};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::stats_group;

use self::criteria::Criteria;
use self::history::History;
use self::rejection::Rejection;

mod criteria;
mod history;
mod rejection;

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.admission_control",
    type_name: "envoy.extensions.filters.http.admission_control.v3.AdmissionControl",
    route_type_name: None,
    compile,
    compile_route,
};

/// `sampling_window` when the configuration does not say.
const WINDOW: Duration = Duration::from_secs(30);

stats_group! {
    /// `http.<stat_prefix>.admission_control.`
    struct Stats {
        counters { rq_failure, rq_rejected, rq_success }
    }
}

#[derive(Debug)]
struct Factory {
    enabled: RuntimeFlag,
    criteria: Criteria,
    history: History,
    /// Percent, as are the other percentages of the configuration.
    sr_threshold: RuntimeDouble,
    aggression: RuntimeDouble,
    max_rejection_probability: RuntimeDouble,
    rps_threshold: RuntimeInteger,
    stats: Stats,
}

fn compile(wire: &[u8], cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    let pb::AdmissionControl {
        enabled,
        evaluation_criteria,
        sampling_window,
        aggression,
        sr_threshold,
        rps_threshold,
        max_rejection_probability,
    } = decode(wire)?;
    let runtime = cx.runtime;
    let Some(EvaluationCriteria::SuccessCriteria(criteria)) = evaluation_criteria else {
        return Err(ConfigError::field("success_criteria", "is required"));
    };
    let percent = |proto: Option<envoy_types::pb::envoy::config::core::v3::RuntimePercent>, default: f64| {
        proto.map_or((String::new(), default), |proto| {
            (proto.runtime_key, proto.default_value.map_or(0.0, |percent| percent.value))
        })
    };
    let (threshold_key, threshold) = percent(sr_threshold, 95.0);
    if threshold < 1.0 {
        return Err(ConfigError::new("Success rate threshold cannot be less than 1.0%."));
    }
    let (max_key, max) = percent(max_rejection_probability, 80.0);
    let aggression =
        aggression.map_or((String::new(), 1.0), |proto| (proto.runtime_key, proto.default_value));
    let rps = rps_threshold.map_or((String::new(), 0), |proto| (proto.runtime_key, proto.default_value));
    let window = wire::duration("sampling_window", sampling_window.as_ref())?.unwrap_or(WINDOW);
    Ok(Arc::new(Factory {
        enabled: flag(enabled.as_ref(), runtime),
        criteria: Criteria::compile(&criteria).at(|| "success_criteria")?,
        history: History::new(window, Instant::now()),
        sr_threshold: runtime.double(&threshold_key, threshold),
        aggression: runtime.double(&aggression.0, aggression.1),
        max_rejection_probability: runtime.double(&max_key, max),
        rps_threshold: runtime.integer(&rps.0, rps.1.into()),
        stats: cx.stats.scope("admission_control").group(),
    }))
}

fn compile_route(_: &[u8], _: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    Err(ConfigError::new("the filter has no configuration on routes"))
}

/// On, unless the configuration or the runtime says otherwise.
pub(crate) fn flag(
    proto: Option<&envoy_types::pb::envoy::config::core::v3::RuntimeFeatureFlag>,
    runtime: &Runtime,
) -> RuntimeFlag {
    match proto {
        None => RuntimeFlag::fixed(true),
        Some(proto) => {
            runtime.flag(&proto.runtime_key, wire::bool_value(proto.default_value.as_ref(), false))
        }
    }
}

impl Factory {
    /// Whether a request is refused now.
    fn rejects(&self, now: Instant, random: impl FnOnce() -> u64) -> bool {
        let least = self.rps_threshold.get();
        if least > 0 && self.history.requests_per_second(now) < least {
            return false;
        }
        let rejection = Rejection {
            threshold: self.sr_threshold.get() / 100.0,
            aggression: self.aggression.get(),
            max: self.max_rejection_probability.get() / 100.0,
        };
        let probability = rejection.probability(self.history.totals(now));
        probability > 0.0 && rejection::is_hit(probability, random())
    }

    fn record(&self, success: bool, now: Instant) {
        self.history.record(success, now);
        match success {
            true => self.stats.rq_success().inc(),
            false => self.stats.rq_failure().inc(),
        }
    }
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
        if factory.rejects(cx.now(), || cx.random()) {
            // It is no failure: that would feed on itself.
            factory.stats.rq_rejected().inc();
            return Flow::Reply(Box::new(LocalReply::new(503, "", "denied_by_admission_control")));
        }
        let phases = Phases {
            request_headers: true,
            response_headers: true,
            response_trailers: true,
            ..Phases::default()
        };
        cx.succeed_by(Box::new(Judge { waits: false }), phases);
        Flow::Continue
    }
}

/// Judges the response. A stream that ends without one says nothing, as in Envoy.
struct Judge {
    /// For the status in the trailers.
    waits: bool,
}

impl HttpFilter for Judge {
    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, end: bool) -> Flow {
        let factory = cx.config::<Factory>();
        let criteria = &factory.criteria;
        let success = match (is_grpc(head, end), end) {
            (true, false) => {
                self.waits = true;
                return Flow::Continue;
            }
            (true, true) => grpc_status(head).is_some_and(|status| criteria.is_grpc_success(status)),
            (false, _) => criteria.is_http_success(head.status().unwrap_or(0)),
        };
        factory.record(success, cx.now());
        Flow::Continue
    }

    fn encode_trailers(&mut self, cx: &mut StreamCx<'_>, trailers: &mut Headers) -> Flow {
        if std::mem::take(&mut self.waits) {
            let factory = cx.config::<Factory>();
            let success =
                grpc_status(trailers).is_some_and(|status| factory.criteria.is_grpc_success(status));
            factory.record(success, cx.now());
        }
        Flow::Continue
    }
}

/// As Envoy tells a gRPC response: one that is only a head by its status, any other by its type.
fn is_grpc(head: &Headers, end: bool) -> bool {
    if end {
        return head.contains(Known::GrpcStatus);
    }
    let grpc = |kind: &[u8]| {
        kind.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest.first(), None | Some(b'+')))
    };
    head.status() == Some(200) && head.get(Known::ContentType).is_some_and(grpc)
}

fn grpc_status(head: &Headers) -> Option<u32> {
    str::from_utf8(head.get(Known::GrpcStatus)?).ok()?.parse().ok()
}

//! `envoy.filters.http.bandwidth_limit`: bodies go no faster than a bucket fills that all streams of a configuration share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::extensions::filters::http::bandwidth_limit::v3 as pb;
use pb::bandwidth_limit::EnableMode;
use waystation_filter_api::http::{
    BodyData, FactoryContext, FilterConfig, Flow, HttpFilter, HttpFilterExtension, HttpFilterFactory, Phases,
    StreamCx, most_specific,
};
use waystation_filter_api::runtime::RuntimeFlag;
use waystation_filter_api::wire::{self, decode};
use waystation_http::Headers;
use waystation_schema::ConfigError;
use waystation_stats::stats_group;

use self::bucket::Bucket;
use crate::admission_control::flag;
use crate::stream_rate_limiter::{FILL_INTERVAL, let_go};

mod bucket;

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.bandwidth_limit",
    type_name: "envoy.extensions.filters.http.bandwidth_limit.v3.BandwidthLimit",
    route_type_name: Some("envoy.extensions.filters.http.bandwidth_limit.v3.BandwidthLimit"),
    compile,
    compile_route,
};

stats_group! {
    /// `<stat_prefix>.http_bandwidth_limit.`
    struct Stats {
        counters {
            request_allowed_total_size, request_enabled, request_enforced, request_incoming_total_size,
            response_allowed_total_size, response_enabled, response_enforced, response_incoming_total_size,
        }
        gauges {
            request_allowed_size, request_incoming_size, request_pending,
            response_allowed_size, response_incoming_size, response_pending,
        }
        histograms {
            request_transfer_duration: Milliseconds,
            response_transfer_duration: Milliseconds,
        }
    }
}

/// A compiled `BandwidthLimit`.
#[derive(Debug)]
struct Settings {
    enabled: RuntimeFlag,
    request: bool,
    response: bool,
    interval: Duration,
    bucket: Bucket,
    stats: Stats,
}

#[derive(Debug)]
struct Factory(Arc<Settings>);

fn compile(wire: &[u8], cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    Ok(Arc::new(Factory(settings(&decode(wire)?, cx)?)))
}

fn compile_route(wire: &[u8], cx: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    let proto: pb::BandwidthLimit = decode(wire)?;
    if proto.limit_kbps.is_none() {
        return Err(ConfigError::new("limit must be set for per route filter config"));
    }
    Ok(settings(&proto, cx)?)
}

fn settings(proto: &pb::BandwidthLimit, cx: &FactoryContext<'_>) -> Result<Arc<Settings>, ConfigError> {
    let limit = proto.limit_kbps.as_ref().map(|limit| limit.value);
    let interval = wire::positive("fill_interval", proto.fill_interval.as_ref())?.unwrap_or(FILL_INTERVAL);
    let mode = proto.enable_mode();
    // Without a limit there is none, whatever the mode.
    let wants = |one: EnableMode| limit.is_some() && (mode == one || mode == EnableMode::RequestAndResponse);
    Ok(Arc::new(Settings {
        enabled: flag(proto.runtime_enabled.as_ref(), cx.runtime),
        request: wants(EnableMode::Request),
        response: wants(EnableMode::Response),
        interval,
        bucket: Bucket::new(limit.unwrap_or_default(), interval, Instant::now()),
        stats: cx.root.scope(&proto.stat_prefix).scope("http_bandwidth_limit").group(),
    }))
}

impl HttpFilterFactory for Factory {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, response_headers: true, ..Phases::default() }
    }

    fn create(&self, route_config: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        let settings = of_route(route_config).unwrap_or(&self.0);
        (settings.request || settings.response).then(|| Box::new(Watch) as _)
    }
}

fn of_route(route_config: &[FilterConfig]) -> Option<&Settings> {
    most_specific(route_config)
}

/// Looks at the heads. Takes no memory.
struct Watch;

impl Watch {
    /// The limit of this stream, if it is in force.
    fn settings<'a>(cx: &StreamCx<'a>) -> Option<&'a Settings> {
        let settings = match cx.most_specific::<Settings>() {
            Some(settings) => settings,
            None => &*cx.config::<Factory>().0,
        };
        settings.enabled.get().then_some(settings)
    }

    fn limits(cx: &mut StreamCx<'_>, settings: &Settings) {
        let phases = Phases {
            request_headers: true,
            request_body: settings.request,
            request_trailers: settings.request,
            response_headers: true,
            response_body: settings.response,
            response_trailers: settings.response,
            complete: true,
        };
        cx.succeed_by(Box::new(Limited::default()), phases);
    }
}

impl HttpFilter for Watch {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, _head: &mut Headers, _end: bool) -> Flow {
        if let Some(settings) = Self::settings(cx)
            && settings.request
        {
            settings.stats.request_enabled().inc();
            Self::limits(cx, settings);
        }
        Flow::Continue
    }

    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, _head: &mut Headers, _end: bool) -> Flow {
        if let Some(settings) = Self::settings(cx)
            && settings.response
        {
            settings.stats.response_enabled().inc();
            Self::limits(cx, settings);
        }
        Flow::Continue
    }
}

/// A stream with a limit in one direction or both.
#[derive(Default)]
struct Limited {
    request: Body,
    response: Body,
}

/// What of a body has come and waits.
#[derive(Default)]
struct Body {
    /// Since its first bytes, until its end.
    since: Option<Instant>,
    held: usize,
}

#[derive(Clone, Copy)]
enum Way {
    Request,
    Response,
}

impl Limited {
    /// The settings, whether they are switched off by now or not: what was begun is ended.
    fn settings<'a>(cx: &StreamCx<'a>) -> &'a Settings {
        match cx.most_specific::<Settings>() {
            Some(settings) => settings,
            None => &cx.config::<Factory>().0,
        }
    }

    fn body(&mut self, way: Way) -> &mut Body {
        match way {
            Way::Request => &mut self.request,
            Way::Response => &mut self.response,
        }
    }

    fn data(&mut self, cx: &mut StreamCx<'_>, data: &mut BodyData, end: bool, way: Way) -> Flow {
        let settings = Self::settings(cx);
        let (stats, now) = (&settings.stats, cx.now());
        let body = self.body(way);
        if body.since.is_none() {
            body.since = Some(now);
            pending(stats, way).inc();
        }
        let wanted = data.as_slice().len();
        // The filter is shown again what it held.
        let fresh = wanted.saturating_sub(body.held) as u64;
        let taken = settings.bucket.take(wanted, now);
        body.held = wanted - taken;
        let enforced = taken < wanted;
        match way {
            Way::Request => {
                if fresh > 0 {
                    stats.request_incoming_size().set(fresh);
                    stats.request_incoming_total_size().add(fresh);
                }
                stats.request_allowed_size().set(taken as u64);
                stats.request_allowed_total_size().add(taken as u64);
                if enforced {
                    stats.request_enforced().inc();
                }
            }
            Way::Response => {
                if fresh > 0 {
                    stats.response_incoming_size().set(fresh);
                    stats.response_incoming_total_size().add(fresh);
                }
                stats.response_allowed_size().set(taken as u64);
                stats.response_allowed_total_size().add(taken as u64);
                if enforced {
                    stats.response_enforced().inc();
                }
            }
        }
        if end && !enforced {
            self.ended(cx, way);
        }
        let_go(cx, data, taken, settings.interval)
    }

    /// The body has passed to its end.
    fn ended(&mut self, cx: &StreamCx<'_>, way: Way) {
        let stats = &Self::settings(cx).stats;
        if let Some(since) = self.body(way).since.take() {
            let took = cx.now().saturating_duration_since(since).as_millis();
            let took = u64::try_from(took).unwrap_or(u64::MAX);
            pending(stats, way).dec();
            match way {
                Way::Request => stats.request_transfer_duration().record(took),
                Way::Response => stats.response_transfer_duration().record(took),
            }
        }
    }
}

fn pending(stats: &Stats, way: Way) -> waystation_stats::GaugeRef<'_> {
    match way {
        Way::Request => stats.request_pending(),
        Way::Response => stats.response_pending(),
    }
}

impl HttpFilter for Limited {
    fn decode_data(&mut self, cx: &mut StreamCx<'_>, data: &mut BodyData, end: bool) -> Flow {
        self.data(cx, data, end, Way::Request)
    }

    fn decode_trailers(&mut self, cx: &mut StreamCx<'_>, _trailers: &mut Headers) -> Flow {
        self.ended(cx, Way::Request);
        Flow::Continue
    }

    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, _head: &mut Headers, _end: bool) -> Flow {
        let settings = Self::settings(cx);
        // Once: this instance may have been made for the response, or for the request alone.
        if settings.response && settings.enabled.get() {
            settings.stats.response_enabled().inc();
        }
        Flow::Continue
    }

    fn encode_data(&mut self, cx: &mut StreamCx<'_>, data: &mut BodyData, end: bool) -> Flow {
        self.data(cx, data, end, Way::Response)
    }

    fn encode_trailers(&mut self, cx: &mut StreamCx<'_>, _trailers: &mut Headers) -> Flow {
        self.ended(cx, Way::Response);
        Flow::Continue
    }

    /// A stream that was cut off does not stay pending.
    fn on_complete(&mut self, cx: &mut StreamCx<'_>) {
        let stats = &Self::settings(cx).stats;
        for way in [Way::Request, Way::Response] {
            if self.body(way).since.take().is_some() {
                pending(stats, way).dec();
            }
        }
    }
}

//! `envoy.filters.http.local_ratelimit`.

mod settings;

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use waystation_filter_api::filter_state::{Object, Sharing};
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::http::{
    FactoryContext, FilterConfig, Flow, HttpFilter, HttpFilterExtension, HttpFilterFactory, LocalReply,
    Phases, StreamCx, most_specific,
};
use waystation_format::{AccessLogType, FormatContext};
use waystation_http::{Headers, Known};
use waystation_schema::ConfigError;

use crate::limiter::{Found, Limit, Limiter};
use settings::Settings;

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.local_ratelimit",
    type_name: TYPE,
    route_type_name: Some(TYPE),
    compile,
    compile_route,
};

const TYPE: &str = "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";

/// Where a connection keeps its own buckets.
const PER_CONNECTION: &str = "per_connection_local_rate_limiter";

/// gRPC's RESOURCE_EXHAUSTED.
const RESOURCE_EXHAUSTED: u32 = 8;

/// A filter's or a route's configuration, with its buckets.
#[derive(Debug)]
struct Factory(Arc<Settings>);

fn compile(wire: &[u8], cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    Ok(Arc::new(Factory(Arc::new(Settings::compile(wire, cx, false)?))))
}

fn compile_route(wire: &[u8], cx: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    Ok(Arc::new(Factory(Arc::new(Settings::compile(wire, cx, true)?))))
}

impl HttpFilterFactory for Factory {
    fn phases(&self) -> Phases {
        // A route may have headers told where the filter does not.
        Phases { request_headers: true, response_headers: true, ..Phases::default() }
    }

    fn create(&self, route_config: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        let Self(settings) = most_specific(route_config).unwrap_or(self);
        Some(if settings.may_tell() { Box::new(Telling(None)) } else { Box::new(Silent) })
    }
}

/// Limits, and says nothing about it to those it lets through.
struct Silent;

/// Tells by `x-ratelimit-*` what is left of this limit.
struct Telling(Option<Arc<Limit>>);

impl HttpFilter for Silent {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        limit(cx, head, &mut None)
    }
}

impl HttpFilter for Telling {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        limit(cx, head, &mut self.0)
    }

    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        if let Self(Some(limit)) = self {
            let (bucket, now) = (&limit.bucket, cx.now());
            let values = [
                (Known::XRatelimitLimit, u64::from(bucket.config().max_tokens)),
                (Known::XRatelimitRemaining, bucket.remaining(now)),
                (Known::XRatelimitReset, seconds(bucket.next_token(now))),
            ];
            for (name, value) in values {
                head.append(name, itoa::Buffer::new().format(value));
            }
        }
        Flow::Continue
    }
}

/// Decides about a request. `told` becomes the limit that its response is to tell of.
fn limit(cx: &mut StreamCx<'_>, head: &mut Headers, told: &mut Option<Arc<Limit>>) -> Flow {
    let own = cx.config::<Factory>();
    let Factory(settings) = cx.most_specific().unwrap_or(own);
    if !settings.enabled.as_ref().is_some_and(|fraction| fraction.contains(cx.random())) {
        return Flow::Continue;
    }
    let stats = &settings.stats;
    stats.enabled().inc();
    let now = cx.now();
    let descriptors = settings.descriptors(head, cx.info, now);
    let share = settings.share.as_ref().map_or(1, |local| local.members().max(1));
    let own_limiter = settings.is_per_connection.then(|| connections_own(cx, settings, now));
    let decision = own_limiter.as_deref().unwrap_or(&settings.limiter).decide(&descriptors, share, now);
    if settings.tells(decision.headers) {
        *told = decision.by.as_ref().map(Found::to_kept);
    }
    if decision.allowed {
        stats.ok().inc();
        return Flow::Continue;
    }
    stats.rate_limited().inc();
    if decision.shadow {
        stats.shadow_mode().inc();
        return Flow::Continue;
    }
    let mut format = FormatContext {
        request: None,
        response: None,
        trailers: None,
        info: cx.info,
        local_reply_body: "",
        log_type: AccessLogType::NotSet,
        now,
    };
    if !settings.enforced.as_ref().is_some_and(|fraction| fraction.contains(cx.random())) {
        settings.request_headers.apply_to_request(head, &format);
        return Flow::Continue;
    }
    stats.enforced().inc();
    let mut reply = LocalReply::new(settings.status, "local_rate_limited", "local_rate_limited");
    format.request = Some(head);
    settings.response_headers.apply_to_response(&mut reply.headers, &format);
    if let Some(limit) = decision.by.filter(|_| settings.retry_after && settings.status == 429)
        && !reply.headers.contains(Known::RetryAfter)
    {
        let wait = seconds(limit.bucket.next_token(now)).max(1);
        reply.headers.append(Known::RetryAfter, itoa::Buffer::new().format(wait));
    }
    reply.flag = Some(ResponseFlag::RateLimited);
    reply.grpc_status = settings.resource_exhausted.then_some(RESOURCE_EXHAUSTED);
    Flow::Reply(Box::new(reply))
}

/// Whole seconds, the begun one counted.
fn seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}

/// The buckets that each configuration has for one connection.
#[derive(Debug, Default)]
struct PerConnection(RefCell<Vec<(Weak<Settings>, Rc<Limiter>)>>);

impl Object for PerConnection {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The connection's own buckets of a configuration, made for its first request.
fn connections_own(cx: &StreamCx<'_>, settings: &Arc<Settings>, now: Instant) -> Rc<Limiter> {
    let mut state = cx.info.connection.filter_state.borrow_mut();
    if state.get(PER_CONNECTION).is_none() {
        state.set(PER_CONNECTION, Rc::new(PerConnection::default()), true, Sharing::None);
    }
    let kept = state.get(PER_CONNECTION).and_then(|object| object.as_any().downcast_ref::<PerConnection>());
    // Another filter's object of this name keeps ours out: then each request has its own, as on connections of their own.
    let Some(PerConnection(limiters)) = kept else { return Rc::new(settings.limits.limiter(now)) };
    of_configuration(&mut limiters.borrow_mut(), settings, || settings.limits.limiter(now))
}

/// What is kept for a configuration, made if need be.
fn of_configuration<C, T>(kept: &mut Vec<(Weak<C>, Rc<T>)>, own: &Arc<C>, make: impl FnOnce() -> T) -> Rc<T> {
    if let Some((_, found)) = kept.iter().find(|(other, _)| other.as_ptr() == Arc::as_ptr(own)) {
        return Rc::clone(found);
    }
    // Connections outlive configurations.
    kept.retain(|(other, _)| other.strong_count() > 0);
    let made = Rc::new(make());
    kept.push((Arc::downgrade(own), Rc::clone(&made)));
    made
}

#[cfg(test)]
mod tests {
    use super::of_configuration;
    use std::rc::Rc;
    use std::sync::Arc;

    #[test]
    fn a_connection_forgets_configurations_that_are_gone() {
        let (mut connections, stays) = ([Vec::new(), Vec::new()], Arc::new(0));
        let first = of_configuration(&mut connections[0], &stays, || "stays");
        for update in 1..10 {
            let replaced = Arc::new(update);
            for kept in &mut connections {
                of_configuration(kept, &replaced, || "goes");
            }
        }
        // The last one goes when the next one comes.
        assert_eq!(connections.each_ref().map(Vec::len), [2, 1]);
        assert!(Rc::ptr_eq(&first, &of_configuration(&mut connections[0], &stays, || unreachable!())));
    }
}

//! `envoy.filters.http.ext_authz`: asks a service, over gRPC or HTTP, whether a request may go on.
//!
//! Whatever is not a clear yes ends the request, unless the configuration lets failures through.

use std::cell::RefCell;
use std::mem;
use std::rc::Rc;
use std::time::Instant;

use bytes::BytesMut;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::grpc;
use waystation_filter_api::http::{
    BodyData, FilterConfig, Flow, Hold, HttpFilter, HttpFilterExtension, HttpFilterFactory, LocalReply,
    Phases, StreamCx,
};
use waystation_filter_api::stream::{ClusterView, StreamInfo};
use waystation_filter_api::value::Value;
use waystation_format::{AccessLogType, FormatContext};
use waystation_http::{Headers, Known};

use self::answer::{Answer, Verdict};
use self::config::{Body, Config, PerRoute, Service};
use self::mutation::{Rejected, ResponseChanges};
use self::stats::{ClusterStats, Outcome};

mod answer;
mod check;
mod config;
mod http_service;
mod mutation;
mod stats;
#[cfg(test)]
mod tests;

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.ext_authz",
    type_name: "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
    route_type_name: Some("envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute"),
    compile: config::compile,
    compile_route: config::compile_route,
};

/// Where dynamic metadata goes.
const NAMESPACE: &str = "envoy.filters.http.ext_authz";

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

/// Tells the service whether it is shown all of a body.
const PARTIAL_BODY: &str = "x-envoy-auth-partial-body";

/// Tells upstream that nobody was asked.
const FAILURE_MODE_ALLOWED: &str = "x-envoy-auth-failure-mode-allowed";

#[derive(Default)]
struct Filter {
    state: State,
    /// What has come of a body that the service is to see.
    body: BytesMut,
    /// How much has come of it.
    received: usize,
    /// Where the call leaves its answer.
    answer: Rc<RefCell<Option<Answer>>>,
    asked: Option<Instant>,
    /// The route's cluster, by which is counted, too.
    cluster: Option<Rc<dyn ClusterView>>,
    response: Option<Box<ResponseChanges>>,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum State {
    #[default]
    New,
    Buffering(Body),
    Asking,
    Done,
}

impl HttpFilterFactory for Config {
    fn phases(&self) -> Phases {
        Phases {
            request_headers: true,
            request_body: true,
            request_trailers: true,
            response_headers: true,
            ..Phases::default()
        }
    }

    fn create(&self, route_config: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        let of_route = waystation_filter_api::http::most_specific::<PerRoute>(route_config);
        let disabled = of_route.is_some_and(|config| config.disabled);
        (!disabled).then(|| Box::new(Filter::default()) as _)
    }
}

impl HttpFilter for Filter {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, end: bool) -> Flow {
        match self.state {
            State::New => {}
            State::Asking => return self.conclude(cx, head),
            State::Buffering(_) | State::Done => return Flow::Continue,
        }
        self.state = State::Done;
        // Nobody is asked for what goes nowhere.
        if cx.info.route.is_none() {
            return Flow::Continue;
        }
        let config: &Config = cx.config();
        if !config.enabled(&cx.info.metadata, cx.random()) {
            config.stats.disabled().inc();
            return match config.deny_at_disable.get() {
                true => refuse(config.status_on_error, "ext_authz_error"),
                false => Flow::Continue,
            };
        }
        let of_route: Option<&PerRoute> = cx.most_specific();
        let body = config.body_for(of_route).filter(|_| !end && !is_upgrade(head));
        if let Some(body) = body {
            self.state = State::Buffering(body);
            if !body.partial {
                cx.set_request_buffer_limit(body.max);
            }
            return Flow::Pause(Hold::Buffer);
        }
        self.ask(cx, head)
    }

    fn decode_data(&mut self, cx: &mut StreamCx<'_>, data: &mut BodyData, end: bool) -> Flow {
        let body = match self.state {
            State::New | State::Done => return Flow::Continue,
            State::Asking => return self.conclude_held(cx),
            State::Buffering(body) => body,
        };
        // All that is held is shown each time.
        let data = data.as_slice();
        let (known, length) = (self.body.len().min(data.len()), data.len());
        self.received = length;
        if length > body.max && !body.partial {
            return Flow::Reply(Box::new(too_large()));
        }
        self.body.extend_from_slice(&data[known..length.min(body.max).max(known)]);
        if end || body.partial && length >= body.max {
            return self.ask_held(cx);
        }
        Flow::Pause(Hold::Buffer)
    }

    fn decode_trailers(&mut self, cx: &mut StreamCx<'_>, _trailers: &mut Headers) -> Flow {
        match self.state {
            State::New | State::Done => Flow::Continue,
            State::Asking => self.conclude_held(cx),
            State::Buffering(_) => self.ask_held(cx),
        }
    }

    fn encode_headers(&mut self, _cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        if let Some(changes) = self.response.take() {
            changes.apply(head);
        }
        Flow::Continue
    }
}

impl Filter {
    /// Asks for a request whose head is held, as is its body.
    fn ask_held(&mut self, cx: &mut StreamCx<'_>) -> Flow {
        let Some(head) = cx.request.take() else { return refuse(403, "ext_authz_error") };
        let flow = self.ask(cx, head);
        cx.request = Some(head);
        flow
    }

    fn conclude_held(&mut self, cx: &mut StreamCx<'_>) -> Flow {
        let Some(head) = cx.request.take() else { return refuse(403, "ext_authz_error") };
        let flow = self.conclude(cx, head);
        cx.request = Some(head);
        flow
    }

    fn ask(&mut self, cx: &mut StreamCx<'_>, head: &Headers) -> Flow {
        let config: &Config = cx.config();
        let of_route: Option<&PerRoute> = cx.most_specific();
        let service = of_route.and_then(|config| config.service.as_ref()).unwrap_or(&config.service);
        let shown = check::Shown { body: &self.body, received: self.received };
        self.state = State::Asking;
        self.asked = Some(cx.now());
        self.cluster = cx.info.upstream.cluster.clone();
        let answer = Rc::clone(&self.answer);
        let clients = cx.driver.clients();
        match service {
            Service::Grpc(service) => {
                let frame = grpc::frame(|out| check::encode(config, cx, head, shown, out));
                let stream = service.call(CHECK, frame, &context(cx.info, cx.now()), clients);
                Flow::Wait(Box::pin(async move {
                    let answered = grpc::unary(stream).await;
                    *answer.borrow_mut() = Some(Answer::of_grpc(answered));
                    Flow::Again
                }))
            }
            Service::Http(service) => {
                let request = service.request(config, head, shown, &context(cx.info, cx.now()));
                let call = service.call(request, &self.body, clients);
                let service = std::sync::Arc::clone(service);
                Flow::Wait(Box::pin(async move {
                    let limit = waystation_filter_api::client::MAX_RESPONSE;
                    let answered = waystation_filter_api::client::gather(call, limit).await;
                    *answer.borrow_mut() = Some(service.answer(answered));
                    Flow::Again
                }))
            }
        }
    }

    /// Does as the service says.
    fn conclude(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers) -> Flow {
        self.state = State::Done;
        let config: &Config = cx.config();
        // A wait always leaves an answer; without one, nobody has allowed anything.
        let mut answer = self.answer.take().unwrap_or_else(|| Answer::failed(None));
        if answer.unknown_action && config.validate_mutations {
            return self.reject(config);
        }
        self.take_metadata(config, cx, &mut answer);
        match answer.verdict {
            Verdict::Allowed => {
                self.allow(config, cx, head, answer).unwrap_or_else(|Rejected| self.reject(config))
            }
            Verdict::Denied(status) => {
                config.stats.denied().inc();
                self.count(config, Outcome::Denied);
                if config.charge_cluster
                    && let Some(cluster) = &self.cluster
                {
                    cluster.count_response(status);
                    self.in_cluster(config, |stats| stats.internal.record(status));
                }
                self.deny(config, status, "ext_authz_denied", &answer)
            }
            Verdict::Failed(status) => {
                config.stats.error().inc();
                self.count(config, Outcome::Error);
                if !config.failure_mode_allow {
                    return self.deny(
                        config,
                        status.unwrap_or(config.status_on_error),
                        "ext_authz_error",
                        &answer,
                    );
                }
                config.stats.failure_mode_allowed().inc();
                self.count(config, Outcome::FailureModeAllowed);
                if config.failure_mode_header {
                    head.append(FAILURE_MODE_ALLOWED, "true");
                }
                Flow::Continue
            }
        }
    }

    fn allow(
        &mut self,
        config: &Config,
        cx: &mut StreamCx<'_>,
        head: &mut Headers,
        answer: Answer,
    ) -> Result<Flow, Rejected> {
        let clear = config.clear_route_cache && answer.changes_request();
        mutation::apply_to_request(config, &answer, head)?;
        let response = ResponseChanges::new(config, answer.response)?;
        mutation::apply_to_query(config, &answer.query, head)?;
        if clear {
            cx.clear_route_cache();
        }
        self.response = response.map(Box::new);
        config.stats.ok().inc();
        self.count(config, Outcome::Ok);
        Ok(Flow::Continue)
    }

    fn take_metadata(&self, config: &Config, cx: &mut StreamCx<'_>, answer: &mut Answer) {
        if answer.metadata.is_empty() {
            return;
        }
        if !config.ingest_metadata {
            config.stats.ignored_dynamic_metadata().inc();
            return;
        }
        if let (Verdict::Allowed, Some(asked)) = (answer.verdict, self.asked) {
            let millis = cx.now().saturating_duration_since(asked).as_millis();
            answer.metadata.insert("ext_authz_duration".into(), Value::Number(millis as f64));
        }
        for (key, value) in mem::take(&mut answer.metadata) {
            cx.info.metadata.set(NAMESPACE, &key, value);
        }
    }

    fn deny(&self, config: &Config, status: u16, details: &'static str, answer: &Answer) -> Flow {
        let Ok(headers) = mutation::of_reply(config, &answer.request) else { return self.reject(config) };
        let body = match config.max_denied_body {
            0 => &answer.body[..],
            max => &answer.body[..answer.body.len().min(max)],
        };
        let mut reply = LocalReply::new(status, String::from_utf8_lossy(body).into_owned(), details);
        reply.flag = Some(ResponseFlag::UnauthorizedExternalService);
        reply.headers = headers;
        Flow::Reply(Box::new(reply))
    }

    /// What the service says can't be done.
    fn reject(&self, config: &Config) -> Flow {
        config.stats.invalid().inc();
        self.count(config, Outcome::Invalid);
        refuse(500, "ext_authz_invalid")
    }

    fn count(&self, config: &Config, outcome: Outcome) {
        self.in_cluster(config, |stats| stats.count(outcome));
    }

    /// Counts in the route's cluster.
    fn in_cluster(&self, config: &Config, count: impl FnOnce(&ClusterStats)) {
        let Some(cluster) = &self.cluster else { return };
        let kept =
            cluster.of_filter(config.id, &|scope| Rc::new(ClusterStats::new(scope, &config.stat_prefix)));
        if let Some(stats) = kept.as_deref().and_then(|kept| kept.downcast_ref::<ClusterStats>()) {
            count(stats);
        }
    }
}

fn refuse(status: u16, details: &'static str) -> Flow {
    let mut reply = LocalReply::new(status, "", details);
    reply.flag = Some(ResponseFlag::UnauthorizedExternalService);
    Flow::Reply(Box::new(reply))
}

/// As the driver has it of what outgrows its buffer.
fn too_large() -> LocalReply {
    let mut reply = LocalReply::new(413, "Payload Too Large", "request_payload_too_large");
    reply.headers.append(Known::Connection, "close");
    reply
}

/// WebSockets, whose payload is no body, are asked for by their heads.
fn is_upgrade(head: &Headers) -> bool {
    let websocket =
        |name| head.get(name).is_some_and(|value: &[u8]| value.eq_ignore_ascii_case(b"websocket"));
    websocket(Known::Upgrade) || head.method() == Some(b"CONNECT") && head.contains(Known::Protocol)
}

fn context(info: &StreamInfo, now: Instant) -> FormatContext<'_> {
    FormatContext {
        request: None,
        response: None,
        trailers: None,
        info,
        local_reply_body: "",
        log_type: AccessLogType::NotSet,
        now,
    }
}

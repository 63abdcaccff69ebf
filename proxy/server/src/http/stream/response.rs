//! The response head on its way downstream.

use waystation_format::AccessLogType;
use waystation_http::{Headers, Known};
use waystation_route::{Route, WeightedCluster};

use super::Stream;
use super::chain::Way;
use super::request::format_context;
use crate::http::config::ServerHeader;
use crate::http::downstream::Downstream;

impl<D: Downstream> Stream<'_, D> {
    /// Applies the route's header mutations to `heads.response`.
    pub(super) fn mutate_response(&mut self, route: &Route, weighted: Option<&WeightedCluster>) {
        for mutations in route.response_mutations(weighted) {
            let cx = format_context(&self.info, Some(&self.heads.request), None);
            mutations.apply_to_response(&mut self.heads.response, &cx);
        }
    }

    /// Applies the route's header mutations to `heads.request`.
    pub(super) fn mutate_request(&mut self, route: &Route, weighted: Option<&WeightedCluster>) {
        for mutations in route.request_mutations(weighted) {
            mutations.apply_to_request(&mut self.heads.request, &format_context(&self.info, None, None));
        }
    }

    /// Queues for the client what has passed the filters.
    pub(super) fn send_encoded(&mut self) {
        if !self.chain.head_passed(Way::Response) || self.response_ended {
            return;
        }
        if !self.response_started && self.send_response_head(self.chain.head_is_all(Way::Response)) {
            // To HEAD, upstream's framing may say that a body follows, which never comes.
            if !self.chain.head_is_all(Way::Response) {
                self.down.send_end(None);
            }
            self.end_response();
            return;
        }
        for data in self.chain.out(Way::Response) {
            self.down.send_data(data);
        }
        if self.chain.passed(Way::Response) {
            self.end_response();
            if !self.chain.head_is_all(Way::Response) {
                let trailers = Some(&self.heads.response_trailers).filter(|_| self.response_has_trailers);
                self.down.send_end(trailers);
            }
        }
    }

    /// The end of the response is queued for the client.
    fn end_response(&mut self) {
        self.response_ended = true;
        self.info.timing.last_downstream_tx = Some(self.timer.now());
    }

    /// Queues the 1xx head in `heads.response`, which counts as a response of its own.
    pub(super) fn send_informational(&mut self) {
        self.encode_informational();
        let status = self.heads.response.status().unwrap_or(100);
        self.cx.hcm.stats.classes.record(status);
        self.cx.hcm.stats.listener_classes.record(status);
        self.down.send_informational(&self.heads.response);
    }

    /// Adds what the connection manager adds to every response, and sends the head. Tells whether the response ends
    /// with it, which HEAD decides too.
    pub(super) fn send_response_head(&mut self, end: bool) -> bool {
        let hcm = &self.cx.hcm;
        let now = self.timer.now();
        let head: &mut Headers = &mut self.heads.response;
        let forced = || self.heads.request.contains(Known::XEnvoyForceTrace);
        if (hcm.request_id.always_in_response || forced())
            && let Some(id) = self.heads.request.get(Known::XRequestId)
        {
            head.set(Known::XRequestId, id);
        }
        if !hcm.trust.via.is_empty() {
            head.append_joined(Known::Via, ", ", hcm.trust.via.as_bytes());
        }
        if !head.contains(Known::Date) {
            self.cx.worker.with_date(now, |date| head.append(Known::Date, date));
        }
        match hcm.server_header {
            ServerHeader::Overwrite => head.set(Known::Server, hcm.server_name.as_bytes()),
            ServerHeader::AppendIfAbsent if !head.contains(Known::Server) => {
                head.append(Known::Server, hcm.server_name.as_bytes());
            }
            ServerHeader::AppendIfAbsent | ServerHeader::PassThrough => {}
        }
        if let Some(proxy_status) = &hcm.proxy_status {
            proxy_status.apply(&self.info, head);
        }
        let status = head.status().unwrap_or(200);
        self.info.response_code = status;
        self.info.timing.first_downstream_tx = Some(now);
        if !self.request_complete {
            hcm.stats.hcm.downstream_rq_response_before_rq_complete().inc();
        }
        let end = end || (self.is_head && !self.facts.tunnel);
        self.response_started = true;
        // From here on only the other timeouts cut it.
        self.deadlines.request = None;
        if let Some(overload) = &hcm.overload
            && !self.down.is_last()
            && overload.ends_connection(|| self.cx.worker.random())
        {
            hcm.stats.hcm.downstream_cx_overload_disable_keepalive().inc();
            hcm.stats.hcm.downstream_cx_drain_close().inc();
            self.down.close_after_response();
        }
        self.down.send_head(&mut self.heads.response, end);
        if hcm.log_on_tunnel && self.is_tunnel_accepted() {
            self.log_midway(AccessLogType::DownstreamTunnelSuccessfullyEstablished);
        }
        end
    }
}

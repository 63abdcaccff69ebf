//! What is checked, cleaned and added on a request head before it is routed: Envoy's connection manager, in its order.

use std::net::SocketAddr;
use std::time::Instant;

use waystation_filter_api::address::Address;
use waystation_filter_api::stream::{Protocol, StreamInfo};
use waystation_format::{AccessLogType, FormatContext};
use waystation_http::{Headers, Known, PathOutcome, normalize_path, sanitize_request};
use waystation_matchers::Inputs;

use super::Stream;
use crate::http::client_cert;
use crate::http::config::StripPort;
use crate::http::downstream::Downstream;
use crate::http::end::StreamEnd;
use crate::http::forwarding::{self, Peer};
use crate::http::request_id;

impl<D: Downstream> Stream<'_, D> {
    /// Runs the rules over the head.
    pub(super) fn prepare_head(&mut self) -> Result<(), StreamEnd> {
        let hcm = &self.cx.hcm;
        for mutations in &hcm.early_mutations {
            mutations.apply_to_request(&mut self.heads.request, &format_context(&self.info, None, None));
        }
        let headers = &mut self.heads.request;
        if self.facts.expect_continue && !hcm.proxy_100_continue {
            headers.remove(Known::Expect);
            if self.facts.protocol != Protocol::Http10 {
                self.heads.response.clear();
                self.heads.response.set_status(100);
                self.send_informational();
                self.heads.response.clear();
            }
        }
        let headers = &mut self.heads.request;
        if headers.authority().is_none() {
            return Err(StreamEnd::MissingHost);
        }
        let connect = headers.method() == Some(b"CONNECT");
        match headers.path() {
            _ if connect && !headers.contains(Known::Protocol) => {}
            None | Some([]) => return Err(StreamEnd::MissingPath),
            Some([b'/', ..]) => {}
            Some(_) => {
                hcm.stats.hcm.downstream_rq_non_relative_path().inc();
                return Err(StreamEnd::AbsolutePathRejected);
            }
        }
        if headers.method() == Some(b"QUERY") && !headers.contains(Known::ContentType) {
            return Err(StreamEnd::QueryWithoutContentType);
        }
        if let Some(path) = headers.path() {
            match normalize_path(path, hcm.paths) {
                PathOutcome::Unchanged => {}
                PathOutcome::Changed(path) => headers.set(Known::Path, path),
                PathOutcome::Redirect(path) => {
                    hcm.stats.hcm.downstream_rq_redirected_with_normalized_path().inc();
                    return Err(StreamEnd::PathRedirect(String::from_utf8_lossy(&path).into()));
                }
                PathOutcome::Reject => {
                    hcm.stats.hcm.downstream_rq_failed_path_normalization().inc();
                    return Err(StreamEnd::PathNormalization);
                }
            }
        }
        if let Some(rewritten) = self.heads.request.authority().and_then(|host| self.strip_host(host)) {
            self.heads.request.set(Known::Authority, rewritten);
        }
        let headers = &mut self.heads.request;
        let upgrade = self.facts.tunnel && headers.contains(Known::Upgrade);
        sanitize_request(headers, upgrade);
        let peer = Peer {
            remote: &self.cx.info.remote_address,
            local: &self.cx.info.local_address,
            local_restored: self.cx.info.local_address_restored,
            node_ip: self.cx.worker.node_ip,
            tls: self.cx.info.tls.is_some(),
        };
        let verdict = forwarding::apply(&hcm.trust, peer, headers).inspect_err(|_| {
            hcm.stats.hcm.downstream_rq_rejected_via_ip_detection().inc();
        })?;
        if let Some(scheme) = hcm.scheme {
            headers.set(Known::XForwardedProto, scheme);
            headers.set(Known::Scheme, scheme);
        }
        if let Some(remote) = verdict.remote {
            // An address that came in a header has no port; Envoy shows 0, and so do we.
            self.info.remote_address = match remote {
                Address::Ip(address) => Address::Ip(SocketAddr::new(address.ip(), address.port())),
                other => other,
            };
        }
        self.info.internal = verdict.internal;
        if hcm.request_id.generate {
            let fresh = verdict.edge && !hcm.request_id.preserve_external;
            if fresh || !headers.contains(Known::XRequestId) {
                let id = self.cx.worker.with_random(request_id::generate);
                headers.set(Known::XRequestId, id);
            }
        }
        if let Some(stable) = headers.get(Known::XRequestId).and_then(request_id::stable_random) {
            self.random = stable;
        }
        let chosen = hcm.forward_cert_matcher.as_ref();
        let chosen = chosen.and_then(|tree| tree.evaluate(&Inputs::request(&self.info, headers)).action());
        let (forward, details) = *chosen.unwrap_or(&hcm.forward_cert);
        client_cert::apply(forward, details, self.cx.info.tls.as_deref(), headers);
        Ok(())
    }

    /// `strip_*_host_port` and `strip_trailing_host_dot`.
    fn strip_host(&self, host: &[u8]) -> Option<Vec<u8>> {
        let hcm = &self.cx.hcm;
        if hcm.strip_port == StripPort::Never && !hcm.strip_dot {
            return None;
        }
        let colon = memchr::memrchr(b':', host).filter(|colon| {
            host[colon + 1..].iter().all(u8::is_ascii_digit)
                && memchr::memrchr(b']', host).is_none_or(|bracket| bracket < *colon)
        });
        let (mut name, mut port) = colon.map_or((host, &[][..]), |colon| host.split_at(colon));
        if hcm.strip_dot {
            name = name.strip_suffix(b".").unwrap_or(name);
        }
        let strip = match hcm.strip_port {
            StripPort::Never => false,
            StripPort::Any => true,
            StripPort::Matching => {
                let local = self.cx.info.local_address.ip().map(|address| address.port());
                let stated =
                    str::from_utf8(port.get(1..).unwrap_or_default()).ok().and_then(|p| p.parse().ok());
                local.is_some() && local == stated
            }
        };
        if strip {
            port = &[];
        }
        let stripped = [name, port].concat();
        (stripped != host).then_some(stripped)
    }

    /// Whether an upgrade is allowed, by the route or else by the connection manager.
    pub(super) fn check_upgrade(&mut self) -> Result<(), StreamEnd> {
        if !self.facts.tunnel {
            return Ok(());
        }
        let headers = &self.heads.request;
        let connect = headers.method() == Some(b"CONNECT") && !headers.contains(Known::Protocol);
        let protocol = match headers.get(Known::Upgrade).or_else(|| headers.get(Known::Protocol)) {
            Some(protocol) if !connect => protocol.to_ascii_lowercase(),
            _ => b"connect".to_vec(),
        };
        let of_manager = || {
            let found = self.cx.hcm.upgrades.iter().find(|(name, _)| name.as_bytes() == protocol);
            found.is_some_and(|(_, enabled)| *enabled)
        };
        let route = self.table.as_ref().and_then(|(table, index)| table.held.route(*index));
        let of_route = match route.map(|route| &route.action) {
            Some(waystation_route::Action::Route(action)) => action.upgrade(&protocol),
            Some(_) => None,
            // A filter may fetch a route, which is then asked as well.
            None if of_manager() => return Ok(()),
            // A CONNECT that no route takes is not found rather than forbidden.
            None => return Err(self.no_route()),
        };
        let allowed = of_route.map_or_else(of_manager, |config| config.enabled);
        if allowed {
            return Ok(());
        }
        self.cx.hcm.stats.hcm.downstream_rq_ws_on_non_ws_route().inc();
        Err(StreamEnd::UpgradeFailed)
    }
}

/// What header mutations read.
pub(super) fn format_context<'a>(
    info: &'a StreamInfo,
    request: Option<&'a Headers>,
    response: Option<&'a Headers>,
) -> FormatContext<'a> {
    FormatContext {
        request,
        response,
        trailers: None,
        info,
        local_reply_body: "",
        log_type: AccessLogType::NotSet,
        now: Instant::now(),
    }
}

/// Whether local replies must speak gRPC: `application/grpc`, alone or followed by `+` and a format.
pub(in crate::http) fn is_grpc(headers: &Headers) -> bool {
    let content_type = headers.get(Known::ContentType).unwrap_or_default();
    content_type.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest, [] | [b'+', ..]))
}

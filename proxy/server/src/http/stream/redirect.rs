//! Internal redirects: a redirect of upstream that is followed here instead of being passed on.

use waystation_filter_api::flags::ResponseFlags;
use waystation_filter_api::stream::{Timing, UpstreamInfo};
use waystation_format::AccessLogType;
use waystation_http::{Headers, Known};
use waystation_route::{InternalRedirectPolicy, RedirectPredicate};

use super::{Deadlines, Stream};
use crate::http::downstream::Downstream;

/// Where a `location` leads.
#[derive(Debug, PartialEq)]
struct Target<'a> {
    scheme: &'a str,
    authority: &'a str,
    /// Path and query.
    path: &'a str,
}

impl<D: Downstream> Stream<'_, D> {
    /// Turns the request into the one that the response in `heads.response` points to, and selects its route. `false`
    /// leaves everything as it was but the deadlines, which Envoy, too, takes from a route that it looked at in vain, and
    /// the response is passed on.
    pub(super) fn follow_redirect(&mut self, policy: &InternalRedirectPolicy, status: u16) -> bool {
        let stats = &self.cx.hcm.stats.router;
        let current_scheme = self.heads.request.scheme().unwrap_or(b"http").to_vec();
        let current_scheme = String::from_utf8_lossy(&current_scheme).into_owned();
        let current_host = self.heads.request.authority().unwrap_or_default().to_vec();
        let current_host = String::from_utf8_lossy(&current_host).into_owned();
        let Some(location) = self.heads.response.get(Known::Location) else { return false };
        let location = String::from_utf8_lossy(location).into_owned();
        let Some(target) = parse(&location) else {
            stats.passthrough_internal_redirect_bad_location().inc();
            return false;
        };
        let crosses = target.scheme != current_scheme;
        if crosses && !policy.allow_cross_scheme {
            stats.passthrough_internal_redirect_unsafe_scheme().inc();
            return false;
        }
        if self.redirects >= policy.max_redirects {
            stats.passthrough_internal_redirect_too_many_redirects().inc();
            return false;
        }
        let before = self.heads.request.clone();
        let previous_route = self.table.clone();
        let original =
            [current_scheme.as_bytes(), b"://", current_host.as_bytes(), before.path().unwrap_or_default()];
        let headers: &mut Headers = &mut self.heads.request;
        headers.set(Known::Scheme, target.scheme);
        headers.set(Known::Authority, target.authority);
        headers.set(Known::Path, target.path);
        for name in policy.headers_to_copy.iter() {
            headers.remove(name);
            for value in self.heads.response.get_all(name) {
                headers.append(name, value);
            }
        }
        headers.set(Known::XEnvoyOriginalUrl, original.concat());
        // RFC 9110 section 15.4.4: 303 is fetched with GET, without the body.
        let method = headers.method().unwrap_or_default();
        let becomes_get = status == 303 && method != b"GET" && method != b"HEAD";
        if becomes_get {
            headers.set(Known::Method, "GET");
            headers.remove(Known::ContentLength);
        }
        let found = self.select_route().is_ok() && self.table.is_some();
        // The log names the route that the request would have, whether it gets it or not.
        self.info.upstream.cluster = None;
        self.note_cluster();
        let safe = !(crosses && target.scheme == "https");
        if found && self.redirect_allowed(policy, safe) {
            if becomes_get {
                self.heads.kept.clear();
                self.kept_bytes = 0;
                self.request_has_trailers = false;
            }
            self.log_redirected(status);
            // As if the client had sent it now; what was read of the request counts again for what it has become.
            self.deadlines = Deadlines::new(&self.cx.hcm, self.info.start);
            self.last_activity = self.info.start;
            self.limit_duration();
            self.resent += self.kept_bytes as u64;
            self.redirected_from.extend(previous_route.as_ref().map(|(_, index)| *index));
            self.redirects += 1;
            self.interim = false;
            return true;
        }
        if found {
            stats.passthrough_internal_redirect_predicate().inc();
        } else {
            stats.passthrough_internal_redirect_no_route().inc();
        }
        self.heads.request = before;
        self.table = previous_route;
        false
    }

    /// To the access log the request that was redirected and the one it became are two, as Envoy recreates the stream: with
    /// the head that it has made of the first.
    fn log_redirected(&mut self, status: u16) {
        let now = self.timer.now();
        self.info.response_code = status;
        self.info.details = Some("internal_redirect".into());
        self.info.timing.complete = Some(now);
        self.info.bytes = self.bytes();
        self.log(AccessLogType::DownstreamEnd, now);
        let info = &mut self.info;
        info.start = now;
        info.start_time = self.cx.worker.wall_clock(now);
        info.timing = Timing { last_downstream_rx: Some(now), ..Timing::default() };
        info.upstream = UpstreamInfo::default();
        info.flags = ResponseFlags::default();
        info.response_code = 0;
        info.details = None;
    }

    fn redirect_allowed(&self, policy: &InternalRedirectPolicy, safe: bool) -> bool {
        let Some((table, index)) = &self.table else { return false };
        policy.predicates.iter().all(|predicate| match predicate {
            RedirectPredicate::PreviousRoutes => !self.redirected_from.contains(index),
            RedirectPredicate::AllowListedRoutes(names) => {
                let name = table.held.route(*index).map_or("", |route| &*route.name);
                names.iter().any(|allowed| &**allowed == name)
            }
            RedirectPredicate::SafeCrossScheme => safe,
            // Nothing sets such an object in this version.
            RedirectPredicate::FilterState { if_absent, .. } => *if_absent,
        })
    }
}

/// Where a `location` leads. As in Envoy it must be absolute: a relative one is the client's to resolve.
fn parse(location: &str) -> Option<Target<'_>> {
    let location = location.split('#').next().unwrap_or_default();
    let (scheme, rest) = location.split_once("://")?;
    if !matches!(scheme, "http" | "https") {
        return None;
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    if authority.is_empty() || path.starts_with('?') {
        return None;
    }
    Some(Target { scheme, authority, path: if path.is_empty() { "/" } else { path } })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn locations() {
        let rows = [
            ("https://b/x?y#z", Some(("https", "b", "/x?y"))),
            ("/x?y", None),
            ("//b/x", None),
            ("https://b:8443/p", Some(("https", "b:8443", "/p"))),
            ("http://b", Some(("http", "b", "/"))),
            ("http://me:secret@b/x", Some(("http", "b", "/x"))),
            ("ftp://b/", None),
            ("x", None),
            ("", None),
        ];
        for (location, expected) in rows {
            let found = parse(location).map(|target| (target.scheme, target.authority, target.path));
            assert_eq!(found, expected, "{location}");
        }
    }
}

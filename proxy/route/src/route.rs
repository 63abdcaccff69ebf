//! One route.

use std::time::Instant;

use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::value::Metadata;
use waystation_filter_api::wire::refuse;
use waystation_format::HeaderMutations;
use waystation_http::Headers;
use waystation_matchers::without_query;
use waystation_schema::{At, ConfigError};

use waystation_http::Known;

use crate::action::Action;
use crate::cluster::WeightedCluster;
use crate::filter_config::{FilterConfigs, FilterLevels, FilterSlot};
use crate::matching::RouteMatch;
use crate::mutations::Mutations;
use crate::rewrite::{HostRewrite, RequestFacts, update_authority};
use crate::stats::RequestCounters;
use crate::table::Compiler;
use crate::virtual_host::Defaults;

/// Compiled `Route`.
#[derive(Debug)]
pub struct Route {
    pub(crate) matcher: RouteMatch,
    /// What to do.
    pub action: Action,
    /// `name`, empty when unset.
    pub name: Box<str>,
    /// `metadata`.
    pub metadata: Option<Box<Metadata>>,
    /// What `stat_prefix` has it count.
    pub counters: Option<Box<RequestCounters>>,
    /// How much of a request body may be buffered for retries and mirrors: the route's, else the virtual host's.
    pub request_body_buffer_limit: Option<u64>,
    /// Mutations of the levels above, in order; this route's own stand before or after them.
    request_mutations: [Mutations; 3],
    response_mutations: [Mutations; 3],
    most_specific_wins: bool,
    filters: FilterConfigs,
}

impl Route {
    pub(crate) fn compile(
        proto: &pb::Route,
        defaults: &Defaults,
        compiler: &mut Compiler<'_>,
    ) -> Result<Self, ConfigError> {
        #[expect(deprecated, reason = "the old name of the buffer limit still counts")]
        let pb::Route {
            name,
            r#match,
            metadata,
            // Names spans only, and there are none.
            decorator: _,
            typed_per_filter_config,
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
            // Chooses what is traced, and nothing is.
            tracing: _,
            per_request_buffer_limit_bytes,
            stat_prefix,
            request_body_buffer_limit,
            route_specifiers,
            action,
        } = proto;
        refuse("route_specifiers", !route_specifiers.is_empty(), "route specifiers")?;
        let matcher = r#match.as_ref().ok_or_else(|| ConfigError::field("match", "is required"))?;
        let matcher = RouteMatch::compile(matcher, compiler.cx).at(|| "match")?;
        let filters = compiler.filters.level(&defaults.filters, typed_per_filter_config, compiler.cx)?;
        let own = Mutations::compile(request_headers_to_add, request_headers_to_remove, "request")?;
        let [vhost, table] = defaults.request_mutations.clone();
        let request_mutations = [own, vhost, table];
        let own = Mutations::compile(response_headers_to_add, response_headers_to_remove, "response")?;
        let [vhost, table] = defaults.response_mutations.clone();
        let limit = request_body_buffer_limit
            .map(|limit| limit.value)
            .or(per_request_buffer_limit_bytes.map(|limit| u64::from(limit.value)));
        Ok(Self {
            action: Action::compile(action.as_ref(), &matcher.path, &filters, defaults, compiler)?,
            matcher,
            name: name.as_str().into(),
            metadata: metadata.as_ref().map(|metadata| Box::new(Metadata::from_proto(metadata))),
            counters: (!stat_prefix.is_empty())
                .then(|| RequestCounters::of_route(&compiler.cx.stats, &defaults.host, stat_prefix)),
            request_body_buffer_limit: limit.or(defaults.request_body_buffer_limit),
            request_mutations,
            response_mutations: [own, vhost, table],
            most_specific_wins: defaults.most_specific_wins,
            filters,
        })
    }

    /// Request header mutations in the order in which they apply: from the weighted cluster to the table, so that
    /// the table has the last word, or the other way round with `most_specific_header_mutations_wins`.
    pub fn request_mutations<'a>(
        &'a self,
        weighted: Option<&'a WeightedCluster>,
    ) -> impl Iterator<Item = &'a HeaderMutations> {
        self.ordered(weighted.map(|weighted| &weighted.request_mutations), &self.request_mutations)
    }

    /// Response header mutations likewise.
    pub fn response_mutations<'a>(
        &'a self,
        weighted: Option<&'a WeightedCluster>,
    ) -> impl Iterator<Item = &'a HeaderMutations> {
        self.ordered(weighted.map(|weighted| &weighted.response_mutations), &self.response_mutations)
    }

    fn ordered<'a>(
        &'a self,
        weighted: Option<&'a Mutations>,
        levels: &'a [Mutations; 3],
    ) -> impl Iterator<Item = &'a HeaderMutations> {
        let [route, vhost, table] = levels;
        let mut ordered = [weighted, Some(route), Some(vhost), Some(table)];
        if self.most_specific_wins {
            ordered.reverse();
        }
        ordered.into_iter().flatten().filter_map(Mutations::get)
    }

    /// What all levels say about a filter. With a weighted cluster, its level comes first.
    pub fn filter_config<'a>(
        &'a self,
        weighted: Option<&'a WeightedCluster>,
        slot: FilterSlot,
    ) -> FilterLevels<'a> {
        match weighted {
            Some(weighted) => weighted.filter_config(slot),
            None => self.filters.get(slot),
        }
    }

    /// Rewrites host and path of a request that goes upstream, in that order, and leaves the originals in
    /// `x-envoy-original-host` and `x-envoy-original-path` if `keep_originals`. Comes after the header mutations.
    /// `auto_host_rewrite` is left to [`rewrite_host_to_upstream`](Self::rewrite_host_to_upstream).
    pub fn rewrite(
        &self,
        headers: &mut Headers,
        weighted: Option<&WeightedCluster>,
        info: &StreamInfo,
        now: Instant,
        keep_originals: bool,
    ) {
        let Action::Route(action) = &self.action else { return };
        let facts = RequestFacts { info, now };
        // The weighted cluster's rewrite comes first, so a rewrite of the route overrides it.
        if let Some(host) = weighted.and_then(|weighted| weighted.host_rewrite.as_deref()) {
            update_authority(headers, host.as_bytes(), action.append_x_forwarded_host, false);
        }
        let host = action.host_rewrite.as_ref().and_then(|rewrite| rewrite.apply(headers, facts));
        if let Some(host) = host.map(|host| host.into_owned()) {
            update_authority(headers, &host, action.append_x_forwarded_host, keep_originals);
        }
        let path = action
            .path_rewrite
            .as_ref()
            .and_then(|rewrite| rewrite.apply(headers, &self.matcher.path, facts));
        if let Some(path) = path {
            if keep_originals {
                let original = headers.path().unwrap_or_default().to_vec();
                headers.set(Known::XEnvoyOriginalPath, &original);
            }
            headers.set(Known::Path, &path);
        }
    }

    /// `auto_host_rewrite`: the host becomes the upstream host's name once that is known. Does nothing on other
    /// routes and for hosts without a name.
    pub fn rewrite_host_to_upstream(&self, headers: &mut Headers, hostname: &str, keep_original: bool) {
        if let Action::Route(action) = &self.action
            && matches!(action.host_rewrite, Some(HostRewrite::Auto))
            && !hostname.is_empty()
        {
            update_authority(headers, hostname.as_bytes(), action.append_x_forwarded_host, keep_original);
        }
    }

    /// Status and `location`, when this route redirects.
    pub fn redirect(&self, headers: &Headers, info: &StreamInfo, now: Instant) -> Option<(u16, Vec<u8>)> {
        let Action::Redirect(redirect) = &self.action else { return None };
        Some((redirect.status, redirect.location(headers, info, now, &self.matcher.path)))
    }

    /// The path that requests are matched with: the target without its query, and without `;parameters` when the
    /// table ignores those.
    pub(crate) fn matched_path(target: &[u8], ignore_parameters: bool) -> &[u8] {
        let path = without_query(target);
        match memchr::memchr(b';', path) {
            Some(at) if ignore_parameters => &path[..at],
            _ => path,
        }
    }
}

//! `/stats`, `/stats/prometheus` and `/stats/recentlookups`.

use std::iter;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use hyper::{Response, StatusCode};
use waystation_stats::render::{Format, Query as StatsQuery, Renderer};

use super::body::{Body, long};
use super::{Admin, Query, ok, page, respond, text};

/// A scrape: indexed, rendered and written by a renderer, 64 KiB at a time.
pub(super) fn stats(admin: &Admin, query: &Query, prometheus: bool) -> Response<Body> {
    let parsed = if prometheus {
        StatsQuery::parse_prometheus(query.pairs())
    } else {
        StatsQuery::parse(query.pairs())
    };
    let StatsQuery { format, options } = match parsed {
        Ok(parsed) => parsed,
        Err(reason) => return text(StatusCode::BAD_REQUEST, reason),
    };
    let store = admin.shared.stats.clone();
    let rendered = iter::once_with(move || Renderer::new(&store, format, options)).flatten();
    let body = match format {
        Format::Text | Format::Json | Format::Prometheus => long(rendered),
        Format::Html | Format::ActiveHtml => {
            let head = page::stats_head(query.pairs(), format == Format::ActiveHtml);
            let rendered = rendered.map(|piece| page::escaped(&piece));
            long(iter::once(Bytes::from(head)).chain(rendered).chain([Bytes::from_static(page::STATS_TAIL)]))
        }
    };
    respond(StatusCode::OK, format.content_type(), body)
}

pub(super) fn recent_lookups(admin: &Admin) -> Response<Body> {
    let table = if admin.tracks_lookups.load(Ordering::Relaxed) {
        "   Count Lookup\n"
    } else {
        "Lookup tracking is not enabled. Use /stats/recentlookups/enable to enable.\n"
    };
    text(StatusCode::OK, format!("{table}\ntotal: 0\n"))
}

pub(super) fn track_lookups(admin: &Admin, enable: bool) -> Response<Body> {
    admin.tracks_lookups.store(enable, Ordering::Relaxed);
    ok()
}

//! The list of endpoints: `/help`, the page at `/`, and which of them need POST.

use std::fmt::Write as _;

/// One endpoint.
pub(super) struct Endpoint {
    pub(super) path: &'static str,
    /// It changes something: GET is refused.
    pub(super) post: bool,
    pub(super) help: &'static str,
    pub(super) parameters: &'static [(&'static str, &'static str)],
}

const fn get(path: &'static str, help: &'static str) -> Endpoint {
    Endpoint { path, post: false, help, parameters: &[] }
}

const fn post(path: &'static str, help: &'static str) -> Endpoint {
    Endpoint { path, post: true, help, parameters: &[] }
}

impl Endpoint {
    const fn with(self, parameters: &'static [(&'static str, &'static str)]) -> Self {
        Self { parameters, ..self }
    }
}

/// Sorted by path.
pub(super) const ENDPOINTS: &[Endpoint] = &[
    get("/", "Admin home page"),
    get("/certs", "print certs on machine"),
    get("/clusters", "upstream cluster status").with(&[
        ("filter", "Regular expression for filtering clusters by name"),
        ("format", "Format to use; One of (text, json)"),
    ]),
    get("/config_dump", "dump current Envoy configs").with(&[
        ("resource", "The resource to dump"),
        ("mask", "The fields to keep of each configuration, or of each element of the resource"),
        ("name_regex", "Dump only the configurations whose names match the regular expression"),
        ("include_eds", "Dump the endpoints as well"),
    ]),
    get("/contention", "dump mutex contention stats (there is nothing to trace)"),
    post("/drain_listeners", "drain listeners").with(&[
        ("graceful", "Drain connections over --drain-time-s before the listeners are stopped"),
        ("skip_exit", "Drain connections, but never stop the listeners"),
        ("inboundonly", "Only listeners whose traffic_direction is INBOUND"),
    ]),
    post("/healthcheck/fail", "cause the server to fail health checks"),
    post("/healthcheck/ok", "cause the server to pass health checks"),
    get("/help", "print out list of admin commands"),
    get("/hot_restart_version", "print the hot restart compatibility version"),
    get("/init_dump", "dump what the server still waits for"),
    get("/listeners", "print listener info").with(&[("format", "Format to use; One of (text, json)")]),
    post("/logging", "query/change logging levels").with(&[
        ("paths", "Change several levels: <logger>:<level>,<logger>:<level>"),
        ("level", "The level of all loggers; One of (trace, debug, info, warning, error, critical, off)"),
    ]),
    get("/memory", "print current allocation/heap usage"),
    post("/quitquitquit", "exit the server"),
    get("/ready", "print server state, return 200 if LIVE, otherwise return 503"),
    post("/reopen_logs", "reopen access logs"),
    post("/reset_counters", "reset all counters to zero"),
    get("/runtime", "print runtime values"),
    post(
        "/runtime_modify",
        "Adds or modifies runtime values as passed in query parameters. To delete a previously added key, use an empty string as the value. Note that deletion only applies to overrides added via this endpoint; values loaded from disk can be modified via override but not deleted. E.g. ?key1=value1&key2=value2...",
    ),
    get("/server_info", "print server version/status information"),
    get("/stats", "print server stats").with(&[
        ("usedonly", "Only include stats that have been written"),
        ("filter", "Regular expression for filtering stats"),
        ("invert_filter", "Invert the filter"),
        ("format", "Format to use; One of (html, active-html, text, json, prometheus)"),
        ("type", "Stat types to include; One of (All, Counters, Histograms, Gauges, TextReadouts)"),
        ("histogram_buckets", "One of (cumulative, disjoint, detailed, summary)"),
    ]),
    get("/stats/prometheus", "print server stats in prometheus format").with(&[
        ("usedonly", "Only include stats that have been written"),
        ("text_readouts", "Render text readouts as gauges of value 0"),
        ("filter", "Regular expression for filtering stats"),
        ("invert_filter", "Invert the filter"),
        ("histogram_buckets", "One of (cumulative, summary)"),
    ]),
    get(
        "/stats/recentlookups",
        "show recent stat-name lookups (no name is looked up while traffic is served)",
    ),
    post("/stats/recentlookups/clear", "clear list of stat-name lookups and counter"),
    post("/stats/recentlookups/disable", "disable recording of stat-name lookups"),
    post("/stats/recentlookups/enable", "enable recording of stat-name lookups"),
];

/// The text of `/help`.
pub(super) fn help() -> String {
    let mut text = String::from("admin commands are:\n");
    for endpoint in ENDPOINTS {
        let post = if endpoint.post { " (POST)" } else { "" };
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {}{post}: {}", endpoint.path, endpoint.help);
        for (name, help) in endpoint.parameters {
            let _ = writeln!(text, "      {name}: {help}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{ENDPOINTS, help};

    #[test]
    fn endpoints_are_sorted_and_dispatched() {
        assert!(ENDPOINTS.is_sorted_by_key(|endpoint| endpoint.path));
        let dispatch = include_str!("../admin.rs");
        for endpoint in ENDPOINTS {
            assert!(
                dispatch.contains(&format!("\"{}\" =>", endpoint.path)),
                "{} has no handler",
                endpoint.path
            );
        }
        assert!(help().contains("  /quitquitquit (POST): exit the server\n"));
    }
}

//! Every output format against what Envoy 1.40 answered for the same stats (`fixtures/`, captured from a process with
//! one listener, one HTTP connection manager and two clusters).

use std::collections::HashSet;
use std::sync::Arc;

use regex::Regex;
use waystation_stats::render::{BucketMode, Format, Options, Renderer, StatType};
use waystation_stats::{
    BucketSettings, Counter, Gauge, Histogram, ResponseCodes, Scope, StatsConfig, Store, TagRule, Unit,
    stats_group,
};

macro_rules! fixture {
    ($name:literal) => {
        include_str!(concat!("fixtures/", $name))
    };
}

/// The stats that Envoy listed, remade; the handles keep them alive.
struct Remade {
    store: Store,
    _handles: Handles,
}

#[derive(Default)]
struct Handles {
    counters: Vec<Counter>,
    gauges: Vec<Gauge>,
    histograms: Vec<Histogram>,
    codes: Vec<ResponseCodes>,
    sums: Vec<OwnSum>,
}

stats_group! {
    /// What a cluster's group declares of its response codes.
    struct OwnSum { counters { upstream_rq_completed } gauges {} histograms {} }
}

/// Envoy's own outputs, from which to remake.
struct Captured {
    counters: &'static str,
    gauges: &'static str,
    used: &'static str,
    detailed: &'static str,
}

const PLAIN: Captured = Captured {
    counters: fixture!("counters.txt"),
    gauges: fixture!("gauges.txt"),
    used: fixture!("used.txt"),
    detailed: fixture!("detailed.txt"),
};

impl Remade {
    fn new(config: StatsConfig, captured: &Captured) -> Self {
        let store = Store::new(config);
        let root = store.root();
        let mut handles = Handles::default();
        let used: HashSet<&str> =
            captured.used.lines().filter_map(|line| Some(line.split_once(": ")?.0)).collect();

        for (name, value) in scalars(captured.counters) {
            let (scope, leaf) = resolve(&root, name);
            if let Some(prefix) = code_prefix(leaf) {
                // The sum of a cluster's own codes is listed before there are any.
                if scope.name().strip_prefix("cluster.").is_some_and(|name| !name.contains('.')) {
                    let sum: OwnSum = scope.group();
                    if leaf == "upstream_rq_completed" {
                        sum.upstream_rq_completed().add(value);
                    }
                    handles.sums.push(sum);
                }
                let codes = scope.response_codes(prefix);
                if let Ok(status) = leaf[prefix.len()..].parse() {
                    (0..value).for_each(|_| codes.record(status));
                }
                handles.codes.push(codes);
            } else {
                let counter = scope.counter(leaf);
                counter.add(value);
                handles.counters.push(counter);
            }
        }
        for (name, value) in scalars(captured.gauges) {
            let (scope, leaf) = resolve(&root, name);
            let gauge = scope.gauge(leaf);
            if used.contains(name) {
                gauge.set(value);
            }
            handles.gauges.push(gauge);
        }
        let mut lines = captured.detailed.lines();
        while let Some(line) = lines.next() {
            let (name, rest) = line.split_once(':').unwrap();
            if !rest.is_empty() && rest != " No recorded values" {
                continue;
            }
            let (scope, leaf) = resolve(&root, name);
            let histogram = scope.histogram(leaf, Unit::Milliseconds);
            if rest.is_empty() {
                let totals = lines.next().unwrap().strip_prefix("  totals=").unwrap();
                for bin in totals.split(", ") {
                    let (bin, count) = bin.split_once(':').unwrap();
                    let value = bin.split_once(',').unwrap().0.parse::<f64>().unwrap().ceil() as u64;
                    (0..count.parse().unwrap()).for_each(|_| histogram.record(value));
                }
                assert_eq!(lines.next(), Some("  intervals="));
                lines.next();
            }
            handles.histograms.push(histogram);
        }
        // The second flush closes an interval in which nothing happened, as the captures show.
        store.flush();
        store.flush();
        Self { store, _handles: handles }
    }

    fn plain() -> Self {
        Self::new(StatsConfig::default(), &PLAIN)
    }

    fn render(&self, format: Format, options: Options) -> String {
        let chunks = Renderer::new(&self.store, format, options).flat_map(|chunk| chunk.to_vec());
        String::from_utf8(chunks.collect()).unwrap()
    }
}

fn scalars(text: &'static str) -> impl Iterator<Item = (&'static str, u64)> {
    text.lines().map(|line| {
        let (name, value) = line.split_once(": ").unwrap();
        (name, value.parse().unwrap())
    })
}

/// Where the owners of these stats create them.
fn resolve<'a>(root: &Scope, name: &'a str) -> (Scope, &'a str) {
    let (parent, leaf) = name.rsplit_once('.').unwrap();
    let parent = parent.replace("127.0.0.1_18941", "ADDRESS");
    let mut scope = root.clone();
    let mut previous = "";
    for segment in parent.split('.') {
        scope = match (previous, segment) {
            ("cluster", cluster) => scope.tag("envoy.cluster_name", cluster),
            ("http", manager) => scope.tag("envoy.http_conn_manager_prefix", manager),
            ("listener", "ADDRESS") => scope.tag("envoy.listener_address", "127.0.0.1:18941"),
            ("vhost", host) => scope.tag("envoy.virtual_host", host),
            ("vcluster", cluster) => scope.tag("envoy.virtual_cluster", cluster),
            (_, worker) if worker.starts_with("worker_") => scope.worker(worker[7..].parse().unwrap()),
            (_, plain) => scope.scope(plain),
        };
        previous = segment;
    }
    (scope, leaf)
}

fn code_prefix(leaf: &str) -> Option<&'static str> {
    let is_code = Regex::new(r"^upstream_rq_(\d{3}|\dxx|completed)$").unwrap().is_match(leaf);
    is_code.then_some("upstream_rq_")
}

#[track_caller]
fn assert_same(ours: &str, envoys: &str) {
    for (at, (our, envoy)) in ours.lines().zip(envoys.lines()).enumerate() {
        assert_eq!(our, envoy, "line {}", at + 1);
    }
    assert_eq!(ours.len(), envoys.len(), "same lines, but not as many");
}

#[test]
fn text() {
    let stats = Remade::plain();
    assert_same(&stats.render(Format::Text, Options::default()), fixture!("all.txt"));
    assert_same(
        &stats.render(Format::Text, Options { used_only: true, ..Options::default() }),
        fixture!("used.txt"),
    );
    assert_same(
        &stats.render(Format::Text, Options { only: Some(StatType::Counters), ..Options::default() }),
        fixture!("counters.txt"),
    );
    assert_same(
        &stats.render(Format::Text, Options { only: Some(StatType::Gauges), ..Options::default() }),
        fixture!("gauges.txt"),
    );
}

#[test]
fn text_buckets() {
    let stats = Remade::plain();
    let render = |only, buckets| stats.render(Format::Text, Options { only, buckets, ..Options::default() });
    let histograms = Some(StatType::Histograms);
    assert_same(&render(histograms, BucketMode::Cumulative), fixture!("cumulative.txt"));
    assert_same(&render(histograms, BucketMode::Disjoint), fixture!("disjoint.txt"));
    assert_same(&render(None, BucketMode::Detailed), fixture!("detailed.txt"));
}

#[test]
fn json() {
    let stats = Remade::plain();
    let render = |only, buckets| stats.render(Format::Json, Options { only, buckets, ..Options::default() });
    let histograms = Some(StatType::Histograms);
    assert_same(&render(None, BucketMode::Unset), fixture!("all.json"));
    assert_same(&render(histograms, BucketMode::Cumulative), fixture!("cumulative.json"));
    assert_same(&render(histograms, BucketMode::Disjoint), fixture!("disjoint.json"));
    assert_same(&render(histograms, BucketMode::Detailed), fixture!("detailed.json"));
    assert_same(&render(histograms, BucketMode::Summary), fixture!("summary.json"));
    assert_eq!(render(Some(StatType::TextReadouts), BucketMode::Unset), r#"{"stats":[]}"#);
}

#[test]
fn prometheus() {
    let stats = Remade::plain();
    let used = Options { used_only: true, ..Options::default() };
    assert_same(&stats.render(Format::Prometheus, Options::default()), fixture!("all.prom"));
    assert_same(&stats.render(Format::Prometheus, used.clone()), fixture!("used.prom"));
    let summary = Options { buckets: BucketMode::Summary, ..used };
    assert_same(&stats.render(Format::Prometheus, summary), fixture!("summary.prom"));
}

#[test]
fn tags_and_buckets_of_the_user() {
    let extract =
        |tag: &str, regex: &str| TagRule::Extract { tag: tag.into(), regex: Regex::new(regex).unwrap() };
    let config = StatsConfig {
        tags: vec![
            TagRule::Fixed { tag: "env".into(), value: "prod".into() },
            extract("direction", r"^cluster\.up\.((upstream)_)"),
            extract("suffix", r"_((total))$"),
            extract("whole_cluster", r"^cluster\.((.+?)\.)upstream_cx"),
        ],
        buckets: vec![BucketSettings {
            matches: Arc::new(|name| name.ends_with("upstream_rq_time")),
            buckets: Arc::from([0.5, 20., 200.]),
        }],
        ..StatsConfig::default()
    };
    let captured = Captured {
        counters: fixture!("tagged-counters.txt"),
        gauges: fixture!("tagged-gauges.txt"),
        used: fixture!("tagged-used.txt"),
        detailed: fixture!("tagged-detailed.txt"),
    };
    let stats = Remade::new(config, &captured);
    let used = Options { used_only: true, ..Options::default() };
    assert_same(&stats.render(Format::Prometheus, used), fixture!("tagged.prom"));
}

#[test]
fn chunk_size_does_not_change_the_body() {
    let stats = Remade::plain();
    for (format, whole) in [
        (Format::Text, fixture!("all.txt")),
        (Format::Json, fixture!("all.json")),
        (Format::Prometheus, fixture!("all.prom")),
    ] {
        let mut renderer = Renderer::new(&stats.store, format, Options::default());
        let mut body = Vec::new();
        while let Some(chunk) = renderer.next_chunk(1) {
            body.extend_from_slice(&chunk);
        }
        assert_same(std::str::from_utf8(&body).unwrap(), whole);
    }
}

#[test]
fn filters() {
    let stats = Remade::plain();
    let filtered = |filter, invert_filter| {
        let options =
            Options { filter: Some(Regex::new(filter).unwrap()), invert_filter, ..Options::default() };
        stats.render(Format::Text, options)
    };
    let kept = filtered(r"^cluster\.up\.upstream_rq_2", false);
    assert_eq!(
        kept,
        "cluster.up.upstream_rq_200: 7\ncluster.up.upstream_rq_201: 1\ncluster.up.upstream_rq_2xx: 8\n"
    );
    assert!(!filtered(r"^cluster\.up", true).contains("cluster.up"));
    let nothing = Options { filter: Some(Regex::new("nothing").unwrap()), ..Options::default() };
    assert_eq!(stats.render(Format::Prometheus, nothing), "");
}

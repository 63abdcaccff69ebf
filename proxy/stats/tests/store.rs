//! The store as its users see it: identity, lifetime, shards, matchers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use waystation_stats::render::{Format, Options, Renderer};
use waystation_stats::{Scope, StatsConfig, StatsMatcher, Store, TagRule, Unit, Value, stats_group};

stats_group! {
    /// A few of each.
    pub struct ClusterStats {
        counters { upstream_cx_total, upstream_rq_total }
        gauges { upstream_cx_active, cx_open = "circuit_breakers.default.cx_open" }
        histograms { upstream_cx_connect_ms: Milliseconds }
    }
}

stats_group! {
    /// Only gauges.
    pub struct GaugesOnly {
        gauges { live, state }
    }
}

fn cluster(store: &Store, name: &str) -> Scope {
    store.root().scope("cluster").tag("envoy.cluster_name", name)
}

fn render(store: &Store, format: Format, options: Options) -> String {
    let body = Renderer::new(store, format, options).flat_map(|chunk| chunk.to_vec()).collect();
    String::from_utf8(body).unwrap()
}

fn text(store: &Store) -> String {
    render(store, Format::Text, Options::default())
}

#[test]
fn workers_and_other_threads_add_up() {
    let store = Store::new(StatsConfig { workers: 4, ..StatsConfig::default() });
    let stats: ClusterStats = cluster(&store, "up").group();
    let codes = cluster(&store, "up").response_codes("upstream_rq_");
    std::thread::scope(|threads| {
        // Six threads claim four workers, one of them twice: whoever comes late shares.
        for worker in [0, 1, 2, 3, 3, 9] {
            let (store, stats, codes) = (&store, &stats, &codes);
            threads.spawn(move || {
                let _shard = store.register_worker(worker);
                for _ in 0..10_000 {
                    stats.upstream_rq_total().inc();
                    stats.upstream_cx_active().add(3);
                    stats.upstream_cx_active().sub(2);
                    stats.upstream_cx_connect_ms().record(7);
                    codes.record(200);
                }
            });
        }
    });
    store.flush();
    assert_eq!(stats.upstream_rq_total().value(), 60_000);
    assert_eq!(stats.upstream_cx_active().value(), 60_000);
    assert_eq!(store.find("cluster.up.upstream_rq_200"), Some(60_000));
    assert_eq!(store.find("cluster.up.upstream_rq_2xx"), Some(60_000));
    let Some(Value::Histogram(Some(summary))) = store.lookup("cluster.up.upstream_cx_connect_ms") else {
        panic!("recorded and flushed");
    };
    assert_eq!(summary.cumulative.count(), 60_000);
}

#[test]
fn a_worker_takes_back_what_another_added() {
    let store = Store::new(StatsConfig { workers: 2, ..StatsConfig::default() });
    let active = store.root().gauge("active");
    active.add(5);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let _shard = store.register_worker(1);
            active.sub(4);
        });
    });
    assert_eq!(active.value(), 1);
    active.set(u64::MAX);
    assert_eq!(store.find("active"), Some(u64::MAX));
}

#[test]
fn a_released_worker_can_be_claimed_again() {
    let store = Store::default();
    let counter = store.root().counter("a.b");
    drop(store.register_worker(0));
    let _again = store.register_worker(0);
    counter.inc();
    assert_eq!(counter.value(), 1);
}

#[test]
fn one_name_is_one_stat() {
    let store = Store::default();
    let stats: ClusterStats = cluster(&store, "up").group();
    let same: ClusterStats = store.root().scope("cluster.up").group();
    stats.upstream_cx_total().inc();
    same.upstream_cx_total().inc();
    cluster(&store, "up").counter("upstream_cx_total").inc();
    store.root().counter("cluster.up.upstream_cx_total").inc();
    cluster(&store, "up").gauge("circuit_breakers.default.cx_open").set(1);
    assert_eq!(store.find("cluster.up.upstream_cx_total"), Some(4));
    assert_eq!(stats.cx_open().value(), 1);
    assert_eq!(text(&store).matches("upstream_cx_total").count(), 1);
}

#[test]
fn a_stat_lives_as_long_as_its_handles() {
    let store = Store::default();
    let stats: ClusterStats = cluster(&store, "up").group();
    let total = stats.upstream_cx_total().to_owned();
    total.inc();
    drop(stats);
    // Something still counts, so a successor continues where this one is.
    let successor: ClusterStats = cluster(&store, "up").group();
    assert_eq!(successor.upstream_cx_total().value(), 1);
    drop((total, successor));
    assert_eq!(text(&store), "");
    assert_eq!(store.find("cluster.up.upstream_cx_total"), None);
    let fresh: ClusterStats = cluster(&store, "up").group();
    assert_eq!(fresh.upstream_cx_total().value(), 0);
    assert_eq!(store.find("cluster.up.upstream_cx_total"), Some(0));
}

#[test]
fn idle_stats_are_listed_unless_only_used_ones_are_wanted() {
    let store = Store::default();
    let stats: ClusterStats = cluster(&store, "up").group();
    let gauges: GaugesOnly = store.root().scope("server").group();
    gauges.state().set(0);
    stats.upstream_cx_total().inc();
    store.reset_counters();
    let used = render(&store, Format::Text, Options { used_only: true, ..Options::default() });
    assert_eq!(used, "cluster.up.upstream_cx_total: 0\nserver.state: 0\n");
    assert_eq!(
        text(&store),
        "cluster.up.circuit_breakers.default.cx_open: 0\n\
         cluster.up.upstream_cx_active: 0\n\
         cluster.up.upstream_cx_total: 0\n\
         cluster.up.upstream_rq_total: 0\n\
         server.live: 0\n\
         server.state: 0\n\
         cluster.up.upstream_cx_connect_ms: No recorded values\n"
    );
}

#[test]
fn a_reset_starts_counters_over_and_keeps_gauges() {
    let store = Store::default();
    let up = cluster(&store, "up");
    let (total, active, codes) =
        (up.counter("upstream_rq_total"), up.gauge("upstream_rq_active"), up.response_codes("upstream_rq_"));
    total.add(3);
    active.set(2);
    [200, 204, 503].into_iter().for_each(|status| codes.record(status));
    store.reset_counters();
    total.inc();
    codes.record(204);
    assert_eq!(
        text(&store),
        "cluster.up.upstream_rq_200: 0\n\
         cluster.up.upstream_rq_204: 1\n\
         cluster.up.upstream_rq_2xx: 1\n\
         cluster.up.upstream_rq_503: 0\n\
         cluster.up.upstream_rq_5xx: 0\n\
         cluster.up.upstream_rq_active: 2\n\
         cluster.up.upstream_rq_completed: 1\n\
         cluster.up.upstream_rq_total: 1\n"
    );
}

#[test]
fn adding_removing_and_scraping_at_once() {
    let store = Store::default();
    std::thread::scope(|threads| {
        for thread in 0..4 {
            let store = &store;
            threads.spawn(move || {
                for round in 0..300 {
                    // All threads fight over the same few names.
                    let up = cluster(store, ["a", "b", "c"][(thread + round) % 3]);
                    let stats: ClusterStats = up.group();
                    stats.upstream_cx_total().inc();
                    up.counter("upstream_cx_total").inc();
                    up.counter("other").inc();
                }
            });
        }
        for format in [Format::Text, Format::Json, Format::Prometheus] {
            let store = &store;
            threads.spawn(move || (0..100).for_each(|_| drop(render(store, format, Options::default()))));
        }
    });
    assert_eq!(text(&store), "");
}

#[test]
fn names_are_listed_in_byte_order_across_scopes() {
    let store = Store::default();
    let root = store.root();
    let names = ["a.b", "a.b.c", "a.b-c.d", "a.b_c.d", "a.c", "a", "b.x.y.z", "b.x.a", "b.x0"];
    let counters: Vec<_> = names.iter().map(|name| root.counter(name)).collect();
    let mut sorted: Vec<_> = names.iter().map(|name| format!("{name}: 0\n")).collect();
    sorted.sort_by(|a, b| a.trim_end_matches(": 0\n").cmp(b.trim_end_matches(": 0\n")));
    assert_eq!(text(&store), sorted.concat());
    drop(counters);
}

#[test]
fn text_readouts_come_first() {
    let store = Store::default();
    let counter = store.root().counter("a");
    let readout = store.root().text_readout("control_plane.identifier");
    assert_eq!(text(&store), "control_plane.identifier: \"\"\na: 0\n");
    readout.set("pilot \"1\"\n");
    assert_eq!(
        render(&store, Format::Json, Options::default()),
        r#"{"stats":[{"name":"control_plane.identifier","value":"pilot \"1\"\n"},{"name":"a","value":0}]}"#
    );
    assert_eq!(
        render(&store, Format::Prometheus, Options { text_readouts: true, ..Options::default() }),
        "# TYPE envoy_a counter\nenvoy_a{} 0\n# TYPE envoy_control_plane_identifier gauge\n\
         envoy_control_plane_identifier{text_value=\"pilot \\\"1\\\"\\n\"} 0\n"
    );
    assert_eq!(
        render(&store, Format::Prometheus, Options::default()),
        "# TYPE envoy_a counter\nenvoy_a{} 0\n"
    );
    drop((counter, readout));
}

#[test]
fn rejected_stats_do_not_exist() {
    let store = Store::new(StatsConfig { matcher: StatsMatcher::RejectAll, ..StatsConfig::default() });
    let stats: ClusterStats = cluster(&store, "up").group();
    let codes = cluster(&store, "up").response_codes("upstream_rq_");
    stats.upstream_cx_total().inc();
    stats.upstream_cx_active().set(5);
    stats.upstream_cx_connect_ms().record(1);
    codes.record(200);
    store.flush();
    assert_eq!(stats.upstream_cx_total().value(), 0);
    assert_eq!(text(&store), "");
    assert_eq!(render(&store, Format::Prometheus, Options::default()), "");

    let keep =
        StatsMatcher::Keep(Arc::new(|name| name.ends_with("upstream_cx_total") || name.ends_with("_2xx")));
    let store = Store::new(StatsConfig { matcher: keep, ..StatsConfig::default() });
    let stats: ClusterStats = cluster(&store, "up").group();
    let codes = cluster(&store, "up").response_codes("upstream_rq_");
    codes.record(200);
    stats.upstream_rq_total().inc();
    stats.upstream_cx_total().inc();
    assert_eq!(text(&store), "cluster.up.upstream_cx_total: 1\ncluster.up.upstream_rq_2xx: 1\n");
    assert_eq!(store.find("cluster.up.upstream_rq_total"), None);
    assert_eq!(render(&store, Format::Prometheus, Options::default()).lines().count(), 4);
}

#[test]
fn a_users_regex_runs_once_per_name() {
    let calls = Arc::new(AtomicU64::new(0));
    let counted = calls.clone();
    let keep = StatsMatcher::Keep(Arc::new(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
        true
    }));
    let store = Store::new(StatsConfig { matcher: keep, ..StatsConfig::default() });
    let _stats: ClusterStats = cluster(&store, "up").group();
    text(&store);
    text(&store);
    assert_eq!(calls.load(Ordering::Relaxed), 5);
}

#[test]
fn without_default_tags_names_stay_whole() {
    let config = StatsConfig {
        use_all_default_tags: false,
        tags: vec![TagRule::Default("envoy.response_code_class".into())],
        ..StatsConfig::default()
    };
    let store = Store::new(config);
    let up = cluster(&store, "up");
    let codes = up.response_codes("upstream_rq_");
    codes.record(204);
    codes.record(999);
    assert_eq!(
        render(&store, Format::Prometheus, Options::default()),
        "# TYPE envoy_cluster_up_upstream_rq_204 counter\nenvoy_cluster_up_upstream_rq_204{} 1\n\
         # TYPE envoy_cluster_up_upstream_rq_completed counter\nenvoy_cluster_up_upstream_rq_completed{} 2\n\
         # TYPE envoy_cluster_up_upstream_rq_xx counter\n\
         envoy_cluster_up_upstream_rq_xx{envoy_response_code_class=\"2\"} 1\n"
    );
}

#[test]
fn labels_and_namespaces() {
    let store = Store::default();
    store.register_namespace("istiocustom");
    let requests = |reporter| {
        let metric = store.root().scope("istiocustom").scope("istio_requests_total");
        metric.label("reporter", reporter).label("response_code", "200").counter("")
    };
    let (source, destination) = (requests("source"), requests("destination"));
    source.inc();
    requests("source").inc();
    assert_eq!(store.find("istiocustom.istio_requests_total.reporter.source.response_code.200"), Some(2));
    assert_eq!(
        render(&store, Format::Prometheus, Options::default()),
        "# TYPE istio_requests_total counter\n\
         istio_requests_total{reporter=\"destination\",response_code=\"200\"} 0\n\
         istio_requests_total{reporter=\"source\",response_code=\"200\"} 2\n"
    );
    drop(destination);
}

#[test]
fn intervals_and_quantiles_are_envoys() {
    let store = Store::default();
    let time = cluster(&store, "up").histogram("upstream_rq_time", Unit::Milliseconds);
    [2, 44, 44, 45, 55, 56, 56, 84, 195].into_iter().for_each(|value| time.record(value));
    store.flush();
    [21, 63, 65, 66, 67, 68].into_iter().for_each(|value| time.record(value));
    assert_eq!(store.lookup("nothing").map(|_| ()), None);
    store.flush();
    assert_eq!(
        text(&store),
        "cluster.up.upstream_rq_time: P0(21.5,2.05) P25(63.5,44.666666666666664) P50(65.5,56.666666666666664) \
         P75(67.5,67.5) P90(68.5,84.5) P95(68.5,195) P99(68.5,195) P99.5(68.5,195) P99.9(68.5,195) \
         P100(68.5,195)\n"
    );
    let Some(Value::Histogram(Some(summary))) = store.lookup("cluster.up.upstream_rq_time") else {
        panic!("recorded and flushed");
    };
    assert_eq!(summary.interval.sum(), 352.969_505_554_019_7);
    time.record(u64::MAX);
    time.record(0);
    store.flush();
    let Some(Value::Histogram(Some(summary))) = store.lookup("cluster.up.upstream_rq_time") else {
        panic!("recorded and flushed");
    };
    assert_eq!(summary.cumulative.iter().last().unwrap().lower, 1.8e19);
}

#[test]
fn percentages_are_fractions() {
    let store = Store::default();
    let used = store.root().histogram("budget_used", Unit::Percent);
    used.record(Unit::PERCENT_SCALE / 4);
    store.flush();
    let Some(Value::Histogram(Some(summary))) = store.lookup("budget_used") else {
        panic!("recorded and flushed");
    };
    assert_eq!(summary.cumulative.count_up_to(0.25), 1);
    assert_eq!(summary.cumulative.count_up_to(0.24), 0);
}

#[test]
fn a_sink_sees_every_stat() {
    let store = Store::default();
    let stats: ClusterStats = cluster(&store, "up").group();
    stats.upstream_cx_total().inc();
    let mut seen = Vec::new();
    store.visit(&mut |stat| seen.push((stat.name.to_owned(), stat.used)));
    assert_eq!(seen.len(), 5);
    let codes = cluster(&store, "up").response_codes("upstream_rq_");
    codes.record(200);
    let mut tagged = Vec::new();
    store.visit(&mut |stat| {
        tagged.extend((stat.name == "cluster.up.upstream_rq_200").then(|| stat.tag_extracted()))
    });
    let tag = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(
        tagged,
        [(
            "cluster.upstream_rq".to_owned(),
            vec![tag("envoy.response_code", "200"), tag("envoy.cluster_name", "up")]
        )]
    );
    assert!(seen.contains(&("cluster.up.upstream_cx_total".to_owned(), true)));
}

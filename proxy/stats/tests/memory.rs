//! What an idle cluster's stats cost: 10 000 of them must stay within a few megabytes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use waystation_stats::render::{Format, Options, Renderer};
use waystation_stats::{StatsConfig, Store, stats_group};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system allocator, counting.
struct Counting;

// SAFETY: every call is passed on unchanged to the system allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promises about `layout` are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from `System.alloc` above with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

stats_group! {
    /// Names cost nothing per instance, so a few stand for a hundred; histograms cost a pointer each.
    pub struct Cluster {
        counters { upstream_cx_total, upstream_rq_total }
        gauges { upstream_cx_active }
        histograms {
            upstream_cx_connect_ms: Milliseconds,
            upstream_cx_length_ms: Milliseconds,
            upstream_rq_per_cx: Unspecified,
        }
    }
}

#[test]
fn an_idle_cluster_costs_less_than_a_kilobyte() {
    const CLUSTERS: usize = 10_000;
    let store = Store::new(StatsConfig { workers: 8, ..StatsConfig::default() });
    let scope = store.root().scope("cluster");
    let mut clusters = Vec::with_capacity(CLUSTERS);

    let before = LIVE.load(Ordering::Relaxed);
    for at in 0..CLUSTERS {
        let cluster = scope.tag("envoy.cluster_name", &format!("outbound|8080||service-{at}.default.svc"));
        clusters.push((cluster.group::<Cluster>(), cluster.response_codes("upstream_rq_")));
    }
    let each = (LIVE.load(Ordering::Relaxed) - before) / CLUSTERS;
    println!("{each} bytes per idle cluster with 8 workers");
    assert!(each < 1000, "{each} bytes for a group and a family of response codes");

    for format in [Format::Text, Format::Json, Format::Prometheus] {
        let before = LIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let body: usize = Renderer::new(&store, format, Options::default()).map(|chunk| chunk.len()).sum();
        let peak = PEAK.load(Ordering::Relaxed) - before;
        println!("{format:?}: a body of {body} bytes, at most {peak} bytes held");
        assert!(peak < 6 << 20, "{format:?} held {peak} bytes");
    }

    let with = LIVE.load(Ordering::Relaxed);
    drop(clusters);
    assert!(with - LIVE.load(Ordering::Relaxed) > CLUSTERS * 300, "removed clusters give their memory back");
}

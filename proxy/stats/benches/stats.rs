//! What a request pays for its stats, and what a scrape of 10 000 clusters costs.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use waystation_stats::render::{Format, Options, Renderer};
use waystation_stats::{Store, Unit, stats_group};

stats_group! {
    /// As many names as Envoy lists for an idle cluster: 104 scalars and 3 histograms.
    pub struct Cluster {
        counters {
            a00, a01, a02, a03, a04, a05, a06, a07, a08, a09, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19,
            a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31, a32, a33, a34, a35, a36, a37, a38, a39,
            a40, a41, a42, a43, a44, a45, a46, a47, a48, a49, a50, a51, a52, a53, a54, a55, a56, a57, a58, a59,
            a60, a61, a62, a63, a64, a65, a66, a67, a68, a69, a70, a71, a72, a73, a74, a75, a76, a77,
            upstream_flow_control_resumed_reading_total
        }
        gauges {
            g00, g01, g02, g03, g04, g05, g06, g07, g08, g09, g10, g11, g12, g13, g14, g15, g16, g17, g18, g19,
            g20, g21, g22, g23, upstream_rq_pending_active
        }
        histograms { upstream_cx_connect_ms: Milliseconds, upstream_cx_length_ms: Milliseconds, upstream_rq_per_cx: Unspecified }
    }
}

fn writes(c: &mut Criterion) {
    let store = Store::default();
    let counter = store.root().counter("server.total");
    let group: Cluster = store.root().scope("cluster").tag("envoy.cluster_name", "up").group();
    let codes = store.root().scope("cluster").tag("envoy.cluster_name", "up").response_codes("upstream_rq_");
    let histogram = store.root().histogram("time", Unit::Milliseconds);

    let bare = AtomicU64::new(0);
    c.bench_function("a bare atomic add, for comparison", |b| {
        b.iter(|| black_box(&bare).fetch_add(1, Ordering::Relaxed));
    });
    c.bench_function("a bare load and store, for comparison", |b| {
        b.iter(|| {
            let bare = black_box(&bare);
            bare.store(bare.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        });
    });
    c.bench_function("counter/shared", |b| b.iter(|| black_box(&counter).inc()));
    let _worker = store.register_worker(0);
    c.bench_function("counter/worker", |b| b.iter(|| black_box(&counter).inc()));
    c.bench_function("group counter/worker", |b| {
        b.iter(|| black_box(&group).upstream_flow_control_resumed_reading_total().inc());
    });
    c.bench_function("group gauge/worker", |b| {
        b.iter(|| black_box(&group).upstream_rq_pending_active().inc())
    });
    c.bench_function("response code/worker", |b| b.iter(|| codes.record(black_box(200))));
    c.bench_function("histogram/worker", |b| {
        let mut value = 0_u64;
        b.iter(|| {
            value = (value + 37) % 5000;
            histogram.record(black_box(value));
        });
    });
}

fn scrapes(c: &mut Criterion) {
    const CLUSTERS: usize = 10_000;
    let store = Store::default();
    let scope = store.root().scope("cluster");
    let clusters: Vec<Cluster> = (0..CLUSTERS)
        .map(|at| scope.tag("envoy.cluster_name", &format!("outbound_8080__service-{at}")).group())
        .collect();

    let mut group = c.benchmark_group("10 000 clusters");
    group.sample_size(10);
    for (name, format) in [("text", Format::Text), ("json", Format::Json), ("prometheus", Format::Prometheus)]
    {
        let scrape =
            || Renderer::new(&store, format, Options::default()).map(|chunk| chunk.len() as u64).sum::<u64>();
        group.throughput(Throughput::Bytes(scrape()));
        group.bench_function(name, |b| b.iter(scrape));
    }
    group.finish();
    drop(clusters);
}

criterion_group!(benches, writes, scrapes);
criterion_main!(benches);

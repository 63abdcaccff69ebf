//! What an idle cluster costs. A test of its own, because it counts every allocation of its process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as ep;
use waystation_filter_api::runtime::Runtime;
use waystation_stats::Store;
use waystation_upstream::cluster::{Environment, TransportFactory};
use waystation_upstream::stats::{ClusterStats, cluster_scope};
use waystation_upstream::{Cluster, ClusterTable, CompileContext};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on unchanged to the system's allocator, which upholds the contract; counting on the side
// touches no memory of the allocation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout` is the one that is needed.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from `alloc` above with this layout, that is from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn an_idle_cluster_is_small() {
    const CLUSTERS: usize = 10_000;
    let protos: Vec<pb::Cluster> = (0..CLUSTERS).map(proto).collect();
    let store = Store::default();
    let root = store.root();
    let environment = Environment::new(Runtime::new());
    let raw: TransportFactory = Arc::new(());
    let table = ClusterTable::new();

    let before = LIVE.load(Ordering::Relaxed);
    let stats: Vec<_> = protos
        .iter()
        .map(|proto| {
            let scope = cluster_scope(&root, &proto.name);
            let stats: ClusterStats = scope.group();
            // What a first assignment writes: the stats then have a shard.
            stats.membership_change().inc();
            stats.membership_total().set(1);
            (scope, stats)
        })
        .collect();
    let of_stats = (LIVE.load(Ordering::Relaxed) - before) / CLUSTERS;

    let before = LIVE.load(Ordering::Relaxed);
    let started = Instant::now();
    let cells: Vec<_> = protos
        .iter()
        .map(|proto| {
            let cx = CompileContext {
                environment: &environment,
                stats: &root,
                transport: &|_| Ok(Arc::clone(&raw)),
                route_policies: &|_| Ok(None),
                upstream_filters: &|_| Ok(None),
                added_via_api: true,
                previous: None,
                now: started,
            };
            let cell = table.cell(&proto.name);
            cell.set(Some(Arc::new(Cluster::compile(proto, &cx).expect("valid"))));
            cell
        })
        .collect();
    let took = started.elapsed();
    let each = (LIVE.load(Ordering::Relaxed) - before) / CLUSTERS;
    println!(
        "{each} bytes for a cluster and its host, {of_stats} for its stats; {CLUSTERS} compiled in {took:?}"
    );
    assert!(each < 2048, "{each} bytes");
    drop((cells, stats));
}

fn proto(index: usize) -> pb::Cluster {
    let address = core::SocketAddress {
        address: format!("10.0.{}.{}", index / 256, index % 256),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(80)),
        ..Default::default()
    };
    let endpoint = ep::LbEndpoint {
        host_identifier: Some(ep::lb_endpoint::HostIdentifier::Endpoint(ep::Endpoint {
            address: Some(core::Address { address: Some(core::address::Address::SocketAddress(address)) }),
            ..Default::default()
        })),
        ..Default::default()
    };
    pb::Cluster {
        name: format!("outbound|80||service-{index}.default.svc.cluster.local"),
        load_assignment: Some(ep::ClusterLoadAssignment {
            endpoints: vec![ep::LocalityLbEndpoints { lb_endpoints: vec![endpoint], ..Default::default() }],
            ..Default::default()
        }),
        ..Default::default()
    }
}

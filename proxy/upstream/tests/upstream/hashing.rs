//! The same key picks the same host as behind Envoy.

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::google::protobuf as wkt;
use waystation_upstream::PickContext;
use xxhash_rust::xxh64::xxh64;

use crate::support::{Rig, at, cluster, locality, weighted};

/// Cluster, key and host, recorded from Envoy 1.40.0: routes hashed by a header, hosts read from its access log.
const RECORDED: &str = include_str!("envoy_hash_picks.txt");

/// In no particular order, as they were configured for the recording.
const HOSTS: [(&str, u32, u32); 7] = [
    ("127.0.0.5", 9005, 3),
    ("127.0.0.1", 9001, 1),
    ("127.0.0.3", 9003, 2),
    ("127.0.0.2", 9002, 5),
    ("127.0.0.4", 9004, 1),
    ("127.0.0.10", 9010, 7),
    ("127.0.0.7", 9007, 1),
];

fn recorded_cluster(name: &str) -> pb::Cluster {
    use pb::cluster::{LbConfig, LbPolicy};
    let equal = matches!(name, "ring" | "ring_murmur" | "maglev" | "maglev_11");
    let endpoints: Vec<_> = HOSTS
        .iter()
        .map(|(ip, port, weight)| weighted(at(ip, *port), if equal { 1 } else { *weight }))
        .collect();
    let policy = if name.starts_with("ring") { LbPolicy::RingHash } else { LbPolicy::Maglev };
    let by_locality = name.ends_with("_locality");
    let localities = if by_locality {
        let (first, second) = endpoints.split_at(4);
        vec![locality("z2", 0, 3, first.to_vec()), locality("z1", 0, 1, second.to_vec())]
    } else {
        vec![locality("", 0, 0, endpoints)]
    };
    let mut proto = cluster(policy, localities);
    let size = |value| Some(wkt::UInt64Value { value });
    let maglev =
        |entries| Some(LbConfig::MaglevLbConfig(pb::cluster::MaglevLbConfig { table_size: size(entries) }));
    proto.lb_config = match name {
        "ring_murmur" => Some(LbConfig::RingHashLbConfig(pb::cluster::RingHashLbConfig {
            hash_function: pb::cluster::ring_hash_lb_config::HashFunction::MurmurHash2 as i32,
            ..Default::default()
        })),
        "ring_small" => Some(LbConfig::RingHashLbConfig(pb::cluster::RingHashLbConfig {
            minimum_ring_size: size(5),
            maximum_ring_size: size(20),
            ..Default::default()
        })),
        "maglev_small" => maglev(101),
        "maglev_11" => maglev(11),
        "maglev_23_weighted" => maglev(23),
        _ => None,
    };
    if by_locality {
        proto.common_lb_config = Some(pb::cluster::CommonLbConfig {
            locality_config_specifier: Some(
                pb::cluster::common_lb_config::LocalityConfigSpecifier::LocalityWeightedLbConfig(
                    Default::default(),
                ),
            ),
            ..Default::default()
        });
    }
    proto
}

#[test]
fn keys_find_the_hosts_that_envoy_picked() {
    let mut rigs = std::collections::BTreeMap::new();
    let mut compared = 0;
    for line in RECORDED.lines() {
        let [name, key, expected] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let rig = rigs.entry(name.to_owned()).or_insert_with(|| Rig::new(&recorded_cluster(name)));
        let cx = PickContext { hash: Some(xxh64(key.as_bytes(), 0)), ..PickContext::default() };
        assert_eq!(rig.pick(&cx).unwrap().address().to_string(), expected, "{name} {key}");
        compared += 1;
    }
    assert_eq!((rigs.len(), compared), (11, 704));
}

/// The sizes that Envoy reported for the recorded clusters.
#[test]
fn tables_have_the_sizes_of_envoys() {
    let rings = [
        ("ring", 1029, 147, 147),
        ("ring_weighted", 1040, 52, 364),
        ("ring_small", 20, 1, 7),
        ("ring_locality", 1044, 29, 355),
    ];
    for (name, size, min, max) in rings {
        let rig = Rig::new(&recorded_cluster(name));
        let found = ["size", "min_hashes_per_host", "max_hashes_per_host"];
        assert_eq!(found.map(|stat| rig.stat(&format!("ring_hash_lb.{stat}"))), [size, min, max], "{name}");
    }
    let maglevs = [
        ("maglev", 9362, 9363),
        ("maglev_weighted", 3277, 22937),
        ("maglev_small", 5, 35),
        ("maglev_locality", 1821, 22341),
    ];
    for (name, min, max) in maglevs {
        let rig = Rig::new(&recorded_cluster(name));
        let found = ["min_entries_per_host", "max_entries_per_host"];
        assert_eq!(found.map(|stat| rig.stat(&format!("maglev_lb.{stat}"))), [min, max], "{name}");
    }
}

#[test]
fn a_rejected_host_is_replaced_by_another_slot() {
    for name in ["ring", "maglev"] {
        let mut rig = Rig::new(&recorded_cluster(name));
        let cx = PickContext { hash: Some(42), ..PickContext::default() };
        let first = rig.octet(&cx).unwrap();
        let reject = |host: &waystation_upstream::Host| crate::support::last_octet(host) == first;
        let cx = PickContext { reject: Some(&reject), reselections: 20, ..cx };
        assert_ne!(rig.octet(&cx), Some(first), "{name}");
    }
}

#[test]
fn bounded_load_moves_on_from_a_busy_host() {
    let mut proto = recorded_cluster("ring");
    proto.common_lb_config = Some(pb::cluster::CommonLbConfig {
        consistent_hashing_lb_config: Some(pb::cluster::common_lb_config::ConsistentHashingLbConfig {
            hash_balance_factor: Some(wkt::UInt32Value { value: 150 }),
            ..Default::default()
        }),
        ..Default::default()
    });
    let mut rig = Rig::new(&proto);
    let cx = PickContext { hash: Some(42), ..PickContext::default() };
    let mut active = Vec::new();
    for _ in 0..140 {
        let host = std::rc::Rc::new(waystation_upstream::HostRef(rig.pick(&cx).unwrap().clone()));
        assert!(rig.cluster.admission.try_acquire(
            waystation_upstream::Priority::Default,
            waystation_upstream::admission::Resource::Requests
        ));
        active.push(host.begin_request());
    }
    // 140 requests over 7 hosts, each bounded by 1.5 times the average (rounded up).
    let most = rig.hosts().iter().map(|host| host.active_requests()).max().unwrap();
    assert!((20..=32).contains(&most), "{most}");
    let busy = rig.hosts().iter().filter(|host| host.active_requests() > 0).count();
    assert!(busy >= 5, "{busy}");
}

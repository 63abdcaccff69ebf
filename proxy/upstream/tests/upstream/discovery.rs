//! Endpoints over time: EDS updates, DNS on a virtual clock, original destinations.

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as ep;
use envoy_types::pb::envoy::r#type::v3 as types;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::address::Address;
use waystation_filter_api::runtime::Runtime;
use waystation_upstream::cluster::{Discovery, Environment};
use waystation_upstream::discovery::{DnsDiscovery, DnsFailure, DnsRecord, DnsSettings, LookupFamily};
use waystation_upstream::host::Locality;
use waystation_upstream::load_balancer::OriginalDestination;
use waystation_upstream::{Host, HostRef, NoHost, PickContext};

use crate::support::{
    Rig, assignment, at, cluster, endpoint, locality, seconds, status, weighted, with_metadata,
};

fn octets(hosts: &[Arc<Host>]) -> Vec<u8> {
    hosts.iter().map(|host| crate::support::last_octet(host)).collect()
}

fn eds() -> Rig {
    let mut proto = cluster(LbPolicy::RoundRobin, Vec::new());
    proto.load_assignment = None;
    proto.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32));
    proto.eds_cluster_config = Some(pb::cluster::EdsClusterConfig {
        eds_config: Some(core::ConfigSource::default()),
        service_name: "svc".into(),
    });
    Rig::new(&proto)
}

#[test]
fn an_eds_update_keeps_what_stays() {
    let rig = eds();
    let Discovery::Eds(settings) = &rig.cluster.discovery else { panic!() };
    assert_eq!(&*settings.resource_name, "svc");
    assert!(!rig.cluster.endpoints().initialized());
    let first = assignment(vec![locality("", 0, 0, vec![endpoint(1), endpoint(2), endpoint(3)])]);
    let applied = rig.cluster.apply_eds(&first, rig.now).unwrap();
    assert!(rig.cluster.endpoints().initialized() && applied.rebuilt);
    assert_eq!(octets(&applied.added), [1, 2, 3]);
    let before = rig.hosts();
    let request = Rc::new(HostRef(before[1].clone())).begin_request();

    let applied = rig.cluster.apply_eds(&first, rig.now).unwrap();
    assert!(!applied.rebuilt, "the same assignment changes nothing");
    assert_eq!(rig.stat("update_no_rebuild"), 1);

    // 1 is gone, 2 has another weight, 3 is unchanged, 4 is new.
    let second =
        assignment(vec![locality("", 0, 0, vec![weighted(endpoint(2), 7), endpoint(3), endpoint(4)])]);
    let applied = rig.cluster.apply_eds(&second, rig.now).unwrap();
    assert_eq!((octets(&applied.added), octets(&applied.removed)), (vec![4], vec![1]));
    let after = rig.hosts();
    assert!(Arc::ptr_eq(&before[2], &after[1]), "an unchanged endpoint is the same object");
    assert_eq!((before[1].id(), after[0].id()), (after[0].id(), before[1].id()));
    assert_eq!((after[0].weight(), after[0].active_requests()), (7, 1), "counts carry over");
    drop(request);
    assert_eq!(after[0].active_requests(), 0);
    assert_eq!(rig.stat("membership_change"), 2);
    assert_eq!((rig.stat("membership_total"), rig.stat("max_host_weight")), (3, 7));
}

#[test]
fn health_and_metadata_change_in_place() {
    let rig = eds();
    rig.cluster
        .apply_eds(&assignment(vec![locality("", 0, 0, vec![endpoint(1), endpoint(2)])]), rig.now)
        .unwrap();
    let before = rig.hosts();
    let update = assignment(vec![locality(
        "",
        0,
        0,
        vec![
            status(endpoint(1), core::HealthStatus::Draining),
            with_metadata(endpoint(2), "envoy.lb", &[("version", "2")]),
        ],
    )]);
    let applied = rig.cluster.apply_eds(&update, rig.now).unwrap();
    assert!(applied.rebuilt && applied.added.is_empty() && applied.removed.is_empty());
    let after = rig.hosts();
    assert!(Arc::ptr_eq(&before[0], &after[0]));
    assert_eq!(after[0].health_flags(), "/eds_status_draining");
    assert_eq!(before[1].id(), after[1].id());
    assert!(after[1].metadata().is_some() && before[1].metadata().is_none());
    assert_eq!(rig.stat("membership_healthy"), 1);
}

#[test]
fn bad_assignments_name_the_path_and_change_nothing() {
    let rig = eds();
    rig.cluster.apply_eds(&assignment(vec![locality("", 0, 0, vec![endpoint(1)])]), rig.now).unwrap();
    let leds = ep::LocalityLbEndpoints {
        lb_config: Some(ep::locality_lb_endpoints::LbConfig::LedsClusterLocalityConfig(Default::default())),
        ..Default::default()
    };
    let named = at("example.com", 80);
    let zero = weighted(endpoint(1), 0);
    for (endpoints, path) in [
        (vec![leds], "endpoints[0].leds_cluster_locality_config"),
        (vec![locality("", 0, 0, vec![named])], "endpoints[0].lb_endpoints[0].endpoint.address"),
        (vec![locality("", 0, 0, vec![zero])], "endpoints[0].lb_endpoints[0].load_balancing_weight"),
        (vec![locality("", 129, 0, Vec::new())], "endpoints[0].priority"),
    ] {
        let error = rig.cluster.apply_eds(&assignment(endpoints), rig.now).unwrap_err();
        assert_eq!(error.path(), path, "{error}");
    }
    assert_eq!(rig.hosts().len(), 1);
}

#[test]
fn overload_drops_and_staleness() {
    let rig = eds();
    let mut update = assignment(vec![locality("", 0, 0, vec![endpoint(1)])]);
    update.policy = Some(ep::cluster_load_assignment::Policy {
        drop_overloads: vec![ep::cluster_load_assignment::policy::DropOverload {
            category: "test".into(),
            drop_percentage: Some(types::FractionalPercent { numerator: 25, denominator: 0 }),
        }],
        endpoint_stale_after: Some(seconds(5)),
        ..Default::default()
    });
    rig.cluster.apply_eds(&update, rig.now).unwrap();
    let snapshot = rig.cluster.endpoints().snapshot();
    let mut rng = fastrand::Rng::with_seed(1);
    let dropped = (0..10_000).filter(|_| snapshot.drop_overload(&mut rng) == Some("test")).count();
    assert!((2300..2700).contains(&dropped), "{dropped}");
    let applied = rig.cluster.assignment_stale(rig.now);
    assert_eq!(applied.removed.len(), 1);
    assert_eq!(rig.stat("assignment_stale"), 1);
}

fn dns(kind: DiscoveryType, change: impl FnOnce(&mut pb::Cluster)) -> Rig {
    let mut proto = cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, vec![at("a.example", 80)])]);
    proto.cluster_discovery_type = Some(ClusterDiscoveryType::Type(kind as i32));
    proto.dns_refresh_rate = Some(seconds(10));
    change(&mut proto);
    Rig::new(&proto)
}

fn settings(rig: &Rig) -> &DnsSettings {
    match &rig.cluster.discovery {
        Discovery::Dns(settings) => settings,
        other => panic!("{other:?}"),
    }
}

fn records(octets: &[u8], ttl: u64) -> Result<Vec<DnsRecord>, DnsFailure> {
    let record =
        |octet: &u8| DnsRecord { address: IpAddr::from([10, 0, 0, *octet]), ttl: Duration::from_secs(ttl) };
    Ok(octets.iter().map(record).collect())
}

#[test]
fn strict_dns_makes_a_host_of_each_address() {
    let rig = dns(DiscoveryType::StrictDns, |_| {});
    let mut rng = fastrand::Rng::with_seed(1);
    let mut names = DnsDiscovery::new(settings(&rig), rig.now);
    let queries = names.due(rig.now);
    assert_eq!((queries.len(), queries[0].name, queries[0].family), (1, "a.example", LookupFamily::Auto));
    assert!(names.due(rig.now).is_empty() && names.next_due().is_none(), "one query at a time");

    let found = names.answered(0, records(&[1, 2], 3), rig.now, &mut rng).unwrap();
    assert_eq!(octets(&rig.cluster.apply(&found, rig.now).added), [1, 2]);
    let hosts = rig.hosts();
    assert_eq!(hosts[0].hostname(), "a.example");
    assert_eq!(
        names.next_due(),
        Some(rig.now + Duration::from_secs(10)),
        "the TTL is not respected by default"
    );

    let later = rig.now + Duration::from_secs(10);
    assert!(names.due(later - Duration::from_millis(1)).is_empty());
    assert_eq!(names.due(later).len(), 1);
    assert!(names.answered(0, Err(DnsFailure("timeout".into())), later, &mut rng).is_none(), "hosts stay");
    assert_eq!(names.next_due(), Some(later + Duration::from_secs(10)));

    names.due(later + Duration::from_secs(10));
    let found = names.answered(0, records(&[2, 3], 3), later, &mut rng).unwrap();
    let applied = rig.cluster.apply(&found, later);
    assert_eq!((octets(&applied.added), octets(&applied.removed)), (vec![3], vec![1]));
    assert!(Arc::ptr_eq(&hosts[1], &rig.hosts()[0]));
}

#[test]
fn ttl_back_off_and_jitter() {
    let rig = dns(DiscoveryType::StrictDns, |proto| {
        proto.respect_dns_ttl = true;
        proto.dns_failure_refresh_rate = Some(pb::cluster::RefreshRate {
            base_interval: Some(seconds(2)),
            max_interval: Some(seconds(8)),
        });
    });
    let mut rng = fastrand::Rng::with_seed(1);
    let mut names = DnsDiscovery::new(settings(&rig), rig.now);
    names.due(rig.now);
    names.answered(0, records(&[1], 3), rig.now, &mut rng);
    assert_eq!(names.next_due(), Some(rig.now + Duration::from_secs(3)));
    names.answered(0, records(&[1], 0), rig.now, &mut rng);
    assert_eq!(names.next_due(), Some(rig.now + Duration::from_secs(10)), "a TTL of zero is no TTL");
    for ceiling in [2, 4, 8, 8, 8] {
        names.answered(0, Err(DnsFailure("refused".into())), rig.now, &mut rng);
        let wait = names.next_due().unwrap() - rig.now;
        assert!(wait > Duration::ZERO && wait < Duration::from_secs(ceiling), "{wait:?} of {ceiling}");
    }
    let rig = dns(DiscoveryType::StrictDns, |proto| proto.dns_jitter = Some(seconds(4)));
    let mut names = DnsDiscovery::new(settings(&rig), rig.now);
    names.answered(0, records(&[1], 3), rig.now, &mut rng);
    let wait = names.next_due().unwrap() - rig.now;
    assert!((Duration::from_secs(10)..=Duration::from_secs(14)).contains(&wait), "{wait:?}");
}

#[test]
fn logical_dns_moves_its_one_host() {
    let rig = dns(DiscoveryType::LogicalDns, |_| {});
    let mut rng = fastrand::Rng::with_seed(1);
    let mut names = DnsDiscovery::new(settings(&rig), rig.now);
    let found = names.answered(0, records(&[1, 2], 3), rig.now, &mut rng).unwrap();
    rig.cluster.apply(&found, rig.now);
    let before = rig.hosts();
    assert_eq!((octets(&before), before[0].additional_addresses().len()), (vec![1], 1));
    let found = names.answered(0, records(&[9], 3), rig.now, &mut rng).unwrap();
    let applied = rig.cluster.apply(&found, rig.now);
    let after = rig.hosts();
    assert_eq!((octets(&after), after[0].id()), (vec![9], before[0].id()));
    assert!(applied.rebuilt && applied.added.is_empty() && applied.removed.is_empty());
}

#[test]
fn an_empty_answer_removes_hosts() {
    let rig = dns(DiscoveryType::StrictDns, |_| {});
    let mut rng = fastrand::Rng::with_seed(1);
    let mut names = DnsDiscovery::new(settings(&rig), rig.now);
    let found = names.answered(0, records(&[1], 3), rig.now, &mut rng).unwrap();
    rig.cluster.apply(&found, rig.now);
    let found = names.answered(0, Ok(Vec::new()), rig.now, &mut rng).unwrap();
    assert_eq!(rig.cluster.apply(&found, rig.now).removed.len(), 1);
}

/// The real resolver, for a name that every machine has in its hosts file.
#[test]
fn localhost_resolves_without_a_server() {
    use waystation_upstream::discovery::{HickoryResolver, Resolver, ResolverSettings};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let resolver = HickoryResolver::new(&ResolverSettings::default()).unwrap();
        for family in [LookupFamily::V4Only, LookupFamily::V4Preferred] {
            let found = resolver.resolve("localhost", family).await.unwrap();
            assert!(found.iter().any(|record| record.address == IpAddr::from([127, 0, 0, 1])), "{found:?}");
        }
    });
}

/// The driver: first answer, then a later one, with time that only moves when everything waits.
#[test]
fn the_driver_applies_answers() {
    use waystation_upstream::discovery::{Resolve, Resolver, drive};
    struct Fixed;
    impl Resolver for Fixed {
        fn resolve<'a>(&'a self, _: &'a str, _: LookupFamily) -> Resolve<'a> {
            Box::pin(std::future::ready(records(&[4], 60)))
        }
    }
    let rig = dns(DiscoveryType::StrictDns, |_| {});
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (tx, mut rx) = tokio::sync::mpsc::channel(4);
        tokio::select! {
            () = drive(&rig.cluster, &Fixed, |applied| { let _ = tx.try_send(applied); }) => panic!("it never ends"),
            applied = rx.recv() => assert_eq!(octets(&applied.unwrap().added), [4]),
        }
    });
    assert_eq!((rig.stat("update_attempt"), rig.stat("update_success")), (1, 1));
}

fn original_dst(config: pb::cluster::OriginalDstLbConfig) -> Rig {
    let mut proto = cluster(LbPolicy::ClusterProvided, Vec::new());
    proto.load_assignment = None;
    proto.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst as i32));
    proto.lb_config = Some(pb::cluster::LbConfig::OriginalDstLbConfig(config));
    Rig::new(&proto)
}

#[test]
fn original_destinations_become_hosts_and_are_forgotten() {
    let mut rig = original_dst(Default::default());
    let local = Address::Ip(([10, 0, 0, 9], 80).into());
    let given = OriginalDestination { local_address: Some(&local), ..Default::default() };
    let cx = PickContext { original_destination: Some(given), ..PickContext::default() };
    let first = rig.pick(&cx).unwrap().clone();
    assert_eq!(first.address(), &local);
    assert!(Arc::ptr_eq(&first, rig.pick(&cx).unwrap()));
    assert_eq!(rig.pick(&PickContext::default()).unwrap_err(), NoHost::InvalidOriginalDestination);
    assert_eq!(rig.stat("original_dst_host_invalid"), 1);
    let cluster = Arc::clone(&rig.cluster);
    let Discovery::OriginalDst(hosts) = &cluster.discovery else { panic!() };
    assert!(hosts.clean_up(&cluster).is_empty(), "used since");
    let connection = Rc::new(HostRef(first.clone())).begin_connection();
    assert!(hosts.clean_up(&cluster).is_empty(), "connected");
    drop(connection);
    assert_eq!(hosts.clean_up(&cluster).len(), 1);
    assert!(!Arc::ptr_eq(&first, rig.pick(&cx).unwrap()), "made anew");
}

#[test]
fn a_header_and_a_port_name_the_destination() {
    let mut rig = original_dst(pb::cluster::OriginalDstLbConfig {
        use_http_header: true,
        upstream_port_override: Some(wkt::UInt32Value { value: 8443 }),
        ..Default::default()
    });
    let Discovery::OriginalDst(config) = &rig.cluster.discovery else { panic!() };
    assert_eq!(config.header(), Some("x-envoy-original-dst-host"));
    let mut pick = |header: &[u8]| {
        let given = OriginalDestination { header: Some(header), ..Default::default() };
        let cx = PickContext { original_destination: Some(given), ..PickContext::default() };
        rig.pick(&cx).map(|host| host.address().to_string())
    };
    assert_eq!(pick(b"10.1.2.3:80").unwrap(), "10.1.2.3:8443");
    for bad in [&b"nonsense"[..], b"10.1.2.3", b"\xff"] {
        assert_eq!(pick(bad), Err(NoHost::InvalidOriginalDestination));
    }
}

#[test]
fn the_bootstraps_resolver_is_for_clusters_without_their_own() {
    use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap;
    use waystation_upstream::discovery::ResolverSettings;
    let server = |text: &str| {
        let socket = core::SocketAddress {
            address: text.into(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(53)),
            ..Default::default()
        };
        core::Address { address: Some(core::address::Address::SocketAddress(socket)) }
    };
    let proto = Bootstrap {
        dns_resolution_config: Some(core::DnsResolutionConfig {
            resolvers: vec![server("10.0.0.1")],
            ..Default::default()
        }),
        ..Default::default()
    };
    let resolver = ResolverSettings::of_bootstrap(&proto).unwrap();
    assert_eq!(resolver.servers, ["10.0.0.1:53".parse().unwrap()]);
    let tcp = Bootstrap { use_tcp_for_dns_lookups: true, ..Default::default() };
    assert!(ResolverSettings::of_bootstrap(&tcp).unwrap().tcp);
    let named = Bootstrap {
        dns_resolution_config: Some(core::DnsResolutionConfig {
            resolvers: vec![server("not an address")],
            ..Default::default()
        }),
        ..Default::default()
    };
    let path = ResolverSettings::of_bootstrap(&named).unwrap_err().path();
    assert_eq!(path, "dns_resolution_config.resolvers[0]");

    let environment = Arc::new(Environment {
        runtime: Runtime::new(),
        locality: Locality::default(),
        local_cluster: None,
        bind: None,
        resolver,
        outliers: Arc::new(|_| {}),
    });
    let resolver_of = |change: &dyn Fn(&mut pb::Cluster)| {
        let mut proto = cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, vec![at("a.example", 80)])]);
        proto.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::StrictDns as i32));
        change(&mut proto);
        let rig = Rig::within(&proto, &environment);
        settings(&rig).resolver.clone()
    };
    assert_eq!(resolver_of(&|_| {}), environment.resolver);
    // Envoy gives a cluster a resolver of its own for servers only.
    assert_eq!(resolver_of(&|proto| proto.use_tcp_for_dns_lookups = true), environment.resolver);
    let options = core::DnsResolutionConfig {
        dns_resolver_options: Some(core::DnsResolverOptions {
            use_tcp_for_dns_lookups: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(
        resolver_of(&|proto| proto.dns_resolution_config = Some(options.clone())),
        environment.resolver
    );
    let own = resolver_of(&|proto| proto.dns_resolvers = vec![server("10.0.0.2")]);
    assert_eq!(own.servers, ["10.0.0.2:53".parse().unwrap()]);
}

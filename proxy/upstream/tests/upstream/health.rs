//! Hosts under active health checks: what a cluster makes of verdicts and of discovery together.

use std::time::Instant;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as ep;
use envoy_types::pb::google::protobuf as wkt;
use waystation_upstream::discovery::Assignment;
use waystation_upstream::health_check::{Answer, Failure, Session};
use waystation_upstream::{Health, PickContext};

use crate::support::{Rig, assignment, cluster, endpoint, locality, seconds};

const GOOD: Answer = Answer::Healthy { degraded: false };
const BAD: Answer = Answer::Failed(Failure::Active { retriable: false, excluded: false, status: 500 });

/// A cluster of these hosts under checks.
fn checked(octets: &[u8], change: impl FnOnce(&mut pb::Cluster)) -> Rig {
    let mut proto = cluster(pb::cluster::LbPolicy::RoundRobin, vec![all(octets)]);
    proto.health_checks.push(core::HealthCheck {
        timeout: Some(seconds(1)),
        interval: Some(seconds(1)),
        unhealthy_threshold: Some(wkt::UInt32Value { value: 1 }),
        healthy_threshold: Some(wkt::UInt32Value { value: 1 }),
        ..core::HealthCheck::default()
    });
    change(&mut proto);
    Rig::new(&proto)
}

fn all(octets: &[u8]) -> ep::LocalityLbEndpoints {
    locality("", 0, 0, octets.iter().map(|octet| endpoint(*octet)).collect())
}

impl Rig {
    /// The host `10.0.0.octet` answers a check.
    fn answer(&mut self, octet: u8, answer: Answer) {
        let host = self.hosts().into_iter().find(|host| crate::support::last_octet(host) == octet).unwrap();
        let settings = &self.cluster.health_check.as_ref().unwrap().settings;
        let mut session = Session::new(settings, &mut self.rng, self.now);
        let verdict = session.answered(settings, answer, host.flags(), false, &mut self.rng, Instant::now());
        host.judge(&verdict, self.now);
        if verdict.changed {
            self.cluster.refresh();
        }
    }

    fn discover(&self, octets: &[u8]) {
        self.cluster.apply_eds(&assignment(vec![all(octets)]), self.now).unwrap();
    }

    fn flags(&self) -> Vec<(u8, String)> {
        self.hosts().iter().map(|host| (crate::support::last_octet(host), host.health_flags())).collect()
    }
}

#[test]
fn hosts_serve_when_they_have_passed() {
    let mut rig = checked(&[1, 2, 3, 4], |_| ());
    assert_eq!((rig.stat("membership_total"), rig.stat("membership_healthy")), (4, 0));
    for octet in 1..4 {
        rig.answer(octet, GOOD);
    }
    rig.answer(4, BAD);
    assert_eq!(rig.stat("membership_healthy"), 3);
    let spread = rig.spread(&PickContext::default(), 30);
    assert_eq!(spread.into_iter().collect::<Vec<_>>(), [(1, 10), (2, 10), (3, 10)]);
}

#[test]
fn unchecked_hosts_are_excluded_if_so_configured() {
    let mut rig = checked(&[1, 2], |proto| {
        let common = proto.common_lb_config.get_or_insert_default();
        common.ignore_new_hosts_until_first_hc = true;
    });
    assert_eq!(rig.stat("membership_excluded"), 2);
    assert_eq!(rig.flags()[0].1, "/failed_active_hc/pending_active_hc");
    rig.answer(1, BAD);
    assert_eq!(rig.stat("membership_excluded"), 1);
}

#[test]
fn removed_hosts_stay_while_they_pass() {
    let mut rig = checked(&[1, 2], |_| ());
    rig.answer(1, GOOD);
    rig.answer(2, BAD);
    rig.discover(&[3]);
    let failed = "/failed_active_hc".to_owned();
    assert_eq!(rig.flags(), [(3, failed.clone()), (1, "/pending_dynamic_removal".to_owned())]);
    rig.cluster.drop_removed();
    assert_eq!(rig.hosts().len(), 2, "it still passes");
    rig.answer(1, BAD);
    rig.cluster.drop_removed();
    assert_eq!(rig.flags(), [(3, failed)]);
}

#[test]
fn removed_hosts_come_back_as_they_were() {
    let mut rig = checked(&[1], |_| ());
    rig.answer(1, GOOD);
    let id = rig.hosts()[0].id();
    rig.discover(&[2]);
    rig.discover(&[1, 2]);
    assert_eq!(rig.hosts()[0].id(), id);
    assert_eq!(rig.flags()[0], (1, "healthy".to_owned()));
}

#[test]
fn removed_hosts_go_at_once_if_so_configured() {
    let mut rig = checked(&[1], |proto| proto.ignore_health_on_host_removal = true);
    rig.answer(1, GOOD);
    rig.discover(&[2]);
    assert_eq!(rig.flags().len(), 1);
}

/// The one host of a LOGICAL_DNS cluster is the same wherever its name leads: a new address does not take it out of service.
#[test]
fn a_logical_host_keeps_its_health() {
    let mut rig = checked(&[1], |proto| {
        let kind = pb::cluster::DiscoveryType::LogicalDns as i32;
        proto.cluster_discovery_type = Some(pb::cluster::ClusterDiscoveryType::Type(kind));
        proto.load_assignment =
            Some(assignment(vec![locality("", 0, 0, vec![crate::support::at("a.test", 80)])]));
    });
    let resolved = |octet| Assignment::compile(&assignment(vec![all(&[octet])])).unwrap();
    rig.cluster.apply(&resolved(1), rig.now);
    assert_eq!(rig.flags(), [(1, "/failed_active_hc".to_owned())]);
    rig.answer(1, GOOD);
    rig.cluster.apply(&resolved(2), rig.now);
    assert_eq!(rig.flags(), [(2, "healthy".to_owned())]);
}

#[test]
fn where_a_host_is_checked_is_part_of_what_it_is() {
    let mut rig = checked(&[1], |_| ());
    rig.answer(1, GOOD);
    let id = rig.hosts()[0].id();
    let with = |config: ep::endpoint::HealthCheckConfig| {
        let mut endpoint = endpoint(1);
        if let Some(ep::lb_endpoint::HostIdentifier::Endpoint(inner)) = &mut endpoint.host_identifier {
            inner.health_check_config = Some(config);
        }
        rig.cluster.apply_eds(&assignment(vec![locality("", 0, 0, vec![endpoint])]), rig.now).unwrap();
        let host = rig.hosts().remove(0);
        (host.id() == id, host.health(), host.health_check_address().to_string())
    };
    let config = ep::endpoint::HealthCheckConfig::default;
    let named = with(ep::endpoint::HealthCheckConfig { hostname: "a.test".into(), ..config() });
    assert_eq!(named, (true, Health::Healthy, "10.0.0.1:80".to_owned()));
    let elsewhere = with(ep::endpoint::HealthCheckConfig { port_value: 81, ..config() });
    assert_eq!(elsewhere, (false, Health::Unhealthy, "10.0.0.1:81".to_owned()));
    let unchecked = ep::endpoint::HealthCheckConfig { disable_active_health_check: true, ..config() };
    assert_eq!(with(unchecked).1, Health::Healthy, "nobody asks it");
}

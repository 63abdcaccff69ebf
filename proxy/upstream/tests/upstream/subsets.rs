//! Subsets: the table of Envoy's documentation ("Load Balancer Subsets", examples), and every fallback.

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::LbPolicy;
use envoy_types::pb::envoy::config::cluster::v3::cluster::lb_subset_config::{
    LbSubsetFallbackPolicy as Fallback, LbSubsetSelector,
    lb_subset_selector::LbSubsetSelectorFallbackPolicy as Own,
};
use envoy_types::pb::envoy::config::endpoint::v3 as ep;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::value::{Struct, Value};
use waystation_upstream::{MetadataMatch, PickContext};

use crate::support::{Rig, cluster, endpoint, locality, object, with_metadata};

/// Hosts 1 to 7 are e1 to e7 of the documentation.
fn documented_endpoints() -> Vec<ep::LbEndpoint> {
    let host = |octet, stage, version, kind, extra: &[(&str, &str)]| {
        let mut fields = vec![("stage", stage), ("version", version), ("type", kind)];
        fields.extend(extra);
        with_metadata(endpoint(octet), "envoy.lb", &fields)
    };
    vec![
        host(1, "prod", "1.0", "std", &[]),
        host(2, "prod", "1.0", "std", &[]),
        host(3, "prod", "1.1", "std", &[]),
        host(4, "prod", "1.1", "std", &[]),
        host(5, "prod", "1.0", "bigmem", &[]),
        host(6, "prod", "1.1", "bigmem", &[]),
        host(7, "dev", "1.2-pre", "std", &[("xlarge", "true")]),
    ]
}

fn selector(keys: &[&str]) -> LbSubsetSelector {
    LbSubsetSelector {
        keys: keys.iter().map(|key| (*key).to_owned()).collect(),
        ..LbSubsetSelector::default()
    }
}

fn documented() -> pb::cluster::LbSubsetConfig {
    pb::cluster::LbSubsetConfig {
        fallback_policy: Fallback::DefaultSubset as i32,
        default_subset: Some(object(&[("stage", "prod"), ("version", "1.0"), ("type", "std")])),
        subset_selectors: vec![
            selector(&["stage", "type"]),
            selector(&["stage", "version"]),
            selector(&["version"]),
            selector(&["xlarge", "version"]),
        ],
        ..Default::default()
    }
}

fn rig(config: pb::cluster::LbSubsetConfig) -> Rig {
    let mut proto = cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, documented_endpoints())]);
    proto.lb_subset_config = Some(config);
    Rig::new(&proto)
}

fn wanted(fields: &[(&str, &str)]) -> MetadataMatch {
    let fields: Struct =
        fields.iter().map(|(key, value)| ((*key).into(), Value::String((*value).into()))).collect();
    MetadataMatch::compile(&fields).unwrap().unwrap()
}

fn found(rig: &mut Rig, fields: &[(&str, &str)]) -> Vec<u8> {
    let wanted = wanted(fields);
    let cx = PickContext { metadata_match: Some(&wanted), ..PickContext::default() };
    rig.spread(&cx, 40).into_keys().collect()
}

#[test]
fn documented_table() {
    let mut rig = rig(documented());
    type Row = (&'static [(&'static str, &'static str)], &'static [u8]);
    let table: [Row; 7] = [
        (&[("stage", "prod"), ("version", "1.0")], &[1, 2, 5]),
        (&[("stage", "prod"), ("version", "1.1")], &[3, 4, 6]),
        (&[("stage", "prod"), ("type", "std")], &[1, 2, 3, 4]),
        (&[("stage", "prod"), ("type", "bigmem")], &[5, 6]),
        (&[("stage", "dev"), ("type", "std")], &[7]),
        (&[("version", "1.2-pre")], &[7]),
        (&[("version", "1.2-pre"), ("xlarge", "true")], &[7]),
    ];
    for (fields, expected) in table {
        assert_eq!(found(&mut rig, fields), expected, "{fields:?}");
    }
    assert_eq!(rig.stat("lb_subsets_selected"), 280);
    // stage+type: 3, stage+version: 3, version: 3, xlarge+version: 1; each for a worker and for the main thread.
    assert_eq!(rig.stat("lb_subsets_active"), 2 * 10);
    assert_eq!(rig.stat("lb_subsets_fallback"), 0);
    // Keys without a selector, and no keys at all: the default subset.
    assert_eq!(found(&mut rig, &[("stage", "prod"), ("random", "value")]), [1, 2]);
    assert_eq!(rig.spread(&PickContext::default(), 40).into_keys().collect::<Vec<_>>(), [1, 2]);
    assert_eq!(rig.stat("lb_subsets_fallback"), 80);
}

#[test]
fn fallback_policies_of_the_cluster() {
    let mut none =
        rig(pb::cluster::LbSubsetConfig { fallback_policy: Fallback::NoFallback as i32, ..documented() });
    assert_eq!(found(&mut none, &[("version", "9")]), []);
    let mut any =
        rig(pb::cluster::LbSubsetConfig { fallback_policy: Fallback::AnyEndpoint as i32, ..documented() });
    assert_eq!(found(&mut any, &[("version", "9")]), [1, 2, 3, 4, 5, 6, 7]);
    // A default subset without hosts, with and without panic_mode_any.
    let empty =
        || pb::cluster::LbSubsetConfig { default_subset: Some(object(&[("stage", "gone")])), ..documented() };
    assert_eq!(found(&mut rig(empty()), &[("version", "9")]), []);
    let mut panic = rig(pb::cluster::LbSubsetConfig { panic_mode_any: true, ..empty() });
    assert_eq!(found(&mut panic, &[("version", "9")]), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(panic.stat("lb_subsets_fallback_panic"), 40);
}

#[test]
fn fallback_policies_of_a_selector() {
    let with = |policy: Own, keys: &[&str]| {
        let mut config = documented();
        config.fallback_policy = Fallback::NoFallback as i32;
        config.subset_selectors[1] = LbSubsetSelector {
            fallback_policy: policy as i32,
            fallback_keys_subset: keys.iter().map(|key| (*key).to_owned()).collect(),
            ..selector(&["stage", "version"])
        };
        rig(config)
    };
    let missing: &[(&str, &str)] = &[("stage", "test"), ("version", "1.1")];
    assert_eq!(found(&mut with(Own::NotDefined, &[]), missing), []);
    assert_eq!(found(&mut with(Own::NoFallback, &[]), missing), []);
    assert_eq!(found(&mut with(Own::AnyEndpoint, &[]), missing), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(found(&mut with(Own::DefaultSubset, &[]), missing), [1, 2]);
    assert_eq!(found(&mut with(Own::KeysSubset, &["version"]), missing), [3, 4, 6]);
    let mut proto = cluster(LbPolicy::RoundRobin, Vec::new());
    let mut config = documented();
    config.subset_selectors[0].fallback_policy = Own::KeysSubset as i32;
    config.subset_selectors[0].fallback_keys_subset = vec!["other".into()];
    proto.lb_subset_config = Some(config);
    let error = crate::support::compile(&proto).unwrap_err();
    assert_eq!(error.path(), "lb_subset_config.subset_selectors[0].fallback_keys_subset");
}

#[test]
fn a_fallback_list_is_tried_in_order() {
    let mut config = documented();
    config.metadata_fallback_policy = 1;
    config.fallback_policy = Fallback::NoFallback as i32;
    let mut rig = rig(config);
    let alternative = |version: &str| {
        let fields: Struct = [("version".into(), Value::String(version.into()))].into();
        Value::Struct(fields)
    };
    let fields: Struct = [
        ("stage".into(), Value::String("prod".into())),
        (
            "fallback_list".into(),
            Value::List(vec![alternative("2.0"), alternative("1.1"), alternative("1.0")]),
        ),
    ]
    .into();
    let wanted = MetadataMatch::compile(&fields).unwrap().unwrap();
    let cx = PickContext { metadata_match: Some(&wanted), ..PickContext::default() };
    assert_eq!(rig.spread(&cx, 40).into_keys().collect::<Vec<_>>(), [3, 4, 6]);
}

#[test]
fn lists_stand_for_any_of_their_values() {
    let values =
        ["1.0", "1.1"].map(|value| wkt::Value { kind: Some(wkt::value::Kind::StringValue(value.into())) });
    let list =
        wkt::Value { kind: Some(wkt::value::Kind::ListValue(wkt::ListValue { values: values.into() })) };
    let mut host = with_metadata(endpoint(1), "envoy.lb", &[]);
    let fields = host.metadata.as_mut().unwrap().filter_metadata.get_mut("envoy.lb").unwrap();
    fields.fields.insert("version".into(), list);
    let mut proto = cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, vec![host])]);
    let config = |list_as_any| pb::cluster::LbSubsetConfig {
        subset_selectors: vec![selector(&["version"])],
        list_as_any,
        ..Default::default()
    };
    for (list_as_any, expected) in [(true, &[1][..]), (false, &[])] {
        proto.lb_subset_config = Some(config(list_as_any));
        assert_eq!(found(&mut Rig::new(&proto), &[("version", "1.1")]), expected);
    }
}

#[test]
fn single_host_subsets_keep_one() {
    let mut config = documented();
    config.subset_selectors =
        vec![LbSubsetSelector { single_host_per_subset: true, ..selector(&["stage", "version"]) }];
    let mut rig = rig(config);
    assert_eq!(found(&mut rig, &[("stage", "prod"), ("version", "1.1")]), [3]);
    assert_eq!(rig.stat("lb_subsets_single_host_per_subset_duplicate"), 4);
}

#[test]
fn subsets_come_and_go_with_hosts() {
    let rig = rig(documented());
    assert_eq!((rig.stat("lb_subsets_created"), rig.stat("lb_subsets_removed")), (20, 0));
    let without_dev = documented_endpoints()[..6].to_vec();
    let update = crate::support::assignment(vec![locality("", 0, 0, without_dev)]);
    rig.cluster.apply_eds(&update, rig.now).unwrap();
    assert_eq!((rig.stat("lb_subsets_created"), rig.stat("lb_subsets_removed")), (20, 8));
    assert_eq!(rig.stat("lb_subsets_active"), 2 * 6);
}

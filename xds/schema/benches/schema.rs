//! Throughput of the walk and the transcoder, over a front proxy's bootstrap.

use std::fmt::Write as _;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use waystation_schema::{
    ConfigError, Finding, JsonStyle, Message, Place, TextOptions, Visitor, json_to_wire, walk, wire_to_json,
    yaml_to_wire,
};

struct Nothing;

impl Visitor for Nothing {
    fn found(&mut self, _: &Place<'_>, _: &Finding<'_>) -> Result<(), ConfigError> {
        Ok(())
    }
}

fn schema(criterion: &mut Criterion) {
    let bootstrap = Message::find("envoy.config.bootstrap.v3.Bootstrap").expect("it exists");
    let yaml = include_str!("bootstrap.yaml");
    let options = TextOptions::default();
    let wire = yaml_to_wire(bootstrap, yaml, options).expect("it is well-formed").wire;
    let mut json = String::new();
    wire_to_json(bootstrap, &wire, &mut json, JsonStyle::default()).expect("it is well-formed");

    let mut group = criterion.benchmark_group("schema");
    group.throughput(Throughput::Bytes(wire.len() as u64));
    group.bench_function("walk", |bencher| {
        bencher.iter(|| walk(bootstrap, black_box(&wire), &mut Nothing));
    });
    group.bench_function("wire_to_json", |bencher| {
        bencher.iter(|| {
            let mut out = String::new();
            wire_to_json(bootstrap, black_box(&wire), &mut out, JsonStyle::default()).map(|()| out)
        });
    });
    group.throughput(Throughput::Bytes(json.len() as u64));
    group.bench_function("json_to_wire", |bencher| {
        bencher.iter(|| json_to_wire(bootstrap, black_box(&json), options));
    });
    group.throughput(Throughput::Bytes(yaml.len() as u64));
    group.bench_function("yaml_to_wire", |bencher| {
        bencher.iter(|| yaml_to_wire(bootstrap, black_box(yaml), options));
    });
    group.finish();
}

/// What a large static configuration costs at start.
fn ten_thousand_clusters(criterion: &mut Criterion) {
    let bootstrap = Message::find("envoy.config.bootstrap.v3.Bootstrap").expect("it exists");
    let mut yaml = String::from("static_resources:\n  clusters:\n");
    for index in 0..10_000 {
        let _ = write!(
            yaml,
            "  - name: cluster-{index}\n    type: STATIC\n    connect_timeout: 1s\n    load_assignment:\n      \
             cluster_name: cluster-{index}\n      endpoints:\n      - lb_endpoints:\n        - endpoint: \
             {{address: {{socket_address: {{address: 10.0.0.1, port_value: 80}}}}}}\n"
        );
    }
    let options = TextOptions::default();
    let wire = yaml_to_wire(bootstrap, &yaml, options).expect("it is well-formed").wire;
    let mut json = String::new();
    wire_to_json(bootstrap, &wire, &mut json, JsonStyle::default()).expect("it is well-formed");

    let mut group = criterion.benchmark_group("ten_thousand_clusters");
    group.sample_size(10);
    group.bench_function("walk", |bencher| {
        bencher.iter(|| walk(bootstrap, black_box(&wire), &mut Nothing));
    });
    group.bench_function("json_to_wire", |bencher| {
        bencher.iter(|| json_to_wire(bootstrap, black_box(&json), options));
    });
    group.bench_function("yaml_to_wire", |bencher| {
        bencher.iter(|| yaml_to_wire(bootstrap, black_box(&yaml), options));
    });
    group.finish();
}

criterion_group!(benches, schema, ten_thousand_clusters);
criterion_main!(benches);

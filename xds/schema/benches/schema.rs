//! Throughput of the walk and the transcoder, over a front proxy's bootstrap.

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

criterion_group!(benches, schema);
criterion_main!(benches);

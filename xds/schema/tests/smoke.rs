//! Damaged input of every kind: errors, never a panic. The fuzz targets in `fuzz/` do the same for longer.

use fastrand::Rng;
use waystation_schema::{
    JsonStyle, Message, Policy, TextOptions, check, json_to_wire, merge, pb_text_to_wire,
    typed_struct_to_wire, wire_to_json, yaml_to_wire,
};

const YAML: &str = include_str!("../benches/bootstrap.yaml");
const ROUNDS: usize = 3000;

#[test]
fn damaged_input_never_panics() {
    let bootstrap = Message::find("envoy.config.bootstrap.v3.Bootstrap").expect("it exists");
    let wire = yaml_to_wire(bootstrap, YAML, TextOptions::default()).expect("it is well-formed").wire;
    let mut json = String::new();
    wire_to_json(bootstrap, &wire, &mut json, JsonStyle::default()).expect("it is well-formed");
    let proto_text = "node { id: \"a\" metadata { fields { key: 'x' value { number_value: 1e3 } } } }\n\
        static_resources { clusters: [{ name: \"c\" connect_timeout: < seconds: 1 > }] }";
    let options = TextOptions { allow_unknown: true };
    for seed in 0..ROUNDS {
        let mut rng = Rng::with_seed(seed as u64);
        let text = damaged(&mut rng, YAML.as_bytes());
        let _ = yaml_to_wire(bootstrap, &String::from_utf8_lossy(&text), options);
        let text = damaged(&mut rng, json.as_bytes());
        let _ = json_to_wire(bootstrap, &String::from_utf8_lossy(&text), options);
        let text = damaged(&mut rng, proto_text.as_bytes());
        let _ = pb_text_to_wire(bootstrap, &String::from_utf8_lossy(&text));
        for bytes in [damaged(&mut rng, &wire), (0..rng.usize(..64)).map(|_| rng.u8(..)).collect()] {
            try_wire(bootstrap, &bytes);
        }
    }
}

#[test]
fn random_bytes_as_any_type_never_panic() {
    let mut rng = Rng::with_seed(1);
    for message in Message::all() {
        for _ in 0..8 {
            let len = rng.usize(..48);
            let bytes: Vec<u8> =
                (0..len).map(|index| if index % 2 == 0 { rng.u8(..) & 0x7f } else { rng.u8(..8) }).collect();
            try_wire(message, &bytes);
        }
    }
}

fn try_wire(message: Message, bytes: &[u8]) {
    let mut out = String::new();
    let style = JsonStyle { with_defaults: true, ..JsonStyle::CONFIG_DUMP };
    let rendered = wire_to_json(message, bytes, &mut out, style);
    let _ = check(message, bytes, Policy { allow_unknown: true, allow_disallowed: true });
    let _ = typed_struct_to_wire(bytes, message);
    if let Ok(merged) = merge(message, bytes, bytes) {
        let _ = check(message, &merged, Policy::default());
    }
    // What is written as JSON is JSON; a string that is not UTF-8 is the only other outcome.
    if rendered.is_ok() {
        serde_json::from_str::<serde_json::Value>(&out).unwrap_or_else(|error| panic!("{error} in {out}"));
    }
}

/// A few bytes changed, removed, doubled or moved.
fn damaged(rng: &mut Rng, original: &[u8]) -> Vec<u8> {
    let mut bytes = original.to_vec();
    for _ in 0..rng.usize(1..6) {
        let at = rng.usize(..bytes.len());
        let until = (at + rng.usize(..20)).min(bytes.len());
        match rng.u8(..5) {
            0 => bytes[at] = rng.u8(..),
            1 => bytes[at] ^= 1 << rng.u8(..8),
            2 => {
                bytes.drain(at..until);
            }
            3 => {
                let piece = bytes[at..until].to_vec();
                let to = rng.usize(..bytes.len());
                bytes.splice(to..to, piece);
            }
            _ => bytes.truncate(at.max(1)),
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
    bytes
}

#![no_main]

use libfuzzer_sys::fuzz_target;
use waystation_schema::{JsonStyle, Message, TextOptions, json_to_wire, wire_to_json};

// What reads as a bootstrap can be written as JSON.
fuzz_target!(|text: &str| {
    let bootstrap = Message::find("envoy.config.bootstrap.v3.Bootstrap").expect("it exists");
    if let Ok(encoded) = json_to_wire(bootstrap, text, TextOptions { allow_unknown: true }) {
        let mut out = String::new();
        wire_to_json(bootstrap, &encoded.wire, &mut out, JsonStyle::default()).expect("our own wire bytes read");
    }
});

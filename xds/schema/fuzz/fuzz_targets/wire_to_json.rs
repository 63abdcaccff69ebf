#![no_main]

use libfuzzer_sys::fuzz_target;
use waystation_schema::{JsonStyle, Message, wire_to_json};

// The first two bytes choose the type.
fuzz_target!(|bytes: &[u8]| {
    if let [low, high, wire @ ..] = bytes {
        let index = usize::from(u16::from_le_bytes([*low, *high])) % Message::all().len();
        let message = Message::all().nth(index).expect("the index is in range");
        let mut out = String::new();
        let _ = wire_to_json(message, wire, &mut out, JsonStyle::CONFIG_DUMP);
    }
});

#![no_main]

use libfuzzer_sys::fuzz_target;
use waystation_schema::{Message, Policy, check, merge};

// The first two bytes choose the type.
fuzz_target!(|bytes: &[u8]| {
    if let [low, high, wire @ ..] = bytes {
        let index = usize::from(u16::from_le_bytes([*low, *high])) % Message::all().len();
        let message = Message::all().nth(index).expect("the index is in range");
        let _ = check(message, wire, Policy { allow_unknown: true, allow_disallowed: true });
        let _ = merge(message, wire, wire);
    }
});

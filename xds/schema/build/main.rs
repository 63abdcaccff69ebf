//! Writes the schema: flat read-only tables of every message of the Envoy API, with its validation rules and
//! its ledger, ready to be included in the binary as they are.

#[path = "../src/layout.rs"]
#[expect(dead_code, reason = "shared with the crate; each side uses its part")]
mod layout;
mod ledger;
mod protos;
mod rules;
mod tables;

use std::env;
use std::fs;
use std::path::PathBuf;

fn main() {
    for path in ["build", "src/layout.rs", "ledger.txt"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let protos = protos::compile();
    let pool = protos.pool;
    let ledger = ledger::read("ledger.txt", &pool).unwrap_or_else(|error| {
        println!("cargo::error=ledger.txt:{error}");
        std::process::exit(1);
    });
    let tables = tables::build(&pool, &ledger);
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo::rustc-env=ENVOY_TYPES_VERSION={}", protos.version);
    fs::write(out.join("schema.bin"), &tables.blob).expect("OUT_DIR is writable");
    fs::write(out.join("sections.rs"), &tables.sections).expect("OUT_DIR is writable");
    // The oracle of the tests.
    fs::write(out.join("schema.fds"), pool.encode_to_vec()).expect("OUT_DIR is writable");
}

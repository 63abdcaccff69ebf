//! The schema costs nothing at start, and a walk that finds nothing costs no memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::OnceLock;

use waystation_schema::{ConfigError, Finding, Message, Place, TextOptions, Visitor, walk, yaml_to_wire};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations_of(f: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.with(Cell::get);
    f();
    ALLOCATIONS.with(Cell::get) - before
}

struct Nothing;

impl Visitor for Nothing {
    fn found(&mut self, place: &Place<'_>, finding: &Finding<'_>) -> Result<(), ConfigError> {
        panic!("{place}: {finding:?}");
    }
}

#[test]
fn looking_a_type_up_allocates_nothing() {
    let found = allocations_of(|| {
        let cluster = Message::find("envoy.config.cluster.v3.Cluster").expect("it exists");
        let field = cluster.field_by_name("connectTimeout").expect("it exists");
        assert_eq!(field.message().map(Message::full_name), Some("google.protobuf.Duration"));
        assert!(Message::find_by_url("type.googleapis.com/envoy.config.cluster.v3.Cluster").is_some());
    });
    assert_eq!(found, 0);
    let size = waystation_schema::table_size();
    assert!(size < 700_000, "the tables have grown to {size} bytes");
}

#[test]
fn the_tables_are_of_the_locked_protos() {
    let lock = include_str!("../../../Cargo.lock");
    let package = lock.split("[[package]]").find(|package| package.contains("\nname = \"envoy-types\"\n"));
    let version = format!("\nversion = \"{}\"\n", waystation_schema::ENVOY_TYPES_VERSION);
    // Cargo does not run the build script again for another version of a crate that it only reads.
    assert!(
        package.is_some_and(|package| package.contains(&version)),
        "touch xds/schema/ledger.txt and build again"
    );
}

#[test]
fn a_walk_without_findings_allocates_nothing() {
    static WIRE: OnceLock<Vec<u8>> = OnceLock::new();
    let bootstrap = Message::find("envoy.config.bootstrap.v3.Bootstrap").expect("it exists");
    let wire = WIRE.get_or_init(|| {
        let text = include_str!("../benches/bootstrap.yaml");
        yaml_to_wire(bootstrap, text, TextOptions::default()).expect("it is well-formed").wire
    });
    // The first walk compiles the regular expressions that its rules need.
    walk(bootstrap, wire, &mut Nothing).expect("there is nothing to find");
    let found = allocations_of(|| walk(bootstrap, wire, &mut Nothing).expect("there is nothing to find"));
    assert_eq!(found, 0);
}

//! `waystation`: a proxy that stands wherever an `envoy` binary stands.

use std::process::ExitCode;

/// An HTTP/2 request allocates some thirty times, in the HTTP/2 library and its header maps: with the C library's
/// allocator that was a seventh of all instructions.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    waystation::cli::main(std::env::args_os())
}

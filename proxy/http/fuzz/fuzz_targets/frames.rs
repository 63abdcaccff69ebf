//! HTTP/2 frames watched from beside the codec: no panic, and the same wherever the bytes are cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use waystation_http::h2::{Frame, FrameGuard, FrameLimits};

fn watch(pieces: [&[u8]; 2], server: bool) -> (Vec<Frame>, String, Vec<u32>) {
    let limits = FrameLimits::default();
    let mut guard = if server { FrameGuard::server(limits) } else { FrameGuard::client(limits) };
    let mut seen = Vec::new();
    for piece in pieces {
        guard.sent(piece, |frame| seen.push(frame));
    }
    let mut ended = String::new();
    for piece in pieces {
        if ended.is_empty()
            && let Err(flood) = guard.received(piece, |frame| seen.push(frame))
        {
            ended = flood.to_string();
        }
    }
    guard.would_refuse(pieces, 1);
    (seen, ended, guard.untaken().collect())
}

fuzz_target!(|input: (u16, bool, &[u8])| {
    let (cut, server, bytes) = input;
    let (left, right) = bytes.split_at(usize::from(cut).min(bytes.len()));
    assert_eq!(watch([bytes, b""], server), watch([left, right], server));
});

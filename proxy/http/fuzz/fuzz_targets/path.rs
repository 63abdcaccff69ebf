//! Path normalisation: no panic, no dot segment left, the query untouched.
#![no_main]

use libfuzzer_sys::fuzz_target;
use waystation_http::{EscapedSlashes, PathOptions, PathOutcome, normalize_path};

fuzz_target!(|bytes: &[u8]| {
    let options = PathOptions {
        normalize: true,
        merge_slashes: true,
        escaped_slashes: EscapedSlashes::UnescapeAndForward,
    };
    if let PathOutcome::Changed(path) = normalize_path(bytes, options) {
        let end = path.iter().position(|byte| *byte == b'?').unwrap_or(path.len());
        assert!(path[..end].split(|byte| *byte == b'/').all(|segment| segment != b"." && segment != b".."));
        let query = bytes.iter().position(|byte| *byte == b'?').map(|start| &bytes[start..]);
        assert_eq!(query.unwrap_or_default(), &path[end..]);
    }
});

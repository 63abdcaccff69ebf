//! Every row was produced by Envoy 1.40.0.

use super::*;

#[derive(Debug, PartialEq)]
enum Want {
    Same,
    Path(&'static str),
    Redirect(&'static str),
    Reject,
}
use Want::{Path, Redirect, Reject, Same};

fn check(options: PathOptions, rows: &[(&str, Want)]) {
    for (path, want) in rows {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        match (normalize_path(path.as_bytes(), options), want) {
            (PathOutcome::Unchanged, Same) | (PathOutcome::Reject, Reject) => {}
            (PathOutcome::Changed(got), Path(want)) => assert_eq!(text(got), *want, "{path}"),
            (PathOutcome::Redirect(got), Redirect(want)) => assert_eq!(text(got), *want, "{path}"),
            (got, want) => panic!("{path}: {got:?}, not {want:?}"),
        }
    }
}

#[test]
fn everything_on() {
    let options = PathOptions {
        normalize: true,
        merge_slashes: true,
        escaped_slashes: EscapedSlashes::UnescapeAndRedirect,
    };
    check(
        options,
        &[
            ("/a//b", Path("/a/b")),
            ("/a/./b", Path("/a/b")),
            ("/a\\b", Path("/a/b")),
            ("/a/../b", Path("/b")),
            ("/a/%2e%2e/b", Path("/b")),
            ("/../x", Path("/x")),
            ("/a/..;/b", Path("/b")),
            ("/%41", Path("/A")),
            ("/%zz", Same),
            ("/a;x=1/b", Same),
            ("//", Same),
            ("/a%2fb", Redirect("/a/b")),
            ("/a%5cb", Redirect("/a/b")),
            ("/a%00b", Reject),
            ("/a/b/..", Path("/a/")),
            ("/a/b/.", Path("/a/b/")),
            ("/.", Path("/")),
            ("/..", Path("/")),
            ("/a/...", Same),
            ("/%2E", Path("/")),
            ("/a%2F%2fb", Redirect("/a/b")),
            ("/a?b//c/../d", Same),
            ("/a%2fb?x=%2f", Redirect("/a/b?x=%2f")),
            ("/a%5Cb", Redirect("/a/b")),
            ("/a%2f..%2fb", Redirect("/b")),
            ("/%7e", Path("/~")),
            ("/%20", Same),
            ("/a%e9", Same),
            ("/a\"b", Path("/a%22b")),
            ("/a<b", Path("/a%3Cb")),
            ("/a[b", Same),
            ("/a^b", Path("/a%5Eb")),
            ("/a|b", Path("/a%7Cb")),
            ("/a`b", Path("/a%60b")),
            ("/a{b", Path("/a%7Bb")),
            ("//a", Path("/a")),
            ("///a//b/", Path("/a/b/")),
            ("/a/%2e/b", Path("/a/b")),
            ("/a/.%2e/b", Path("/b")),
            ("/a/..;x=1/b", Path("/b")),
            ("/a/..;", Path("/")),
            ("/a/.;/b", Path("/a/b")),
            ("/%", Same),
            ("/%4", Same),
            ("/a%25b", Same),
            ("/a\\..\\b", Path("/b")),
            ("/%5c%2e%2e", Redirect("/")),
            ("/a%2F/../b", Redirect("/a/b")),
            ("/%2f", Redirect("//")),
            ("/a/%2E%2E%2fb", Redirect("/b")),
            ("/./", Path("/")),
            ("/a/./", Path("/a/")),
            ("/a/../", Path("/")),
            ("/..;/..;/x", Path("/x")),
            ("/%0d%0a", Same),
            ("/%7f", Same),
            ("/%3f", Same),
            ("/%23", Same),
            ("/a/%2e%2e;/b", Path("/a/..;/b")),
            ("/x/..;a/b;/c", Path("/b;/c")),
            ("/a;/../b", Path("/b")),
            ("/*", Same),
            ("/%c3%a9", Same),
            ("/A%2dB%5fC%2E", Path("/A-B_C.")),
            ("/a;b/../c", Path("/c")),
            ("/;/../x", Path("/x")),
            ("/a%2520b", Same),
        ],
    );
}

#[test]
fn without_merging() {
    let options = PathOptions {
        normalize: true,
        merge_slashes: false,
        escaped_slashes: EscapedSlashes::UnescapeAndForward,
    };
    check(
        options,
        &[
            ("/a//b", Same),
            ("/a/./b", Path("/a/b")),
            ("/a\\b", Path("/a/b")),
            ("/a/../b", Path("/b")),
            ("/a/%2e%2e/b", Path("/b")),
            ("/../x", Path("/x")),
            ("/a/..;/b", Path("/b")),
            ("/%41", Path("/A")),
            ("/%zz", Same),
            ("/a;x=1/b", Same),
            ("//", Same),
            ("/a%2fb", Path("/a/b")),
            ("/a%5cb", Path("/a/b")),
            ("/a%00b", Reject),
            ("/a/b/..", Path("/a/")),
            ("/a/b/.", Path("/a/b/")),
            ("/.", Path("/")),
            ("/..", Path("/")),
            ("/a/...", Same),
            ("/%2E", Path("/")),
            ("/a%2F%2fb", Path("/a//b")),
            ("/a?b//c/../d", Same),
            ("/a%2fb?x=%2f", Path("/a/b?x=%2f")),
            ("/a%5Cb", Path("/a/b")),
            ("/a%2f..%2fb", Path("/b")),
            ("/%7e", Path("/~")),
            ("/%20", Same),
            ("/a%e9", Same),
            ("/a\"b", Path("/a%22b")),
            ("/a<b", Path("/a%3Cb")),
            ("/a[b", Same),
            ("/a^b", Path("/a%5Eb")),
            ("/a|b", Path("/a%7Cb")),
            ("/a`b", Path("/a%60b")),
            ("/a{b", Path("/a%7Bb")),
            ("//a", Same),
            ("///a//b/", Same),
            ("/a/%2e/b", Path("/a/b")),
            ("/a/.%2e/b", Path("/b")),
            ("/a/..;x=1/b", Path("/b")),
            ("/a/..;", Path("/")),
            ("/a/.;/b", Path("/a/b")),
            ("/%", Same),
            ("/%4", Same),
            ("/a%25b", Same),
            ("/a\\..\\b", Path("/b")),
            ("/%5c%2e%2e", Path("/")),
            ("/a%2F/../b", Path("/a/b")),
            ("/%2f", Path("//")),
            ("/a/%2E%2E%2fb", Path("/b")),
            ("/./", Path("/")),
            ("/a/./", Path("/a/")),
            ("/a/../", Path("/")),
            ("/..;/..;/x", Path("/x")),
            ("/%0d%0a", Same),
            ("/%7f", Same),
            ("/%3f", Same),
            ("/%23", Same),
            ("/a/%2e%2e;/b", Path("/a/..;/b")),
            ("/x/..;a/b;/c", Path("/b;/c")),
            ("/a;/../b", Path("/b")),
            ("/*", Same),
            ("/%c3%a9", Same),
            ("/A%2dB%5fC%2E", Path("/A-B_C.")),
            ("/a;b/../c", Path("/c")),
            ("/;/../x", Path("/x")),
            ("/a%2520b", Same),
        ],
    );
}

#[test]
fn merging_only() {
    let options =
        PathOptions { normalize: false, merge_slashes: true, escaped_slashes: EscapedSlashes::Reject };
    check(
        options,
        &[
            ("/a//b", Path("/a/b")),
            ("/a/./b", Same),
            ("/a\\b", Same),
            ("/a/../b", Same),
            ("/a/%2e%2e/b", Same),
            ("/../x", Same),
            ("/a/..;/b", Same),
            ("/%41", Same),
            ("/%zz", Same),
            ("/a;x=1/b", Same),
            ("//", Same),
            ("/a%2fb", Reject),
            ("/a%5cb", Reject),
            ("/a%00b", Same),
            ("/a/b/..", Same),
            ("/a/b/.", Same),
            ("/.", Same),
            ("/..", Same),
            ("/a/...", Same),
            ("/%2E", Same),
            ("/a%2F%2fb", Reject),
            ("/a?b//c/../d", Same),
            ("/a%2fb?x=%2f", Reject),
            ("/a%5Cb", Reject),
            ("/a%2f..%2fb", Reject),
            ("/%7e", Same),
            ("/%20", Same),
            ("/a%e9", Same),
            ("/a\"b", Same),
            ("/a<b", Same),
            ("/a[b", Same),
            ("/a^b", Same),
            ("/a|b", Same),
            ("/a`b", Same),
            ("/a{b", Same),
            ("//a", Path("/a")),
            ("///a//b/", Path("/a/b/")),
            ("/a/%2e/b", Same),
            ("/a/.%2e/b", Same),
            ("/a/..;x=1/b", Same),
            ("/a/..;", Same),
            ("/a/.;/b", Same),
            ("/%", Same),
            ("/%4", Same),
            ("/a%25b", Same),
            ("/a\\..\\b", Same),
            ("/%5c%2e%2e", Reject),
            ("/a%2F/../b", Reject),
            ("/%2f", Reject),
            ("/a/%2E%2E%2fb", Reject),
            ("/./", Same),
            ("/a/./", Same),
            ("/a/../", Same),
            ("/..;/..;/x", Same),
            ("/%0d%0a", Same),
            ("/%7f", Same),
            ("/%3f", Same),
            ("/%23", Same),
            ("/a/%2e%2e;/b", Same),
            ("/x/..;a/b;/c", Same),
            ("/a;/../b", Same),
            ("/*", Same),
            ("/%c3%a9", Same),
            ("/A%2dB%5fC%2E", Same),
            ("/a;b/../c", Same),
            ("/;/../x", Same),
            ("/a%2520b", Same),
        ],
    );
}

#[test]
fn everything_off_changes_nothing_but_refuses_fragments() {
    let options = PathOptions::default();
    for path in ["/a//b", "/a/../b", "/a%2fb", "/%41", "*", "", "?q", "/a%00b"] {
        assert_eq!(normalize_path(path.as_bytes(), options), PathOutcome::Unchanged, "{path}");
    }
    for path in ["/a#b", "/a?b#c", "#"] {
        assert_eq!(normalize_path(path.as_bytes(), options), PathOutcome::Reject, "{path}");
    }
}

#[test]
fn normalizing_twice_changes_nothing_more() {
    let options = PathOptions {
        normalize: true,
        merge_slashes: true,
        escaped_slashes: EscapedSlashes::UnescapeAndForward,
    };
    let mut rng = fastrand::Rng::with_seed(7);
    let parts = ["/", "a", ".", "..", "%2e", "%2F", "%5c", "\\", ";", "%41", "%", "b", "{", "?"];
    for _ in 0..20_000 {
        let path: String = (0..8).map(|_| parts[rng.usize(..parts.len())]).collect();
        let path = format!("/{path}");
        if let PathOutcome::Changed(once) = normalize_path(path.as_bytes(), options) {
            // A dot segment that only its parameters or an escape kept from being one is not looked for again.
            if once.windows(2).any(|pair| pair == b".;") || once.contains(&b'%') {
                continue;
            }
            assert_eq!(normalize_path(&once, options), PathOutcome::Unchanged, "{path}");
        }
    }
}

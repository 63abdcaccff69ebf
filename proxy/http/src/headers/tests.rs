use super::*;

fn sample() -> Headers {
    [(":method", "GET"), (":path", "/"), ("x-a", "1"), ("accept", "*/*"), ("x-a", "2")].into_iter().collect()
}

fn list(headers: &Headers) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
}

#[test]
fn looks_up_known_and_other_names() {
    let headers = sample();
    assert_eq!(headers.len(), 5);
    assert_eq!(headers.get(Known::Path), Some(&b"/"[..]));
    assert_eq!(headers.get("accept"), Some(&b"*/*"[..]));
    assert_eq!(headers.get("x-a"), Some(&b"1"[..]));
    assert_eq!(headers.get_all("x-a").collect::<Vec<_>>(), [b"1", b"2"]);
    assert_eq!(headers.get_joined("x-a").unwrap(), &b"1,2"[..]);
    assert!(matches!(headers.get_joined("accept"), Some(Cow::Borrowed(b"*/*"))));
    assert_eq!(headers.get("x-b"), None);
    assert!(!headers.contains(Known::Host));
    assert!(headers.contains("x-a"));
    assert_eq!(headers.byte_size(), ":method:pathx-aacceptx-aGET/1*/*2".len());
}

#[test]
fn pseudo_headers_stand_first() {
    let mut headers = sample();
    headers.append(Known::Authority, "a");
    headers.set(Known::Scheme, "http");
    let names: Vec<String> = list(&headers).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, [":method", ":path", ":authority", ":scheme", "x-a", "accept", "x-a"]);
    assert_eq!(headers.iter_regular().count(), 3);
}

#[test]
fn set_replaces_the_first_and_drops_the_rest() {
    let mut headers = sample();
    headers.set("x-a", "longer than before");
    assert_eq!(headers.get_all("x-a").count(), 1);
    assert_eq!(list(&headers)[2], ("x-a".into(), "longer than before".into()));
    headers.set("x-a", "s");
    assert_eq!(headers.get("x-a"), Some(&b"s"[..]));
    headers.set("new", "v");
    assert_eq!(list(&headers).last().unwrap(), &("new".into(), "v".into()));
}

#[test]
fn remove_and_retain_keep_the_bit_set_right() {
    let mut headers = sample();
    assert!(headers.remove("x-a"));
    assert!(!headers.remove("x-a"));
    assert!(headers.remove(Known::Accept));
    assert!(!headers.contains(Known::Accept));
    assert_eq!(headers.get(Known::Accept), None);
    headers.append(Known::Accept, "a");
    headers.retain(|name, _| !name.is_pseudo());
    assert_eq!(list(&headers), [("accept".to_owned(), "a".to_owned())]);
    assert!(!headers.contains(Known::Method));
    assert!(headers.contains(Known::Accept));
}

#[test]
fn joined_values_grow_in_place_or_move() {
    let mut headers = Headers::new();
    headers.append_joined(Known::XForwardedFor, ",", "1.1.1.1");
    headers.append_joined(Known::XForwardedFor, ",", "2.2.2.2");
    headers.append("x", "y");
    headers.append_joined(Known::XForwardedFor, ", ", "3.3.3.3");
    assert_eq!(headers.get(Known::XForwardedFor), Some(&b"1.1.1.1,2.2.2.2, 3.3.3.3"[..]));
    headers.set("x", "");
    headers.append_joined("x", ",", "z");
    assert_eq!(headers.get("x"), Some(&b"z"[..]));
}

#[test]
fn typed_helpers() {
    let mut headers = Headers::new();
    assert_eq!(headers.status(), None);
    headers.set_status(204);
    assert_eq!(headers.status(), Some(204));
    headers.set(Known::Status, "2x4");
    assert_eq!(headers.status(), None);
    for (text, want) in
        [("0", Some(0)), ("42", Some(42)), ("+1", None), ("", None), ("18446744073709551616", None)]
    {
        headers.set(Known::ContentLength, text);
        assert_eq!(headers.content_length(), want, "{text}");
    }
    headers.set_number(Known::ContentLength, u64::MAX);
    assert_eq!(headers.content_length(), Some(u64::MAX));
}

#[test]
fn refilling_a_cleared_map_does_not_grow_it() {
    let mut headers = sample();
    let before = headers.capacity_bytes();
    for _ in 0..100 {
        headers.clear();
        headers.extend([("accept", "*/*"), ("x-a", "1"), ("x-b", "2")]);
    }
    assert_eq!(headers.capacity_bytes(), before);
    assert_eq!(headers.len(), 3);
}

#[test]
fn rewriting_a_header_forever_stays_bounded() {
    let mut headers = sample();
    headers.append_wire(b"X-Case", b"kept", true);
    headers.append_wire(b"Content-Type", b"text/plain", true);
    for length in 0..10_000 {
        headers.set("x-a", "v".repeat(length % 700));
        headers.remove("x-tmp");
        headers.append("x-tmp", "t".repeat(300));
    }
    assert!(headers.capacity_bytes() < 8192, "{}", headers.capacity_bytes());
    assert_eq!(headers.get("x-case"), Some(&b"kept"[..]));
    let spelled: Vec<&[u8]> = headers.iter_original_case().map(|(name, _)| name).collect();
    assert!(spelled.contains(&&b"X-Case"[..]) && spelled.contains(&&b"Content-Type"[..]));
}

#[test]
fn original_case_is_kept_only_on_request() {
    let mut headers = Headers::new();
    assert_eq!(headers.append_wire(b"Content-TYPE", b"a", true), Some(Known::ContentType));
    assert_eq!(headers.append_wire(b"X-Foo", b"b", true), None);
    assert_eq!(headers.append_wire(b"x-bar", b"c", true), None);
    assert_eq!(headers.append_wire(b"X-Baz", b"d", false), None);
    let names: Vec<&[u8]> = headers.iter_original_case().map(|(name, _)| name).collect();
    assert_eq!(names, [&b"Content-TYPE"[..], b"X-Foo", b"x-bar", b"x-baz"]);
    let lower: Vec<String> = list(&headers).into_iter().map(|(name, _)| name).collect();
    assert_eq!(lower, ["content-type", "x-foo", "x-bar", "x-baz"]);
}

#[test]
fn values_that_could_split_a_message_are_invalid() {
    assert!(is_valid_value(b"a\tb\xff"));
    for bad in [&b"a\0"[..], b"a\r", b"\nb"] {
        assert!(!is_valid_value(bad));
    }
}

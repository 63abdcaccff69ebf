use super::{Flood, Frame, FrameGuard, FrameLimits, Refusing, kind};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn server() -> FrameGuard {
    let mut guard = FrameGuard::server(FrameLimits::default());
    assert_eq!(receive(&mut guard, PREFACE), Ok(vec![]));
    guard
}

fn receive(guard: &mut FrameGuard, bytes: &[u8]) -> Result<Vec<Frame>, Flood> {
    let mut seen = Vec::new();
    guard.received(bytes, |frame| seen.push(frame)).map(|()| seen)
}

fn send(guard: &mut FrameGuard, bytes: &[u8]) -> Vec<Frame> {
    let mut seen = Vec::new();
    guard.sent(bytes, |frame| seen.push(frame));
    seen
}

fn times(count: usize, frame: &[u8]) -> Vec<u8> {
    frame.repeat(count)
}

#[test]
fn a_request_that_the_library_refuses_is_told_apart() {
    let mut guard = server();
    let reset = |stream, code: u32| frame(kind::RST_STREAM, 0, stream, &code.to_be_bytes());
    for stream in [1, 3, 5] {
        receive(&mut guard, &frame(kind::HEADERS, 5, stream, b"block")).unwrap();
    }
    guard.taken(1);
    assert_eq!(send(&mut guard, &reset(1, 1)), [Frame::Reset], "it was handed out: the reset is ours");
    let in_pieces = guard.would_refuse([&reset(3, 1)[..5], &reset(3, 1)[5..]], 1);
    assert_eq!(in_pieces, Some(Refusing { stream: 3, at: 0 }));
    assert_eq!(guard.would_refuse([&frame(kind::DATA, 0, 1, b"x")[..]], 1), None);
    let behind_another = [reset(3, 7), frame(kind::DATA, 0, 1, b"xyz"), reset(5, 1)].concat();
    let at = behind_another.len() - reset(5, 1).len();
    for cut in 0..behind_another.len() {
        let (first, second) = behind_another.split_at(cut);
        let found = guard.would_refuse([first, second], 1);
        assert_eq!(found, Some(Refusing { stream: 5, at }), "what goes before it may go, in pieces of {cut}");
    }
    assert_eq!(guard.would_refuse([&reset(3, 7)[..]], 1), None);
    assert_eq!(send(&mut guard, &reset(3, 1)), [Frame::Reset, Frame::Refusal { stream: 3, code: 1 }]);
    assert_eq!(guard.untaken().collect::<Vec<_>>(), [5]);
    assert_eq!(send(&mut guard, &frame(kind::HEADERS, 4, 5, b"431")), [Frame::Answer { stream: 5 }]);
    assert_eq!(guard.untaken().count(), 0);
    assert_eq!(send(&mut guard, &frame(kind::GOAWAY, 0, 0, &[0; 8])), [Frame::GoAway]);
    // One that the client takes back itself is nobody's refusal.
    receive(&mut guard, &frame(kind::HEADERS, 5, 7, b"block")).unwrap();
    assert_eq!(receive(&mut guard, &reset(7, 8)), Ok(vec![Frame::Reset]));
    assert_eq!(guard.untaken().count(), 0);
}

#[test]
fn trailers_are_heads_of_a_stream_that_is_known() {
    let mut guard = server();
    assert_eq!(receive(&mut guard, &frame(kind::HEADERS, 4, 1, b"head")), Ok(vec![]));
    assert_eq!(receive(&mut guard, &frame(kind::HEADERS, 5, 1, b"trailers")), Ok(vec![Frame::Trailers]));
}

#[test]
fn frames_without_payload() {
    let empty = frame(kind::DATA, 0, 1, b"");
    let mut guard = server();
    receive(&mut guard, &frame(kind::HEADERS, 4, 1, b"head")).unwrap();
    assert!(receive(&mut guard, &empty).is_ok(), "one is tolerated");
    assert!(receive(&mut guard, &frame(kind::DATA, 0, 1, b"x")).is_ok(), "and forgotten");
    assert!(receive(&mut guard, &empty).is_ok());
    assert_eq!(receive(&mut guard, &empty), Err(Flood::Empty));

    let mut guard = server();
    assert_eq!(receive(&mut guard, &times(2, &frame(kind::HEADERS, 1, 1, b""))), Ok(vec![Frame::Trailers]));
    let padding_only = frame(kind::DATA, 8, 1, &[3, 0, 0, 0]);
    assert_eq!(receive(&mut guard, &times(2, &padding_only)), Err(Flood::Empty));
    let mut guard = server();
    let padded = frame(kind::DATA, 8, 1, &[3, b'x', 0, 0, 0]);
    assert!(receive(&mut guard, &times(9, &padded)).is_ok());
    let continued = frame(kind::CONTINUATION, 0, 1, b"");
    assert_eq!(receive(&mut guard, &times(2, &continued)), Err(Flood::Empty));
}

#[test]
fn priorities_are_counted_against_streams() {
    let priority = frame(kind::PRIORITY, 0, 1, &[0; 5]);
    let mut guard = server();
    assert!(receive(&mut guard, &times(100, &priority)).is_ok());
    receive(&mut guard, &frame(kind::HEADERS, 5, 1, b"head")).unwrap();
    assert!(receive(&mut guard, &times(100, &priority)).is_ok());
    assert_eq!(receive(&mut guard, &priority), Err(Flood::Priority));
}

#[test]
fn window_updates_are_counted_against_streams_and_data() {
    let update = frame(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]);
    let mut guard = server();
    assert!(receive(&mut guard, &times(5, &update)).is_ok());
    receive(&mut guard, &frame(kind::HEADERS, 5, 1, b"head")).unwrap();
    assert!(receive(&mut guard, &times(2, &update)).is_ok());
    send(&mut guard, &frame(kind::DATA, 0, 1, b"answer"));
    assert!(receive(&mut guard, &times(20, &update)).is_ok());
    assert_eq!(receive(&mut guard, &update), Err(Flood::WindowUpdate));

    // A client's streams are those that it sends.
    let mut guard = FrameGuard::client(FrameLimits::default());
    send(&mut guard, PREFACE);
    send(&mut guard, &frame(kind::HEADERS, 5, 1, b"head"));
    assert!(receive(&mut guard, &times(7, &update)).is_ok());
    assert_eq!(receive(&mut guard, &update), Err(Flood::WindowUpdate));
}

#[test]
fn pieces_do_not_matter() {
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(4, 0, 0, &[0, 3, 0, 0, 0, 9]));
    bytes.extend(frame(kind::HEADERS, 12, 1, &[2, b'a', 0, 0]));
    bytes.extend(frame(kind::DATA, 8, 1, &[1, b'b', 0]));
    bytes.extend(frame(kind::HEADERS, 5, 1, b"trailers"));
    bytes.extend(frame(kind::HEADERS, 5, 3, b"next"));
    bytes.extend(frame(kind::RST_STREAM, 0, 3, &[0, 0, 0, 8]));
    bytes.extend(frame(kind::GOAWAY, 0, 0, &[0; 8]));
    let expected = vec![Frame::Trailers, Frame::Reset, Frame::GoAway];
    for size in 1..=bytes.len() {
        let mut guard = FrameGuard::server(FrameLimits::default());
        let mut seen = Vec::new();
        for piece in bytes.chunks(size) {
            seen.extend(receive(&mut guard, piece).unwrap());
        }
        assert_eq!(seen, expected, "in pieces of {size}");
    }
}

//! Any sequence of responses, reconnects, interest changes and answers: the core must not panic, must keep its
//! queues bounded, and must never answer on a stream that is gone.

#![no_main]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use waystation_xds::{
    Action, Core, Event, GrpcService, GrpcSource, Interest, Options, Protocol, Rejection, ResourceType,
    Source, StreamId, SubId, SubscriptionSpec, UpdateToken,
};

const KINDS: [ResourceType; 5] = [
    ResourceType::Cluster,
    ResourceType::ClusterLoadAssignment,
    ResourceType::Listener,
    ResourceType::RouteConfiguration,
    ResourceType::VirtualHost,
];

const NAMES: [&str; 6] = ["a", "b", "rc/a", "rc", "*", ""];

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[usize::from(self.byte()) % from.len()].clone()
    }

    fn slice(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()).min(self.0.len());
        let (slice, rest) = self.0.split_at(length);
        self.0 = rest;
        slice
    }
}

/// One length-delimited protobuf field.
fn field(into: &mut Vec<u8>, tag: u8, content: &[u8]) {
    into.push(tag << 3 | 2);
    let mut length = content.len();
    while length >= 0x80 {
        into.push(length as u8 | 0x80);
        length >>= 7;
    }
    into.push(length as u8);
    into.extend_from_slice(content);
}

/// A response that is nearly right: arbitrary bytes alone would seldom get past the decoder.
fn response(input: &mut Input<'_>, protocol: Protocol) -> Bytes {
    let kind = input.pick(&KINDS);
    let mut message = Vec::new();
    field(&mut message, 1, input.pick(&["1", "2", "3"]).as_bytes());
    for _ in 0..input.byte() % 5 {
        let mut body = Vec::new();
        field(&mut body, 1, input.pick(&NAMES).as_bytes());
        body.extend_from_slice(input.slice());
        let mut any = Vec::new();
        let url = if input.byte() == 255 { "type.googleapis.com/x.Y" } else { kind.url() };
        field(&mut any, 1, url.as_bytes());
        field(&mut any, 2, &body);
        let mut wrapper = Vec::new();
        let shape = input.byte();
        field(&mut wrapper, 1, input.pick(&["1", "2"]).as_bytes());
        if shape & 1 == 0 {
            field(&mut wrapper, 2, &any);
        }
        field(&mut wrapper, 3, input.pick(&NAMES).as_bytes());
        if shape & 2 == 0 {
            field(&mut wrapper, 4, input.pick(&NAMES).as_bytes());
        }
        if shape & 4 == 0 {
            field(&mut wrapper, 6, &[1 << 3, input.byte() & 0x7f]);
        }
        match protocol {
            Protocol::Delta => field(&mut message, 2, &wrapper),
            Protocol::Sotw if shape & 8 == 0 => field(&mut message, 2, &any),
            Protocol::Sotw => {
                let mut outer = Vec::new();
                field(&mut outer, 1, b"type.googleapis.com/envoy.service.discovery.v3.Resource");
                field(&mut outer, 2, &wrapper);
                field(&mut message, 2, &outer);
            }
        }
    }
    field(&mut message, 4, kind.url().as_bytes());
    field(&mut message, 5, &[b'n', input.byte() & 0x7f]);
    if protocol == Protocol::Delta && input.byte() & 1 == 0 {
        field(&mut message, 6, input.pick(&NAMES).as_bytes());
    }
    message.into()
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let protocol = if input.byte() & 1 == 0 { Protocol::Sotw } else { Protocol::Delta };
    let mut now = Instant::now();
    let ads = Some(Arc::new(GrpcSource::new(protocol, GrpcService::new("xds"))));
    let mut core = Core::new(Options { node: Bytes::new(), ads, seed: 1, unix_ms: 0 }, now);
    let mut subs: Vec<SubId> = Vec::new();
    let mut tokens: Vec<(UpdateToken, Option<Arc<str>>)> = Vec::new();
    let mut current: Option<StreamId> = None;
    let mut opening: Option<StreamId> = None;

    while !input.0.is_empty() {
        match input.byte() % 12 {
            0 if subs.len() < 16 => {
                let interest = match input.byte() % 3 {
                    0 => Interest::Wildcard,
                    1 => Interest::Namespace("rc".into()),
                    _ => Interest::Names(vec![input.pick(&NAMES).into(), input.pick(&NAMES).into()]),
                };
                let init_fetch_timeout = Some(Duration::from_secs(u64::from(input.byte())));
                let kind = input.pick(&KINDS);
                subs.extend(core.subscribe(
                    SubscriptionSpec { kind, source: Source::Ads, interest, init_fetch_timeout },
                    now,
                ));
            }
            1 if !subs.is_empty() => {
                let at = usize::from(input.byte()) % subs.len();
                core.unsubscribe(subs.swap_remove(at), now);
            }
            2 if !subs.is_empty() => core.set_names(input.pick(&subs), vec![input.pick(&NAMES).into()], now),
            3 => core.pause(&input.pick(&KINDS)),
            4 => core.resume(&input.pick(&KINDS), now),
            5 if !tokens.is_empty() => {
                let at = usize::from(input.byte()) % tokens.len();
                let (token, name) = tokens.swap_remove(at);
                let rejected = name.filter(|_| input.byte() & 1 == 0);
                let rejected = rejected.map(|name| Rejection { name, reason: "no".into() });
                core.applied(token, rejected.into_iter().collect(), now);
            }
            6 => {
                now += Duration::from_millis(u64::from(input.byte()) * 100);
                core.tick(now);
            }
            7 => {
                if let Some(stream) = current.take() {
                    core.stream_closed(stream, 14, "", now);
                }
            }
            8 => {
                if let Some(stream) = opening.take() {
                    core.stream_opened(stream, now);
                    current = Some(stream);
                }
            }
            9 => {
                if let Some(stream) = current {
                    core.message(stream, Bytes::copy_from_slice(input.slice()), now);
                }
            }
            _ => {
                let message = response(&mut input, protocol);
                if let Some(stream) = current.filter(|stream| core.wants_messages(*stream)) {
                    core.message(stream, message, now);
                }
            }
        }
        let mut sent = 0;
        while let Some(action) = core.poll_action() {
            match action {
                Action::Open { stream, .. } => opening = Some(stream),
                Action::Send { stream, .. } => {
                    sent += 1;
                    assert!(sent <= 64, "requests are bounded");
                    assert_eq!(Some(stream), current, "a request on a stream that is gone");
                    core.sent(stream, now);
                }
                Action::Close { stream } => {
                    current = current.filter(|open| *open != stream);
                }
                Action::Watch { .. } | Action::Poll { .. } => unreachable!("only streams here"),
            }
        }
        while let Some(event) = core.poll_event() {
            if let Event::Update(update) = event {
                tokens.push((update.token, update.resources.first().map(|resource| resource.name.clone())));
            }
        }
    }
});

//! The first bytes of a connection, in two segments, go through each listener filter that reads them. The first byte
//! says where the segments part. What a filter decided on the first segment it must decide on both: an answer that
//! hangs on how the network cut the bytes is one that an attacker can choose.
#![no_main]

use std::sync::LazyLock;
use std::time::Instant;

use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3::ProxyProtocol;
use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::runtime::Runtime;
use waystation_listener_filters::{ListenerFilter, Verdict};
use waystation_stats::Store;

static FILTERS: LazyLock<Vec<ListenerFilter>> = LazyLock::new(|| {
    let scope = Store::default().root();
    let optional = ProxyProtocol { allow_requests_without_proxy_protocol: true, ..ProxyProtocol::default() };
    let filters: [(&str, Vec<u8>); 4] = [
        ("tls_inspector.v3.TlsInspector", Vec::new()),
        ("http_inspector.v3.HttpInspector", Vec::new()),
        ("proxy_protocol.v3.ProxyProtocol", Vec::new()),
        ("proxy_protocol.v3.ProxyProtocol", optional.encode_to_vec()),
    ];
    let compile = |(name, config): (&str, Vec<u8>)| {
        let name = format!("envoy.extensions.filters.listener.{name}");
        ListenerFilter::compile(&name, &config, &scope, &Runtime::new()).expect("these configurations are valid")
    };
    filters.into_iter().map(compile).collect()
});

fuzz_target!(|input: &[u8]| {
    let Some((&cut, bytes)) = input.split_first() else { return };
    let cut = bytes.len() * usize::from(cut) / 255;
    for filter in FILTERS.iter() {
        let inspect = |bytes: &[u8]| {
            let address = Address::Ip(([127, 0, 0, 1], 80).into());
            let mut info = ConnectionInfo::new(1, Instant::now(), address.clone(), address);
            let verdict = filter.inspect(bytes, false, None, info.start, &mut info);
            if let Verdict::Done { consumed } = verdict {
                assert!(consumed <= bytes.len());
            }
            verdict
        };
        let (first, both) = (inspect(&bytes[..cut]), inspect(bytes));
        assert!(first == Verdict::NeedMore || first == both, "{first:?}, then {both:?}");
    }
});

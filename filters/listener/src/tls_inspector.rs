//! `envoy.filters.listener.tls_inspector`: whether a connection speaks TLS, and for which name and protocols.

use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3 as pb;
use rustls::server::Acceptor;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_schema::ConfigError;
use waystation_stats::{Scope, stats_group};

use crate::Verdict;

/// Envoy's default for `max_client_hello_size`.
const MAX_CLIENT_HELLO: usize = 16 * 1024;

/// A TLS record that carries a handshake (RFC 8446 section 5.1).
const HANDSHAKE_RECORD: u8 = 22;

stats_group! {
    /// `tls_inspector.`
    pub(crate) struct Stats {
        counters {
            alpn_found, alpn_not_found, client_hello_too_large, sni_found, sni_not_found, tls_found,
            tls_not_found,
        }
        gauges {}
        histograms { bytes_processed: Bytes }
    }
}

#[derive(Debug)]
pub(crate) struct TlsInspector {
    max_client_hello: usize,
    close_on_error: bool,
    stats: Stats,
}

impl TlsInspector {
    pub(crate) fn compile(proto: &pb::TlsInspector, scope: &Scope) -> Result<Self, ConfigError> {
        let fingerprints = [
            ("enable_ja3_fingerprinting", proto.enable_ja3_fingerprinting.as_ref()),
            ("enable_ja4_fingerprinting", proto.enable_ja4_fingerprinting.as_ref()),
        ];
        for (field, flag) in fingerprints {
            if flag.is_some_and(|flag| flag.value) {
                return Err(ConfigError::field(field, "fingerprints are not supported in this version"));
            }
        }
        // `initial_read_buffer_size` tunes how Envoy peeks; the driver here reads what has come.
        let max = proto.max_client_hello_size.as_ref().map(|size| size.value as usize);
        Ok(Self {
            max_client_hello: max.filter(|max| *max > 0).unwrap_or(MAX_CLIENT_HELLO),
            close_on_error: proto.close_connection_on_client_hello_parsing_errors,
            stats: scope.scope("tls_inspector").group(),
        })
    }

    pub(crate) fn inspect(&self, buffer: &[u8], end: bool, info: &mut ConnectionInfo) -> Verdict {
        match buffer {
            [] => return if end { self.not_tls() } else { Verdict::NeedMore },
            [HANDSHAKE_RECORD] if !end => return Verdict::NeedMore,
            [HANDSHAKE_RECORD, 3, ..] => {}
            _ => return self.not_tls(),
        }
        let mut acceptor = Acceptor::default();
        let mut rest = buffer;
        // Reading from memory does not fail; a ClientHello that is refused shows in `accept`.
        while !rest.is_empty() && acceptor.read_tls(&mut rest).is_ok_and(|read| read > 0) {
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let hello = accepted.client_hello();
                    self.stats.bytes_processed().record((buffer.len() - rest.len()) as u64);
                    self.stats.tls_found().inc();
                    info.transport_protocol = "tls";
                    info.requested_server_name =
                        hello.server_name().map(|name| name.to_ascii_lowercase().into_boxed_str());
                    info.application_protocols =
                        hello.alpn().map(|protocols| protocols.map(Box::from).collect()).unwrap_or_default();
                    count(
                        info.requested_server_name.is_some(),
                        &self.stats.sni_found(),
                        &self.stats.sni_not_found(),
                    );
                    let has_alpn = !info.application_protocols.is_empty();
                    count(has_alpn, &self.stats.alpn_found(), &self.stats.alpn_not_found());
                    return Verdict::PASS;
                }
                Err(_) if self.close_on_error => return Verdict::Reject("malformed ClientHello"),
                Err(_) => return self.not_tls(),
            }
        }
        if buffer.len() >= self.max_client_hello {
            self.stats.client_hello_too_large().inc();
            return Verdict::Reject("ClientHello is too large");
        }
        if end { self.not_tls() } else { Verdict::NeedMore }
    }

    fn not_tls(&self) -> Verdict {
        self.stats.tls_not_found().inc();
        Verdict::PASS
    }
}

fn count(found: bool, yes: &waystation_stats::CounterRef<'_>, no: &waystation_stats::CounterRef<'_>) {
    if found { (*yes).inc() } else { (*no).inc() }
}

#[cfg(test)]
mod tests {
    use super::TlsInspector;
    use crate::Verdict;
    use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3 as pb;
    use std::sync::Arc;
    use std::time::Instant;
    use waystation_filter_api::connection::ConnectionInfo;
    use waystation_stats::Store;

    fn client_hello(name: &'static str, alpn: &[&[u8]]) -> Vec<u8> {
        let mut config = rustls::ClientConfig::builder()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name.try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    fn info() -> ConnectionInfo {
        let address: std::net::SocketAddr = "127.0.0.1:1".parse().unwrap();
        ConnectionInfo::new(1, Instant::now(), address.into(), address.into())
    }

    fn inspector(store: &Store) -> TlsInspector {
        TlsInspector::compile(&pb::TlsInspector::default(), &store.root()).unwrap()
    }

    #[test]
    fn a_client_hello_is_read_however_it_is_cut() {
        let store = Store::default();
        let filter = inspector(&store);
        let hello = client_hello("www.Example.com", &[b"h2", b"http/1.1"]);
        for cut in 1..hello.len() {
            assert_eq!(filter.inspect(&hello[..cut], false, &mut info()), Verdict::NeedMore, "{cut}");
        }
        let mut info = info();
        assert_eq!(filter.inspect(&hello, false, &mut info), Verdict::PASS);
        assert_eq!(info.transport_protocol, "tls");
        assert_eq!(info.requested_server_name.as_deref(), Some("www.example.com"));
        assert_eq!(info.application_protocols, [Box::from(*b"h2") as Box<[u8]>, Box::from(*b"http/1.1")]);
        assert_eq!(store.find("tls_inspector.tls_found"), Some(1));
        assert_eq!(store.find("tls_inspector.sni_found"), Some(1));
        assert_eq!(store.find("tls_inspector.alpn_found"), Some(1));
    }

    #[test]
    fn other_protocols_pass_and_oversize_hellos_do_not() {
        let store = Store::default();
        let filter = inspector(&store);
        for bytes in [&b"GET / HTTP/1.1\r\n"[..], b"\x16\x02\x00", b"\x00"] {
            let mut info = info();
            assert_eq!(filter.inspect(bytes, false, &mut info), Verdict::PASS);
            assert_eq!(info.transport_protocol, "raw_buffer");
        }
        assert_eq!(store.find("tls_inspector.tls_not_found"), Some(3));
        // A record that announces 16 KB of handshake and never ends.
        let mut endless = vec![22, 3, 1, 0x40, 0x00, 1, 0, 0xff, 0xff];
        endless.resize(super::MAX_CLIENT_HELLO, 0);
        assert_eq!(filter.inspect(&endless, false, &mut info()), Verdict::Reject("ClientHello is too large"));
    }
}

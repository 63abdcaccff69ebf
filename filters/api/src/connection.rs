//! What is known of a downstream or upstream connection.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Instant;

use crate::address::Address;
use crate::filter_state::FilterState;
use crate::flags::ResponseFlags;
use crate::value::Metadata;

/// Facts about a connection that filters, matchers, routes and logs read. The transport itself travels beside it. `S` is `()`
/// on the way to another thread.
#[derive(Debug)]
pub struct ConnectionInfo<S = FilterState> {
    /// Unique in this process (`%CONNECTION_ID%`).
    pub id: u64,
    /// When the connection was accepted.
    pub start: Instant,
    /// The address connected to; after `original_dst` or PROXY protocol, the original one.
    pub local_address: Address,
    /// The address of the socket itself, before any listener filter changed it.
    pub direct_local_address: Address,
    /// The peer's address; after PROXY protocol, the one it states.
    pub remote_address: Address,
    /// The peer of the socket itself.
    pub direct_remote_address: Address,
    /// Whether a listener filter restored the local address (`use_original_dst`, ORIGINAL_DST clusters).
    pub local_address_restored: bool,
    /// SNI of the TLS handshake or of the sniffed ClientHello, lower case.
    pub requested_server_name: Option<Box<str>>,
    /// The application protocols offered (sniffed ALPN list).
    pub application_protocols: Vec<Box<[u8]>>,
    /// What the filter chain match sees: `tls` or `raw_buffer`.
    pub transport_protocol: &'static str,
    /// The protocol agreed by ALPN in a handshake that ended here.
    pub negotiated_protocol: Option<Box<[u8]>>,
    /// The TLS session, when TLS ends here.
    pub tls: Option<Arc<TlsInfo>>,
    /// The listener's name.
    pub listener: Arc<str>,
    /// The filter chain's name, empty when it has none.
    pub filter_chain: Arc<str>,
    /// The TLVs of the PROXY header that may be passed on upstream.
    pub proxy_protocol_tlvs: Vec<Tlv>,
    /// Metadata that listener filters or PROXY protocol TLVs set.
    pub metadata: RefCell<Metadata>,
    /// Filter state with the life of the connection.
    pub filter_state: RefCell<S>,
    /// Response flags that network filters set, for the logs of the connection.
    pub flags: Cell<ResponseFlags>,
    /// Why the connection was ended, for `%CONNECTION_TERMINATION_DETAILS%`.
    pub termination_details: RefCell<Option<Box<str>>>,
    /// Why the transport failed, for `%DOWNSTREAM_TRANSPORT_FAILURE_REASON%`.
    pub transport_failure_reason: RefCell<Option<Box<str>>>,
}

impl ConnectionInfo {
    /// A plain connection between two addresses.
    pub fn new(id: u64, start: Instant, local: Address, remote: Address) -> Self {
        Self {
            id,
            start,
            direct_local_address: local.clone(),
            local_address: local,
            direct_remote_address: remote.clone(),
            remote_address: remote,
            local_address_restored: false,
            requested_server_name: None,
            application_protocols: Vec::new(),
            transport_protocol: "raw_buffer",
            negotiated_protocol: None,
            tls: None,
            listener: Arc::from(""),
            filter_chain: Arc::from(""),
            proxy_protocol_tlvs: Vec::new(),
            metadata: RefCell::default(),
            filter_state: RefCell::default(),
            flags: Cell::default(),
            termination_details: RefCell::default(),
            transport_failure_reason: RefCell::default(),
        }
    }
}

impl<S> ConnectionInfo<S> {
    /// The same with another filter state: one belongs to a thread, so that who moves a connection leaves it behind.
    pub fn with_filter_state<T>(self, filter_state: T) -> ConnectionInfo<T> {
        ConnectionInfo {
            id: self.id,
            start: self.start,
            local_address: self.local_address,
            direct_local_address: self.direct_local_address,
            remote_address: self.remote_address,
            direct_remote_address: self.direct_remote_address,
            local_address_restored: self.local_address_restored,
            requested_server_name: self.requested_server_name,
            application_protocols: self.application_protocols,
            transport_protocol: self.transport_protocol,
            negotiated_protocol: self.negotiated_protocol,
            tls: self.tls,
            listener: self.listener,
            filter_chain: self.filter_chain,
            proxy_protocol_tlvs: self.proxy_protocol_tlvs,
            metadata: self.metadata,
            filter_state: RefCell::new(filter_state),
            flags: self.flags,
            termination_details: self.termination_details,
            transport_failure_reason: self.transport_failure_reason,
        }
    }
}

/// A type-length-value of a PROXY protocol header.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tlv {
    /// Its type.
    pub kind: u8,
    /// Its value, below 64 KiB.
    pub value: Box<[u8]>,
}

/// A finished TLS handshake, one side's view.
#[derive(Debug, Default)]
pub struct TlsInfo {
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite by its IANA-style OpenSSL name, as Envoy prints it (`TLS_AES_256_GCM_SHA384`,
    /// `ECDHE-RSA-AES128-GCM-SHA256`).
    pub cipher: &'static str,
    /// The key exchange group, e.g. `X25519MLKEM768`; empty when unknown.
    pub group: &'static str,
    /// Whether the session was resumed.
    pub resumed: bool,
    /// The name that the client asked for (SNI), where this is the server's view.
    pub server_name: Option<Box<str>>,
    /// The peer's certificate, if it presented one.
    pub peer: Option<Box<Certificate>>,
    /// Whether the peer's certificate was verified against a trust anchor or pin.
    pub peer_verified: bool,
    /// Our own certificate.
    pub local: Option<Arc<Certificate>>,
}

/// What logs, headers and policies read from an X.509 certificate. Times are seconds since the Unix epoch.
#[derive(Clone, Debug, Default)]
pub struct Certificate {
    /// Subject in RFC 2253 form.
    pub subject: String,
    /// Issuer in RFC 2253 form.
    pub issuer: String,
    /// Serial number, lower-case hex.
    pub serial: String,
    /// SHA-256 of the DER form, lower-case hex.
    pub sha256: String,
    /// SHA-1 of the DER form, lower-case hex.
    pub sha1: String,
    /// URI SANs in order.
    pub uri_sans: Vec<String>,
    /// DNS SANs in order.
    pub dns_sans: Vec<String>,
    /// IP SANs in order.
    pub ip_sans: Vec<String>,
    /// E-mail SANs in order.
    pub email_sans: Vec<String>,
    /// Start of validity.
    pub not_before: i64,
    /// End of validity.
    pub not_after: i64,
    /// The certificate in PEM, URL-encoded (`%DOWNSTREAM_PEER_CERT%`, XFCC `Cert`).
    pub url_encoded_pem: String,
    /// The whole chain likewise (XFCC `Chain`).
    pub url_encoded_pem_chain: String,
}

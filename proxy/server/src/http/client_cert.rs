//! `x-forwarded-client-cert`.

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use pb::http_connection_manager::{ForwardClientCertDetails, SetCurrentClientCertDetails};
use waystation_filter_api::connection::TlsInfo;
use waystation_filter_api::wire::bool_value;
use waystation_http::{Headers, Known};
use waystation_schema::ConfigError;

/// What becomes of the header, and what this hop says in it.
pub(crate) type ForwardCert = (Forward, Details);

/// `forward_client_cert_details`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Forward {
    /// Never forwarded.
    #[default]
    Sanitize,
    /// FORWARD_ONLY: as it came, over mutual TLS.
    Keep,
    /// This hop's certificate is appended, over mutual TLS.
    Append,
    /// Replaced by this hop's certificate, over mutual TLS.
    Set,
    /// Forwarded as it came, always.
    KeepAlways,
}

/// `set_current_client_cert_details`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Details {
    pub(crate) cert: bool,
    pub(crate) chain: bool,
    pub(crate) subject: bool,
    pub(crate) uri: bool,
    pub(crate) dns: bool,
}

impl Forward {
    pub(crate) fn compile(proto: ForwardClientCertDetails) -> Self {
        match proto {
            ForwardClientCertDetails::Sanitize => Self::Sanitize,
            ForwardClientCertDetails::ForwardOnly => Self::Keep,
            ForwardClientCertDetails::AppendForward => Self::Append,
            ForwardClientCertDetails::SanitizeSet => Self::Set,
            ForwardClientCertDetails::AlwaysForwardOnly => Self::KeepAlways,
        }
    }
}

impl Details {
    /// The path of errors begins with the field.
    pub(crate) fn compile(proto: Option<&SetCurrentClientCertDetails>) -> Result<Self, ConfigError> {
        let Some(proto) = proto else { return Ok(Self::default()) };
        let SetCurrentClientCertDetails { subject, cert, chain, dns, uri, issuer, format } = proto;
        for (field, set) in [("issuer", *issuer), ("format", *format != 0)] {
            if set {
                let error = ConfigError::field(field, "is not supported in this version");
                return Err(error.at("set_current_client_cert_details"));
            }
        }
        Ok(Self {
            cert: *cert,
            chain: *chain,
            subject: bool_value(subject.as_ref(), false),
            uri: *uri,
            dns: *dns,
        })
    }
}

/// Applies the rules to a request that came over `tls` (Envoy's `mutateXfccRequestHeader`).
pub(crate) fn apply(forward: Forward, details: Details, tls: Option<&TlsInfo>, headers: &mut Headers) {
    if forward == Forward::KeepAlways {
        return;
    }
    let mutual = tls.and_then(|tls| Some((tls, tls.peer.as_deref()?)));
    let Some((tls, peer)) = mutual.filter(|_| forward != Forward::Sanitize) else {
        headers.remove(Known::XForwardedClientCert);
        return;
    };
    if forward == Forward::Keep {
        return;
    }
    let mut value = String::new();
    let mut add = |parts: &[&str]| {
        if !value.is_empty() {
            value.push(';');
        }
        value.extend(parts.iter().copied());
    };
    if let Some(uri) = tls.local.as_ref().and_then(|local| local.uri_sans.first()) {
        add(&["By=", uri]);
    }
    if !peer.sha256.is_empty() {
        add(&["Hash=", &peer.sha256]);
    }
    if details.cert && !peer.url_encoded_pem.is_empty() {
        add(&["Cert=\"", &peer.url_encoded_pem, "\""]);
    }
    if details.chain && !peer.url_encoded_pem_chain.is_empty() {
        add(&["Chain=\"", &peer.url_encoded_pem_chain, "\""]);
    }
    // Subject and URI are present even when they are empty.
    if details.subject {
        add(&["Subject=\"", &peer.subject, "\""]);
    }
    if details.uri {
        if peer.uri_sans.is_empty() {
            add(&["URI="]);
        }
        for uri in &peer.uri_sans {
            add(&["URI=", uri]);
        }
    }
    if details.dns {
        for dns in &peer.dns_sans {
            add(&["DNS=", dns]);
        }
    }
    // A certificate may hold anything; what could split the head is not forwarded.
    value.retain(|c| !matches!(c, '\0' | '\r' | '\n'));
    match forward {
        Forward::Append => headers.append_joined(Known::XForwardedClientCert, ",", &value),
        _ => headers.set(Known::XForwardedClientCert, &value),
    }
}

#[cfg(test)]
mod tests {
    use super::{Details, Forward, apply};
    use std::sync::Arc;
    use waystation_filter_api::connection::{Certificate, TlsInfo};
    use waystation_http::{Headers, Known};

    #[test]
    fn each_mode() {
        let local = Certificate { uri_sans: vec!["spiffe://us".into()], ..Certificate::default() };
        let peer = Certificate {
            sha256: "ab".into(),
            subject: "CN=x".into(),
            dns_sans: vec!["a".into(), "b".into()],
            ..Certificate::default()
        };
        let tls = TlsInfo { peer: Some(Box::new(peer)), local: Some(Arc::new(local)), ..TlsInfo::default() };
        let details = Details { subject: true, uri: true, dns: true, ..Details::default() };
        let own = "By=spiffe://us;Hash=ab;Subject=\"CN=x\";URI=;DNS=a;DNS=b";
        let appended = format!("old,{own}");
        let rows = [
            (Forward::Sanitize, true, None),
            (Forward::Keep, true, Some("old")),
            (Forward::Keep, false, None),
            (Forward::Append, true, Some(appended.as_str())),
            (Forward::Set, true, Some(own)),
            (Forward::Set, false, None),
            (Forward::KeepAlways, false, Some("old")),
        ];
        for (forward, mutual, expected) in rows {
            let mut headers: Headers = [(Known::XForwardedClientCert, "old")].into_iter().collect();
            apply(forward, details, mutual.then_some(&tls), &mut headers);
            assert_eq!(headers.get_str(Known::XForwardedClientCert), expected, "{forward:?} {mutual}");
        }
    }
}

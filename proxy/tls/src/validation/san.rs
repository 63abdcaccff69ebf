//! The subject alternative names of a parsed certificate.

use waystation_matchers::{SanKind, SanMatcher, dns_name_matches};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::X509Certificate;

use crate::x509;

/// Whether one of the names of `certificate` matches.
pub(crate) fn has_match(certificate: &X509Certificate<'_>, matcher: &SanMatcher) -> bool {
    x509::names(certificate).iter().any(|name| match name {
        GeneralName::DNSName(text) => matcher.is_match(SanKind::Dns, text),
        GeneralName::URI(text) => matcher.is_match(SanKind::Uri, text),
        GeneralName::RFC822Name(text) => matcher.is_match(SanKind::Email, text),
        GeneralName::IPAddress(bytes) => {
            x509::ip_text(bytes).is_some_and(|text| matcher.is_match(SanKind::Ip, &text))
        }
        _ => false,
    })
}

/// Whether `certificate` is for `name`, which may be a DNS name, a URI or an address.
pub(crate) fn has_name(certificate: &X509Certificate<'_>, name: &str) -> bool {
    x509::names(certificate).iter().any(|own| match own {
        GeneralName::DNSName(pattern) => dns_name_matches(name, pattern),
        GeneralName::URI(uri) => *uri == name,
        GeneralName::IPAddress(bytes) => x509::ip_text(bytes).is_some_and(|text| text == name),
        _ => false,
    })
}

//! What logs, headers, policies and `/certs` read from an X.509 certificate.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use envoy_types::pb::envoy::admin::v3 as admin;
use envoy_types::pb::google::protobuf::Timestamp;
use rustls_pki_types::CertificateDer;
use waystation_filter_api::connection::Certificate;
use x509_parser::asn1_rs::{Any, Tag};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::x509::X509Name;

/// Parses a certificate; `None` when it is not one.
pub(crate) fn parse(der: &[u8]) -> Option<X509Certificate<'_>> {
    X509Certificate::from_der(der).ok().map(|(_, certificate)| certificate)
}

/// All of the leaf of `chain`, with the PEM forms when `pem`.
pub(crate) fn certificate(chain: &[CertificateDer<'_>]) -> Option<Certificate> {
    let der = chain.first()?;
    let parsed = parse(der)?;
    let mut out = Certificate {
        subject: rfc2253(parsed.subject()),
        issuer: rfc2253(parsed.issuer()),
        serial: serial(&parsed),
        sha256: hex(digest::digest(&digest::SHA256, der).as_ref()),
        sha1: hex(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, der).as_ref()),
        not_before: parsed.validity().not_before.timestamp(),
        not_after: parsed.validity().not_after.timestamp(),
        url_encoded_pem: url_encoded_pem(der),
        ..Certificate::default()
    };
    for name in names(&parsed) {
        match name {
            GeneralName::URI(uri) => out.uri_sans.push((*uri).to_owned()),
            GeneralName::DNSName(dns) => out.dns_sans.push((*dns).to_owned()),
            GeneralName::RFC822Name(email) => out.email_sans.push((*email).to_owned()),
            GeneralName::IPAddress(bytes) => out.ip_sans.extend(ip_text(bytes)),
            _ => {}
        }
    }
    out.url_encoded_pem_chain = out.url_encoded_pem.clone();
    for der in &chain[1..] {
        out.url_encoded_pem_chain.push_str(&url_encoded_pem(der));
    }
    Some(out)
}

/// The names of the SubjectAltName extension, in order.
pub(crate) fn names<'a>(certificate: &'a X509Certificate<'a>) -> &'a [GeneralName<'a>] {
    match certificate.subject_alternative_name() {
        Ok(Some(extension)) => &extension.value.general_names,
        // Chain verification refuses a certificate whose extensions cannot be read.
        Ok(None) | Err(_) => &[],
    }
}

/// The common name of the subject.
pub(crate) fn common_name<'a>(certificate: &'a X509Certificate<'a>) -> Option<&'a str> {
    certificate.subject().iter_common_name().next()?.as_str().ok()
}

/// Whether the TLS features (RFC 7633), a sequence of small numbers, have `status_request`.
pub(crate) fn must_staple(certificate: &X509Certificate<'_>) -> bool {
    let mut extensions = certificate.extensions().iter();
    let features = extensions.find(|extension| extension.oid.to_id_string() == "1.3.6.1.5.5.7.1.24");
    let numbers = features.and_then(|extension| extension.value.get(2..)).unwrap_or_default();
    numbers.chunks(3).any(|number| number == [2, 1, 5])
}

/// An IP address SAN in its usual form.
pub(crate) fn ip_text(bytes: &[u8]) -> Option<String> {
    let address = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => return None,
    };
    Some(address.to_string())
}

/// What `/certs` tells of one certificate; `now` is in seconds since the epoch.
pub(crate) fn details(der: &[u8], path: &str, now: i64) -> Option<admin::CertificateDetails> {
    use admin::subject_alternate_name::Name;
    let parsed = parse(der)?;
    let validity = parsed.validity();
    let not_after = validity.not_after.timestamp();
    // Envoy lists all DNS names, then URIs, then addresses.
    let mut sorted: [Vec<Name>; 3] = Default::default();
    for name in names(&parsed) {
        match name {
            GeneralName::DNSName(dns) => sorted[0].push(Name::Dns((*dns).to_owned())),
            GeneralName::URI(uri) => sorted[1].push(Name::Uri((*uri).to_owned())),
            GeneralName::IPAddress(bytes) => sorted[2].extend(ip_text(bytes).map(Name::IpAddress)),
            _ => {}
        }
    }
    let subject_alt_names =
        sorted.into_iter().flatten().map(|name| admin::SubjectAlternateName { name: Some(name) }).collect();
    Some(admin::CertificateDetails {
        path: path.to_owned(),
        serial_number: serial(&parsed),
        subject_alt_names,
        days_until_expiration: u64::try_from((not_after - now) / 86_400).unwrap_or(0),
        valid_from: Some(Timestamp { seconds: validity.not_before.timestamp(), nanos: 0 }),
        expiration_time: Some(Timestamp { seconds: not_after, nanos: 0 }),
        ocsp_details: None,
    })
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        // Writing to a String does not fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

fn serial(certificate: &X509Certificate<'_>) -> String {
    let raw = certificate.raw_serial();
    let zeros = raw.iter().take_while(|byte| **byte == 0).count();
    if zeros == raw.len() { "0".to_owned() } else { hex(&raw[zeros..]) }
}

/// The PEM form, with what is not unreserved in a URL percent-encoded, as Envoy puts it into XFCC.
fn url_encoded_pem(der: &[u8]) -> String {
    let base64 = BASE64.encode(der);
    let mut out = String::with_capacity(base64.len() * 5 / 4 + 80);
    out.push_str("-----BEGIN%20CERTIFICATE-----%0A");
    let mut column = 0;
    for character in base64.chars() {
        if column == 64 {
            out.push_str("%0A");
            column = 0;
        }
        match character {
            '+' => out.push_str("%2B"),
            '/' => out.push_str("%2F"),
            '=' => out.push_str("%3D"),
            other => out.push(other),
        }
        column += 1;
    }
    out.push_str("%0A-----END%20CERTIFICATE-----%0A");
    out
}

/// A distinguished name as RFC 2253 writes it: last RDN first.
fn rfc2253(name: &X509Name<'_>) -> String {
    let mut out = String::new();
    let rdns: Vec<_> = name.iter_rdn().collect();
    for rdn in rdns.into_iter().rev() {
        if !out.is_empty() {
            out.push(',');
        }
        for (index, attribute) in rdn.iter().enumerate() {
            if index > 0 {
                out.push('+');
            }
            let oid = attribute.attr_type().to_id_string();
            match short_name(&oid) {
                Some(short) => {
                    out.push_str(short);
                    out.push('=');
                    match text(attribute.attr_value()) {
                        Some(text) => escape(&text, &mut out),
                        None => dump(attribute.attr_value(), &mut out),
                    }
                }
                None => {
                    out.push_str(&oid);
                    out.push('=');
                    dump(attribute.attr_value(), &mut out);
                }
            }
        }
    }
    out
}

/// OpenSSL's short names.
fn short_name(oid: &str) -> Option<&'static str> {
    Some(match oid {
        "2.5.4.3" => "CN",
        "2.5.4.4" => "SN",
        "2.5.4.5" => "serialNumber",
        "2.5.4.6" => "C",
        "2.5.4.7" => "L",
        "2.5.4.8" => "ST",
        "2.5.4.9" => "street",
        "2.5.4.10" => "O",
        "2.5.4.11" => "OU",
        "2.5.4.12" => "title",
        "2.5.4.13" => "description",
        "2.5.4.15" => "businessCategory",
        "2.5.4.17" => "postalCode",
        "2.5.4.41" => "name",
        "2.5.4.42" => "GN",
        "2.5.4.43" => "initials",
        "2.5.4.44" => "generationQualifier",
        "2.5.4.46" => "dnQualifier",
        "0.9.2342.19200300.100.1.1" => "UID",
        "0.9.2342.19200300.100.1.25" => "DC",
        "1.2.840.113549.1.9.1" => "emailAddress",
        "1.3.6.1.4.1.311.60.2.1.1" => "jurisdictionL",
        "1.3.6.1.4.1.311.60.2.1.2" => "jurisdictionST",
        "1.3.6.1.4.1.311.60.2.1.3" => "jurisdictionC",
        _ => return None,
    })
}

/// The value of a string type, as UTF-8 bytes.
fn text(value: &Any<'_>) -> Option<Vec<u8>> {
    match value.tag() {
        Tag::Utf8String | Tag::PrintableString | Tag::Ia5String | Tag::NumericString | Tag::VisibleString => {
            Some(value.data.to_vec())
        }
        // Latin-1 in practice.
        Tag::T61String => {
            Some(value.data.iter().map(|byte| char::from(*byte)).collect::<String>().into_bytes())
        }
        Tag::BmpString => {
            let units = value.data.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
            Some(
                char::decode_utf16(units)
                    .map(|unit| unit.unwrap_or('\u{fffd}'))
                    .collect::<String>()
                    .into_bytes(),
            )
        }
        _ => None,
    }
}

/// RFC 2253 section 2.4, and as OpenSSL does, all that is not printable ASCII in hex.
fn escape(value: &[u8], out: &mut String) {
    let last = value.len().saturating_sub(1);
    for (index, byte) in value.iter().enumerate() {
        match byte {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => {
                out.push('\\');
                out.push(char::from(*byte));
            }
            b'#' if index == 0 => out.push_str("\\#"),
            b' ' if index == 0 || index == last => out.push_str("\\ "),
            0x20..=0x7e => out.push(char::from(*byte)),
            other => {
                // Writing to a String does not fail.
                let _ = write!(out, "\\{other:02X}");
            }
        }
    }
}

/// A value of another type: its DER form in hex.
fn dump(value: &Any<'_>, out: &mut String) {
    out.push('#');
    let mut der = vec![u8::try_from(value.tag().0).unwrap_or(0)];
    match value.data.len() {
        short @ 0..=0x7f => der.push(u8::try_from(short).unwrap_or(0x7f)),
        long => {
            let bytes = long.to_be_bytes();
            let significant = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
            der.push(0x80 | u8::try_from(significant.len()).unwrap_or(0x7f));
            der.extend_from_slice(significant);
        }
    }
    der.extend_from_slice(value.data);
    for byte in der {
        // Writing to a String does not fail.
        let _ = write!(out, "{byte:02X}");
    }
}

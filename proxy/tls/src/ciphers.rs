//! Cipher suites by OpenSSL's names, and who is asked for the order.
//!
//! As in BoringSSL: in TLS 1.3 a server takes the first suite that the client offers, on machines without AES in hardware
//! ChaCha before it. In TLS 1.2 the server's list decides, and inside a group of equal preference the client's.

use rustls::crypto::aws_lc_rs::cipher_suite as suites;
use rustls::{CipherSuite, SupportedCipherSuite, SupportedProtocolVersion};
use waystation_schema::ConfigError;

/// The suites that may be used.
#[derive(Clone, Debug)]
pub(crate) struct Ciphers {
    /// Of TLS 1.3, as our clients offer them.
    tls13: Vec<SupportedCipherSuite>,
    /// Of TLS 1.2, in groups of equal preference.
    tls12: Vec<Vec<SupportedCipherSuite>>,
    fast_aes: bool,
}

/// The suites of TLS 1.2.
static SUITES: [(&str, &SupportedCipherSuite); 6] = [
    ("ECDHE-ECDSA-AES128-GCM-SHA256", &suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
    ("ECDHE-ECDSA-CHACHA20-POLY1305", &suites::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
    ("ECDHE-RSA-AES128-GCM-SHA256", &suites::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
    ("ECDHE-RSA-CHACHA20-POLY1305", &suites::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
    ("ECDHE-ECDSA-AES256-GCM-SHA384", &suites::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
    ("ECDHE-RSA-AES256-GCM-SHA384", &suites::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
];

/// Envoy's list where none is configured, for both sides.
const DEFAULT: [&str; 4] = [
    "[ECDHE-ECDSA-AES128-GCM-SHA256|ECDHE-ECDSA-CHACHA20-POLY1305]",
    "[ECDHE-RSA-AES128-GCM-SHA256|ECDHE-RSA-CHACHA20-POLY1305]",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
];

/// What BoringSSL has besides and rustls has not: no forward secrecy, or CBC.
const OBSOLETE: [&str; 13] = [
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-RSA-AES128-SHA256",
    "ECDHE-RSA-AES256-SHA",
    "ECDHE-PSK-AES128-CBC-SHA",
    "ECDHE-PSK-AES256-CBC-SHA",
    "ECDHE-PSK-CHACHA20-POLY1305",
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-SHA",
    "AES256-SHA",
    "DES-CBC3-SHA",
];

impl Ciphers {
    /// Compiles `cipher_suites`, which is of TLS 1.2: the suites of TLS 1.3 are always on. Suites of versions that are off
    /// are left out: rustls would offer them, and choose certificates by them.
    pub(crate) fn compile(
        names: &[String],
        versions: &[&SupportedProtocolVersion],
    ) -> Result<Self, ConfigError> {
        let configured = if names.is_empty() { groups(&DEFAULT)? } else { groups(names)? };
        let fast_aes = has_aes_hardware();
        let mut tls13 = vec![
            suites::TLS13_AES_128_GCM_SHA256,
            suites::TLS13_AES_256_GCM_SHA384,
            suites::TLS13_CHACHA20_POLY1305_SHA256,
        ];
        if !fast_aes {
            tls13.rotate_right(1);
        }
        let on = |version| versions.iter().any(|on| on.version == version);
        Ok(Self {
            tls13: if on(rustls::ProtocolVersion::TLSv1_3) { tls13 } else { Vec::new() },
            tls12: if on(rustls::ProtocolVersion::TLSv1_2) { configured } else { Vec::new() },
            fast_aes,
        })
    }

    /// All, in our own order.
    pub(crate) fn own(&self) -> Vec<SupportedCipherSuite> {
        self.tls13.iter().chain(self.tls12.iter().flatten()).copied().collect()
    }

    /// All, in the order in which a server looks for one that a client has, which offers these.
    pub(crate) fn for_client(&self, offered: &[CipherSuite]) -> Vec<SupportedCipherSuite> {
        let rank = |suite: &SupportedCipherSuite| {
            offered.iter().position(|offered| *offered == suite.suite()).unwrap_or(usize::MAX)
        };
        let mut all = self.tls13.clone();
        all.sort_by_key(|suite| {
            let preferred = !self.fast_aes && *suite == suites::TLS13_CHACHA20_POLY1305_SHA256;
            (!preferred, rank(suite))
        });
        for group in &self.tls12 {
            let start = all.len();
            all.extend(group);
            all[start..].sort_by_key(rank);
        }
        all
    }
}

/// As OpenSSL prints a cipher suite.
pub(crate) fn cipher_name(suite: CipherSuite) -> &'static str {
    match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => "TLS_AES_128_GCM_SHA256",
        CipherSuite::TLS13_AES_256_GCM_SHA384 => "TLS_AES_256_GCM_SHA384",
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => "TLS_CHACHA20_POLY1305_SHA256",
        other => SUITES.iter().find(|(_, suite)| suite.suite() == other).map_or("", |(name, _)| name),
    }
}

/// The suites of a list of names and of `[a|b]` groups of equal preference.
///
/// An obsolete suite beside others is left out with a warning: control planes list them by habit (Istio's inbound
/// list has two without forward secrecy), and to offer less of what is weak harms only peers that have nothing else.
/// A list of nothing else is refused, as is a name nobody knows.
fn groups<S: AsRef<str>>(names: &[S]) -> Result<Vec<Vec<SupportedCipherSuite>>, ConfigError> {
    let mut groups: Vec<Vec<SupportedCipherSuite>> = Vec::new();
    for (index, entry) in names.iter().enumerate() {
        for item in entry.as_ref().split(':') {
            let inner = item.strip_prefix('[').and_then(|item| item.strip_suffix(']'));
            let mut group = Vec::new();
            for name in inner.unwrap_or(item).split(|separator| inner.is_some() && separator == '|') {
                if let Some((_, suite)) = SUITES.iter().find(|(known, _)| *known == name) {
                    if !groups.iter().flatten().chain(&group).any(|known| known == *suite) {
                        group.push(**suite);
                    }
                } else if OBSOLETE.contains(&name) {
                    tracing::warn!(target: "config", "cipher suite {name} is not offered: rustls does not implement it");
                } else {
                    let all: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
                    let reason = format!(
                        "Failed to initialize cipher suites {}. The following ciphers were rejected when tried \
                         individually: {name}",
                        all.join(":")
                    );
                    return Err(ConfigError::field(format!("cipher_suites[{index}]"), reason));
                }
            }
            if !group.is_empty() {
                groups.push(group);
            }
        }
    }
    if groups.is_empty() {
        return Err(ConfigError::field("cipher_suites", "rustls implements none of these cipher suites"));
    }
    Ok(groups)
}

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
fn has_aes_hardware() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn has_aes_hardware() -> bool {
    std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull")
}

#[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes_hardware() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::{Ciphers, SUITES, cipher_name};
    use rustls::CipherSuite as C;
    use rustls::version::{TLS12, TLS13};

    fn names(suites: &[rustls::SupportedCipherSuite]) -> Vec<&'static str> {
        suites.iter().map(|suite| cipher_name(suite.suite())).collect()
    }

    #[test]
    fn clients_order_tls_1_3_and_equal_preferences() {
        let fast = Ciphers { fast_aes: true, ..Ciphers::compile(&[], &[&TLS13, &TLS12]).unwrap() };
        let offered = [
            C::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
            C::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
            C::TLS13_AES_256_GCM_SHA384,
            C::TLS13_CHACHA20_POLY1305_SHA256,
            C::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        ];
        assert_eq!(
            names(&fast.for_client(&offered)),
            [
                "TLS_AES_256_GCM_SHA384",
                "TLS_CHACHA20_POLY1305_SHA256",
                "TLS_AES_128_GCM_SHA256",
                "ECDHE-ECDSA-CHACHA20-POLY1305",
                "ECDHE-ECDSA-AES128-GCM-SHA256",
                "ECDHE-RSA-AES128-GCM-SHA256",
                "ECDHE-RSA-CHACHA20-POLY1305",
                "ECDHE-ECDSA-AES256-GCM-SHA384",
                "ECDHE-RSA-AES256-GCM-SHA384",
            ]
        );
        let slow = Ciphers { fast_aes: false, ..fast };
        assert_eq!(
            names(&slow.for_client(&offered))[..3],
            ["TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"]
        );
        let own = names(&slow.own());
        assert_eq!(own[3..], SUITES.map(|(name, _)| name));
    }

    #[test]
    fn lists() {
        let compile = |list: &[&str]| {
            let list: Vec<String> = list.iter().map(ToString::to_string).collect();
            Ciphers::compile(&list, &[&TLS12])
                .map(|ciphers| ciphers.tls12.iter().map(|group| names(group)).collect::<Vec<_>>())
        };
        let (a, b, c) =
            ("ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-RSA-AES256-GCM-SHA384");
        let group = format!("[{a}|{b}]");
        assert_eq!(compile(&[&group, "AES128-GCM-SHA256", c, a]).unwrap(), [vec![a, b], vec![c]]);
        assert_eq!(compile(&[&format!("{c}:{group}")]).unwrap(), [vec![c], vec![a, b]]);
        let refused = |list: &[&str]| compile(list).unwrap_err().path();
        assert_eq!(refused(&["AES128-SHA"]), "cipher_suites");
        assert_eq!(refused(&[a, &format!("{a}|{b}")]), "cipher_suites[1]");
        assert_eq!(refused(&["TLS_AES_128_GCM_SHA256"]), "cipher_suites[0]");
        assert_eq!(Ciphers::compile(&[], &[&TLS13]).unwrap().own().len(), 3);
    }
}

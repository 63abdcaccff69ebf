//! Where a run puts its files and what it fills into the configurations.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::run;

/// A temporary folder, removed at the end.
pub(super) struct Place {
    folder: PathBuf,
    next: AtomicUsize,
}

impl Place {
    pub(super) fn new() -> Result<Self, String> {
        let folder = std::env::temp_dir().join(format!("bench-peers-{}", std::process::id()));
        fs::create_dir_all(&folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
        Ok(Self { folder, next: AtomicUsize::new(0) })
    }

    /// A new folder for one process, `temp` in it.
    pub(super) fn folder(&self, name: &str) -> Result<PathBuf, String> {
        let folder = self.folder.join(format!("{name}-{}", self.next.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(folder.join("temp"))
            .map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
        Ok(folder)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Nothing is lost when a file stays in the system's temporary folder.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The text of a file of `conformance/bench`.
pub(super) fn template(name: &str) -> Result<String, String> {
    let file = run::root().join("conformance/bench").join(name);
    fs::read_to_string(&file).map_err(|error| format!("cannot read {}: {error}", file.display()))
}

/// A template with each `@NAME@` replaced.
pub(super) fn fill(template: &str, values: &[(&str, &str)]) -> String {
    values.iter().fold(template.to_owned(), |text, (name, value)| text.replace(name, value))
}

/// Writes a file; the error names it.
pub(super) fn write(file: &Path, text: &str) -> Result<(), String> {
    fs::write(file, text).map_err(|error| format!("cannot write {}: {error}", file.display()))
}

/// An address that nobody listens on at the moment.
pub(super) fn free_address() -> Result<SocketAddr, String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|error| error.to_string())?;
    listener.local_addr().map_err(|error| error.to_string())
}

/// A self-signed P-256 certificate, the usual kind: `cert.pem`, `key.pem`, and `both.pem` for HAProxy.
pub(super) fn certificate(folder: &Path) -> Result<(), String> {
    if run::find("openssl").is_none() {
        return Err("`openssl` is not installed (it makes the certificate)".to_owned());
    }
    let made = Command::new("openssl")
        .current_dir(folder)
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=bench", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
        .args(["-keyout", "key.pem", "-out", "cert.pem"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !made {
        return Err("openssl could not make a certificate".to_owned());
    }
    let read = |name| fs::read_to_string(folder.join(name)).map_err(|error| error.to_string());
    write(&folder.join("both.pem"), &(read("cert.pem")? + &read("key.pem")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_filled() {
        assert_eq!(fill("a @X@ b @Y@ @X@", &[("@X@", "1"), ("@Y@", "2")]), "a 1 b 2 1");
    }
}

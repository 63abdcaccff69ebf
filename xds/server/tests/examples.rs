//! What a user copies is valid, and what the README shows is what there is.

use std::fs;
use std::path::{Path, PathBuf};

use waystation_schema::{Message, Policy, TextOptions, check, yaml_to_wire};
use waystation_xds_server::Server;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn bootstraps_are_accepted() {
    let message = Message::find("envoy.config.bootstrap.v3.Bootstrap").expect("it exists");
    let mut found = 0;
    for entry in fs::read_dir(root().join("examples")).expect("it exists") {
        let path = entry.expect("it can be listed").path();
        if path.is_dir() {
            continue;
        }
        let text = fs::read_to_string(&path).expect("it can be read");
        let encoded = yaml_to_wire(message, &text, TextOptions::default());
        let wire = encoded.unwrap_or_else(|error| panic!("{}: {error}", path.display())).wire;
        let report = check(message, &wire, Policy::default());
        let report = report.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // What is ignored, such as API versions, is what Envoy wants to read there.
        assert_eq!((report.deprecated, report.unknown), (vec![], vec![]), "{}", path.display());
        found += 1;
    }
    assert!(found >= 3);
}

#[test]
fn resources_of_the_demo_are_served_without_a_warning() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let status = runtime.block_on(async {
        let server = Server::builder(root().join("examples/xds")).console(|_| ()).start().expect("it starts");
        server.status()
    });
    assert_eq!(status.types.len(), 4);
    assert_eq!(status.warnings, [""; 0]);
    for (path, file) in &status.files {
        assert!(file.fault.is_none() && file.warnings.is_empty() && file.resources == 1, "{path}: {file:?}");
    }
}

#[test]
fn readme_shows_the_bootstrap_of_the_examples() {
    let bootstrap = fs::read_to_string(root().join("examples/bootstrap.yaml")).expect("it can be read");
    let readme = fs::read_to_string(root().join("README.md")).expect("it can be read");
    assert!(readme.contains(&format!("```yaml\n{bootstrap}```")), "the README shows another bootstrap");
    assert_eq!(bootstrap.lines().count(), 15);
}

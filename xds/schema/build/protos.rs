//! Finds the protos that the `envoy-types` crate ships and compiles them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use protox::file::{File, FileResolver, GoogleFileResolver};
use protox::prost_reflect::DescriptorPool;
use protox::prost_reflect::prost_types::{DescriptorProto, FileDescriptorProto, UninterpretedOption};

/// Import roots inside `envoy-types/proto`.
const ROOTS: [&str; 8] = [
    "cel-spec/proto",
    "client_model",
    "data-plane-api",
    "googleapis",
    "opentelemetry-proto",
    "protoc-gen-validate",
    "ratelimit/api",
    "xds",
];

/// What the protos compile to, and where they come from.
pub(crate) struct Protos {
    pub(crate) pool: DescriptorPool,
    /// The version of `envoy-types`.
    pub(crate) version: String,
}

/// Compiles every proto file into one pool.
///
/// Type names are qualified here, each in the scope of its own file's imports as `protoc` does it. Left relative,
/// they would be resolved against the whole pool, where `config.core.v3.X` in one package meets the `config`
/// of another.
pub(crate) fn compile() -> Protos {
    let mut files = BTreeMap::new();
    let (folder, version) = envoy_types();
    let shipped = folder.join("proto");
    for root in ROOTS {
        parse_tree(&shipped.join(root), &mut files);
    }
    let own = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("proto");
    println!("cargo::rerun-if-changed={}", own.display());
    parse_tree(&own, &mut files);
    open_well_known(&mut files);

    let symbols: HashMap<String, HashSet<String>> =
        files.iter().map(|(name, file)| (name.clone(), symbols_of(file))).collect();
    let names: Vec<String> = files.keys().cloned().collect();
    for name in &names {
        let visible = visible_symbols(name, &files, &symbols);
        let file = files.get_mut(name).expect("the key comes from the map");
        Scope { visible: &visible, package: file.package().to_owned() }.qualify_file(file);
    }
    let mut pool = DescriptorPool::new();
    if let Err(error) = pool.add_file_descriptor_protos(files.into_values()) {
        panic!("the protos of envoy-types do not compile: {error:?}");
    }
    Protos { pool, version }
}

/// The source folder and the version of the `envoy-types` crate in the dependency graph being built.
fn envoy_types() -> (PathBuf, String) {
    let cargo = env::var_os("CARGO").expect("cargo sets it");
    let target = env::var("TARGET").expect("cargo sets it");
    let manifest =
        PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("Cargo.toml");
    // Only the packages of this target need to be on disk, so this works offline after `cargo fetch`.
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--filter-platform", &target, "--manifest-path"])
        .arg(manifest)
        .output()
        .unwrap_or_else(|error| panic!("cannot run cargo metadata: {error}"));
    if !output.status.success() {
        panic!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata writes JSON");
    let package = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "envoy-types")
        .expect("envoy-types is in the dependency graph");
    let text = |key: &str| package[key].as_str().expect("cargo metadata describes packages so");
    let folder = Path::new(text("manifest_path")).parent().expect("a manifest has a folder");
    (folder.to_owned(), text("version").to_owned())
}

fn parse_tree(root: &Path, files: &mut BTreeMap<String, FileDescriptorProto>) {
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).unwrap_or_else(|error| panic!("cannot read {}: {error}", folder.display()));
        for entry in entries {
            let path = entry.expect("the folder was just opened").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "proto") {
                let name = path.strip_prefix(root).expect("it was found below the root");
                let name = name.to_str().expect("proto paths are ASCII").replace('\\', "/");
                let source = fs::read_to_string(&path)
                    .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
                let file = File::from_source(&name, &source)
                    .unwrap_or_else(|error| panic!("cannot parse {}: {error:?}", path.display()));
                let mut file = file.file_descriptor_proto().clone();
                file.source_code_info = None;
                files.insert(name, file);
            }
        }
    }
}

/// Adds the well-known types, any of which may stand in an `Any`, and the imports of other `google/protobuf` files.
fn open_well_known(files: &mut BTreeMap<String, FileDescriptorProto>) {
    const TYPES: [&str; 7] = ["any", "duration", "empty", "field_mask", "struct", "timestamp", "wrappers"];
    let resolver = GoogleFileResolver::new();
    loop {
        let missing: HashSet<String> = files
            .values()
            .flat_map(|file| file.dependency.iter().cloned())
            .chain(TYPES.iter().map(|name| format!("google/protobuf/{name}.proto")))
            .filter(|name| !files.contains_key(name))
            .collect();
        if missing.is_empty() {
            return;
        }
        for name in missing {
            let file =
                resolver.open_file(&name).unwrap_or_else(|error| panic!("no import {name}: {error:?}"));
            files.insert(name, file.file_descriptor_proto().clone());
        }
    }
}

/// Everything a file defines, with its package and the package's prefixes.
fn symbols_of(file: &FileDescriptorProto) -> HashSet<String> {
    fn add_message(scope: &str, message: &DescriptorProto, symbols: &mut HashSet<String>) {
        let name = join(scope, message.name());
        for nested in &message.nested_type {
            add_message(&name, nested, symbols);
        }
        symbols.extend(message.enum_type.iter().map(|nested| join(&name, nested.name())));
        symbols.extend(message.extension.iter().map(|nested| join(&name, nested.name())));
        symbols.insert(name);
    }
    let package = file.package();
    let mut symbols = HashSet::new();
    symbols.extend(package.match_indices('.').map(|(dot, _)| package[..dot].to_owned()));
    symbols.insert(package.to_owned());
    for message in &file.message_type {
        add_message(package, message, &mut symbols);
    }
    symbols.extend(file.enum_type.iter().map(|nested| join(package, nested.name())));
    symbols.extend(file.extension.iter().map(|nested| join(package, nested.name())));
    symbols
}

fn visible_symbols(
    name: &str,
    files: &BTreeMap<String, FileDescriptorProto>,
    symbols: &HashMap<String, HashSet<String>>,
) -> HashSet<String> {
    let mut visible = symbols[name].clone();
    let mut pending = files[name].dependency.clone();
    let mut seen = HashSet::new();
    while let Some(import) = pending.pop() {
        if seen.insert(import.clone()) {
            visible.extend(symbols[&import].iter().cloned());
            let file = &files[&import];
            pending
                .extend(file.public_dependency.iter().map(|&index| file.dependency[index as usize].clone()));
        }
    }
    visible
}

struct Scope<'a> {
    visible: &'a HashSet<String>,
    package: String,
}

impl Scope<'_> {
    fn qualify_file(&self, file: &mut FileDescriptorProto) {
        for message in &mut file.message_type {
            self.qualify_message(&self.package, message);
        }
        for field in &mut file.extension {
            self.qualify(&self.package, &mut field.extendee);
            self.qualify(&self.package, &mut field.type_name);
        }
        for item in &mut file.enum_type {
            for value in &mut item.value {
                if let Some(options) = &mut value.options {
                    self.qualify_options(&mut options.uninterpreted_option);
                }
            }
            if let Some(options) = &mut item.options {
                self.qualify_options(&mut options.uninterpreted_option);
            }
        }
        for method in file.service.iter_mut().flat_map(|service| &mut service.method) {
            self.qualify(&self.package, &mut method.input_type);
            self.qualify(&self.package, &mut method.output_type);
            if let Some(options) = &mut method.options {
                self.qualify_options(&mut options.uninterpreted_option);
            }
        }
        for service in &mut file.service {
            if let Some(options) = &mut service.options {
                self.qualify_options(&mut options.uninterpreted_option);
            }
        }
        if let Some(options) = &mut file.options {
            self.qualify_options(&mut options.uninterpreted_option);
        }
    }

    fn qualify_message(&self, outer: &str, message: &mut DescriptorProto) {
        let scope = join(outer, message.name());
        for field in message.field.iter_mut().chain(&mut message.extension) {
            self.qualify(&scope, &mut field.extendee);
            self.qualify(&scope, &mut field.type_name);
            if let Some(options) = &mut field.options {
                self.qualify_options(&mut options.uninterpreted_option);
            }
        }
        for oneof in &mut message.oneof_decl {
            if let Some(options) = &mut oneof.options {
                self.qualify_options(&mut options.uninterpreted_option);
            }
        }
        for item in &mut message.enum_type {
            for value in &mut item.value {
                if let Some(options) = &mut value.options {
                    self.qualify_options(&mut options.uninterpreted_option);
                }
            }
        }
        if let Some(options) = &mut message.options {
            self.qualify_options(&mut options.uninterpreted_option);
        }
        for nested in &mut message.nested_type {
            self.qualify_message(&scope, nested);
        }
    }

    fn qualify_options(&self, options: &mut [UninterpretedOption]) {
        for part in options.iter_mut().flat_map(|option| &mut option.name) {
            if part.is_extension {
                let mut name = Some(std::mem::take(&mut part.name_part));
                self.qualify(&self.package, &mut name);
                part.name_part = name.expect("it was set above");
            }
        }
    }

    fn qualify(&self, scope: &str, name: &mut Option<String>) {
        let Some(relative) = name.as_deref().filter(|name| !name.is_empty() && !name.starts_with('.')) else {
            return;
        };
        let mut scope = scope;
        loop {
            let candidate = join(scope, relative);
            if self.visible.contains(&candidate) {
                *name = Some(format!(".{candidate}"));
                return;
            }
            assert!(!scope.is_empty(), "cannot resolve {relative} in {}", self.package);
            scope = scope.rfind('.').map_or("", |dot| &scope[..dot]);
        }
    }
}

fn join(scope: &str, name: &str) -> String {
    if scope.is_empty() { name.to_owned() } else { format!("{scope}.{name}") }
}

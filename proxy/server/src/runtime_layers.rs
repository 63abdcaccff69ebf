//! The layers of `layered_runtime`: static, disk, admin, RTDS.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use envoy_types::pb::envoy::config::bootstrap::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::runtime::{Layer, Runtime};
use waystation_filter_api::value::Value;
use waystation_schema::{At as _, ConfigError};
use waystation_stats::{Scope, stats_group};

stats_group! {
    /// `runtime.`
    pub struct RuntimeStats {
        counters {
            deprecated_feature_use, load_error, load_success, override_dir_exists, override_dir_not_exists,
        }
        gauges { admin_overrides_active, deprecated_feature_seen_since_process_start, num_keys, num_layers }
        histograms {}
    }
}

/// What one layer is made of.
#[derive(Clone, Debug)]
enum Source {
    Static(BTreeMap<String, Value>),
    Disk(PathBuf),
    Admin(BTreeMap<String, Value>),
    Rtds { name: String, source: Box<core::ConfigSource>, values: BTreeMap<String, Value> },
}

/// The configured layers in order; each change puts the merged whole in force.
#[derive(Debug)]
pub struct RuntimeLayers {
    layers: Vec<(String, Source)>,
    /// How many disk layers could not be read when they were put in force.
    failed: Cell<u64>,
    stats: RuntimeStats,
}

impl RuntimeLayers {
    /// Compiles the layers. Without a `layered_runtime` there is none, not even an admin layer.
    pub fn compile(
        proto: Option<&pb::LayeredRuntime>,
        service_cluster: &str,
        root: &Scope,
    ) -> Result<Self, ConfigError> {
        use pb::runtime_layer::LayerSpecifier;
        let stats = root.scope("runtime").group();
        let Some(proto) = proto else {
            return Ok(Self { layers: Vec::new(), failed: Cell::default(), stats });
        };
        let mut layers: Vec<(String, Source)> = Vec::with_capacity(proto.layers.len());
        for (i, layer) in proto.layers.iter().enumerate() {
            let compile = || {
                if layers.iter().any(|(name, _)| *name == layer.name) {
                    return Err(ConfigError::new(format!("Duplicate layer name: {}", layer.name)));
                }
                Ok(match &layer.layer_specifier {
                    Some(LayerSpecifier::StaticLayer(values)) => {
                        Source::Static(flatten(values).at(|| "static_layer")?)
                    }
                    Some(LayerSpecifier::AdminLayer(_)) => {
                        if layers.iter().any(|(_, source)| matches!(source, Source::Admin(_))) {
                            return Err(ConfigError::new(
                                "Too many admin layers specified in LayeredRuntime, at most one may be specified",
                            ));
                        }
                        Source::Admin(BTreeMap::new())
                    }
                    Some(LayerSpecifier::DiskLayer(disk)) => {
                        let mut path = PathBuf::from(&disk.symlink_root);
                        path.push(&disk.subdirectory);
                        if disk.append_service_cluster {
                            path.push(service_cluster);
                        }
                        Source::Disk(path)
                    }
                    Some(LayerSpecifier::RtdsLayer(rtds)) => Source::Rtds {
                        name: rtds.name.clone(),
                        source: rtds
                            .rtds_config
                            .clone()
                            .map(Box::new)
                            .ok_or_else(|| ConfigError::field("rtds_layer.rtds_config", "is required"))?,
                        values: BTreeMap::new(),
                    },
                    None => return Err(ConfigError::field("layer_specifier", "is required")),
                })
            };
            let source = compile().at(|| format!("layers[{i}]")).at(|| "layered_runtime")?;
            layers.push((layer.name.clone(), source));
        }
        Ok(Self { layers, failed: Cell::default(), stats })
    }

    /// Puts the layers in force; disk layers are read anew.
    pub fn apply(&self, runtime: &Runtime) {
        self.put(runtime, self.read());
    }

    /// The layers that can be read, and how many cannot. As in Envoy a disk layer is there as a whole or not at all, and
    /// one without a folder is no error.
    fn read(&self) -> (Vec<Layer>, u64) {
        let mut failed = 0;
        let layers = self.layers.iter().filter_map(|(name, source)| {
            let values = match source {
                Source::Static(values) | Source::Admin(values) | Source::Rtds { values, .. } => {
                    values.clone()
                }
                Source::Disk(path) if !path.exists() => return None,
                Source::Disk(path) => match read_disk(path) {
                    Ok(values) => values,
                    Err(error) => {
                        tracing::debug!(target: "runtime", "error loading layer '{name}' from disk: {error}");
                        failed += 1;
                        return None;
                    }
                },
            };
            Some(Layer { name: name.clone(), values })
        });
        (layers.collect(), failed)
    }

    fn put(&self, runtime: &Runtime, (layers, failed): (Vec<Layer>, u64)) {
        self.failed.set(failed);
        let count = |of: fn(&Source) -> bool| self.layers.iter().filter(|(_, source)| of(source)).count();
        let stats = &self.stats;
        let overrides = count(|source| matches!(source, Source::Admin(values) if !values.is_empty()));
        stats.admin_overrides_active().set(overrides as u64);
        stats.num_layers().set(layers.len() as u64);
        let keys: BTreeSet<&String> = layers.iter().flat_map(|layer| layer.values.keys()).collect();
        stats.num_keys().set(keys.len() as u64);
        match failed {
            0 => stats.load_success().inc(),
            _ => stats.load_error().inc(),
        }
        // A second disk layer is what an override directory once was.
        match count(|source| matches!(source, Source::Disk(_))) {
            0 | 1 => stats.override_dir_not_exists().inc(),
            _ => stats.override_dir_exists().inc(),
        }
        runtime.set_layers(layers);
    }

    /// The RTDS layers: resource name and source.
    pub fn rtds(&self) -> impl Iterator<Item = (&str, &core::ConfigSource)> {
        self.layers.iter().filter_map(|(_, source)| match source {
            Source::Rtds { name, source, .. } => Some((name.as_str(), &**source)),
            _ => None,
        })
    }

    /// New values for the RTDS layers of this resource name.
    pub fn set_rtds(&mut self, resource: &str, new: Option<&wkt::Struct>) -> Result<(), ConfigError> {
        let new = new.map(flatten).transpose().at(|| "layer")?;
        self.replace_rtds(resource, &new.unwrap_or_default());
        Ok(())
    }

    /// The RTDS layers of this resource name have no values any more.
    pub fn clear_rtds(&mut self, resource: &str) {
        self.replace_rtds(resource, &BTreeMap::new());
    }

    fn replace_rtds(&mut self, resource: &str, new: &BTreeMap<String, Value>) {
        for (_, source) in &mut self.layers {
            if let Source::Rtds { name, values, .. } = source
                && name == resource
            {
                values.clone_from(new);
            }
        }
    }

    /// `/runtime_modify`: an empty value removes the key. `false` when there is no admin layer.
    pub fn modify(&mut self, changes: &[(String, String)]) -> bool {
        let admin = self.layers.iter_mut().find_map(|(_, source)| match source {
            Source::Admin(values) => Some(values),
            _ => None,
        });
        let Some(values) = admin else {
            return false;
        };
        for (key, value) in changes {
            if value.is_empty() {
                values.remove(key);
            } else {
                values.insert(key.clone(), Value::String(value.as_str().into()));
            }
        }
        true
    }

    /// A configuration sets so many deprecated fields.
    pub fn deprecated_features_used(&self, count: u64) {
        self.stats.deprecated_feature_use().add(count);
        self.stats.deprecated_feature_seen_since_process_start().add(count);
    }

    /// Reads disk layers again, if there are any: a layer is replaced by moving a symbolic link.
    pub fn refresh(&self, runtime: &Runtime) {
        if self.layers.iter().any(|(_, source)| matches!(source, Source::Disk(_))) {
            let (layers, failed) = self.read();
            if layers != runtime.layers() || failed != self.failed.get() {
                self.put(runtime, (layers, failed));
            }
        }
    }
}

/// Nested objects become dotted keys; an object with a numerator or denominator is a fraction and stays whole.
/// Nothing else can be made of a list or a null.
fn flatten(proto: &wkt::Struct) -> Result<BTreeMap<String, Value>, ConfigError> {
    fn walk(prefix: &str, value: Value, out: &mut BTreeMap<String, Value>) -> Result<(), ConfigError> {
        match value {
            Value::Null | Value::List(_) => {
                return Err(ConfigError::new(format!("Invalid runtime entry value for {prefix}")));
            }
            Value::Struct(fields)
                if !fields.contains_key("numerator") && !fields.contains_key("denominator") =>
            {
                for (key, value) in fields {
                    let path = if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") };
                    walk(&path, value, out)?;
                }
            }
            value => {
                out.insert(prefix.to_owned(), value);
            }
        }
        Ok(())
    }
    let mut out = BTreeMap::new();
    walk("", Value::Struct(waystation_filter_api::value::struct_from_proto(proto)), &mut out)?;
    Ok(out)
}

/// One file per key, folders are dots; `#` starts a comment line.
///
/// # Errors
/// Whatever of it cannot be read.
fn read_disk(root: &Path) -> io::Result<BTreeMap<String, Value>> {
    /// Envoy's bound, against links that lead in circles.
    const MAX_DEPTH: usize = 16;
    fn walk(folder: &Path, prefix: &str, depth: usize, out: &mut BTreeMap<String, Value>) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::other("folders are too deep"));
        }
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            if fs::metadata(entry.path())?.is_dir() {
                walk(&entry.path(), &path, depth + 1, out)?;
            } else {
                let text = fs::read_to_string(entry.path())?;
                let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
                out.insert(path, Value::String(lines.join("\n").trim_end().into()));
            }
        }
        Ok(())
    }
    let mut out = BTreeMap::new();
    walk(root, "", 1, &mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::RuntimeLayers;
    use envoy_types::pb::envoy::config::bootstrap::v3 as pb;
    use envoy_types::pb::google::protobuf as wkt;
    use waystation_filter_api::runtime::Runtime;
    use waystation_stats::{Scope, Store};

    fn root() -> Scope {
        Store::default().root()
    }

    fn number(value: f64) -> wkt::Value {
        wkt::Value { kind: Some(wkt::value::Kind::NumberValue(value)) }
    }

    fn object(fields: Vec<(&str, wkt::Value)>) -> wkt::Struct {
        wkt::Struct { fields: fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() }
    }

    fn layer(name: &str, specifier: pb::runtime_layer::LayerSpecifier) -> pb::RuntimeLayer {
        pb::RuntimeLayer { name: name.into(), layer_specifier: Some(specifier) }
    }

    #[test]
    fn static_disk_and_admin_layers_merge_in_order() {
        use pb::runtime_layer::LayerSpecifier;
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("current/health")).unwrap();
        std::fs::write(folder.path().join("current/health/min"), "# comment\n5\n").unwrap();
        let nested =
            wkt::Value { kind: Some(wkt::value::Kind::StructValue(object(vec![("min", number(1.0))]))) };
        let disk = pb::runtime_layer::DiskLayer {
            symlink_root: folder.path().join("current").to_string_lossy().into_owned(),
            ..Default::default()
        };
        let proto = pb::LayeredRuntime {
            layers: vec![
                layer("s", LayerSpecifier::StaticLayer(object(vec![("health", nested)]))),
                layer("d", LayerSpecifier::DiskLayer(disk)),
                layer("a", LayerSpecifier::AdminLayer(Default::default())),
            ],
        };
        let mut layers = RuntimeLayers::compile(Some(&proto), "", &root()).unwrap();
        let runtime = Runtime::new();
        let min = runtime.integer("health.min", 0);
        layers.apply(&runtime);
        assert_eq!(min.get(), 5);
        assert!(layers.modify(&[("health.min".into(), "9".into())]));
        layers.apply(&runtime);
        assert_eq!(min.get(), 9);
        layers.modify(&[("health.min".into(), String::new())]);
        layers.apply(&runtime);
        assert_eq!(min.get(), 5);
    }

    #[test]
    fn nulls_and_lists_are_no_values() {
        use pb::runtime_layer::LayerSpecifier;
        use wkt::value::Kind;
        let value = |kind| wkt::Value { kind: Some(kind) };
        for kind in [Kind::NullValue(0), Kind::ListValue(wkt::ListValue { values: vec![] })] {
            let nested = value(Kind::StructValue(object(vec![("b", value(kind))])));
            let proto = pb::LayeredRuntime {
                layers: vec![layer("s", LayerSpecifier::StaticLayer(object(vec![("a", nested)])))],
            };
            let error = RuntimeLayers::compile(Some(&proto), "", &root()).unwrap_err();
            assert_eq!(
                error.to_string(),
                "layered_runtime.layers[0].static_layer: Invalid runtime entry value for a.b"
            );
        }
    }

    #[test]
    fn a_second_admin_layer_is_refused() {
        use pb::runtime_layer::LayerSpecifier;
        let admin = |name| layer(name, LayerSpecifier::AdminLayer(Default::default()));
        let proto = pb::LayeredRuntime { layers: vec![admin("a"), admin("b")] };
        let error = RuntimeLayers::compile(Some(&proto), "", &root()).unwrap_err();
        assert_eq!(error.path(), "layered_runtime.layers[1]");
    }

    #[test]
    fn a_disk_layer_that_cannot_be_read_is_left_out_and_counted() {
        use pb::runtime_layer::LayerSpecifier;
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let disk = pb::runtime_layer::DiskLayer {
            symlink_root: path("now").to_string_lossy().into_owned(),
            ..Default::default()
        };
        let proto = pb::LayeredRuntime { layers: vec![layer("d", LayerSpecifier::DiskLayer(disk))] };
        let layers = RuntimeLayers::compile(Some(&proto), "", &root()).unwrap();
        let runtime = Runtime::new();
        let counts = || {
            (layers.stats.load_success().value(), layers.stats.load_error().value(), runtime.layers().len())
        };
        layers.apply(&runtime);
        assert_eq!(counts(), (1, 0, 0), "no folder is no error");
        std::fs::create_dir(path("now")).unwrap();
        std::fs::write(path("now/min"), "5").unwrap();
        layers.refresh(&runtime);
        assert_eq!(counts(), (2, 0, 1));
        std::os::unix::fs::symlink(path("nowhere"), path("now/dangling")).unwrap();
        for _ in 0..2 {
            layers.refresh(&runtime);
            assert_eq!(counts(), (2, 1, 0), "counted once");
        }
        std::fs::remove_file(path("now/dangling")).unwrap();
        let deep: std::path::PathBuf = std::iter::repeat_n("d", 20).collect();
        std::fs::create_dir_all(path("now").join(deep)).unwrap();
        layers.apply(&runtime);
        assert_eq!(counts(), (2, 2, 0));
    }
}

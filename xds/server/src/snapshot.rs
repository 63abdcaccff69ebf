use std::collections::BTreeMap;
use std::sync::Arc;

use waystation_xds::ResourceType;
use xxhash_rust::xxh64::Xxh64;

use crate::Resource;

/// All resources at one point in time; immutable.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    types: BTreeMap<ResourceType, BTreeMap<Arc<str>, Arc<Resource>>>,
    /// Aliases to names.
    aliases: BTreeMap<ResourceType, BTreeMap<Arc<str>, Arc<str>>>,
}

impl Snapshot {
    /// The resources of a type, by name.
    pub fn of(&self, kind: &ResourceType) -> &BTreeMap<Arc<str>, Arc<Resource>> {
        static NONE: BTreeMap<Arc<str>, Arc<Resource>> = BTreeMap::new();
        self.types.get(kind).unwrap_or(&NONE)
    }

    /// A resource of a type by its name or by an alias; a name goes before an alias.
    pub fn find(&self, kind: &ResourceType, name: &str) -> Option<&Arc<Resource>> {
        let resources = self.of(kind);
        resources.get(name).or_else(|| resources.get(self.aliases.get(kind)?.get(name)?))
    }

    /// The types that have resources.
    pub fn types(&self) -> impl Iterator<Item = (&ResourceType, &BTreeMap<Arc<str>, Arc<Resource>>)> {
        self.types.iter()
    }

    /// The hash of all names and versions of a type.
    pub fn version(&self, kind: &ResourceType) -> String {
        version_of(self.of(kind).values().map(|resource| (resource.name(), resource.version())))
    }
}

impl FromIterator<Arc<Resource>> for Snapshot {
    /// The last of several resources with one type and name or alias counts. From a folder there is but one: of files that
    /// say one twice only the first gets here.
    fn from_iter<I: IntoIterator<Item = Arc<Resource>>>(resources: I) -> Self {
        let mut snapshot = Self::default();
        for resource in resources {
            if !resource.aliases().is_empty() {
                let of_type = snapshot.aliases.entry(resource.kind().clone()).or_default();
                let aliases = resource.aliases().iter();
                of_type.extend(aliases.map(|alias| (Arc::clone(alias), Arc::clone(resource.name()))));
            }
            let of_type = snapshot.types.entry(resource.kind().clone()).or_default();
            of_type.insert(resource.name().clone(), resource);
        }
        snapshot
    }
}

/// A version for a list of resources, in the order of their names.
pub(crate) fn version_of<'r>(resources: impl Iterator<Item = (&'r Arc<str>, &'r Arc<str>)>) -> String {
    let mut hash = Xxh64::new(0);
    for (name, version) in resources {
        hash.update(&(name.len() as u64).to_le_bytes());
        hash.update(name.as_bytes());
        hash.update(version.as_bytes());
    }
    format!("{:016x}", hash.digest())
}

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::Resource;

/// A resource that was accepted by those who have seen it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) resource: Resource,
    /// xxHash64 of the body.
    pub(super) hash: u64,
    /// False when its subscribers left before they had looked at it. It is kept nevertheless while the server
    /// believes that we want it: whoever comes back for it will not be sent it again.
    pub(super) accepted: bool,
    /// Some subscriber refused it: the same bytes must be offered again.
    pub(super) disputed: bool,
    /// Serial of the last response that listed it.
    pub(super) seen: u64,
    /// End of its TTL.
    pub(super) expires: Option<Instant>,
    pub(super) updated_unix_ms: u64,
}

/// The resources of one type that one source has given us. They outlive the stream they came on.
#[derive(Debug, Default)]
pub(super) struct Inventory(HashMap<Arc<str>, Held>);

impl Inventory {
    pub(super) fn get(&self, name: &str) -> Option<&Held> {
        self.0.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut Held> {
        self.0.get_mut(name)
    }

    pub(super) fn put(&mut self, held: Held) -> Option<Held> {
        self.0.insert(held.resource.name.clone(), held)
    }

    pub(super) fn remove(&mut self, name: &str) -> Option<Held> {
        self.0.remove(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Held> {
        self.0.values()
    }

    /// Names for which `condition` holds, sorted: what we do must not depend on hash order.
    pub(super) fn names_where(&self, mut condition: impl FnMut(&Held) -> bool) -> Vec<Arc<str>> {
        let mut names: Vec<_> =
            self.0.iter().filter(|(_, held)| condition(held)).map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        names
    }
}

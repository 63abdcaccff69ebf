//! The files that secrets name. A secret by SDS is read again when a file is moved into a directory that it watches, as
//! Envoy does; those of the bootstrap, and certificates that stand in a context itself, are read once.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use waystation_schema::ConfigError;
use waystation_xds::{SubId, is_move_into};

/// Which secrets are to be read again when something moves.
#[derive(Debug)]
pub struct SecretFiles {
    /// Made with the first directory.
    watcher: Option<RecommendedWatcher>,
    watching: HashMap<PathBuf, HashSet<SubId>>,
    /// Where something has moved: written by the watcher's thread.
    moved: Arc<Mutex<HashSet<PathBuf>>>,
    /// One message is enough: what has moved stands in `moved`.
    tell: mpsc::Sender<()>,
    told: mpsc::Receiver<()>,
}

impl SecretFiles {
    /// Nothing is watched.
    pub fn new() -> Self {
        let (tell, told) = mpsc::channel(1);
        Self { watcher: None, watching: HashMap::new(), moved: Arc::default(), tell, told }
    }

    /// From now on watches `directories` for the secret of `sub`, and no others.
    ///
    /// # Errors
    /// When one cannot be watched; it names it.
    pub fn watch(&mut self, sub: SubId, directories: &[PathBuf]) -> Result<(), ConfigError> {
        for directory in directories {
            if self.watching.contains_key(directory) {
                continue;
            }
            self.watch_directory(directory).map_err(|error| {
                ConfigError::new(format!("can not watch {}: {error}", directory.display()))
            })?;
            self.watching.insert(directory.clone(), HashSet::new());
        }
        for (directory, subs) in &mut self.watching {
            if directories.contains(directory) {
                subs.insert(sub);
            } else {
                subs.remove(&sub);
            }
        }
        self.unwatch_unused();
        Ok(())
    }

    /// The secret is gone.
    pub fn forget(&mut self, sub: SubId) {
        for subs in self.watching.values_mut() {
            subs.remove(&sub);
        }
        self.unwatch_unused();
    }

    /// Waits until a secret has to be read again; nothing is lost when the wait is given up.
    pub async fn moved(&mut self) {
        // The other end is ours: it never hangs up.
        let _ = self.told.recv().await;
    }

    /// Those that have to be.
    pub fn take_moved(&mut self) -> HashSet<SubId> {
        let moved = std::mem::take(&mut *self.moved.lock());
        moved.iter().filter_map(|directory| self.watching.get(directory)).flatten().copied().collect()
    }

    fn watch_directory(&mut self, directory: &Path) -> notify::Result<()> {
        let watcher = match &mut self.watcher {
            Some(watcher) => watcher,
            none => {
                let (moved, tell) = (Arc::clone(&self.moved), self.tell.clone());
                none.insert(notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                    let Some(event) = event.ok().filter(|event| is_move_into(&event.kind)) else { return };
                    let parents = event.paths.iter().filter_map(|path| path.parent());
                    moved.lock().extend(parents.map(Path::to_owned));
                    // Full means that somebody is about to look.
                    let _ = tell.try_send(());
                })?)
            }
        };
        watcher.watch(directory, RecursiveMode::NonRecursive)
    }

    fn unwatch_unused(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        self.watching.retain(|directory, subs| {
            if subs.is_empty() {
                // It may have been deleted, which ends the watch as well.
                let _ = watcher.unwatch(directory);
            }
            !subs.is_empty()
        });
    }
}

impl Default for SecretFiles {
    fn default() -> Self {
        Self::new()
    }
}

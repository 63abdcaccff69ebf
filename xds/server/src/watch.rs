//! The folder on disk: reading it, and hearing of changes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::timeout;
use waystation_schema::Format;

use crate::folder::Files;

/// Largest file.
const MAX_FILE: u64 = 64 << 20;

/// Files in a folder.
const MAX_FILES: usize = 100_000;

/// Folders in folders; stops symbolic links that lead back.
const MAX_DEPTH: usize = 16;

/// A change is read when nothing more has happened for this long: editors and `kubectl cp` write in several steps.
const QUIET: Duration = Duration::from_millis(50);

/// And not later than this.
const LONGEST: Duration = Duration::from_secs(1);

/// Reads all YAML and JSON files below `root`. Names with a dot in front are left out: editors' and Kubernetes'
/// own (whose `..data` is where the visible links lead).
pub(crate) fn read(root: &Path) -> io::Result<Files> {
    let mut files = Files::new();
    let mut folders = vec![(root.to_owned(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            // A folder removed under our hands is as empty as it will be next time; the root has to be there.
            Err(error) if depth > 0 && error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
            let (path, shown) = (entry.path(), format!("{prefix}{name}"));
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if metadata.is_dir() {
                if depth < MAX_DEPTH {
                    folders.push((path, format!("{shown}/"), depth + 1));
                }
            } else if metadata.is_file() && is_config(&path) {
                if files.len() >= MAX_FILES {
                    return Err(io::Error::other(format!("more than {MAX_FILES} files")));
                }
                files.insert(shown, read_file(&path, metadata.len()));
            }
        }
    }
    Ok(files)
}

fn is_config(path: &Path) -> bool {
    matches!(Format::of_path(path), Some(Format::Yaml | Format::Json))
}

fn read_file(path: &Path, length: u64) -> Result<Vec<u8>, String> {
    if length > MAX_FILE {
        return Err(format!("larger than {MAX_FILE} bytes"));
    }
    fs::read(path).map_err(|error| format!("cannot be read: {error}"))
}

/// Changes of a folder; ends with the watcher.
#[derive(Debug)]
pub(crate) struct Changes {
    events: mpsc::Receiver<()>,
    _watcher: RecommendedWatcher,
}

impl Changes {
    /// Watches `root` and all below it from now on.
    pub(crate) fn watch(root: &Path) -> Result<Self, notify::Error> {
        let (sender, events) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // An error may mean that events were lost.
            if event.is_ok_and(|event| !may_change(event.kind)) {
                return;
            }
            // Full means that the folder is about to be read anyway.
            let _ = sender.try_send(());
        })?;
        watcher.watch(root, RecursiveMode::Recursive)?;
        Ok(Self { events, _watcher: watcher })
    }

    /// Waits until something has changed and the dust has settled. False when there is nothing more to come.
    pub(crate) async fn next(&mut self) -> bool {
        if self.events.recv().await.is_none() {
            return false;
        }
        let start = Instant::now();
        while start.elapsed() < LONGEST {
            match timeout(QUIET, self.events.recv()).await {
                Ok(Some(())) => {}
                Ok(None) => return false,
                Err(_) => break,
            }
        }
        true
    }
}

/// Whether an event may mean other content; our own reading does not.
fn may_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}

/// The folder as the user wrote it, for messages.
pub(crate) fn show(root: &Path, file: &str) -> String {
    PathBuf::from(root).join(file).display().to_string()
}

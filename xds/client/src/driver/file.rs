use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use notify::event::{ModifyKind, RenameMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

use super::{ConfigCodec, Report};
use crate::{PathSource, StreamId};

/// Largest file.
const MAX_FILE: u64 = 256 << 20;

/// Reads a file now, whenever it is replaced, and whenever asked to.
pub(super) async fn run(
    stream: StreamId,
    source: Arc<PathSource>,
    codec: Arc<dyn ConfigCodec>,
    reports: mpsc::Sender<Report>,
    mut again: mpsc::Receiver<Bytes>,
) {
    // Watch first, read second: what happens in between is seen.
    let (replaced, mut replacements) = mpsc::channel(1);
    let watcher = watch(&source, replaced);
    if let Err(error) = &watcher {
        let message = format!("can not watch it: {error}");
        let _ = reports.send(Report::Fetched(stream, Err(message))).await;
    }
    loop {
        let content = read(&source.path, &*codec).await;
        // The client is gone only when this task is being aborted, too.
        let _ = reports.send(Report::Fetched(stream, content)).await;
        tokio::select! {
            Some(()) = replacements.recv() => {}
            Some(_) = again.recv() => {}
            else => return,
        }
    }
}

async fn read(path: &Path, codec: &dyn ConfigCodec) -> Result<Bytes, String> {
    let explain = |error: std::io::Error| error.to_string();
    let length = tokio::fs::metadata(path).await.map_err(explain)?.len();
    if length > MAX_FILE {
        return Err(format!("larger than {MAX_FILE} bytes"));
    }
    let content = tokio::fs::read(path).await.map_err(explain)?;
    codec.decode_file(path, &content)
}

/// Watches for the file being moved into place, or for anything being moved into the watched directory: never
/// for writes, which would show half a file. This is Envoy's rule, too.
fn watch(source: &PathSource, replaced: mpsc::Sender<()>) -> notify::Result<RecommendedWatcher> {
    let (directory, name) = place(source);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let Ok(event) = event else { return };
        let is_ours = match &name {
            Some(name) => event.paths.iter().any(|path| path.file_name() == Some(name)),
            None => true,
        };
        if is_ours && is_move_into(&event.kind) {
            // Full means that a read is due anyway.
            let _ = replaced.try_send(());
        }
    })?;
    watcher.watch(&directory, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

fn place(source: &PathSource) -> (PathBuf, Option<OsString>) {
    if let Some(directory) = &source.watched_directory {
        return (directory.clone(), None);
    }
    let parent = source.path.parent().filter(|parent| !parent.as_os_str().is_empty());
    (parent.unwrap_or(Path::new(".")).to_owned(), source.path.file_name().map(OsString::from))
}

/// Whether a watched directory has got a file by being moved there.
pub fn is_move_into(kind: &EventKind) -> bool {
    match kind {
        // Where both ends are known, a third event repeats them.
        EventKind::Modify(ModifyKind::Name(mode)) => matches!(mode, RenameMode::To | RenameMode::Any),
        // Only inotify tells a move from a creation.
        EventKind::Create(_) => cfg!(not(target_os = "linux")),
        _ => false,
    }
}

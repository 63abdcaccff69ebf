//! Named cells.
//!
//! Every resource that can change under a name (cluster, route configuration, secret, extension config, scope)
//! lives in a [`Cell`]. Whoever refers to the name holds the cell, resolved when it was compiled itself, so that
//! one update of one resource among thousands is one swap, no map is cloned, no name is looked up on the request
//! path, and a reference to a resource that does not exist (yet) is simply an empty cell.
//!
//! Workers do not touch the reference count that they would share: a [`Local`] keeps one reference per worker
//! and hands out cheap worker-local clones of it.

use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

/// A named place that holds the current compiled form of a resource, or nothing.
pub struct Cell<T> {
    name: Box<str>,
    id: u32,
    value: ArcSwapOption<T>,
}

impl<T> Cell<T> {
    /// The resource's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A small number, unique among the live cells of one table: the index of worker-local state.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The current value. Takes a shared reference count: for control code, not for each request.
    pub fn get(&self) -> Option<Arc<T>> {
        self.value.load_full()
    }

    /// Reads the current value where it is, without taking a shared reference count. For what each request reads of a
    /// cell that no worker follows by a [`Local`]; `read` should be short.
    pub fn with<R>(&self, read: impl FnOnce(Option<&T>) -> R) -> R {
        read(self.value.load().as_deref())
    }

    /// Whether there is a value.
    pub fn is_set(&self) -> bool {
        self.value.load().is_some()
    }

    /// Publishes a new value; streams that hold the old one keep it.
    pub fn set(&self, value: Option<Arc<T>>) {
        self.value.store(value);
    }

    fn address(&self) -> *const T {
        self.value.load().as_ref().map_or(std::ptr::null(), |value| Arc::as_ptr(value))
    }
}

impl<T> fmt::Debug for Cell<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cell")
            .field("name", &self.name)
            .field("id", &self.id)
            .field("set", &self.is_set())
            .finish()
    }
}

/// All cells of one kind, by name. Only control code looks names up here.
///
/// A cell lives as long as somebody refers to it; its id is used again after that.
pub struct CellTable<T> {
    inner: Mutex<TableInner<T>>,
}

struct TableInner<T> {
    cells: HashMap<Box<str>, Weak<Cell<T>>>,
    next_id: u32,
    free_ids: Vec<u32>,
    sweep_at: usize,
}

impl<T> CellTable<T> {
    /// An empty table.
    pub fn new() -> Self {
        Self {
            inner: Mutex::new(TableInner {
                cells: HashMap::new(),
                next_id: 0,
                free_ids: Vec::new(),
                sweep_at: 64,
            }),
        }
    }

    /// The cell of `name`, made empty when nobody refers to it yet.
    pub fn cell(&self, name: &str) -> Arc<Cell<T>> {
        let mut inner = self.inner.lock();
        if let Some(cell) = inner.cells.get(name).and_then(Weak::upgrade) {
            return cell;
        }
        if inner.cells.len() >= inner.sweep_at {
            inner.sweep();
        }
        let id = inner.free_ids.pop().unwrap_or_else(|| {
            let id = inner.next_id;
            inner.next_id += 1;
            id
        });
        let cell = Arc::new(Cell { name: name.into(), id, value: ArcSwapOption::empty() });
        inner.cells.insert(name.into(), Arc::downgrade(&cell));
        cell
    }

    /// The cell of `name`, if somebody refers to it.
    pub fn find(&self, name: &str) -> Option<Arc<Cell<T>>> {
        self.inner.lock().cells.get(name).and_then(Weak::upgrade)
    }

    /// Every live cell, in no order.
    pub fn live(&self) -> Vec<Arc<Cell<T>>> {
        self.inner.lock().cells.values().filter_map(Weak::upgrade).collect()
    }
}

impl<T> TableInner<T> {
    /// Forgets dead cells. A dead cell's id cannot be known any more, so ids are recomputed as the gaps between
    /// the live ones.
    fn sweep(&mut self) {
        self.cells.retain(|_, cell| cell.strong_count() > 0);
        let mut live: Vec<u32> = self.cells.values().filter_map(Weak::upgrade).map(|cell| cell.id).collect();
        live.sort_unstable();
        self.free_ids.clear();
        let mut next = 0;
        for id in live {
            self.free_ids.extend(next..id);
            next = id + 1;
        }
        self.next_id = next;
        self.sweep_at = (self.cells.len() * 2).max(64);
    }
}

impl<T> Default for CellTable<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for CellTable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CellTable").field("cells", &self.inner.lock().cells.len()).finish()
    }
}

/// One worker's view of a cell: follows the cell's changes at the price of one atomic load and a comparison.
#[derive(Debug)]
pub struct Local<T> {
    cell: Arc<Cell<T>>,
    held: Option<Held<T>>,
}

impl<T> Local<T> {
    /// A view of `cell`.
    pub fn new(cell: Arc<Cell<T>>) -> Self {
        Self { cell, held: None }
    }

    /// The cell that is followed.
    pub fn cell(&self) -> &Arc<Cell<T>> {
        &self.cell
    }

    /// The current value. A stream clones the [`Held`] and so keeps the snapshot it started with.
    pub fn get(&mut self) -> Option<&Held<T>> {
        let current = self.cell.address();
        let held = self.held.as_ref().map_or(std::ptr::null(), |held| Arc::as_ptr(&held.0));
        if current != held {
            self.held = self.cell.get().map(Held::new);
        }
        self.held.as_ref()
    }
}

/// A worker-local reference to a shared value: cloning it touches no shared reference count.
#[expect(
    clippy::redundant_allocation,
    reason = "the inner count is shared by all workers, the outer one is this worker's"
)]
pub struct Held<T>(Rc<Arc<T>>);

impl<T> Held<T> {
    /// Takes one shared reference and makes it worker-local.
    pub fn new(value: Arc<T>) -> Self {
        Self(Rc::new(value))
    }

    /// The shared reference, for control code.
    pub fn shared(&self) -> &Arc<T> {
        &self.0
    }

    /// Whether both refer to the same value.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<T> Clone for Held<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: fmt::Debug> fmt::Debug for Held<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::{CellTable, Local};
    use std::sync::Arc;

    #[test]
    fn one_name_is_one_cell_and_ids_are_reused() {
        let table = CellTable::<u32>::new();
        let a = table.cell("a");
        assert!(Arc::ptr_eq(&a, &table.cell("a")));
        assert_eq!(table.cell("b").id(), 1, "dropped at once: its id returns at the next sweep");
        for i in 0..200 {
            table.cell(&i.to_string());
        }
        assert!(table.cell("last").id() < 130, "ids of dead cells are used again");
        assert_eq!(table.cell("a").id(), a.id());
    }

    #[test]
    fn local_follows_and_streams_keep_their_snapshot() {
        let table = CellTable::new();
        let cell = table.cell("a");
        let mut local = Local::new(Arc::clone(&cell));
        assert!(local.get().is_none());
        cell.set(Some(Arc::new(1)));
        let stream = local.get().cloned();
        cell.set(Some(Arc::new(2)));
        assert_eq!(local.get().map(|held| **held), Some(2));
        assert_eq!(stream.map(|held| *held), Some(1));
        cell.set(None);
        assert!(local.get().is_none());
    }
}

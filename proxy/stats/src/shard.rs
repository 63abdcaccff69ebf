//! Per-worker storage: who writes where, and how a reader adds it up.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

thread_local! {
    /// The shard this thread alone writes to; [`SHARED`] for threads that are not workers.
    static CURRENT: Cell<usize> = const { Cell::new(SHARED) };
}

/// The shard of every thread that is not a registered worker; written with atomic adds.
const SHARED: usize = 0;

/// A worker thread's claim on its own shard, given back when dropped.
///
/// Not `Send`: the claim is about the thread that made it.
#[derive(Debug)]
#[must_use = "the thread falls back to the shared shard when this is dropped"]
pub struct WorkerShard {
    claims: Option<(Arc<ShardClaims>, usize)>,
    _thread_bound: PhantomData<*const ()>,
}

impl WorkerShard {
    /// Claims shard `worker + 1` for this thread, unless another thread has it or it does not exist: then the thread
    /// keeps using the shared shard, which is slower and equally correct.
    pub(crate) fn claim(claims: &Arc<ShardClaims>, worker: usize) -> Self {
        let free = claims.0.get(worker).is_some_and(|taken| !taken.swap(true, Ordering::AcqRel));
        if free {
            CURRENT.set(worker + 1);
        }
        Self { claims: free.then(|| (claims.clone(), worker)), _thread_bound: PhantomData }
    }
}

impl Drop for WorkerShard {
    fn drop(&mut self) {
        if let Some((claims, worker)) = self.claims.take() {
            CURRENT.set(SHARED);
            claims.0[worker].store(false, Ordering::Release);
        }
    }
}

/// Which worker shards of a store have a thread.
#[derive(Debug)]
pub(crate) struct ShardClaims(Box<[AtomicBool]>);

impl ShardClaims {
    pub(crate) fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| AtomicBool::new(false)).collect())
    }
}

/// One `T` per worker and one for everybody else, each allocated by its first writer.
#[derive(Debug)]
pub(crate) struct Sharded<T: ?Sized> {
    /// Made by the first write: most clusters of a large configuration never see one.
    shards: OnceLock<Box<[OnceLock<Box<T>>]>>,
    /// 0 when the stats matcher rejected every name stored here: writes then go nowhere.
    count: usize,
}

impl<T: ?Sized> Sharded<T> {
    /// Shards for `workers` workers and the shared one.
    pub(crate) fn new(workers: usize) -> Self {
        Self { shards: OnceLock::new(), count: workers + 1 }
    }

    /// Storage that forgets what is written to it.
    pub(crate) fn discarding() -> Self {
        Self { shards: OnceLock::new(), count: 0 }
    }

    pub(crate) fn is_discarding(&self) -> bool {
        self.count == 0
    }

    /// This thread's shard, and how it may write to it.
    #[inline]
    pub(crate) fn mine(&self, init: impl FnOnce() -> Box<T>) -> Option<(&T, Writer)> {
        let current = CURRENT.get();
        let shards = self.shards.get().map_or_else(|| self.unallocated(), Box::as_ref);
        if current != SHARED
            && let Some(shard) = shards.get(current)
        {
            return Some((shard.get().map_or_else(|| allocated(shard, init), Box::as_ref), Writer::Sole));
        }
        // No worker at all, or one of a store with more workers than this one has.
        let shard = shards.first()?;
        Some((shard.get().map_or_else(|| allocated(shard, init), Box::as_ref), Writer::Shared))
    }

    /// The shards that have been written to.
    #[inline]
    pub(crate) fn written(&self) -> impl Iterator<Item = &T> {
        self.shards.get().into_iter().flatten().filter_map(|shard| shard.get().map(Box::as_ref))
    }

    #[cold]
    fn unallocated(&self) -> &[OnceLock<Box<T>>] {
        self.shards.get_or_init(|| (0..self.count).map(|_| OnceLock::new()).collect())
    }
}

#[cold]
fn allocated<T: ?Sized>(shard: &OnceLock<Box<T>>, init: impl FnOnce() -> Box<T>) -> &T {
    shard.get_or_init(init)
}

/// How the current thread may write to a shard.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Writer {
    /// Nobody else writes: a load and a store are enough.
    Sole,
    /// Others write too: atomic read-modify-write.
    Shared,
}

impl Writer {
    /// Adds `n`, wrapping, so that a gauge's decrement on another worker than its increment still sums up right.
    #[inline]
    pub(crate) fn add(self, slot: &AtomicU64, n: u64) {
        match self {
            Self::Sole => slot.store(slot.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed),
            Self::Shared => {
                slot.fetch_add(n, Ordering::Relaxed);
            }
        }
    }

    /// Sets the bits of `mask`; almost always they are set already, and that costs only the load.
    #[inline]
    pub(crate) fn mark(self, slot: &AtomicU64, mask: u64) {
        if slot.load(Ordering::Relaxed) & mask == mask {
            return;
        }
        match self {
            Self::Sole => slot.store(slot.load(Ordering::Relaxed) | mask, Ordering::Relaxed),
            Self::Shared => {
                slot.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }
}

/// A zeroed run of slots.
pub(crate) fn zeroed(slots: usize) -> Box<[AtomicU64]> {
    (0..slots).map(|_| AtomicU64::new(0)).collect()
}

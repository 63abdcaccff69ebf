//! Rebuilding what depends on secrets when one of them changes.

use std::sync::Arc;

use arc_swap::{ArcSwapOption, Guard};
use parking_lot::Mutex;
use waystation_filter_api::cell::Cell;
use waystation_schema::ConfigError;

use crate::secret::Secret;

/// Something built from the secrets in some cells. As long as none of them changes, getting it takes no lock.
#[derive(Debug)]
pub(crate) struct Follower<B> {
    cells: Box<[Arc<Cell<Secret>>]>,
    state: ArcSwapOption<State<B>>,
    rebuild: Mutex<()>,
}

#[derive(Debug)]
struct State<B> {
    /// The values it was built from, or for which it was found that nothing can be built. Held, so that no other
    /// value can have the address of one of them.
    seen: Box<[Arc<Secret>]>,
    built: Arc<B>,
}

impl<B> Follower<B> {
    pub(crate) fn new(cells: Vec<Arc<Cell<Secret>>>) -> Self {
        Self { cells: cells.into(), state: ArcSwapOption::empty(), rebuild: Mutex::default() }
    }

    /// What was built last, if anything.
    pub(crate) fn last(&self) -> Option<Arc<B>> {
        self.state.load().as_ref().map(|state| Arc::clone(&state.built))
    }

    /// Whether every secret has arrived.
    pub(crate) fn is_ready(&self) -> bool {
        self.cells.iter().all(|cell| cell.is_set())
    }

    /// What is built from the current secrets, with `build` if they changed. `None` while one has not arrived; what
    /// was built before when `build` fails.
    pub(crate) fn current(
        &self,
        build: impl FnOnce(&[Arc<Secret>]) -> Result<B, ConfigError>,
    ) -> Option<Arc<B>> {
        match self.update(build) {
            Ok(built) => built,
            Err(error) => {
                tracing::warn!(target: "secret", "a TLS context keeps its former secrets: {error}");
                self.last()
            }
        }
    }

    /// Like [`Self::current`], but tells the error. It is told once for each change.
    pub(crate) fn update(
        &self,
        build: impl FnOnce(&[Arc<Secret>]) -> Result<B, ConfigError>,
    ) -> Result<Option<Arc<B>>, ConfigError> {
        if let Some(state) = self.fresh(&self.state.load()) {
            return Ok(Some(state));
        }
        let _guard = self.rebuild.lock();
        let state = self.state.load();
        if let Some(state) = self.fresh(&state) {
            return Ok(Some(state));
        }
        let former = state.as_ref().map(|state| Arc::clone(&state.built));
        let Some(secrets) = self.cells.iter().map(|cell| cell.get()).collect::<Option<Box<[_]>>>() else {
            return Ok(former);
        };
        let (built, error) = match build(&secrets) {
            Ok(built) => (Arc::new(built), None),
            Err(error) => match former {
                Some(former) => (former, Some(error)),
                None => return Err(error),
            },
        };
        self.state.store(Some(Arc::new(State { seen: secrets, built: Arc::clone(&built) })));
        error.map_or(Ok(Some(built)), Err)
    }

    fn fresh(&self, state: &Guard<Option<Arc<State<B>>>>) -> Option<Arc<B>> {
        let state = state.as_ref()?;
        let same = |(cell, seen): (&Arc<Cell<Secret>>, &Arc<Secret>)| {
            cell.get().is_some_and(|secret| Arc::ptr_eq(&secret, seen))
        };
        self.cells.iter().zip(&state.seen).all(same).then(|| Arc::clone(&state.built))
    }
}

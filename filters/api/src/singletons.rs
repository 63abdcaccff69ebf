//! What there is once in a process for all configurations of an extension, such as token buckets shared by a key.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

/// One object of each type, made when it is first asked for. Asked only while configuration is compiled. A clone is the same.
#[derive(Clone, Default)]
pub struct Singletons(Arc<Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>>);

impl Singletons {
    /// The process's `T`.
    pub fn get<T: Any + Default + Send + Sync>(&self) -> Arc<T> {
        let mut all = self.0.lock();
        let entry = all.entry(TypeId::of::<T>()).or_insert_with(|| Arc::new(T::default()));
        match Arc::clone(entry).downcast() {
            Ok(found) => found,
            Err(_) => unreachable!("it is kept under its own type"),
        }
    }
}

impl fmt::Debug for Singletons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Singletons").finish_non_exhaustive()
    }
}

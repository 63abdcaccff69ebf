//! Filter state: typed objects by name, on a stream or on its connection.

use std::any::Any;
use std::fmt;
use std::rc::Rc;

/// An object in the filter state.
pub trait Object: fmt::Debug {
    /// The serialised form that access logs print (`%FILTER_STATE(key)%`), if there is one.
    fn serialize(&self) -> Option<Vec<u8>> {
        None
    }

    /// Whether the serialised form is JSON, that of a message rather than a mere string.
    fn is_json(&self) -> bool {
        false
    }

    /// The serialised form where the object has it at hand: policies that look at it on every request need no copy.
    fn text(&self) -> Option<&[u8]> {
        None
    }

    /// The value of a field (`%FILTER_STATE(key:FIELD:name)%`), if the object has fields.
    fn field(&self, _name: &str) -> Option<Vec<u8>> {
        None
    }

    /// For the extension that put the object there.
    fn as_any(&self) -> &dyn Any;
}

/// With which upstream connections an object is shared (`shared_with_upstream`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Sharing {
    /// With none.
    #[default]
    None,
    /// With the upstream connection of this stream.
    Once,
    /// With that one and those beyond it.
    Transitive,
}

#[derive(Clone, Debug)]
struct Entry {
    name: Box<str>,
    object: Rc<dyn Object>,
    read_only: bool,
    sharing: Sharing,
}

/// Objects by name. A handful at most, so a list; empty costs nothing.
#[derive(Clone, Debug, Default)]
pub struct FilterState {
    entries: Vec<Entry>,
}

impl FilterState {
    /// The object called `name`.
    pub fn get(&self, name: &str) -> Option<&Rc<dyn Object>> {
        self.entries.iter().find(|entry| &*entry.name == name).map(|entry| &entry.object)
    }

    /// Sets an object. A read-only object is not replaced: returns whether it was set.
    pub fn set(&mut self, name: &str, object: Rc<dyn Object>, read_only: bool, sharing: Sharing) -> bool {
        let entry = Entry { name: name.into(), object, read_only, sharing };
        match self.entries.iter_mut().find(|entry| &*entry.name == name) {
            Some(old) if old.read_only => false,
            Some(old) => {
                *old = entry;
                true
            }
            None => {
                self.entries.push(entry);
                true
            }
        }
    }

    /// What an upstream connection gets: objects shared once or transitively, the former shared no further.
    pub fn for_upstream(&self) -> Self {
        let entries = self.entries.iter().filter(|entry| entry.sharing != Sharing::None).cloned();
        let entries = entries.map(|mut entry| {
            if entry.sharing == Sharing::Once {
                entry.sharing = Sharing::None;
            }
            entry
        });
        Self { entries: entries.collect() }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::{FilterState, Object, Sharing};
    use std::any::Any;
    use std::rc::Rc;

    #[derive(Debug)]
    struct Text(&'static str);

    impl Object for Text {
        fn serialize(&self) -> Option<Vec<u8>> {
            Some(self.0.into())
        }

        fn as_any(&self) -> &dyn Any {
            self
        }
    }

    #[test]
    fn read_only_objects_stay_and_sharing_once_ends_there() {
        let mut state = FilterState::default();
        assert!(state.set("a", Rc::new(Text("1")), true, Sharing::Once));
        assert!(!state.set("a", Rc::new(Text("2")), true, Sharing::Once));
        state.set("b", Rc::new(Text("3")), false, Sharing::Transitive);
        state.set("c", Rc::new(Text("4")), false, Sharing::None);
        let upstream = state.for_upstream();
        assert!(upstream.get("a").is_some() && upstream.get("b").is_some() && upstream.get("c").is_none());
        let beyond = upstream.for_upstream();
        assert!(beyond.get("a").is_none() && beyond.get("b").is_some());
    }
}

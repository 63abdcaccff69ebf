//! Values by byte-string prefix: a radix trie.

/// A map from byte strings to values that finds every key that is a prefix of a text, in time that depends on the
/// text and not on the number of keys.
///
/// Built once; nodes, labels and branch bytes lie in flat arrays so that a walk touches little memory. With
/// `ignore_case`, keys and texts compare by ASCII case.
#[derive(Clone, Debug)]
pub struct PrefixMap<T> {
    nodes: Vec<Node<T>>,
    bytes: Vec<u8>,
    children: Vec<u32>,
    ignore_case: bool,
}

#[derive(Clone, Debug)]
struct Node<T> {
    /// The bytes between the parent and this node, in `bytes`.
    label: (u32, u32),
    /// The first bytes of the children's labels, in `bytes` and sorted; the children themselves stand from `children` on in
    /// the same order.
    branches: (u32, u16),
    children: u32,
    value: Option<T>,
}

/// A node while the map is built.
struct Builder<T> {
    label: Vec<u8>,
    children: Vec<Builder<T>>,
    value: Option<T>,
}

impl<T> PrefixMap<T> {
    /// A map of these entries. A key given twice goes through `merge`.
    pub fn build<K: AsRef<[u8]>>(
        entries: impl IntoIterator<Item = (K, T)>,
        ignore_case: bool,
        mut merge: impl FnMut(&mut T, T),
    ) -> Self {
        let mut root = Builder { label: Vec::new(), children: Vec::new(), value: None };
        for (key, value) in entries {
            let mut key = key.as_ref().to_vec();
            if ignore_case {
                key.make_ascii_lowercase();
            }
            let place = root.place(&key);
            match place {
                Some(old) => merge(old, value),
                None => *place = Some(value),
            }
        }
        let mut map = Self { nodes: Vec::new(), bytes: Vec::new(), children: Vec::new(), ignore_case };
        map.flatten(root);
        map
    }

    /// The keys that are prefixes of `text`, shortest first: key length and value.
    #[inline]
    pub fn prefixes<'a, 't>(&'a self, text: &'t [u8]) -> Prefixes<'a, 't, T> {
        Prefixes { map: self, text, depth: 0, node: Some(0) }
    }

    /// The value of the longest key that is a prefix of `text`.
    pub fn longest(&self, text: &[u8]) -> Option<(usize, &T)> {
        self.prefixes(text).last()
    }

    /// The value of the key that equals `text`.
    pub fn get(&self, text: &[u8]) -> Option<&T> {
        self.longest(text).filter(|(len, _)| *len == text.len()).map(|(_, value)| value)
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.nodes.len() == 1 && self.nodes[0].value.is_none()
    }

    /// All values, in no order.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.nodes.iter().filter_map(|node| node.value.as_ref())
    }

    /// Visits every value with the nearest value above it, parents first.
    pub fn visit_mut(&mut self, mut visit: impl FnMut(Option<&T>, &mut T)) {
        // Parents are flattened before their children; each remembers the nearest valued ancestor by index.
        let mut above = vec![None; self.nodes.len()];
        for index in 0..self.nodes.len() {
            let (before, rest) = self.nodes.split_at_mut(index);
            let node = &mut rest[0];
            let nearest: Option<usize> = above[index];
            if let Some(value) = &mut node.value {
                visit(nearest.and_then(|ancestor| before[ancestor].value.as_ref()), value);
            }
            let inherited = if node.value.is_some() { Some(index) } else { nearest };
            let children = node.children as usize..node.children as usize + usize::from(node.branches.1);
            for child in &self.children[children] {
                above[*child as usize] = inherited;
            }
        }
    }

    fn flatten(&mut self, mut builder: Builder<T>) -> u32 {
        builder.children.sort_by_key(|child| child.label[0]);
        let index = self.nodes.len();
        let label = (self.bytes.len() as u32, builder.label.len() as u32);
        self.bytes.extend_from_slice(&builder.label);
        let branches = (self.bytes.len() as u32, builder.children.len() as u16);
        self.bytes.extend(builder.children.iter().map(|child| child.label[0]));
        let children = self.children.len();
        self.children.resize(children + builder.children.len(), 0);
        self.nodes.push(Node { label, branches, children: children as u32, value: builder.value });
        for (offset, child) in builder.children.into_iter().enumerate() {
            self.children[children + offset] = self.flatten(child);
        }
        index as u32
    }

    #[inline]
    fn child(&self, node: &Node<T>, byte: u8) -> Option<u32> {
        let (start, count) = (node.branches.0 as usize, usize::from(node.branches.1));
        let branches = &self.bytes[start..start + count];
        // Sorted: the last child costs what the first does.
        let offset = branches.binary_search(&byte).ok()?;
        Some(self.children[node.children as usize + offset])
    }
}

impl<T> Builder<T> {
    fn place(&mut self, key: &[u8]) -> &mut Option<T> {
        if key.is_empty() {
            return &mut self.value;
        }
        let Some(index) = self.children.iter().position(|child| child.label[0] == key[0]) else {
            self.children.push(Self { label: key.to_vec(), children: Vec::new(), value: None });
            let last = self.children.len() - 1;
            return &mut self.children[last].value;
        };
        let child = &mut self.children[index];
        let shared = child.label.iter().zip(key).take_while(|(a, b)| a == b).count();
        if shared < child.label.len() {
            // The key leaves the label in its middle: split it.
            let tail = Self {
                label: child.label.split_off(shared),
                children: std::mem::take(&mut child.children),
                value: child.value.take(),
            };
            child.children.push(tail);
        }
        child.place(&key[shared..])
    }
}

/// The keys of a [`PrefixMap`] that are prefixes of a text.
#[derive(Clone, Debug)]
pub struct Prefixes<'a, 't, T> {
    map: &'a PrefixMap<T>,
    text: &'t [u8],
    depth: usize,
    node: Option<u32>,
}

impl<'a, T> Iterator for Prefixes<'a, '_, T> {
    type Item = (usize, &'a T);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        while let Some(index) = self.node.take() {
            let node = &self.map.nodes[index as usize];
            let label = &self.map.bytes[node.label.0 as usize..(node.label.0 + node.label.1) as usize];
            let found = self.text.get(self.depth..self.depth + label.len())?;
            let equal = if self.map.ignore_case { found.eq_ignore_ascii_case(label) } else { found == label };
            if !equal {
                return None;
            }
            self.depth += label.len();
            if let Some(byte) = self.text.get(self.depth) {
                let byte = if self.map.ignore_case { byte.to_ascii_lowercase() } else { *byte };
                self.node = self.map.child(node, byte);
            }
            if let Some(value) = &node.value {
                return Some((self.depth, value));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::PrefixMap;
    use proptest::prelude::*;

    #[test]
    fn shortest_first_and_exact() {
        let entries = [("/", 0), ("/api", 1), ("/api/v1", 2), ("/apple", 3)];
        let map = PrefixMap::build(entries, false, |_, _| panic!("keys are unique"));
        let found: Vec<_> = map.prefixes(b"/api/v1/x").collect();
        assert_eq!(found, [(1, &0), (4, &1), (7, &2)]);
        assert_eq!(map.get(b"/apple"), Some(&3));
        assert_eq!(map.get(b"/app"), None);
        assert_eq!(map.longest(b"x"), None);
        let folded = PrefixMap::build([("/A", 1)], true, |_, _| ());
        assert_eq!(folded.get(b"/a"), Some(&1));
    }

    #[test]
    fn visits_with_the_nearest_above() {
        let entries = [("/", 0), ("/api", 1), ("/api/v1", 2), ("/apple", 3), ("x", 4)];
        let mut map = PrefixMap::build(entries, false, |_, _| ());
        let mut seen = Vec::new();
        map.visit_mut(|above, value| seen.push((above.copied(), *value)));
        seen.sort_by_key(|(_, value)| *value);
        assert_eq!(seen, [(None, 0), (Some(0), 1), (Some(1), 2), (Some(0), 3), (None, 4)]);
    }

    proptest! {
        #[test]
        fn agrees_with_a_scan(keys in proptest::collection::hash_set("[ab/]{0,6}", 0..30), text in "[ab/]{0,10}") {
            let map = PrefixMap::build(keys.iter().map(|key| (key, key.clone())), false, |_, _| ());
            let mut expected: Vec<&String> = keys.iter().filter(|key| text.starts_with(*key)).collect();
            expected.sort_by_key(|key| key.len());
            let found: Vec<&String> = map.prefixes(text.as_bytes()).map(|(_, value)| value).collect();
            prop_assert_eq!(found, expected);
        }
    }
}

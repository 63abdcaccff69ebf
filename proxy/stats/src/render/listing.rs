//! Every stat in the order of its full name, without holding all the names.
//!
//! Scopes come sorted by prefix, and names under one prefix form a contiguous range of the sorted whole, so merging a
//! scope's own leaves with the scopes nested in it needs only the chain of open scopes.

use std::collections::HashMap;
use std::iter::Peekable;
use std::sync::Arc;

use crate::cells::{Cells, Layout, Leaf};
use crate::scope::ScopeNode;
use crate::store::StoreInner;

type Scopes = Box<dyn Iterator<Item = Arc<ScopeNode>> + Send>;

/// A cursor over all stats.
pub(super) struct Listing {
    scopes: Peekable<Scopes>,
    open: Vec<OpenScope>,
    /// The sorted leaves of a group's table, by its address: sorted once, not once per cluster.
    orders: HashMap<usize, Arc<[(usize, Leaf)]>>,
}

struct OpenScope {
    node: Arc<ScopeNode>,
    cells: Vec<Arc<Cells>>,
    /// Index into `cells`, and leaf, by name.
    leaves: Arc<[(usize, Leaf)]>,
    next: usize,
}

impl Listing {
    pub(super) fn new(store: &Arc<StoreInner>) -> Self {
        let scopes: Scopes = Box::new(store.live_scopes());
        Self { scopes: scopes.peekable(), open: Vec::new(), orders: HashMap::new() }
    }

    /// Calls `visit` with the next stat; false when there is none.
    pub(super) fn next(&mut self, visit: impl FnOnce(&Cells, Leaf)) -> bool {
        loop {
            let Some(top) = self.open.last_mut() else {
                let Some(node) = self.scopes.next() else { return false };
                self.enter(node);
                continue;
            };
            let leaf = top.leaves.get(top.next).map(|(cells, leaf)| (&top.cells[*cells], *leaf));
            let nested = self.scopes.next_if(|node| {
                node.prefix
                    .strip_prefix(&*top.node.prefix)
                    .is_some_and(|below| leaf.is_none_or(|(cells, leaf)| below < &*cells.leaf_name(leaf)))
            });
            match (nested, leaf) {
                (Some(node), _) => self.enter(node),
                (None, Some((cells, leaf))) => {
                    visit(cells, leaf);
                    top.next += 1;
                    return true;
                }
                (None, None) => {
                    self.open.pop();
                }
            }
        }
    }

    fn enter(&mut self, node: Arc<ScopeNode>) {
        let cells = node.live();
        let leaves = match cells.as_slice() {
            [] => Arc::default(),
            [only] => match only.layout() {
                Layout::Group(def) if only.lists_everything() => {
                    let address = std::ptr::from_ref(*def).addr();
                    self.orders.entry(address).or_insert_with(|| sorted(&cells)).clone()
                }
                _ => sorted(&cells),
            },
            _ => sorted(&cells),
        };
        self.open.push(OpenScope { node, cells, leaves, next: 0 });
    }
}

fn sorted(cells: &[Arc<Cells>]) -> Arc<[(usize, Leaf)]> {
    let mut leaves: Vec<(usize, Leaf)> = cells
        .iter()
        .enumerate()
        .flat_map(|(at, cells)| cells.listed().into_iter().map(move |leaf| (at, leaf)))
        .collect();
    leaves.sort_by_cached_key(|(at, leaf)| cells[*at].leaf_name(*leaf).into_owned());
    leaves.into()
}

//! Counters per HTTP status code.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use crate::Scope;
use crate::cells::Cells;
use crate::handles::Histogram;
use crate::histogram::Unit;
use crate::shard::{Sharded, zeroed};

/// Counters `<prefix>200`, `<prefix>2xx` and `<prefix>completed`, from [`Scope::response_codes`](crate::Scope::response_codes).
///
/// One write per response: classes and `completed` are sums taken when somebody reads.
#[derive(Clone, Debug)]
pub struct ResponseCodes {
    pub(crate) cells: Arc<Cells>,
}

impl ResponseCodes {
    /// Counts one response. A status outside 100..=599 counts as completed only.
    #[inline]
    pub fn record(&self, status: u16) {
        self.cells.record_code(status);
    }
}

/// `upstream_rq_<code>` with its sums, and `upstream_rq_time`, below one scope. Each is made when something is first
/// recorded in it: as in Envoy, what never happened is not listed.
#[derive(Debug)]
pub struct ResponseStats {
    scope: Scope,
    codes: OnceLock<ResponseCodes>,
    time: OnceLock<Histogram>,
}

impl ResponseStats {
    /// The responses counted directly below `scope`.
    pub fn new(scope: Scope) -> Self {
        Self { scope, codes: OnceLock::new(), time: OnceLock::new() }
    }

    /// Counts one response.
    #[inline]
    pub fn record(&self, status: u16) {
        self.codes.get_or_init(|| self.scope.response_codes("upstream_rq_")).record(status);
    }

    /// Records how long one took, in milliseconds.
    #[inline]
    pub fn record_time(&self, millis: u64) {
        self.time.get_or_init(|| self.scope.histogram("upstream_rq_time", Unit::Milliseconds)).record(millis);
    }
}

/// Classes 1xx to 5xx.
const CLASSES: usize = 5;
const PER_CLASS: usize = 100;

/// One worker's counts: 100 codes of a class at a time, since a cluster answers in two or three classes.
#[derive(Debug, Default)]
pub(crate) struct CodeShard {
    classes: [OnceLock<Box<[AtomicU64]>>; CLASSES],
    other: AtomicU64,
}

/// The counts of one family over all workers.
#[derive(Debug)]
pub(crate) struct CodeCounts(pub(crate) Sharded<CodeShard>);

/// A name of a family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum CodeLeaf {
    Code(u16),
    Class(u16),
    Completed,
}

impl CodeLeaf {
    /// Leaves are numbered: 0 `completed`, 1..=5 the classes, 100..=599 the codes.
    pub(crate) fn from_index(index: usize) -> Self {
        match u16::try_from(index).unwrap_or(0) {
            0 => Self::Completed,
            class @ 1..100 => Self::Class(class),
            code => Self::Code(code),
        }
    }

    /// The leaf called `suffix` after the family's prefix.
    pub(crate) fn parse(suffix: &str) -> Option<usize> {
        match suffix.as_bytes() {
            b"completed" => Some(0),
            [class @ b'1'..=b'5', b'x', b'x'] => Some(usize::from(class - b'0')),
            [b'1'..=b'5', b'0'..=b'9', b'0'..=b'9'] => suffix.parse().ok(),
            _ => None,
        }
    }
}

impl CodeCounts {
    #[inline]
    pub(crate) fn record(&self, status: u16) {
        let Some((shard, writer)) = self.0.mine(Box::default) else { return };
        let class = usize::from(status) / PER_CLASS;
        let slot = match class.checked_sub(1).and_then(|class| shard.classes.get(class)) {
            Some(codes) => &codes.get_or_init(|| zeroed(PER_CLASS))[usize::from(status) % PER_CLASS],
            None => &shard.other,
        };
        writer.add(slot, 1);
    }

    pub(crate) fn total(&self, leaf: CodeLeaf) -> u64 {
        use std::sync::atomic::Ordering::Relaxed;
        let class_sum = |shard: &CodeShard, class: usize| -> u64 {
            shard.classes[class].get().map_or(0, |codes| codes.iter().map(|code| code.load(Relaxed)).sum())
        };
        self.0
            .written()
            .map(|shard| match leaf {
                CodeLeaf::Completed => {
                    shard.other.load(Relaxed) + (0..CLASSES).map(|class| class_sum(shard, class)).sum::<u64>()
                }
                CodeLeaf::Class(class) => class_sum(shard, usize::from(class) - 1),
                CodeLeaf::Code(code) => {
                    let (class, code) = (usize::from(code) / PER_CLASS - 1, usize::from(code) % PER_CLASS);
                    shard.classes[class].get().map_or(0, |codes| codes[code].load(Relaxed))
                }
            })
            .sum()
    }

    /// The indices of the leaves to list, `completed` first if it is this family's.
    pub(crate) fn listed(&self, completed: bool) -> Vec<usize> {
        let mut leaves = Vec::new();
        if self.0.written().next().is_none() {
            return leaves;
        }
        if completed {
            leaves.push(0);
        }
        for class in 1..=CLASSES {
            if self.0.written().all(|shard| shard.classes[class - 1].get().is_none()) {
                continue;
            }
            leaves.push(class);
            let codes = class * PER_CLASS..(class + 1) * PER_CLASS;
            leaves.extend(codes.filter(|code| self.total(CodeLeaf::from_index(*code)) != 0));
        }
        leaves
    }
}

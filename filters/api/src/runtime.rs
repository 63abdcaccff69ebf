//! Envoy's layered runtime.
//!
//! Layers (static, disk, admin, RTDS) are merged by order; the last layer that has a key wins. Configuration
//! resolves a key to a handle when it is compiled; the request path reads one atomic through it. A handle sees
//! every later change of its key.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::r#type::v3 as types;
use parking_lot::Mutex;

use crate::value::Value;

/// One layer: its name and its values by dotted key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layer {
    /// The layer's name, shown by `/runtime`.
    pub name: String,
    /// Values by flattened key.
    pub values: BTreeMap<String, Value>,
}

/// The merged layers and the handles that follow them. A clone is the same runtime.
#[derive(Clone, Debug, Default)]
pub struct Runtime {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    layers: Vec<Layer>,
    slots: HashMap<Box<str>, Arc<Slot>>,
    /// How many slots must be there before the next look for unused ones.
    sweep_at: usize,
}

/// A key's current value in the forms that handles read. `ABSENT` in a form means "use the default".
#[derive(Debug)]
struct Slot {
    /// `numerator << 2 | denominator`.
    fraction: AtomicU64,
    /// The integer.
    integer: AtomicU64,
    /// The bits of a double; NaN's canonical form stands for absent.
    double: AtomicU64,
}

const ABSENT: u64 = u64::MAX;

/// A fraction: numerator over 100, 10 000 or 1 000 000.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Fraction {
    /// The numerator.
    pub numerator: u32,
    /// The denominator.
    pub denominator: Denominator,
}

/// `envoy.type.v3.FractionalPercent.DenominatorType`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Denominator {
    /// 100.
    #[default]
    Hundred,
    /// 10 000.
    TenThousand,
    /// 1 000 000.
    Million,
}

impl Denominator {
    fn value(self) -> u64 {
        match self {
            Self::Hundred => 100,
            Self::TenThousand => 10_000,
            Self::Million => 1_000_000,
        }
    }
}

impl Fraction {
    /// Always.
    pub const ALWAYS: Self = Self { numerator: 100, denominator: Denominator::Hundred };
    /// Never.
    pub const NEVER: Self = Self { numerator: 0, denominator: Denominator::Hundred };

    /// Compiles the protobuf form.
    pub fn from_proto(proto: &types::FractionalPercent) -> Self {
        let denominator = match proto.denominator() {
            types::fractional_percent::DenominatorType::Hundred => Denominator::Hundred,
            types::fractional_percent::DenominatorType::TenThousand => Denominator::TenThousand,
            types::fractional_percent::DenominatorType::Million => Denominator::Million,
        };
        Self { numerator: proto.numerator, denominator }
    }

    /// Whether a draw of `random` falls inside: `random % denominator < numerator`, as Envoy decides.
    pub fn contains(self, random: u64) -> bool {
        random % self.denominator.value() < u64::from(self.numerator)
    }

    fn pack(self) -> u64 {
        u64::from(self.numerator) << 2 | self.denominator as u64
    }

    fn unpack(bits: u64) -> Self {
        let denominator = match bits & 3 {
            0 => Denominator::Hundred,
            1 => Denominator::TenThousand,
            _ => Denominator::Million,
        };
        // The numerator was packed from 32 bits.
        Self { numerator: (bits >> 2) as u32, denominator }
    }
}

/// A fraction with a runtime key (`RuntimeFractionalPercent`).
#[derive(Clone, Debug)]
pub struct RuntimeFraction {
    default: Fraction,
    slot: Option<Arc<Slot>>,
}

impl RuntimeFraction {
    /// A fraction without a key.
    pub fn fixed(default: Fraction) -> Self {
        Self { default, slot: None }
    }

    /// The fraction in force.
    pub fn get(&self) -> Fraction {
        self.get_or(self.default)
    }

    /// The fraction in force, with another default.
    pub fn get_or(&self, default: Fraction) -> Fraction {
        let bits = self.slot.as_ref().map_or(ABSENT, |slot| slot.fraction.load(Ordering::Relaxed));
        if bits == ABSENT { default } else { Fraction::unpack(bits) }
    }

    /// Whether a draw of `random` falls inside.
    pub fn contains(&self, random: u64) -> bool {
        self.get().contains(random)
    }
}

/// An integer with a runtime key.
#[derive(Clone, Debug)]
pub struct RuntimeInteger {
    default: u64,
    slot: Option<Arc<Slot>>,
}

impl RuntimeInteger {
    /// An integer without a key.
    pub fn fixed(default: u64) -> Self {
        Self { default, slot: None }
    }

    /// The integer in force.
    pub fn get(&self) -> u64 {
        self.get_or(self.default)
    }

    /// The integer in force, with another default.
    pub fn get_or(&self, default: u64) -> u64 {
        let value = self.slot.as_ref().map_or(ABSENT, |slot| slot.integer.load(Ordering::Relaxed));
        if value == ABSENT { default } else { value }
    }
}

/// A double with a runtime key (`RuntimeDouble`, `RuntimePercent`).
#[derive(Clone, Debug)]
pub struct RuntimeDouble {
    default: f64,
    slot: Option<Arc<Slot>>,
}

impl RuntimeDouble {
    /// A double without a key.
    pub fn fixed(default: f64) -> Self {
        Self { default, slot: None }
    }

    /// The double in force.
    pub fn get(&self) -> f64 {
        let bits = self.slot.as_ref().map_or(ABSENT, |slot| slot.double.load(Ordering::Relaxed));
        if bits == ABSENT { self.default } else { f64::from_bits(bits) }
    }
}

/// A flag with a runtime key (`RuntimeFeatureFlag`).
#[derive(Clone, Debug)]
pub struct RuntimeFlag(RuntimeInteger);

impl RuntimeFlag {
    /// A flag without a key.
    pub fn fixed(default: bool) -> Self {
        Self(RuntimeInteger::fixed(u64::from(default)))
    }

    /// The flag in force.
    pub fn get(&self) -> bool {
        self.0.get() != 0
    }
}

impl Runtime {
    /// No layers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts these layers in force and moves every handle to the new values.
    pub fn set_layers(&self, layers: Vec<Layer>) {
        let mut inner = self.inner.lock();
        inner.layers = layers;
        for (key, slot) in &inner.slots {
            slot.set(final_value(&inner.layers, key));
        }
    }

    /// The layers in force.
    pub fn layers(&self) -> Vec<Layer> {
        self.inner.lock().layers.clone()
    }

    /// The value of a key in the last layer that has it.
    pub fn value(&self, key: &str) -> Option<Value> {
        final_value(&self.inner.lock().layers, key).cloned()
    }

    /// A handle for a fraction.
    pub fn fraction(&self, key: &str, default: Fraction) -> RuntimeFraction {
        RuntimeFraction { default, slot: self.slot(key) }
    }

    /// A handle for `RuntimeFractionalPercent`.
    pub fn fractional_percent(&self, proto: &core::RuntimeFractionalPercent) -> RuntimeFraction {
        let default = proto.default_value.as_ref().map_or(Fraction::NEVER, Fraction::from_proto);
        self.fraction(&proto.runtime_key, default)
    }

    /// A handle for an integer.
    pub fn integer(&self, key: &str, default: u64) -> RuntimeInteger {
        RuntimeInteger { default, slot: self.slot(key) }
    }

    /// A handle for a double.
    pub fn double(&self, key: &str, default: f64) -> RuntimeDouble {
        RuntimeDouble { default, slot: self.slot(key) }
    }

    /// A handle for a flag.
    pub fn flag(&self, key: &str, default: bool) -> RuntimeFlag {
        RuntimeFlag(self.integer(key, u64::from(default)))
    }

    /// An empty key can't be set by a layer.
    fn slot(&self, key: &str) -> Option<Arc<Slot>> {
        if key.is_empty() {
            return None;
        }
        let mut inner = self.inner.lock();
        let Inner { layers, slots, sweep_at } = &mut *inner;
        if slots.len() >= (*sweep_at).max(1024) {
            slots.retain(|_, slot| Arc::strong_count(slot) > 1);
            *sweep_at = slots.len() * 2;
        }
        let slot = slots.entry(key.into()).or_insert_with(|| {
            let slot = Slot {
                fraction: AtomicU64::new(ABSENT),
                integer: AtomicU64::new(ABSENT),
                double: AtomicU64::new(ABSENT),
            };
            slot.set(final_value(layers, key));
            Arc::new(slot)
        });
        Some(Arc::clone(slot))
    }
}

fn final_value<'a>(layers: &'a [Layer], key: &str) -> Option<&'a Value> {
    layers.iter().rev().find_map(|layer| layer.values.get(key))
}

impl Slot {
    fn set(&self, value: Option<&Value>) {
        let number = match value {
            Some(Value::Number(number)) => Some(*number),
            Some(Value::Bool(flag)) => Some(f64::from(u8::from(*flag))),
            Some(Value::String(text)) => match text.trim() {
                "true" => Some(1.0),
                "false" => Some(0.0),
                text => text.parse().ok(),
            },
            _ => None,
        };
        let whole = number.filter(|number| *number >= 0.0 && number.fract() == 0.0 && *number < 1e18);
        let integer = whole.map_or(ABSENT, |number| number as u64);
        // A bare integer is a percentage; an object is a FractionalPercent (Envoy's `featureEnabled`).
        let fraction = match value {
            Some(object @ Value::Struct(_)) => fraction_of(object),
            _ => u32::try_from(integer).ok().map(|numerator| Fraction { numerator, ..Fraction::NEVER }),
        };
        self.fraction.store(fraction.map_or(ABSENT, Fraction::pack), Ordering::Relaxed);
        self.integer.store(integer, Ordering::Relaxed);
        self.double.store(number.map_or(ABSENT, f64::to_bits), Ordering::Relaxed);
    }
}

fn fraction_of(object: &Value) -> Option<Fraction> {
    let numerator = match object.at(&["numerator"]) {
        Some(Value::Number(number)) if *number >= 0.0 && *number <= f64::from(u32::MAX) => *number as u32,
        None => 0,
        _ => return None,
    };
    let denominator = match object.at(&["denominator"]) {
        None => Denominator::Hundred,
        Some(Value::String(name)) => match &**name {
            "HUNDRED" => Denominator::Hundred,
            "TEN_THOUSAND" => Denominator::TenThousand,
            "MILLION" => Denominator::Million,
            _ => return None,
        },
        Some(Value::Number(number)) => match *number as i64 {
            0 => Denominator::Hundred,
            1 => Denominator::TenThousand,
            2 => Denominator::Million,
            _ => return None,
        },
        _ => return None,
    };
    Some(Fraction { numerator, denominator })
}

#[cfg(test)]
mod tests {
    use super::{Denominator, Fraction, Layer, Runtime};
    use crate::value::{Struct, Value};

    fn layer(key: &str, value: Value) -> Layer {
        Layer { name: "test".into(), values: [(key.to_owned(), value)].into() }
    }

    #[test]
    fn the_last_layer_wins_and_handles_follow() {
        let runtime = Runtime::new();
        let handle = runtime.integer("a.b", 7);
        assert_eq!(handle.get(), 7);
        runtime.set_layers(vec![layer("a.b", Value::Number(1.0)), layer("a.b", Value::String("2".into()))]);
        assert_eq!(handle.get(), 2);
        assert_eq!(runtime.integer("a.b", 7).get(), 2, "a new handle starts from the layers in force");
        runtime.set_layers(Vec::new());
        assert_eq!(handle.get(), 7);
    }

    #[test]
    fn fractions_take_integers_and_objects() {
        let runtime = Runtime::new();
        let handle = runtime.fraction("f", Fraction::ALWAYS);
        assert!(handle.contains(99));
        runtime.set_layers(vec![layer("f", Value::Number(50.0))]);
        assert!(handle.contains(49) && !handle.contains(50));
        let object: Struct = [
            ("numerator".into(), Value::Number(1.0)),
            ("denominator".into(), Value::String("MILLION".into())),
        ]
        .into();
        runtime.set_layers(vec![layer("f", Value::Struct(object))]);
        assert_eq!(handle.get(), Fraction { numerator: 1, denominator: Denominator::Million });
        assert!(handle.contains(1_000_000) && !handle.contains(1));
    }

    #[test]
    fn an_empty_key_keeps_its_default() {
        let runtime = Runtime::new();
        runtime.set_layers(vec![layer("", Value::Number(3.0))]);
        assert_eq!(runtime.integer("", 1).get(), 1);
        assert!(runtime.flag("", true).get());
    }
}

//! Every message type, both ways, against `prost-reflect`.

use std::sync::LazyLock;

use fastrand::Rng;
use proptest::prelude::{ProptestConfig, any, proptest};
use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor,
    ReflectMessage, SerializeOptions, Value,
};
use waystation_schema::{JsonStyle, Message, TextOptions, json_to_wire, wire_to_json, yaml_to_wire};

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let set: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/schema.fds"));
    DescriptorPool::decode(set).expect("the build script compiled it")
});

/// The types of the schema; what describes protos is not in it.
static TYPES: LazyLock<Vec<(Message, MessageDescriptor)>> = LazyLock::new(|| {
    Message::all()
        .filter(|message| !message.is_map_entry())
        .map(|message| {
            let descriptor = POOL.get_message_by_name(message.full_name());
            (message, descriptor.unwrap_or_else(|| panic!("{message:?} is not in the pool")))
        })
        .collect()
});

#[test]
fn every_message_type_round_trips() {
    assert!(TYPES.len() > 1400, "{} types", TYPES.len());
    for index in 0..TYPES.len() {
        for seed in 0..3 {
            check(index, seed);
        }
    }
}

#[test]
fn fields_are_those_of_the_descriptors() {
    for (message, descriptor) in TYPES.iter() {
        assert_eq!(message.package(), descriptor.package_name());
        assert_eq!(message.field_count(), descriptor.fields().len());
        for field in descriptor.fields() {
            let ours = message.field(field.number()).expect("it has the field");
            assert_eq!(ours.name(), field.name());
            assert_eq!(ours.json_name(), field.json_name());
            assert_eq!(ours.is_repeated(), field.is_list() || field.is_map());
            assert_eq!(ours.is_packed(), field.is_packed(), "{}", field.full_name());
            assert_eq!(ours.has_presence(), field.supports_presence());
            assert_eq!(message.field_by_name(field.name()), Some(ours));
            assert_eq!(message.field_by_name(field.json_name()), Some(ours));
            match field.kind() {
                Kind::Message(target) => {
                    assert_eq!(ours.message().map(Message::full_name), Some(target.full_name()));
                }
                Kind::Enum(target) => {
                    let item = ours.enumeration().expect("it is an enum");
                    assert_eq!(item.full_name(), target.full_name());
                    for value in target.values() {
                        let found = item.value_by_name(value.name()).expect("it has the value");
                        assert_eq!(found.number(), value.number());
                    }
                }
                _ => assert!(ours.message().is_none() && ours.enumeration().is_none()),
            }
        }
        assert!(message.field_by_name("no_such_field").is_none());
        assert!(message.field(536_870_911).is_none());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, max_shrink_iters: 0, ..ProptestConfig::default() })]

    #[test]
    fn random_messages_round_trip(index in 0..TYPES.len(), seed in any::<u64>()) {
        check(index, seed);
    }
}

/// One random message: our JSON is the oracle's, and what we make of either's JSON is the message.
fn check(index: usize, seed: u64) {
    let (message, descriptor) = &TYPES[index];
    let mut generator = Generator { rng: Rng::with_seed(seed ^ (index as u64) << 32), budget: 60 };
    let original = generator.message(descriptor, 0);
    let wire = original.encode_to_vec();
    let what = || format!("{} with seed {seed}: {original}", descriptor.full_name());

    for (proto_names, with_defaults) in [(false, false), (true, false), (true, true)] {
        let style = JsonStyle { proto_names, with_defaults, pretty: seed.is_multiple_of(2), redact: false };
        let mut ours = String::new();
        wire_to_json(*message, &wire, &mut ours, style).unwrap_or_else(|error| panic!("{}: {error}", what()));
        let ours_value: serde_json::Value =
            serde_json::from_str(&ours).unwrap_or_else(|error| panic!("{}: {error} in {ours}", what()));
        let theirs = oracle_json(&original, proto_names, with_defaults);
        assert!(alike(&ours_value, &theirs), "{}\n ours: {ours_value}\n theirs: {theirs}", what());
        if with_defaults {
            continue;
        }

        // Their JSON to our wire.
        let encoded = json_to_wire(*message, &theirs.to_string(), TextOptions::default())
            .unwrap_or_else(|error| panic!("{}: {error} in {theirs}", what()));
        assert_same(&original, &encoded.wire, &what);

        // Our JSON to their message.
        let mut deserializer = serde_json::Deserializer::from_str(&ours);
        let parsed = DynamicMessage::deserialize_with_options(
            descriptor.clone(),
            &mut deserializer,
            &DeserializeOptions::new(),
        )
        .unwrap_or_else(|error| panic!("{}: {error} in {ours}", what()));
        assert_same(&original, &parsed.encode_to_vec(), &what);

        // JSON is YAML, as long as numbers in a struct stay what they are.
        let encoded = yaml_to_wire(*message, &quoted(&theirs).to_string(), TextOptions::default())
            .unwrap_or_else(|error| panic!("{}: {error} in {theirs}", what()));
        if !wire_has_struct(descriptor) {
            assert_same(&original, &encoded.wire, &what);
        }
    }
}

/// Whether a message may hold a `google.protobuf.Value`, which tells 1 from "1".
fn wire_has_struct(descriptor: &MessageDescriptor) -> bool {
    fn look(descriptor: &MessageDescriptor, seen: &mut Vec<String>) -> bool {
        let name = descriptor.full_name();
        if name.starts_with("google.protobuf.") && ["Value", "Any"].iter().any(|end| name.ends_with(end)) {
            return true;
        }
        if seen.iter().any(|known| known == name) {
            return false;
        }
        seen.push(name.to_owned());
        descriptor.fields().any(|field| match field.kind() {
            Kind::Message(inner) => look(&inner, seen),
            _ => false,
        })
    }
    look(descriptor, &mut Vec::new())
}

/// Fractions as strings: YAML leaves them to the field's type anyway.
fn quoted(value: &serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Number(number) if !number.is_i64() => number.to_string().into(),
        serde_json::Value::Array(items) => items.iter().map(quoted).collect(),
        serde_json::Value::Object(members) => members
            .iter()
            .map(|(key, value)| (key.clone(), quoted(value)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        other => other.clone(),
    }
}

fn assert_same(original: &DynamicMessage, wire: &[u8], what: &dyn Fn() -> String) {
    let decoded = DynamicMessage::decode(original.descriptor(), wire)
        .unwrap_or_else(|error| panic!("{}: {error}", what()));
    // Messages inside an `Any` are bytes, in which the entries of a map have no order: compare what they mean.
    assert_eq!(oracle_json(&decoded, false, false), oracle_json(original, false, false), "{}", what());
}

fn oracle_json(message: &DynamicMessage, proto_names: bool, with_defaults: bool) -> serde_json::Value {
    let options = SerializeOptions::new()
        .stringify_64_bit_integers(true)
        .use_proto_field_name(proto_names)
        .skip_default_fields(!with_defaults);
    message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .unwrap_or_else(|error| panic!("the oracle cannot write {message}: {error}"))
}

/// Equal up to how a number is spelt: a float prints as the shortest text that reads back as the same float.
/// That no digit is lost is for the round trip to show.
fn alike(a: &serde_json::Value, b: &serde_json::Value) -> bool {
    use serde_json::Value::{Array, Number, Object};
    match (a, b) {
        (Number(a), Number(b)) => {
            let (a, b) = (a.as_f64().unwrap_or(f64::NAN), b.as_f64().unwrap_or(f64::NAN));
            (a - b).abs() <= a.abs() * 1e-6
        }
        (Array(a), Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| alike(a, b)),
        (Object(a), Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| alike(a, b)))
        }
        (a, b) => a == b,
    }
}

/// Makes random messages that have a JSON form.
struct Generator {
    rng: Rng,
    /// Values that may still be made.
    budget: u32,
}

impl Generator {
    fn message(&mut self, descriptor: &MessageDescriptor, depth: usize) -> DynamicMessage {
        let mut message = DynamicMessage::new(descriptor.clone());
        match descriptor.full_name() {
            "google.protobuf.Any" => {
                let inner = loop {
                    let (_, inner) = &TYPES[self.rng.usize(..TYPES.len())];
                    // The oracle writes an empty `value` for Empty, as Go does; C++ does not.
                    let empty = inner.full_name() == "google.protobuf.Empty";
                    if !empty && (depth < 4 || inner.fields().len() == 0) {
                        break inner.clone();
                    }
                };
                let content = self.message(&inner, depth + 2);
                set(
                    &mut message,
                    "type_url",
                    Value::String(format!("type.googleapis.com/{}", inner.full_name())),
                );
                set(&mut message, "value", Value::Bytes(content.encode_to_vec().into()));
                return message;
            }
            "google.protobuf.Duration" => {
                let seconds = self.rng.i64(-315_576_000_000..=315_576_000_000) >> self.rng.u32(0..39);
                let nanos =
                    self.rng.i32(0..1_000_000_000) / [1, 1000, 1_000_000, 1_000_000_000][self.rng.usize(..4)];
                set(&mut message, "seconds", Value::I64(seconds));
                let scale = [1, 1000, 1_000_000, 1_000_000_000][self.rng.usize(..4)];
                let nanos = nanos / scale * scale;
                set(&mut message, "nanos", Value::I32(if seconds < 0 { -nanos } else { nanos }));
                return message;
            }
            "google.protobuf.Timestamp" => {
                set(&mut message, "seconds", Value::I64(self.rng.i64(-62_135_596_800..=253_402_300_799)));
                set(&mut message, "nanos", Value::I32(self.rng.i32(0..1_000_000_000)));
                return message;
            }
            "google.protobuf.FieldMask" => {
                let paths = ["a", "a.b", "some_field.other_one", "x"];
                let paths = (0..self.rng.usize(..4)).map(|at| Value::String(paths[at].to_owned())).collect();
                set(&mut message, "paths", Value::List(paths));
                return message;
            }
            "google.protobuf.Value" => {
                let fields: Vec<FieldDescriptor> = descriptor.fields().collect();
                let choices = if depth > 6 || self.budget == 0 { 4 } else { fields.len() };
                let field = &fields[self.rng.usize(..choices)];
                let value = self.value(field, depth);
                message.set_field(field, value);
                return message;
            }
            _ => {}
        }
        for field in descriptor.fields() {
            let spare = depth < 6 && self.budget > 0;
            let wanted = if depth == 0 { self.rng.u8(..4) < 3 } else { self.rng.u8(..3) == 0 };
            if !wanted || (!spare && !matches!(field.kind(), Kind::String | Kind::Bool)) {
                continue;
            }
            if let Some(oneof) = field.containing_oneof()
                && oneof.fields().any(|other| message.has_field(&other))
            {
                continue;
            }
            self.budget = self.budget.saturating_sub(1);
            let value = self.field(&field, depth);
            message.set_field(&field, value);
        }
        message
    }

    fn field(&mut self, field: &FieldDescriptor, depth: usize) -> Value {
        let count = self.rng.usize(..3);
        if field.is_map() {
            let Kind::Message(entry) = field.kind() else { unreachable!("a map has entries") };
            let (key_field, value_field) = (entry.map_entry_key_field(), entry.map_entry_value_field());
            return Value::Map(
                (0..count)
                    .map(|_| {
                        let key = match self.value(&key_field, depth) {
                            Value::String(text) => MapKey::String(text),
                            Value::Bool(value) => MapKey::Bool(value),
                            Value::I32(value) => MapKey::I32(value),
                            Value::I64(value) => MapKey::I64(value),
                            Value::U32(value) => MapKey::U32(value),
                            Value::U64(value) => MapKey::U64(value),
                            other => unreachable!("not a key: {other:?}"),
                        };
                        (key, self.value(&value_field, depth + 1))
                    })
                    .collect(),
            );
        }
        if field.is_list() {
            return Value::List((0..count).map(|_| self.value(field, depth)).collect());
        }
        self.value(field, depth)
    }

    fn value(&mut self, field: &FieldDescriptor, depth: usize) -> Value {
        match field.kind() {
            Kind::Double => Value::F64(self.double()),
            Kind::Float => Value::F32(self.double() as f32),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
                Value::I32(self.rng.i32(..) >> self.rng.u32(0..32))
            }
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                Value::I64(self.rng.i64(..) >> self.rng.u32(0..64))
            }
            Kind::Uint32 | Kind::Fixed32 => Value::U32(self.rng.u32(..) >> self.rng.u32(0..32)),
            Kind::Uint64 | Kind::Fixed64 => Value::U64(self.rng.u64(..) >> self.rng.u32(0..64)),
            Kind::Bool => Value::Bool(self.rng.bool()),
            Kind::String => Value::String(self.text()),
            Kind::Bytes => {
                let len = self.rng.usize(..9);
                Value::Bytes((0..len).map(|_| self.rng.u8(..)).collect::<Vec<_>>().into())
            }
            Kind::Enum(item) => {
                let values: Vec<_> = item.values().collect();
                let known = item.full_name() == "google.protobuf.NullValue" || self.rng.u8(..8) > 0;
                Value::EnumNumber(if known { values[self.rng.usize(..values.len())].number() } else { 4242 })
            }
            Kind::Message(inner) => Value::Message(self.message(&inner, depth + 1)),
        }
    }

    fn double(&mut self) -> f64 {
        match self.rng.u8(..5) {
            0 => f64::from(self.rng.i32(-1000..1000)),
            1 => f64::from(self.rng.i32(-1000..1000)) / 8.0,
            2 => format!("{}e15", self.rng.i16(..)).parse().expect("it is a number"),
            // Few digits: the oracle's reader is not exact with seventeen.
            3 => format!("{}e-9", self.rng.u8(1..)).parse().expect("it is a number"),
            _ => f64::from(self.rng.u16(..)) / 1024.0,
        }
    }

    fn text(&mut self) -> String {
        const TEXTS: [&str; 12] = [
            "",
            "a",
            "x-envoy",
            "y",
            "12",
            "1.5",
            "null",
            "a \"quoted\" \\ text",
            "\u{e9}\u{1f600}",
            "\t\n\u{1}<&>",
            "{a: b}",
            "#*&!|>'%@`",
        ];
        let text = TEXTS[self.rng.usize(..TEXTS.len())].to_owned();
        if self.rng.bool() { text } else { format!("{text}{}", self.rng.u16(..)) }
    }
}

fn set(message: &mut DynamicMessage, field: &str, value: Value) {
    message.set_field_by_name(field, value);
}

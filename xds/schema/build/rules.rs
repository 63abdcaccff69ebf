//! Compiles the `protoc-gen-validate` options into rule programs (`src/layout.rs`, module `rule`).

use protox::prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, OneofDescriptor,
    ReflectMessage, Value,
};

use crate::layout::{form, rule};
use crate::tables::{Strings, extension};

/// Reads the options.
pub(crate) struct Rules {
    pool: DescriptorPool,
}

/// The rule programs of all fields.
pub(crate) struct Program {
    pub(crate) bytes: Vec<u8>,
    patterns: Vec<String>,
}

impl Program {
    pub(crate) fn new() -> Self {
        // Offset 0 means "no rules".
        Self { bytes: vec![rule::END], patterns: Vec::new() }
    }

    pub(crate) fn pattern_count(&self) -> usize {
        self.patterns.len()
    }

    /// Appends a finished program and says where it stands.
    fn append(&mut self, mut ops: Vec<u8>) -> u32 {
        if ops.is_empty() {
            return 0;
        }
        ops.push(rule::END);
        let offset = u32::try_from(self.bytes.len()).expect("the rules are far below 4 GB");
        self.bytes.extend(ops);
        offset
    }

    fn pattern(&mut self, text: &str) -> u32 {
        let index = self.patterns.iter().position(|known| known == text).unwrap_or_else(|| {
            self.patterns.push(text.to_owned());
            self.patterns.len() - 1
        });
        u32::try_from(index).expect("there are a few patterns")
    }
}

impl Rules {
    pub(crate) fn new(pool: &DescriptorPool) -> Self {
        Self { pool: pool.clone() }
    }

    pub(crate) fn flag(&self, options: &DynamicMessage, name: &str) -> bool {
        extension(&self.pool, options, name).and_then(|value| value.as_bool()).unwrap_or(false)
    }

    pub(crate) fn text(&self, options: &DynamicMessage, name: &str) -> String {
        extension(&self.pool, options, name)
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default()
    }

    pub(crate) fn message_disabled(&self, item: &MessageDescriptor) -> bool {
        let options = item.options();
        self.flag(&options, "validate.disabled") || self.flag(&options, "validate.ignored")
    }

    pub(crate) fn oneof_required(&self, item: &OneofDescriptor) -> bool {
        self.flag(&item.options(), "validate.required")
    }

    /// The offset of the field's program, 0 when it has no rules; and whether the rules say something about a field
    /// that is not set or about a list as a whole.
    pub(crate) fn compile(
        &self,
        field: &FieldDescriptor,
        program: &mut Program,
        strings: &mut Strings,
    ) -> (u32, bool) {
        match extension(&self.pool, &field.options(), "validate.rules") {
            Some(Value::Message(rules)) => {
                let mut compiler = Compiler { at: field.full_name(), program, strings };
                let ops = compiler.field_rules(&rules, &field.kind());
                (compiler.program.append(ops), judges_whole(field, &rules))
            }
            _ => (0, false),
        }
    }
}

fn judges_whole(field: &FieldDescriptor, rules: &DynamicMessage) -> bool {
    let has = |wanted: &dyn Fn(&str) -> bool| {
        rules.fields().any(|(_, value)| match value {
            Value::Message(set) => set.fields().any(|(rule, _)| wanted(rule.name())),
            _ => false,
        })
    };
    if field.is_list() || field.is_map() {
        has(&|name| !matches!(name, "items" | "keys" | "values" | "ignore_empty"))
    } else if field.containing_oneof().is_some() {
        // A member of a oneof is judged only when it is set.
        false
    } else {
        !field.supports_presence() || has(&|name| name == "required")
    }
}

/// Compiles the rules of one field.
struct Compiler<'a> {
    at: &'a str,
    program: &'a mut Program,
    strings: &'a mut Strings,
}

impl Compiler<'_> {
    fn field_rules(&mut self, rules: &DynamicMessage, kind: &Kind) -> Vec<u8> {
        let at = self.at;
        let mut ops = Vec::new();
        for (field, value) in rules.fields() {
            let Value::Message(set) = value else { panic!("{at}: unexpected rule {}", field.name()) };
            match field.name() {
                "message" => {
                    flag(set, "required", rule::REQUIRED, &mut ops);
                    flag(set, "skip", rule::SKIP, &mut ops);
                }
                "string" | "bytes" => self.string_rules(set, &mut ops),
                "enum" => {
                    flag(set, "defined_only", rule::ENUM_DEFINED, &mut ops);
                    numbers(set, &mut ops);
                }
                "repeated" => {
                    flag(set, "ignore_empty", rule::IGNORE_EMPTY, &mut ops);
                    bounds(set, "min_items", "max_items", None, rule::ITEMS_COUNT, &mut ops);
                    flag(set, "unique", rule::ITEMS_UNIQUE, &mut ops);
                    self.nested(set, "items", rule::ITEMS, kind, &mut ops);
                }
                "map" => {
                    flag(set, "ignore_empty", rule::IGNORE_EMPTY, &mut ops);
                    bounds(set, "min_pairs", "max_pairs", None, rule::PAIRS_COUNT, &mut ops);
                    assert!(!set.has_field_by_name("no_sparse"), "{at}: the wire has no sparse maps");
                    let Kind::Message(entry) = kind else { panic!("{at}: map rules on a scalar") };
                    let (key, value) =
                        (entry.map_entry_key_field().kind(), entry.map_entry_value_field().kind());
                    self.nested(set, "keys", rule::MAP_KEYS, &key, &mut ops);
                    self.nested(set, "values", rule::MAP_VALUES, &value, &mut ops);
                }
                "any" => {
                    flag(set, "required", rule::REQUIRED, &mut ops);
                    list(set, "in", rule::ANY_IN, &mut ops, |item| text_operand(item, self.strings));
                    list(set, "not_in", rule::ANY_NOT_IN, &mut ops, |item| text_operand(item, self.strings));
                }
                "duration" => durations(set, at, &mut ops),
                "timestamp" => {
                    flag(set, "required", rule::REQUIRED, &mut ops);
                    let others = set.fields().filter(|(field, _)| field.name() != "required").count();
                    assert!(others == 0, "{at}: a timestamp rule that the walk does not know");
                }
                _ => {
                    flag(set, "ignore_empty", rule::IGNORE_EMPTY, &mut ops);
                    numbers(set, &mut ops);
                }
            }
        }
        ops
    }

    fn nested(&mut self, set: &DynamicMessage, name: &str, op: u8, kind: &Kind, ops: &mut Vec<u8>) {
        if let Some(Value::Message(rules)) = get(set, name) {
            let inner = self.field_rules(&rules, kind);
            let offset = self.program.append(inner);
            if offset != 0 {
                ops.push(op);
                ops.extend(offset.to_le_bytes());
            }
        }
    }

    fn string_rules(&mut self, set: &DynamicMessage, ops: &mut Vec<u8>) {
        let (at, strings) = (self.at, &mut *self.strings);
        let bytes = set.descriptor().name() == "BytesRules";
        flag(set, "ignore_empty", rule::IGNORE_EMPTY, ops);
        let mut single = |name: &str, op: u8, ops: &mut Vec<u8>| {
            if let Some(value) = get(set, name) {
                ops.push(op);
                ops.extend(text_operand(&value, strings));
            }
        };
        single("const", rule::STR_CONST, ops);
        single("prefix", rule::STR_PREFIX, ops);
        single("suffix", rule::STR_SUFFIX, ops);
        single("contains", rule::STR_CONTAINS, ops);
        if bytes {
            bounds(set, "min_len", "max_len", Some("len"), rule::STR_BYTES, ops);
        } else {
            single("not_contains", rule::STR_NOT_CONTAINS, ops);
            bounds(set, "min_len", "max_len", Some("len"), rule::STR_CHARS, ops);
            bounds(set, "min_bytes", "max_bytes", Some("len_bytes"), rule::STR_BYTES, ops);
        }
        list(set, "in", rule::STR_IN, ops, |item| text_operand(item, strings));
        list(set, "not_in", rule::STR_NOT_IN, ops, |item| text_operand(item, strings));
        if let Some(value) = get(set, "pattern") {
            let text = value.as_str().expect("a pattern is a string");
            ops.push(rule::STR_PATTERN);
            ops.extend(self.program.pattern(text).to_le_bytes());
            ops.extend(strings.add(text).to_le_bytes());
            ops.extend(strings.add(&go_quoted(text)).to_le_bytes());
        }
        let forms = [
            ("email", form::EMAIL),
            ("hostname", form::HOSTNAME),
            ("ip", form::IP),
            ("ipv4", form::IPV4),
            ("ipv6", form::IPV6),
            ("uri", form::URI),
            ("uri_ref", form::URI_REF),
            ("address", form::ADDRESS),
            ("uuid", form::UUID),
        ];
        for (name, form) in forms {
            if get(set, name).and_then(|value| value.as_bool()).unwrap_or(false) {
                ops.extend([rule::STR_FORM, form]);
            }
        }
        if let Some(Value::EnumNumber(known)) = get(set, "well_known_regex") {
            let strict = get(set, "strict").and_then(|value| value.as_bool()).unwrap_or(true);
            let form = match (known, strict) {
                (1, true) => form::HEADER_NAME,
                (2, true) => form::HEADER_VALUE,
                (1 | 2, false) => form::HEADER_LOOSE,
                _ => panic!("{at}: unknown regex {known}"),
            };
            ops.extend([rule::STR_FORM, form]);
        }
    }
}

fn flag(set: &DynamicMessage, name: &str, op: u8, ops: &mut Vec<u8>) {
    if set.get_field_by_name(name).and_then(|value| value.as_bool()).unwrap_or(false) {
        ops.push(op);
    }
}

fn get(set: &DynamicMessage, name: &str) -> Option<Value> {
    set.has_field_by_name(name)
        .then(|| set.get_field_by_name(name).map(std::borrow::Cow::into_owned))
        .flatten()
}

fn list(
    set: &DynamicMessage,
    name: &str,
    op: u8,
    ops: &mut Vec<u8>,
    mut operand: impl FnMut(&Value) -> Vec<u8>,
) {
    if let Some(Value::List(items)) = get(set, name) {
        ops.push(op);
        ops.extend((items.len() as u32).to_le_bytes());
        for item in &items {
            ops.extend(operand(item));
        }
    }
}

fn text_operand(value: &Value, strings: &mut Strings) -> Vec<u8> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Bytes(bytes) => {
            String::from_utf8(bytes.to_vec()).expect("byte rules in these protos are text")
        }
        other => panic!("not a text operand: {other:?}"),
    };
    strings.add(&text).to_le_bytes().to_vec()
}

/// The eight bytes of a number; its field's type tells how to read them.
fn number_operand(value: &Value) -> Vec<u8> {
    match *value {
        Value::Bool(value) => u64::from(value).to_le_bytes(),
        Value::I32(value) | Value::EnumNumber(value) => i64::from(value).to_le_bytes(),
        Value::I64(value) => value.to_le_bytes(),
        Value::U32(value) => u64::from(value).to_le_bytes(),
        Value::U64(value) => value.to_le_bytes(),
        Value::F32(value) => f64::from(value).to_le_bytes(),
        Value::F64(value) => value.to_le_bytes(),
        ref other => panic!("not a number: {other:?}"),
    }
    .to_vec()
}

fn duration_operand(value: &Value) -> Vec<u8> {
    let Value::Message(duration) = value else { panic!("not a duration: {value:?}") };
    let seconds = duration.get_field_by_name("seconds").and_then(|value| value.as_i64()).unwrap_or(0);
    let nanos = duration.get_field_by_name("nanos").and_then(|value| value.as_i32()).unwrap_or(0);
    let mut bytes = seconds.to_le_bytes().to_vec();
    bytes.extend(nanos.to_le_bytes());
    bytes
}

fn range(set: &DynamicMessage, op: u8, width: usize, operand: fn(&Value) -> Vec<u8>, ops: &mut Vec<u8>) {
    let mut flags = 0;
    let mut lower = vec![0; width];
    let mut upper = vec![0; width];
    if let Some(value) = get(set, "gt") {
        flags |= rule::LOWER;
        lower = operand(&value);
    }
    if let Some(value) = get(set, "gte") {
        flags |= rule::LOWER | rule::LOWER_INCLUSIVE;
        lower = operand(&value);
    }
    if let Some(value) = get(set, "lt") {
        flags |= rule::UPPER;
        upper = operand(&value);
    }
    if let Some(value) = get(set, "lte") {
        flags |= rule::UPPER | rule::UPPER_INCLUSIVE;
        upper = operand(&value);
    }
    if flags != 0 {
        ops.extend([op, flags]);
        ops.extend(lower);
        ops.extend(upper);
    }
}

fn numbers(set: &DynamicMessage, ops: &mut Vec<u8>) {
    if let Some(value) = get(set, "const") {
        ops.push(rule::NUM_CONST);
        ops.extend(number_operand(&value));
    }
    range(set, rule::NUM_RANGE, 8, number_operand, ops);
    list(set, "in", rule::NUM_IN, ops, number_operand);
    list(set, "not_in", rule::NUM_NOT_IN, ops, number_operand);
}

fn durations(set: &DynamicMessage, at: &str, ops: &mut Vec<u8>) {
    flag(set, "required", rule::REQUIRED, ops);
    if let Some(value) = get(set, "const") {
        ops.push(rule::DURATION_CONST);
        ops.extend(duration_operand(&value));
    }
    range(set, rule::DURATION_RANGE, 12, duration_operand, ops);
    list(set, "in", rule::DURATION_IN, ops, duration_operand);
    list(set, "not_in", rule::DURATION_NOT_IN, ops, duration_operand);
    assert!(!ops.is_empty(), "{at}: an empty duration rule");
}

fn bounds(set: &DynamicMessage, min: &str, max: &str, exact: Option<&str>, op: u8, ops: &mut Vec<u8>) {
    let number = |name: &str| get(set, name).and_then(|value| value.as_u64());
    let (mut low, mut high) = (number(min), number(max));
    if let Some(exact) = exact.and_then(number) {
        (low, high) = (Some(exact), Some(exact));
    }
    if low.is_some() || high.is_some() {
        ops.push(op);
        ops.extend(low.unwrap_or(0).to_le_bytes());
        ops.extend(high.unwrap_or(u64::MAX).to_le_bytes());
    }
}

/// The text in Go's `%q` form, in which `protoc-gen-validate` puts a pattern into Envoy's messages.
fn go_quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            control if control < ' ' || control == '\u{7f}' => {
                out.push_str(&format!("\\x{:02x}", control as u32));
            }
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

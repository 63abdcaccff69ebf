//! Lays the descriptors out as the blob that `src/table.rs` reads.

use std::collections::HashMap;
use std::fmt::Write as _;

use protox::prost_reflect::{DescriptorPool, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor};
use protox::prost_reflect::{DynamicMessage, Value};

use crate::layout::{enumeration, field, kind, ledger as ledger_word, message, oneof, value};
use crate::ledger::{Ledger, State};
use crate::rules::{Program, Rules};

/// Packages that describe protos, not configuration.
const LEFT_OUT: [&str; 6] = [
    "google.protobuf.compiler",
    "validate",
    "udpa.annotations",
    "xds.annotations.v3",
    "envoy.annotations",
    "google.api",
];

/// What the build script writes.
pub(crate) struct Tables {
    pub(crate) blob: Vec<u8>,
    /// Rust constants with the offsets of the sections.
    pub(crate) sections: String,
}

/// A pool of distinct strings, each behind its `u16` length.
pub(crate) struct Strings {
    bytes: Vec<u8>,
    offsets: HashMap<String, u32>,
}

impl Strings {
    fn new() -> Self {
        Self { bytes: vec![0, 0], offsets: HashMap::from([(String::new(), 0)]) }
    }

    pub(crate) fn add(&mut self, text: &str) -> u32 {
        if let Some(&offset) = self.offsets.get(text) {
            return offset;
        }
        let offset = u32::try_from(self.bytes.len()).expect("the pool is far below 4 GB");
        let length = u16::try_from(text.len()).expect("names and reasons are short");
        self.bytes.extend(length.to_le_bytes());
        self.bytes.extend(text.as_bytes());
        self.offsets.insert(text.to_owned(), offset);
        offset
    }
}

/// Builds the tables of every message and enum in the pool.
pub(crate) fn build(pool: &DescriptorPool, ledger: &Ledger) -> Tables {
    let wanted = |package: &str, file: &str| {
        !LEFT_OUT.contains(&package) && file != "google/protobuf/descriptor.proto"
    };
    let mut messages: Vec<MessageDescriptor> =
        pool.all_messages().filter(|item| wanted(item.package_name(), item.parent_file().name())).collect();
    messages.sort_by(|a, b| a.full_name().cmp(b.full_name()));
    let mut enums: Vec<EnumDescriptor> =
        pool.all_enums().filter(|item| wanted(item.package_name(), item.parent_file().name())).collect();
    enums.sort_by(|a, b| a.full_name().cmp(b.full_name()));

    let mut writer = Writer {
        message_index: index_of(messages.iter().map(MessageDescriptor::full_name)),
        enum_index: index_of(enums.iter().map(EnumDescriptor::full_name)),
        rules: Rules::new(pool),
        strings: Strings::new(),
        programs: Program::new(),
        messages: Vec::new(),
        fields: Vec::new(),
        oneofs: Vec::new(),
        names: Vec::new(),
        checks: Vec::new(),
        enums: Vec::new(),
        values: Vec::new(),
    };
    for item in &messages {
        writer.message(item, ledger);
    }
    for item in &enums {
        writer.enumeration(item);
    }
    writer.finish()
}

fn index_of<'a>(names: impl Iterator<Item = &'a str>) -> HashMap<String, u16> {
    names
        .enumerate()
        .map(|(index, name)| (name.to_owned(), u16::try_from(index).expect("there are a few thousand types")))
        .collect()
}

struct Writer {
    message_index: HashMap<String, u16>,
    enum_index: HashMap<String, u16>,
    rules: Rules,
    strings: Strings,
    programs: Program,
    messages: Vec<u32>,
    fields: Vec<u32>,
    oneofs: Vec<u32>,
    names: Vec<u32>,
    checks: Vec<u32>,
    enums: Vec<u32>,
    values: Vec<u32>,
}

impl Writer {
    fn message(&mut self, item: &MessageDescriptor, ledger: &Ledger) {
        let mut fields: Vec<FieldDescriptor> = item.fields().collect();
        fields.sort_by_key(FieldDescriptor::number);
        let oneofs: Vec<_> = item.oneofs().filter(|oneof| !oneof.is_synthetic()).collect();
        let first_field = len(&self.fields, field::WORDS);
        let first_oneof = len(&self.oneofs, oneof::WORDS);
        let first_name = len(&self.names, 2);
        let first_check = len(&self.checks, 1);

        let mut names: Vec<(String, u32)> = Vec::new();
        let mut name_field = 0xffff_u32;
        for (ordinal, member) in fields.iter().enumerate() {
            let ordinal = ordinal as u32;
            names.push((member.name().to_owned(), ordinal));
            if member.json_name() != member.name() {
                names.push((member.json_name().to_owned(), ordinal));
            }
            if member.name() == "name" && member.kind() == Kind::String && !member.is_list() {
                name_field = ordinal;
            }
            if self.field(item, member, &oneofs, ledger) {
                self.checks.push(ordinal);
            }
        }
        names.sort();
        names.dedup_by(|a, b| {
            assert!(a.0 != b.0 || a.1 == b.1, "{} has two fields called {}", item.full_name(), a.0);
            a == b
        });
        for (name, ordinal) in &names {
            let name = self.strings.add(name);
            self.names.extend([name, *ordinal]);
        }
        for group in &oneofs {
            let name = self.strings.add(group.name());
            let required = self.rules.oneof_required(group);
            self.oneofs.extend([name, if required { oneof::REQUIRED } else { 0 }]);
        }
        assert!(fields.len() <= 256, "the walk's set of seen fields holds 256: {}", item.full_name());

        let mut flags = 0;
        if item.is_map_entry() {
            flags |= message::MAP_ENTRY;
        }
        if self.rules.message_disabled(item) {
            flags |= message::NO_RULES;
        }
        if ledger.is_root(item.full_name()) {
            flags |= message::ROOT;
        }
        if ledger.is_strict(item.full_name()) {
            flags |= message::STRICT;
        }
        let mut record = [0; message::WORDS];
        record[message::NAME] = self.strings.add(item.full_name());
        record[message::KIND] =
            item.package_name().len() as u32 | u32::from(kind_of(item)) << 16 | u32::from(flags) << 24;
        record[message::FIELDS] = first_field;
        record[message::COUNTS] = fields.len() as u32 | (oneofs.len() as u32) << 16;
        record[message::ONEOFS] = first_oneof;
        record[message::NAMES] = first_name;
        record[message::NAMES_LEN] = names.len() as u32 | name_field << 16;
        record[message::LEDGER] = self.ledger_word(ledger.message(item.full_name()));
        record[message::CHECKS] = first_check;
        record[message::CHECKS_LEN] = len(&self.checks, 1) - first_check;
        self.messages.extend(record);
    }

    /// Adds a field; true when its rules judge its absence or its list as a whole.
    fn field(
        &mut self,
        owner: &MessageDescriptor,
        member: &FieldDescriptor,
        oneofs: &[protox::prost_reflect::OneofDescriptor],
        ledger: &Ledger,
    ) -> bool {
        assert!(!member.is_group(), "groups are not supported: {}", member.full_name());
        let options = member.options();
        let proto = member.field_descriptor_proto();
        let mut flags = 0;
        if member.is_list() || member.is_map() {
            flags |= field::REPEATED;
        }
        if member.is_packed() {
            flags |= field::PACKED;
        }
        if member.is_map() {
            flags |= field::MAP;
        }
        if member.supports_presence() {
            flags |= field::PRESENCE;
        }
        if self.rules.flag(&options, "udpa.annotations.sensitive") {
            flags |= field::SENSITIVE;
        }
        if proto.options.as_ref().is_some_and(|options| options.deprecated()) {
            flags |= field::IS_DEPRECATED;
        }
        if self.rules.flag(&options, "envoy.annotations.disallowed_by_default") {
            flags |= field::DISALLOWED;
        }
        let target = match member.kind() {
            Kind::Message(target) => self.message_index[target.full_name()],
            Kind::Enum(target) => self.enum_index[target.full_name()],
            _ => 0xffff,
        };
        let group = member
            .containing_oneof()
            .and_then(|group| oneofs.iter().position(|other| other.full_name() == group.full_name()))
            .unwrap_or(0xffff);
        let (program, judges_whole) = self.rules.compile(member, &mut self.programs, &mut self.strings);

        let mut record = [0; field::WORDS];
        record[field::NUMBER] = member.number();
        record[field::NAME] = self.strings.add(member.name());
        record[field::JSON] = self.strings.add(member.json_name());
        record[field::TYPE] = proto.r#type() as u32 | u32::from(flags) << 8;
        record[field::TARGET] = u32::from(target) | (group as u32) << 16;
        record[field::RULES] = program;
        record[field::LEDGER] = self.ledger_word(ledger.field(owner, member.name()));
        let deprecated = self.rules.text(&options, "envoy.annotations.deprecated_at_minor_version");
        record[field::DEPRECATED] = self.strings.add(&deprecated);
        self.fields.extend(record);
        judges_whole
    }

    fn enumeration(&mut self, item: &EnumDescriptor) {
        // In the order of declaration: of two names for one number the first is the one to print.
        let mut values: Vec<_> = item
            .enum_descriptor_proto()
            .value
            .iter()
            .map(|value| item.get_value_by_name(value.name()).expect("the enum declares it"))
            .collect();
        values.sort_by_key(|value| value.number());
        let first_value = len(&self.values, value::WORDS);
        let first_name = len(&self.names, 2);
        let mut names = Vec::new();
        for (ordinal, member) in values.iter().enumerate() {
            let options = member.options();
            let proto = member.enum_value_descriptor_proto();
            let mut flags = 0;
            if proto.options.as_ref().is_some_and(|options| options.deprecated()) {
                flags |= value::IS_DEPRECATED;
            }
            if self.rules.flag(&options, "envoy.annotations.disallowed_by_default_enum") {
                flags |= value::DISALLOWED;
            }
            let name = self.strings.add(member.name());
            self.values.extend([member.number() as u32, name, flags]);
            names.push((member.name().to_owned(), ordinal as u32));
        }
        names.sort();
        for (name, ordinal) in names {
            let name = self.strings.add(&name);
            self.names.extend([name, ordinal]);
        }
        let mut record = [0; enumeration::WORDS];
        record[enumeration::NAME] = self.strings.add(item.full_name());
        record[enumeration::VALUES] = first_value;
        record[enumeration::COUNT] = values.len() as u32;
        record[enumeration::NAMES] = first_name;
        self.enums.extend(record);
    }

    fn ledger_word(&mut self, state: &State) -> u32 {
        let (state, reason) = match state {
            State::Unclaimed => (ledger_word::UNCLAIMED, ""),
            State::Implemented => (ledger_word::IMPLEMENTED, ""),
            State::Rejected(reason) => (ledger_word::REJECTED, reason.as_str()),
            State::Ignored(reason) => (ledger_word::IGNORED, reason.as_str()),
        };
        state | self.strings.add(reason) << 2
    }

    fn finish(self) -> Tables {
        let mut blob = Vec::new();
        let mut sections = String::new();
        let mut constant = |name: &str, value: usize| {
            writeln!(sections, "pub(crate) const {name}: usize = {value};").expect("a String takes it");
        };
        let words = [
            ("MESSAGES", &self.messages, message::WORDS),
            ("FIELDS", &self.fields, field::WORDS),
            ("ONEOFS", &self.oneofs, oneof::WORDS),
            ("NAMES", &self.names, 2),
            ("CHECKS", &self.checks, 1),
            ("ENUMS", &self.enums, enumeration::WORDS),
            ("VALUES", &self.values, value::WORDS),
        ];
        for (name, section, width) in words {
            constant(name, blob.len());
            if matches!(name, "MESSAGES" | "ENUMS") {
                constant(&format!("{}_COUNT", name.trim_end_matches('S')), section.len() / width);
            }
            blob.extend(section.iter().flat_map(|word| word.to_le_bytes()));
        }
        constant("RULES", blob.len());
        constant("PATTERN_COUNT", self.programs.pattern_count());
        blob.extend(&self.programs.bytes);
        constant("STRINGS", blob.len());
        blob.extend(&self.strings.bytes);
        Tables { blob, sections }
    }
}

fn len(words: &[u32], width: usize) -> u32 {
    u32::try_from(words.len() / width).expect("the tables are far below 4 GB")
}

fn kind_of(item: &MessageDescriptor) -> u8 {
    match item.full_name() {
        "google.protobuf.Any" => kind::ANY,
        "google.protobuf.Duration" => kind::DURATION,
        "google.protobuf.Timestamp" => kind::TIMESTAMP,
        "google.protobuf.Struct" => kind::STRUCT,
        "google.protobuf.Value" => kind::VALUE,
        "google.protobuf.ListValue" => kind::LIST_VALUE,
        "google.protobuf.FieldMask" => kind::FIELD_MASK,
        "google.protobuf.DoubleValue"
        | "google.protobuf.FloatValue"
        | "google.protobuf.Int64Value"
        | "google.protobuf.UInt64Value"
        | "google.protobuf.Int32Value"
        | "google.protobuf.UInt32Value"
        | "google.protobuf.BoolValue"
        | "google.protobuf.StringValue"
        | "google.protobuf.BytesValue" => kind::WRAPPER,
        "xds.type.v3.TypedStruct" | "udpa.type.v1.TypedStruct" => kind::TYPED_STRUCT,
        _ => kind::PLAIN,
    }
}

/// The value of a set extension of an options message.
pub(crate) fn extension(pool: &DescriptorPool, options: &DynamicMessage, name: &str) -> Option<Value> {
    let extension = pool.get_extension_by_name(name).unwrap_or_else(|| panic!("no extension {name}"));
    options.has_extension(&extension).then(|| options.get_extension(&extension).into_owned())
}

//! Handles on the types of the schema: two or four bytes, free to copy, alive for ever.

use std::fmt;

use crate::layout::{enumeration, field, kind, message, oneof, value};
use crate::table::{find_name, find_record, section, string, word};

/// The authority that Envoy's own type URLs use.
pub const TYPE_URL_PREFIX: &str = "type.googleapis.com/";

/// A message type of the Envoy API.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct Message(u16);

/// A field of a message type.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct Field(u32);

/// An enum type of the Envoy API.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct Enum(u16);

/// A value of an enum type.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct EnumValue(u32);

/// The type of a field's value; the numbers are those of `FieldDescriptorProto.Type`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[expect(missing_docs, reason = "the names are those of the proto language")]
pub enum Type {
    Double,
    Float,
    Int64,
    Uint64,
    Int32,
    Fixed64,
    Fixed32,
    Bool,
    String,
    Message,
    Bytes,
    Uint32,
    Enum,
    Sfixed32,
    Sfixed64,
    Sint32,
    Sint64,
}

/// How a message is treated in JSON.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[expect(missing_docs, reason = "the names are those of the well-known types")]
pub enum Kind {
    Plain,
    Any,
    Duration,
    Timestamp,
    Struct,
    Value,
    ListValue,
    FieldMask,
    /// `google.protobuf.UInt32Value` and its kin.
    Wrapper,
    /// `xds.type.v3.TypedStruct` or `udpa.type.v1.TypedStruct`: in JSON an ordinary message.
    TypedStruct,
}

impl Message {
    /// The message called `name`, e.g. `envoy.config.cluster.v3.Cluster`.
    pub fn find(name: &str) -> Option<Self> {
        find_record(section::MESSAGES, message::WORDS, section::MESSAGE_COUNT, name.as_bytes())
            .map(|index| Self(index as u16))
    }

    /// The message a type URL names: whatever follows the last `/`, as protobuf has it.
    pub fn find_by_url(url: &str) -> Option<Self> {
        Self::find(&url[url.rfind('/')? + 1..])
    }

    /// Every message, sorted by name.
    pub fn all() -> impl ExactSizeIterator<Item = Self> {
        (0..section::MESSAGE_COUNT as u16).map(Self)
    }

    /// The full name, e.g. `envoy.config.cluster.v3.Cluster`.
    pub fn full_name(self) -> &'static str {
        string(self.word(message::NAME))
    }

    /// The name without the package; a nested message keeps its parents: `Cluster.CommonLbConfig`.
    pub fn name(self) -> &'static str {
        let package = (self.word(message::KIND) & 0xffff) as usize;
        let full = self.full_name();
        if package == 0 { full } else { &full[package + 1..] }
    }

    /// Its package, e.g. `envoy.config.cluster.v3`.
    pub fn package(self) -> &'static str {
        &self.full_name()[..(self.word(message::KIND) & 0xffff) as usize]
    }

    /// `type.googleapis.com/` and the full name.
    pub fn type_url(self) -> String {
        format!("{TYPE_URL_PREFIX}{}", self.full_name())
    }

    /// How it is treated in JSON.
    #[inline]
    pub fn kind(self) -> Kind {
        match (self.word(message::KIND) >> 16) as u8 {
            kind::ANY => Kind::Any,
            kind::DURATION => Kind::Duration,
            kind::TIMESTAMP => Kind::Timestamp,
            kind::STRUCT => Kind::Struct,
            kind::VALUE => Kind::Value,
            kind::LIST_VALUE => Kind::ListValue,
            kind::FIELD_MASK => Kind::FieldMask,
            kind::WRAPPER => Kind::Wrapper,
            kind::TYPED_STRUCT => Kind::TypedStruct,
            _ => Kind::Plain,
        }
    }

    /// Whether it is the entry type that the compiler makes for a map.
    pub fn is_map_entry(self) -> bool {
        self.flags() & message::MAP_ENTRY != 0
    }

    /// The number of fields.
    #[inline]
    pub fn field_count(self) -> usize {
        (self.word(message::COUNTS) & 0xffff) as usize
    }

    /// The fields, by number.
    pub fn fields(self) -> impl ExactSizeIterator<Item = Field> {
        let first = self.word(message::FIELDS);
        (first..first + self.field_count() as u32).map(Field)
    }

    /// The field with a number.
    #[inline]
    pub fn field(self, number: u32) -> Option<Field> {
        let first = self.word(message::FIELDS) as usize;
        let count = self.field_count();
        // Most messages number their fields from 1 without gaps.
        let guess = (number as usize).wrapping_sub(1);
        if guess < count && Field((first + guess) as u32).number() == number {
            return Some(Field((first + guess) as u32));
        }
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = low + (high - low) / 2;
            let candidate = Field((first + middle) as u32);
            match candidate.number().cmp(&number) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Some(candidate),
            }
        }
        None
    }

    /// The field called `name`, in the proto file or in JSON.
    pub fn field_by_name(self, name: &str) -> Option<Field> {
        let first = self.word(message::NAMES) as usize;
        let count = (self.word(message::NAMES_LEN) & 0xffff) as usize;
        find_name(first, count, name.as_bytes()).map(|ordinal| self.field_at(ordinal))
    }

    /// The field at a position in the order of numbers.
    #[inline]
    pub(crate) fn field_at(self, ordinal: usize) -> Field {
        Field(self.word(message::FIELDS) + ordinal as u32)
    }

    /// The position of a field of this message in the order of numbers.
    #[inline]
    pub(crate) fn ordinal(self, field: Field) -> usize {
        (field.0 - self.word(message::FIELDS)) as usize
    }

    /// The string field `name`, by which elements of a list are told apart.
    pub(crate) fn name_field(self) -> Option<Field> {
        let ordinal = (self.word(message::NAMES_LEN) >> 16) as usize;
        (ordinal != 0xffff).then(|| self.field_at(ordinal))
    }

    /// The number of oneofs.
    #[inline]
    pub(crate) fn oneof_count(self) -> usize {
        (self.word(message::COUNTS) >> 16) as usize
    }

    /// The name of a oneof.
    pub(crate) fn oneof_name(self, ordinal: usize) -> &'static str {
        let index = self.word(message::ONEOFS) as usize + ordinal;
        string(word(section::ONEOFS, oneof::WORDS, index, oneof::NAME))
    }

    /// Whether one member of a oneof must be set.
    #[inline]
    pub(crate) fn oneof_required(self, ordinal: usize) -> bool {
        let index = self.word(message::ONEOFS) as usize + ordinal;
        word(section::ONEOFS, oneof::WORDS, index, oneof::FLAGS) & oneof::REQUIRED != 0
    }

    /// Whether the validation rules of its fields are switched off.
    pub(crate) fn rules_disabled(self) -> bool {
        self.flags() & message::NO_RULES != 0
    }

    /// The fields with rules about their absence, or about a list as a whole, with their positions.
    #[inline]
    pub(crate) fn checks(self) -> impl Iterator<Item = (usize, Field)> {
        let first = self.word(message::CHECKS) as usize;
        (first..first + self.word(message::CHECKS_LEN) as usize).map(move |index| {
            let ordinal = word(section::CHECKS, 1, index, 0) as usize;
            (ordinal, self.field_at(ordinal))
        })
    }

    /// Whether the ledger accepts it as a document or inside an `Any`.
    pub(crate) fn is_root(self) -> bool {
        self.flags() & message::ROOT != 0
    }

    /// Whether a field of it that is not known must not be passed over, whatever the policy.
    pub(crate) fn is_strict(self) -> bool {
        self.flags() & message::STRICT != 0
    }

    pub(crate) fn ledger_word(self) -> u32 {
        self.word(message::LEDGER)
    }

    #[inline]
    fn flags(self) -> u8 {
        (self.word(message::KIND) >> 24) as u8
    }

    #[inline]
    fn word(self, index: usize) -> u32 {
        word(section::MESSAGES, message::WORDS, usize::from(self.0), index)
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.full_name())
    }
}

impl Field {
    /// The field number.
    #[inline]
    pub fn number(self) -> u32 {
        self.word(field::NUMBER)
    }

    /// The name in the proto file.
    pub fn name(self) -> &'static str {
        string(self.word(field::NAME))
    }

    /// The name in JSON.
    pub fn json_name(self) -> &'static str {
        string(self.word(field::JSON))
    }

    /// The type of the value, or of one element.
    #[inline]
    pub fn ty(self) -> Type {
        match self.word(field::TYPE) as u8 {
            1 => Type::Double,
            2 => Type::Float,
            3 => Type::Int64,
            4 => Type::Uint64,
            5 => Type::Int32,
            6 => Type::Fixed64,
            7 => Type::Fixed32,
            8 => Type::Bool,
            9 => Type::String,
            11 => Type::Message,
            12 => Type::Bytes,
            13 => Type::Uint32,
            14 => Type::Enum,
            15 => Type::Sfixed32,
            16 => Type::Sfixed64,
            17 => Type::Sint32,
            18 => Type::Sint64,
            other => unreachable!("the build script admits no type {other}"),
        }
    }

    /// The message type of the value; for a map, the entry.
    #[inline]
    pub fn message(self) -> Option<Message> {
        (self.ty() == Type::Message).then(|| Message((self.word(field::TARGET) & 0xffff) as u16))
    }

    /// The enum type of the value.
    pub fn enumeration(self) -> Option<Enum> {
        (self.ty() == Type::Enum).then(|| Enum((self.word(field::TARGET) & 0xffff) as u16))
    }

    /// Whether it is a list or a map.
    #[inline]
    pub fn is_repeated(self) -> bool {
        self.flags() & field::REPEATED != 0
    }

    /// Whether it is a map.
    pub fn is_map(self) -> bool {
        self.flags() & field::MAP != 0
    }

    /// Whether its elements are written packed.
    pub fn is_packed(self) -> bool {
        self.flags() & field::PACKED != 0
    }

    /// Whether "not set" differs from the default value.
    #[inline]
    pub fn has_presence(self) -> bool {
        self.flags() & field::PRESENCE != 0
    }

    /// Whether it holds a secret, which is shown as `[redacted]`.
    pub fn is_sensitive(self) -> bool {
        self.flags() & field::SENSITIVE != 0
    }

    /// Whether it is deprecated.
    #[inline]
    pub fn is_deprecated(self) -> bool {
        self.flags() & field::IS_DEPRECATED != 0
    }

    /// Whether it is deprecated and refused unless runtime allows it.
    pub fn is_disallowed(self) -> bool {
        self.flags() & field::DISALLOWED != 0
    }

    /// The API version that deprecated it, e.g. `3.0`; empty when it is not said.
    pub fn deprecated_at(self) -> &'static str {
        string(self.word(field::DEPRECATED))
    }

    /// The position of its oneof in the message.
    #[inline]
    pub(crate) fn oneof(self) -> Option<usize> {
        let ordinal = (self.word(field::TARGET) >> 16) as usize;
        (ordinal != 0xffff).then_some(ordinal)
    }

    /// The offset of its rule program, 0 for none.
    #[inline]
    pub(crate) fn rules(self) -> u32 {
        self.word(field::RULES)
    }

    #[inline]
    pub(crate) fn ledger_word(self) -> u32 {
        self.word(field::LEDGER)
    }

    #[inline]
    fn flags(self) -> u16 {
        (self.word(field::TYPE) >> 8) as u16
    }

    #[inline]
    fn word(self, index: usize) -> u32 {
        word(section::FIELDS, field::WORDS, self.0 as usize, index)
    }
}

impl fmt::Debug for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Enum {
    /// The enum called `name`, e.g. `envoy.config.cluster.v3.Cluster.LbPolicy`.
    pub fn find(name: &str) -> Option<Self> {
        find_record(section::ENUMS, enumeration::WORDS, section::ENUM_COUNT, name.as_bytes())
            .map(|index| Self(index as u16))
    }

    /// The full name.
    pub fn full_name(self) -> &'static str {
        string(self.word(enumeration::NAME))
    }

    /// The values, by number.
    pub fn values(self) -> impl ExactSizeIterator<Item = EnumValue> {
        let first = self.word(enumeration::VALUES);
        (first..first + self.word(enumeration::COUNT)).map(EnumValue)
    }

    /// The value with a number; of several names for one number the first declared.
    pub fn value(self, number: i32) -> Option<EnumValue> {
        let first = self.word(enumeration::VALUES) as usize;
        let (mut low, mut high) = (0, self.word(enumeration::COUNT) as usize);
        while low < high {
            let middle = low + (high - low) / 2;
            if EnumValue((first + middle) as u32).number() < number {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let candidate = EnumValue((first + low) as u32);
        (low < self.word(enumeration::COUNT) as usize && candidate.number() == number).then_some(candidate)
    }

    /// The value called `name`.
    pub fn value_by_name(self, name: &str) -> Option<EnumValue> {
        let (names, count) = (self.word(enumeration::NAMES), self.word(enumeration::COUNT));
        find_name(names as usize, count as usize, name.as_bytes())
            .map(|ordinal| EnumValue(self.word(enumeration::VALUES) + ordinal as u32))
    }

    /// Whether it is `google.protobuf.NullValue`, whose only value is JSON's null.
    pub(crate) fn is_null_value(self) -> bool {
        self.full_name() == "google.protobuf.NullValue"
    }

    fn word(self, index: usize) -> u32 {
        word(section::ENUMS, enumeration::WORDS, usize::from(self.0), index)
    }
}

impl fmt::Debug for Enum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.full_name())
    }
}

impl EnumValue {
    /// The number.
    pub fn number(self) -> i32 {
        word(section::VALUES, value::WORDS, self.0 as usize, value::NUMBER) as i32
    }

    /// The name.
    pub fn name(self) -> &'static str {
        string(word(section::VALUES, value::WORDS, self.0 as usize, value::NAME))
    }

    /// Whether it is deprecated.
    pub fn is_deprecated(self) -> bool {
        self.flags() & value::IS_DEPRECATED != 0
    }

    /// Whether it is deprecated and refused unless runtime allows it.
    pub fn is_disallowed(self) -> bool {
        self.flags() & value::DISALLOWED != 0
    }

    fn flags(self) -> u32 {
        word(section::VALUES, value::WORDS, self.0 as usize, value::FLAGS)
    }
}

impl fmt::Debug for EnumValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

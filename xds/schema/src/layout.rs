//! The layout of the blob that the build script writes and [`crate::table`] reads.
//!
//! This file is compiled into both, so that there is one definition. All numbers are little-endian `u32` words;
//! a string is its offset in the pool, where it stands behind a `u16` length; offset 0 is the empty string.

/// Words of a message record.
pub(crate) mod message {
    /// Full name.
    pub(crate) const NAME: usize = 0;
    /// Package length (low 16), kind (next 8), flags (high 8).
    pub(crate) const KIND: usize = 1;
    /// First field record; the records are sorted by number.
    pub(crate) const FIELDS: usize = 2;
    /// Field count (low 16), oneof count (high 16).
    pub(crate) const COUNTS: usize = 3;
    /// First oneof record.
    pub(crate) const ONEOFS: usize = 4;
    /// First entry of the name index: pairs (string, ordinal) sorted by string, both spellings.
    pub(crate) const NAMES: usize = 5;
    /// Name index entries (low 16), ordinal of the string field `name` (high 16, `0xffff` for none).
    pub(crate) const NAMES_LEN: usize = 6;
    /// Ledger word of the message itself: see [`super::ledger`].
    pub(crate) const LEDGER: usize = 7;
    /// First entry of the list of fields with rules about their absence or their number.
    pub(crate) const CHECKS: usize = 8;
    /// Length of that list.
    pub(crate) const CHECKS_LEN: usize = 9;
    /// Words per record.
    pub(crate) const WORDS: usize = 10;

    /// Flag: a map entry.
    pub(crate) const MAP_ENTRY: u8 = 1;
    /// Flag: `(validate.disabled)` or `(validate.ignored)`.
    pub(crate) const NO_RULES: u8 = 2;
    /// Flag: the ledger accepts it as the root of a document or the content of an `Any`.
    pub(crate) const ROOT: u8 = 4;
    /// Flag: the ledger wants unknown fields refused whatever the policy.
    pub(crate) const STRICT: u8 = 8;
}

/// Words of a field record.
pub(crate) mod field {
    /// Field number.
    pub(crate) const NUMBER: usize = 0;
    /// Name in the proto file.
    pub(crate) const NAME: usize = 1;
    /// JSON name.
    pub(crate) const JSON: usize = 2;
    /// Type (low 8, the numbers of `FieldDescriptorProto.Type`), flags (next 16).
    pub(crate) const TYPE: usize = 3;
    /// Index of the message or enum type (low 16), ordinal of the oneof (high 16, `0xffff` for none).
    pub(crate) const TARGET: usize = 4;
    /// Offset of the rules in the rules section, 0 for none.
    pub(crate) const RULES: usize = 5;
    /// Ledger word: see [`super::ledger`].
    pub(crate) const LEDGER: usize = 6;
    /// The minor version in which it was deprecated, e.g. "3.0"; 0 when it is not.
    pub(crate) const DEPRECATED: usize = 7;
    /// Words per record.
    pub(crate) const WORDS: usize = 8;

    /// Flag: repeated (maps too).
    pub(crate) const REPEATED: u16 = 1;
    /// Flag: written packed.
    pub(crate) const PACKED: u16 = 2;
    /// Flag: a map.
    pub(crate) const MAP: u16 = 4;
    /// Flag: presence is tracked (messages, oneof members, `optional`).
    pub(crate) const PRESENCE: u16 = 8;
    /// Flag: `(udpa.annotations.sensitive)`.
    pub(crate) const SENSITIVE: u16 = 16;
    /// Flag: deprecated.
    pub(crate) const IS_DEPRECATED: u16 = 32;
    /// Flag: `(envoy.annotations.disallowed_by_default)`.
    pub(crate) const DISALLOWED: u16 = 64;
}

/// Words of a oneof record.
pub(crate) mod oneof {
    /// Name in the proto file.
    pub(crate) const NAME: usize = 0;
    /// Flags.
    pub(crate) const FLAGS: usize = 1;
    /// Words per record.
    pub(crate) const WORDS: usize = 2;

    /// Flag: `(validate.required)`.
    pub(crate) const REQUIRED: u32 = 1;
}

/// Words of an enum record.
pub(crate) mod enumeration {
    /// Full name.
    pub(crate) const NAME: usize = 0;
    /// First value record; sorted by number, the first declared name of a number first.
    pub(crate) const VALUES: usize = 1;
    /// Number of values.
    pub(crate) const COUNT: usize = 2;
    /// First entry of the name index: pairs (string, ordinal) sorted by string.
    pub(crate) const NAMES: usize = 3;
    /// Words per record.
    pub(crate) const WORDS: usize = 4;
}

/// Words of an enum value record.
pub(crate) mod value {
    /// Number, as `i32`.
    pub(crate) const NUMBER: usize = 0;
    /// Name.
    pub(crate) const NAME: usize = 1;
    /// Flags.
    pub(crate) const FLAGS: usize = 2;
    /// Words per record.
    pub(crate) const WORDS: usize = 3;

    /// Flag: deprecated.
    pub(crate) const IS_DEPRECATED: u32 = 1;
    /// Flag: `(envoy.annotations.disallowed_by_default_enum)`.
    pub(crate) const DISALLOWED: u32 = 2;
}

/// A ledger word: the state in the low two bits, the reason's string offset above.
pub(crate) mod ledger {
    /// Nobody claims the field: what the reader takes any other value for.
    #[allow(dead_code, reason = "only the build script writes it")]
    pub(crate) const UNCLAIMED: u32 = 0;
    /// Implemented.
    pub(crate) const IMPLEMENTED: u32 = 1;
    /// Refused when set.
    pub(crate) const REJECTED: u32 = 2;
    /// Accepted and without effect.
    pub(crate) const IGNORED: u32 = 3;
}

/// Message kinds: the well-known types have their own JSON form.
pub(crate) mod kind {
    #[allow(dead_code, reason = "only the build script writes it")]
    pub(crate) const PLAIN: u8 = 0;
    pub(crate) const ANY: u8 = 1;
    pub(crate) const DURATION: u8 = 2;
    pub(crate) const TIMESTAMP: u8 = 3;
    pub(crate) const STRUCT: u8 = 4;
    pub(crate) const VALUE: u8 = 5;
    pub(crate) const LIST_VALUE: u8 = 6;
    pub(crate) const FIELD_MASK: u8 = 7;
    pub(crate) const WRAPPER: u8 = 8;
    pub(crate) const TYPED_STRUCT: u8 = 9;
}

/// Operations of a rule program: a byte each, followed by its operands; `END` closes it.
///
/// Numbers are 8 bytes (`i64`, `u64` or `f64` bits by the field's type), durations 12 (`i64` seconds, `i32`
/// nanoseconds), strings and sub-programs a `u32` offset, lists a `u32` count and the operands.
pub(crate) mod rule {
    pub(crate) const END: u8 = 0;
    /// A message, duration, timestamp or `Any` must be set.
    pub(crate) const REQUIRED: u8 = 1;
    /// Do not look into the message.
    pub(crate) const SKIP: u8 = 2;
    /// An empty value is not checked.
    pub(crate) const IGNORE_EMPTY: u8 = 3;

    pub(crate) const NUM_CONST: u8 = 10;
    pub(crate) const NUM_IN: u8 = 11;
    pub(crate) const NUM_NOT_IN: u8 = 12;
    /// A range: flags byte, lower bound, upper bound.
    pub(crate) const NUM_RANGE: u8 = 13;
    pub(crate) const DURATION_CONST: u8 = 14;
    pub(crate) const DURATION_IN: u8 = 15;
    pub(crate) const DURATION_NOT_IN: u8 = 16;
    pub(crate) const DURATION_RANGE: u8 = 17;

    pub(crate) const STR_CONST: u8 = 20;
    /// Characters: minimum (u64), maximum (u64).
    pub(crate) const STR_CHARS: u8 = 21;
    /// Bytes: minimum (u64), maximum (u64).
    pub(crate) const STR_BYTES: u8 = 22;
    /// Regular expression: `u32` index of the compiled pattern, text, text as Envoy prints it.
    pub(crate) const STR_PATTERN: u8 = 23;
    pub(crate) const STR_PREFIX: u8 = 24;
    pub(crate) const STR_SUFFIX: u8 = 25;
    pub(crate) const STR_CONTAINS: u8 = 26;
    pub(crate) const STR_NOT_CONTAINS: u8 = 27;
    pub(crate) const STR_IN: u8 = 28;
    pub(crate) const STR_NOT_IN: u8 = 29;
    /// A well-known form: one byte, see [`super::form`].
    pub(crate) const STR_FORM: u8 = 30;

    pub(crate) const ENUM_DEFINED: u8 = 40;

    /// Minimum (u64), maximum (u64).
    pub(crate) const ITEMS_COUNT: u8 = 50;
    pub(crate) const ITEMS_UNIQUE: u8 = 51;
    /// Program for each item.
    pub(crate) const ITEMS: u8 = 52;
    /// Minimum (u64), maximum (u64).
    pub(crate) const PAIRS_COUNT: u8 = 53;
    pub(crate) const MAP_KEYS: u8 = 54;
    pub(crate) const MAP_VALUES: u8 = 55;

    pub(crate) const ANY_IN: u8 = 60;
    pub(crate) const ANY_NOT_IN: u8 = 61;

    /// Range flag: a lower bound is present.
    pub(crate) const LOWER: u8 = 1;
    /// Range flag: the lower bound itself is allowed.
    pub(crate) const LOWER_INCLUSIVE: u8 = 2;
    /// Range flag: an upper bound is present.
    pub(crate) const UPPER: u8 = 4;
    /// Range flag: the upper bound itself is allowed.
    pub(crate) const UPPER_INCLUSIVE: u8 = 8;
}

/// Well-known forms of strings.
pub(crate) mod form {
    pub(crate) const EMAIL: u8 = 1;
    pub(crate) const HOSTNAME: u8 = 2;
    pub(crate) const IP: u8 = 3;
    pub(crate) const IPV4: u8 = 4;
    pub(crate) const IPV6: u8 = 5;
    pub(crate) const URI: u8 = 6;
    pub(crate) const URI_REF: u8 = 7;
    pub(crate) const ADDRESS: u8 = 8;
    pub(crate) const UUID: u8 = 9;
    pub(crate) const HEADER_NAME: u8 = 10;
    pub(crate) const HEADER_VALUE: u8 = 11;
    /// Header name or value with `strict: false`.
    pub(crate) const HEADER_LOOSE: u8 = 12;
}

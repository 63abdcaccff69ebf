//! Command operators, header mutation and access logs.
//!
//! * [`Formatter`]: a text with `%COMMAND_OPERATORS%`, compiled once and written without look-ups;
//! * [`SubstitutionFormat`]: the same as text or JSON, with a content type;
//! * [`HeaderMutations`], [`HeaderMutationList`]: headers to add, overwrite and remove, with formatter values;
//! * [`QueryMutationList`]: the same for query parameters;
//! * [`AccessLog`]: what is logged, when, and where it goes ([`AccessLogSinks`]).

#![forbid(unsafe_code)]

mod access_log;
mod formatter;
mod header_mutation;
mod query_mutation;

pub use access_log::{AccessLog, AccessLogFilter, AccessLogSinks, AccessLogType, EventLog};
pub use formatter::{FormatContext, Formatter, SubstitutionFormat};
pub use header_mutation::{HeaderMutationList, HeaderMutations};
pub use query_mutation::QueryMutationList;

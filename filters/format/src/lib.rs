//! Command operators, header mutation and access logs.
//!
//! * [`Formatter`]: a text with `%COMMAND_OPERATORS%`, compiled once and written without look-ups;
//! * [`SubstitutionFormat`]: the same as text or JSON, with a content type;
//! * [`HeaderMutations`], [`HeaderMutationList`]: headers to add, overwrite and remove, with formatter values;
//! * [`QueryMutationList`]: the same for query parameters;
//! * [`MutationRules`]: which headers somebody else may change;
//! * [`GrpcService`]: a gRPC service that filters call;
//! * [`AccessLog`]: what is logged, when, and where it goes ([`AccessLogSinks`]).

#![forbid(unsafe_code)]

mod access_log;
mod formatter;
mod grpc_service;
mod header_mutation;
mod mutation_rules;
mod query_mutation;

pub use access_log::{
    AccessLog, AccessLogFilter, AccessLogSinks, AccessLogType, EntryKind, EventLog, GrpcLogDriver, GrpcQueue,
    Next,
};
pub use formatter::{FormatContext, Formatter, SubstitutionFormat};
pub use grpc_service::GrpcService;
pub use header_mutation::{HeaderMutationList, HeaderMutations};
pub use mutation_rules::{Allowed, MutationRules, Operation};
pub use query_mutation::QueryMutationList;

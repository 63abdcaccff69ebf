//! HTTP heads and the sans-io HTTP/1 codec.
//!
//! * [`Headers`]: the one header map of the proxy, for requests, responses and trailers, filled and read by the
//!   codecs, the filters, the router and the access log alike.
//! * [`h1`]: the HTTP/1 codec, bytes in and events out, for both roles.
//! * [`h2`]: to and from the types of the `http` crate, for HTTP/2.
//! * [`normalize_path`]: the connection manager's options on `:path`.
//! * [`sanitize_request`] and its kin: hop-by-hop headers.

#![forbid(unsafe_code)]

mod date;
mod grpc;
pub mod h1;
pub mod h2;
mod headers;
mod inline;
mod known;
mod name;
mod path;
mod reason;
mod sanitize;

pub use date::DateCache;
pub use grpc::{decode_grpc_message, encode_grpc_message};
pub use headers::{GetAll, Headers, Iter, KnownSet, is_valid_value};
pub use known::Known;
pub use name::{HeaderName, InvalidName, Name};
pub use path::{EscapedSlashes, PathOptions, PathOutcome, normalize_path};
pub use reason::reason_phrase;
pub use sanitize::{remove_nominated, sanitize_request, sanitize_response};

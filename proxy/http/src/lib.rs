//! HTTP heads and the sans-io HTTP/1 codec.
//!
//! * [`Headers`]: the one header map of the proxy, for requests, responses and trailers, filled and read by the
//!   codecs, the filters, the router and the access log alike.
//! * [`h1`]: the HTTP/1 codec, bytes in and events out, for both roles.
//! * [`sanitize_request`] and its kin: hop-by-hop headers.

#![forbid(unsafe_code)]

pub mod h1;
mod headers;
mod known;
mod name;
mod reason;
mod sanitize;

pub use headers::{GetAll, Headers, Iter, is_valid_value};
pub use known::Known;
pub use name::{HeaderName, InvalidName, Name};
pub use reason::reason_phrase;
pub use sanitize::{remove_nominated, sanitize_request, sanitize_response};

//! HTTP heads and the sans-io HTTP/1 codec.
//!
//! * [`Headers`]: the one header map of the proxy, for requests, responses and trailers, filled and read by the
//!   codecs, the filters, the router and the access log alike.

#![forbid(unsafe_code)]

mod headers;
mod known;
mod name;

pub use headers::{GetAll, Headers, Iter, is_valid_value};
pub use known::Known;
pub use name::{HeaderName, InvalidName, Name};

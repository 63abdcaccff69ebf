//! The gRPC status of a stream.

use waystation_http::{Headers, Known};

use super::FormatContext;
use super::operator::Written;

/// How `%GRPC_STATUS%` is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum GrpcForm {
    Camel,
    Snake,
    Number,
}

/// `grpc-status` that is no number.
const INVALID: i64 = -1;

impl GrpcForm {
    pub(super) fn write(self, status: i64, out: &mut Vec<u8>) -> Option<Written> {
        let names = usize::try_from(status).ok().and_then(|status| NAMES.get(status));
        match (self, names) {
            (Self::Camel, Some((camel, _))) => out.extend_from_slice(camel.as_bytes()),
            (Self::Snake, Some((_, snake))) => out.extend_from_slice(snake.as_bytes()),
            (form, _) => {
                out.extend_from_slice(itoa::Buffer::new().format(status).as_bytes());
                return Some(if matches!(form, Self::Number) { Written::Json } else { Written::Text });
            }
        }
        Some(Written::Text)
    }
}

/// The status of a gRPC request for `%GRPC_STATUS%`; `None` for any other request.
pub(super) fn grpc_status_of_request(cx: &FormatContext<'_>) -> Option<i64> {
    let content_type = cx.request?.get(Known::ContentType)?;
    let rest = content_type.strip_prefix(b"application/grpc")?;
    if rest.is_empty() || rest[0] == b'+' { grpc_status(cx) } else { None }
}

/// The status in the trailers, else in the head, else what the HTTP status stands for. -1 is an unreadable one.
pub(crate) fn grpc_status(cx: &FormatContext<'_>) -> Option<i64> {
    let of = |headers: Option<&Headers>| {
        let value = headers?.get(Known::GrpcStatus)?;
        Some(
            str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse().ok())
                .map_or(INVALID, |status: u32| i64::from(status)),
        )
    };
    of(cx.trailers).or_else(|| of(cx.response)).or_else(|| from_http(cx.info.response_code))
}

/// gRPC's mapping of HTTP statuses, for a response without a gRPC status.
fn from_http(status: u16) -> Option<i64> {
    Some(match status {
        0 => return None,
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    })
}

/// Names by status.
const NAMES: [(&str, &str); 17] = [
    ("OK", "OK"),
    ("Canceled", "CANCELLED"),
    ("Unknown", "UNKNOWN"),
    ("InvalidArgument", "INVALID_ARGUMENT"),
    ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
    ("NotFound", "NOT_FOUND"),
    ("AlreadyExists", "ALREADY_EXISTS"),
    ("PermissionDenied", "PERMISSION_DENIED"),
    ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
    ("FailedPrecondition", "FAILED_PRECONDITION"),
    ("Aborted", "ABORTED"),
    ("OutOfRange", "OUT_OF_RANGE"),
    ("Unimplemented", "UNIMPLEMENTED"),
    ("Internal", "INTERNAL"),
    ("Unavailable", "UNAVAILABLE"),
    ("DataLoss", "DATA_LOSS"),
    ("Unauthenticated", "UNAUTHENTICATED"),
];

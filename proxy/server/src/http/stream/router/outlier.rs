//! What the router tells outlier detection.

use waystation_http::{Headers, Known};
use waystation_upstream::cluster::ClusterRef;
use waystation_upstream::host::Host;
use waystation_upstream::outlier::LocalOrigin;

/// Upstream has answered. A gRPC status in the head goes before that of HTTP, which is 200; one in the trailers comes too
/// late, as in Envoy.
#[inline]
pub(in crate::http) fn answered(cluster: &ClusterRef, host: &Host, head: &Headers, is_grpc: bool) {
    let Some(detector) = &cluster.outlier_detection else { return };
    let status = match head.get(Known::GrpcStatus) {
        Some(grpc) if is_grpc => http_status(grpc),
        _ => head.status().unwrap_or(0),
    };
    detector.answered(host, status);
    // An error says more than that.
    if status < 500 && detector.detects_degraded() && head.contains(Known::XEnvoyDegraded) {
        detector.degraded(host);
    }
}

/// Nothing came in time: what is charged is what the client is answered with.
pub(in crate::http) fn timed_out(alternative: bool) -> LocalOrigin {
    LocalOrigin::TimedOut(if alternative { 204 } else { 504 })
}

/// The HTTP status that a gRPC status stands for (`google.rpc.Code`).
fn http_status(grpc: &[u8]) -> u16 {
    match std::str::from_utf8(grpc).ok().and_then(|text| text.trim().parse::<u32>().ok()) {
        Some(0) => 200,
        Some(1) => 499,
        Some(3 | 9 | 11) => 400,
        Some(4) => 504,
        Some(5) => 404,
        Some(6 | 10) => 409,
        Some(7) => 403,
        Some(8) => 429,
        Some(12) => 501,
        Some(14) => 503,
        Some(16) => 401,
        // Unknown, internal, data loss, and what is no status.
        _ => 500,
    }
}

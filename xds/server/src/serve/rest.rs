//! REST: a `DiscoveryRequest` in JSON is answered by a `DiscoveryResponse` in JSON, without a stream.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use prost::Message as _;
use tonic::body::Body;
use waystation_schema::{JsonStyle, Message, TextOptions, json_to_wire, wire_to_json};
use waystation_xds::{ResourceType, wire};

use super::MAX_REQUEST;
use crate::Snapshot;
use crate::server::Shared;
use crate::snapshot::version_of;

const REQUEST: &str = "envoy.service.discovery.v3.DiscoveryRequest";
const RESPONSE: &str = "envoy.service.discovery.v3.DiscoveryResponse";

/// Answers everything that is not a gRPC method.
pub(super) async fn respond(shared: &Shared, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path();
    let Some(kind) = ResourceType::known().into_iter().find(|kind| kind.rest_path() == Some(path)) else {
        let hint = "this is an xDS server: gRPC, or POST /v3/discovery:clusters and its like\n";
        return text(StatusCode::NOT_FOUND, hint.to_owned());
    };
    if request.method() != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, "POST a DiscoveryRequest in JSON\n".to_owned());
    }
    let body = match Limited::new(request.into_body(), MAX_REQUEST).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    match read(&body) {
        Err(reason) => text(StatusCode::BAD_REQUEST, format!("{reason}\n")),
        Ok(request) => match write(&kind, &request.resource_names, &shared.snapshot()) {
            Err(reason) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{reason}\n")),
            Ok(json) => reply(StatusCode::OK, "application/json", json),
        },
    }
}

fn read(body: &[u8]) -> Result<wire::DiscoveryRequest, String> {
    let message = Message::find(REQUEST).ok_or("no schema")?;
    let text = std::str::from_utf8(body).map_err(|error| error.to_string())?;
    // A newer client's request is still a request.
    let encoded = json_to_wire(message, text, TextOptions { allow_unknown: true });
    let wire = encoded.map_err(|error| error.to_string())?.wire;
    wire::DiscoveryRequest::decode(Bytes::from(wire)).map_err(|error| error.to_string())
}

/// No names mean all there is, of every type: whoever asks by hand wants to see it.
fn write(kind: &ResourceType, names: &[String], snapshot: &Snapshot) -> Result<String, String> {
    let resources = snapshot.of(kind);
    let everything = names.is_empty() || names.iter().any(|name| name == "*");
    let wanted = resources
        .values()
        .filter(|resource| everything || names.iter().any(|name| **name == **resource.name()));
    let wanted: Vec<_> = wanted.collect();
    let response = wire::DiscoveryResponse {
        version_info: version_of(wanted.iter().map(|resource| (resource.name(), resource.version()))),
        resources: wanted.iter().map(|resource| resource.to_any()).collect(),
        type_url: kind.url().to_owned(),
        ..wire::DiscoveryResponse::default()
    };
    let message = Message::find(RESPONSE).ok_or("no schema")?;
    let mut json = String::new();
    wire_to_json(message, &response.encode_to_vec(), &mut json, JsonStyle::default())
        .map_err(|error| format!("{error:?}"))?;
    Ok(json)
}

fn text(status: StatusCode, text: String) -> Response<Body> {
    reply(status, "text/plain", text)
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(Body::new(Full::new(Bytes::from(body))));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

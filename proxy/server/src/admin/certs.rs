//! `/certs`.

use envoy_types::pb::envoy::admin::v3 as pb;
use hyper::Response;
use prost::Message as _;
use waystation_schema::JsonStyle;

use super::{Admin, Body, json, shutting_down};

pub(super) async fn certs(admin: &Admin) -> Response<Body> {
    let Some(certificates) = admin.main.ask(|server| server.configuration().certificates()).await else {
        return shutting_down();
    };
    let wire = pb::Certificates { certificates }.encode_to_vec();
    let style = JsonStyle { proto_names: true, pretty: true, with_defaults: true, redact: false };
    json("envoy.admin.v3.Certificates", &wire, style)
}

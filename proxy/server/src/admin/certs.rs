//! `/certs`.

use envoy_types::pb::envoy::admin::v3 as pb;
use hyper::Response;
use prost::Message as _;
use waystation_schema::JsonStyle;

use super::{Admin, Body, json, render, shutting_down};

pub(super) async fn certs(admin: &Admin) -> Response<Body> {
    let Some(certificates) = admin.main.ask(|server| server.configuration().certificates()).await else {
        return shutting_down();
    };
    let style = JsonStyle { proto_names: true, pretty: true, with_defaults: true, redact: false };
    render(move || {
        json("envoy.admin.v3.Certificates", &pb::Certificates { certificates }.encode_to_vec(), style)
    })
    .await
}

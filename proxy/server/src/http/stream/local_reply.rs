//! Replies that are made here.

use std::borrow::Cow;
use std::time::Instant;

use bytes::Bytes;
use waystation_filter_api::http::LocalReply;
use waystation_format::{AccessLogType, FormatContext};
use waystation_http::{Known, encode_grpc_message};
use waystation_route::Route;

use super::Stream;
use crate::http::downstream::Downstream;
use crate::http::end::{StreamEnd, grpc_status};

impl<D: Downstream> Stream<'_, D> {
    /// Answers the request. The encode filters see the reply; `local_reply_config` has rewritten it before.
    pub(super) async fn reply(&mut self, mut reply: LocalReply) -> Result<(), StreamEnd> {
        if let Some(flag) = reply.flag {
            self.info.flags.set(flag);
        }
        self.chain_on_local_reply(&mut reply);
        // Envoy prints details without white space.
        let details = match reply.details.contains(' ') {
            true => Cow::Owned(reply.details.replace(' ', "_")),
            false => reply.details.clone(),
        };
        self.info.details = Some(details);
        let mut body: Cow<'_, [u8]> = match &reply.body {
            Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
            Cow::Owned(text) => Cow::Owned(text.clone().into_bytes()),
        };
        let mut content_type = "text/plain".to_owned();
        self.heads.response.clear();
        self.heads.response.set_status(reply.status);
        self.info.response_code = reply.status;
        self.map_reply(&mut reply, &mut body, &mut content_type);
        let head = &mut self.heads.response;
        head.set_status(reply.status);
        if self.is_grpc {
            let status = reply.grpc_status.unwrap_or_else(|| grpc_status(reply.status));
            head.set_status(200);
            head.append(Known::ContentType, "application/grpc");
            head.append(Known::GrpcStatus, status.to_string());
            if !body.is_empty() {
                head.append(Known::GrpcMessage, encode_grpc_message(&body));
            }
            body = Cow::Borrowed(&[]);
        } else if !body.is_empty() {
            head.set_number(Known::ContentLength, body.len() as u64);
            head.append(Known::ContentType, content_type.as_bytes());
        }
        for (name, value) in &reply.headers {
            head.append(name, value);
        }
        let body = Bytes::from(body.into_owned());
        self.send_made(body).await
    }

    /// A direct response or redirect of the route.
    pub(super) async fn direct(
        &mut self,
        route: &Route,
        status: u16,
        body: Bytes,
        location: Option<Vec<u8>>,
    ) -> Result<(), StreamEnd> {
        self.info.details = Some("direct_response".into());
        let head = &mut self.heads.response;
        head.clear();
        head.set_status(status);
        if !body.is_empty() {
            head.set_number(Known::ContentLength, body.len() as u64);
            head.append(Known::ContentType, "text/plain");
        }
        if let Some(location) = location {
            head.append(Known::Location, location);
        }
        self.mutate_response(route, None);
        self.send_made(body).await
    }

    /// Sends the head in `heads.response` and a body that is known in full.
    async fn send_made(&mut self, body: Bytes) -> Result<(), StreamEnd> {
        let end = body.is_empty() || self.is_head;
        self.encode_head(end).await?;
        let end = self.send_response_head(end);
        if !end {
            self.down.send_data(body);
            self.down.send_end(None);
        }
        self.flush().await
    }

    /// `local_reply_config`: the first mapper whose filter matches, then the body format.
    fn map_reply(&mut self, reply: &mut LocalReply, body: &mut Cow<'_, [u8]>, content_type: &mut String) {
        let Some(config) = self.cx.hcm.local_reply.as_deref() else { return };
        let now = Instant::now();
        let mut format = config.format.as_ref();
        let random = self.cx.worker.random();
        for mapper in &config.mappers {
            let cx = FormatContext {
                request: Some(&self.heads.request),
                response: Some(&self.heads.response),
                trailers: None,
                info: &self.info,
                local_reply_body: "",
                log_type: AccessLogType::NotSet,
                now,
            };
            if !mapper.filter.is_match(&cx, random) {
                continue;
            }
            if let Some(status) = mapper.status {
                reply.status = status;
                self.heads.response.set_status(status);
                self.info.response_code = status;
            }
            if let Some(replacement) = &mapper.body {
                *body = Cow::Owned(replacement.to_vec());
            }
            if !mapper.headers.is_empty() {
                let cx = super::request::format_context(&self.info, Some(&self.heads.request), None);
                mapper.headers.apply(&mut reply.headers, &cx);
            }
            format = mapper.format.as_ref().or(format);
            break;
        }
        if let Some(format) = format {
            let text = String::from_utf8_lossy(body).into_owned();
            let cx = FormatContext {
                request: Some(&self.heads.request),
                response: Some(&self.heads.response),
                trailers: None,
                info: &self.info,
                local_reply_body: &text,
                log_type: AccessLogType::NotSet,
                now,
            };
            let mut formatted = Vec::new();
            format.write(&cx, &mut formatted);
            *body = Cow::Owned(formatted);
            *content_type = format.content_type().to_owned();
        }
    }
}

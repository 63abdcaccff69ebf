//! Replies that are made here.

use std::borrow::Cow;
use std::task::Poll;

use bytes::Bytes;
use waystation_filter_api::http::LocalReply;
use waystation_http::{Known, encode_grpc_message};
use waystation_route::Route;

use super::Stream;
use super::chain::Stopped;
use super::request::format_context;
use crate::http::downstream::Downstream;
use crate::http::end::{StreamEnd, grpc_status};
use crate::http::timer::after;

impl<D: Downstream> Stream<'_, D> {
    /// Answers the request. The encode filters see the reply; `local_reply_config` has rewritten it before.
    pub(super) async fn reply(&mut self, mut reply: LocalReply) -> Result<(), StreamEnd> {
        if let Some(flag) = reply.flag {
            self.info.flags.set(flag);
        }
        self.note_cluster();
        self.chain_on_local_reply(&mut reply);
        // Envoy prints details without white space.
        let details = match reply.details.contains(' ') {
            true => Cow::Owned(reply.details.replace(' ', "_")),
            false => reply.details,
        };
        self.info.details = Some(details);
        self.begin_reply(reply.status);
        let head = &mut self.heads.response;
        for (name, value) in &reply.headers {
            head.append(name, value);
        }
        if let Some(attempts) = self.attempt_count.take() {
            head.set_number(Known::XEnvoyAttemptCount, u64::from(attempts));
        }
        let body = match reply.body {
            Cow::Borrowed(text) => Bytes::from_static(text.as_bytes()),
            Cow::Owned(text) => text.into(),
        };
        self.finish_reply(reply.status, body, reply.grpc_status).await
    }

    /// A direct response or redirect of the route: a local reply to which the route's header mutations apply.
    pub(super) async fn direct(
        &mut self,
        route: &Route,
        status: u16,
        body: Bytes,
        content_type: Option<&str>,
        location: Option<Vec<u8>>,
    ) -> Result<(), StreamEnd> {
        self.info.details = Some("direct_response".into());
        self.heads.response.clear();
        self.heads.response.set_status(status);
        if let Some(location) = location {
            self.heads.response.append(Known::Location, location);
        }
        self.mutate_response(route, None);
        if let Some(content_type) = content_type {
            self.heads.response.set(Known::ContentType, content_type);
        }
        // Formatters in the route's headers see no code yet, mappers do.
        self.info.response_code = status;
        self.finish_reply(status, body, None).await
    }

    fn begin_reply(&mut self, status: u16) {
        self.heads.response.clear();
        self.heads.response.set_status(status);
        self.info.response_code = status;
    }

    /// Envoy's `prepareLocalReply`: mappers and formats, then gRPC or the body's headers.
    async fn finish_reply(
        &mut self,
        mut status: u16,
        body: Bytes,
        grpc: Option<u32>,
    ) -> Result<(), StreamEnd> {
        let own_type = self.heads.response.get(Known::ContentType).map(<[u8]>::to_vec);
        let rewritten = self.map_reply(&mut status, &body);
        let mapped_type = self.heads.response.get(Known::ContentType) != own_type.as_deref();
        let head = &mut self.heads.response;
        let (mut body, content_type) = match &rewritten {
            Some((body, content_type)) => (body.clone(), &**content_type),
            None => (body, "text/plain"),
        };
        if self.is_grpc {
            head.set_status(200);
            head.set(Known::ContentType, "application/grpc");
            if !head.contains(Known::GrpcStatus) {
                let status = grpc.unwrap_or_else(|| grpc_status(status));
                head.set_number(Known::GrpcStatus, u64::from(status));
            }
            if !body.is_empty() && !self.is_head {
                head.set(Known::GrpcMessage, encode_grpc_message(&body));
            }
            head.remove(Known::ContentLength);
            body = Bytes::new();
        } else if body.is_empty() {
            head.remove(Known::ContentLength);
            head.remove(Known::ContentType);
        } else {
            head.set_number(Known::ContentLength, body.len() as u64);
            if !head.contains(Known::ContentType) || rewritten.is_some() && !mapped_type {
                head.set(Known::ContentType, content_type);
            }
        }
        self.send_made(body).await
    }

    /// Sends the head in `heads.response` and a body that is known in full.
    async fn send_made(&mut self, body: Bytes) -> Result<(), StreamEnd> {
        match self.encode_made(body).await {
            Ok(()) => {}
            Err(Stopped::End(end)) => return Err(end),
            // An encode filter answers in place of the answer: that goes past the filters, or there would be no end.
            Err(Stopped::Reply(reply)) => {
                if self.response_started {
                    return Err(StreamEnd::LateReply(reply.details));
                }
                self.chain.skip_encode();
                return Box::pin(self.reply(*reply)).await;
            }
        }
        self.flush().await
    }

    async fn encode_made(&mut self, body: Bytes) -> Result<(), Stopped> {
        let end = body.is_empty() || self.is_head;
        self.response_has_trailers = false;
        self.begin_encode(end)?;
        if !end {
            self.encode_data(body, true)?;
        }
        std::future::poll_fn(|task| {
            loop {
                self.send_encoded();
                if self.response_ended {
                    return Poll::Ready(Ok(()));
                }
                match self.poll_encode(task) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(stopped) => return Poll::Ready(Err(stopped)),
                }
            }
            if self.request_complete
                && let Poll::Ready(end) = self.down.poll_gone(task)
            {
                return Poll::Ready(Err(Stopped::End(end)));
            }
            // What has ended the stream may be a deadline that has passed: only the silence counts here.
            let idle = after(self.last_activity, self.idle_timeout());
            let end = StreamEnd::StreamIdleTimeout { request_complete: self.request_complete };
            self.timer.poll(task, idle).map(|()| Err(Stopped::End(end)))
        })
        .await
    }

    /// `local_reply_config`: the first mapper whose filter matches, then the body format. The new body and its content
    /// type, if there is one.
    fn map_reply(&mut self, status: &mut u16, body: &Bytes) -> Option<(Bytes, Cow<'static, str>)> {
        let config = self.cx.hcm.local_reply.as_deref()?;
        let mut format = config.format.as_ref();
        let mut rewritten = None;
        let random = self.cx.worker.random();
        for mapper in &config.mappers {
            let cx = format_context(&self.info, Some(&self.heads.request), Some(&self.heads.response));
            if !mapper.filter.is_match(&cx, random) {
                continue;
            }
            if let Some(mapped) = mapper.status {
                *status = mapped;
                self.heads.response.set_status(mapped);
                self.info.response_code = mapped;
            }
            if let Some(replacement) = &mapper.body {
                rewritten = Some((Bytes::copy_from_slice(replacement), Cow::Borrowed("text/plain")));
            }
            if !mapper.headers.is_empty() {
                let cx = format_context(&self.info, Some(&self.heads.request), None);
                mapper.headers.apply_to_response(&mut self.heads.response, &cx);
            }
            format = mapper.format.as_ref().or(format);
            break;
        }
        if let Some(format) = format {
            let text =
                String::from_utf8_lossy(rewritten.as_ref().map_or(body, |(body, _)| body)).into_owned();
            let mut cx = format_context(&self.info, Some(&self.heads.request), Some(&self.heads.response));
            cx.local_reply_body = &text;
            let mut formatted = Vec::new();
            format.write(&cx, &mut formatted);
            rewritten = Some((formatted.into(), Cow::Owned(format.content_type().to_owned())));
        }
        rewritten
    }
}

//! What an authorization service says.

use bytes::Bytes;
use core::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::service::auth::v3 as pb;
use pb::check_response::HttpResponse;
use prost::Message as _;
use waystation_filter_api::grpc::Status;
use waystation_filter_api::value::{Struct, struct_from_proto};

/// A name and a value, unchecked.
pub(super) type Field = (Box<[u8]>, Box<[u8]>);

/// An answer, or what stands for one.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) verdict: Verdict,
    /// Changes of the request; headers of the reply where it is not allowed.
    pub(super) request: RequestHeaders,
    pub(super) response: ResponseHeaders,
    pub(super) query: Query,
    pub(super) body: Bytes,
    pub(super) metadata: Struct,
    /// It asked for something to be done to a header that nobody knows.
    pub(super) unknown_action: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    Allowed,
    /// With this status.
    Denied(u16),
    /// There is no answer; with this status, if it says one.
    Failed(Option<u16>),
}

impl Default for Verdict {
    /// Nobody is allowed by default.
    fn default() -> Self {
        Self::Failed(None)
    }
}

#[derive(Debug, Default)]
pub(super) struct RequestHeaders {
    pub(super) set: Vec<Field>,
    pub(super) add: Vec<Field>,
    pub(super) append: Vec<Field>,
    pub(super) remove: Vec<Box<[u8]>>,
}

#[derive(Debug, Default)]
pub(super) struct ResponseHeaders {
    pub(super) add: Vec<Field>,
    pub(super) set: Vec<Field>,
    pub(super) add_if_absent: Vec<Field>,
    pub(super) overwrite_if_exists: Vec<Field>,
}

#[derive(Debug, Default)]
pub(super) struct Query {
    pub(super) set: Vec<Field>,
    pub(super) remove: Vec<Box<[u8]>>,
}

impl Answer {
    /// There is none.
    pub(super) fn failed(status: Option<u16>) -> Self {
        Self { verdict: Verdict::Failed(status), ..Self::default() }
    }

    /// The outcome of a gRPC call.
    pub(super) fn of_grpc(answered: Result<Bytes, Status>) -> Self {
        let decoded = answered.ok().and_then(|wire| pb::CheckResponse::decode(wire).ok());
        decoded.map_or_else(|| Self::failed(None), Self::of_response)
    }

    #[expect(deprecated, reason = "services still send OkHttpResponse.dynamic_metadata")]
    fn of_response(response: pb::CheckResponse) -> Self {
        let pb::CheckResponse { status, http_response, dynamic_metadata } = response;
        let allowed = status.is_none_or(|status| status.code == 0);
        let mut answer = Self::default();
        let mut metadata = dynamic_metadata;
        match http_response {
            Some(HttpResponse::OkResponse(ok)) => {
                if ok.dynamic_metadata.is_some() {
                    metadata = ok.dynamic_metadata;
                }
                if allowed {
                    (answer.request.set, answer.request.append) = split(ok.headers);
                    answer.request.remove = names(ok.headers_to_remove);
                    let fields = ok.query_parameters_to_set.into_iter();
                    answer.query.set = fields.map(|field| field_of(field.key, field.value)).collect();
                    answer.query.remove = names(ok.query_parameters_to_remove);
                    answer.add_response_headers(ok.response_headers_to_add);
                }
                answer.verdict = Verdict::Denied(403);
            }
            Some(HttpResponse::DeniedResponse(denied)) if !allowed => {
                let status = answer.reply(denied);
                answer.verdict = Verdict::Denied(status.unwrap_or(403));
            }
            Some(HttpResponse::ErrorResponse(error)) if !allowed => {
                let status = answer.reply(error);
                answer.verdict = Verdict::Failed(status);
            }
            _ => answer.verdict = Verdict::Denied(403),
        }
        if allowed {
            answer.verdict = Verdict::Allowed;
        }
        answer.metadata = metadata.as_ref().map(struct_from_proto).unwrap_or_default();
        answer
    }

    fn reply(&mut self, reply: pb::DeniedHttpResponse) -> Option<u16> {
        let pb::DeniedHttpResponse { status, headers, body } = reply;
        // What is to be appended has nothing there to be appended to.
        self.request.set = split(headers).0;
        self.body = body.into();
        status.and_then(|status| u16::try_from(status.code).ok()).filter(|code| (100..600).contains(code))
    }

    #[expect(deprecated, reason = "services still send append")]
    fn add_response_headers(&mut self, options: Vec<core::HeaderValueOption>) {
        for option in options {
            let Some(header) = option.header else { continue };
            let action = match option.append {
                Some(append) if append.value => Ok(HeaderAppendAction::AppendIfExistsOrAdd),
                Some(_) => Ok(HeaderAppendAction::OverwriteIfExistsOrAdd),
                None => HeaderAppendAction::try_from(option.append_action),
            };
            let list = match action {
                Ok(HeaderAppendAction::AppendIfExistsOrAdd) => &mut self.response.add,
                Ok(HeaderAppendAction::OverwriteIfExistsOrAdd) => &mut self.response.set,
                Ok(HeaderAppendAction::AddIfAbsent) => &mut self.response.add_if_absent,
                Ok(HeaderAppendAction::OverwriteIfExists) => &mut self.response.overwrite_if_exists,
                Err(_) => {
                    self.unknown_action = true;
                    continue;
                }
            };
            list.push(field_of(header.key, header.value));
        }
    }

    /// Whether it may change where the request goes.
    pub(super) fn changes_request(&self) -> bool {
        let Self { request, query, .. } = self;
        let fields = [&request.set, &request.append, &query.set];
        let names = [&request.remove, &query.remove];
        fields.iter().any(|list| !list.is_empty()) || names.iter().any(|list| !list.is_empty())
    }
}

pub(super) fn field_of(name: String, value: String) -> Field {
    (name.into_bytes().into(), value.into_bytes().into())
}

fn names(names: Vec<String>) -> Vec<Box<[u8]>> {
    names.into_iter().map(|name| name.into_bytes().into()).collect()
}

/// What is to be set, and what appended. For these headers Envoy looks at nothing but the old `append`.
#[expect(deprecated, reason = "it is what decides")]
fn split(options: Vec<core::HeaderValueOption>) -> (Vec<Field>, Vec<Field>) {
    let (mut set, mut append) = (Vec::new(), Vec::new());
    for option in options {
        let Some(header) = option.header else { continue };
        let list = if option.append.is_some_and(|append| append.value) { &mut append } else { &mut set };
        list.push(field_of(header.key, header.value));
    }
    (set, append)
}

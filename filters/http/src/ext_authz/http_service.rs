//! An authorization service over HTTP: its request is the client's, with what it may see, and its response the verdict.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3::ListStringMatcher;
use waystation_filter_api::client::{
    Call, CallError, CallRetries, Clients, Clusters, NamedCluster, Request, Response,
};
use waystation_filter_api::value::Value;
use waystation_filter_api::wire::timeout;
use waystation_format::{FormatContext, HeaderMutations};
use waystation_http::{Headers, Known};
use waystation_matchers::StringMatcher;
use waystation_schema::{At, ConfigError};

use super::PARTIAL_BODY;
use super::answer::{Answer, Field, Verdict};
use super::check::{self, Shown};
use super::config::{Config, TIMEOUT, matchers};

/// In which a service lists what is to be removed from the request.
const HEADERS_TO_REMOVE: &str = "x-envoy-auth-headers-to-remove";

/// A compiled service.
#[derive(Debug)]
pub(super) struct HttpService {
    cluster: NamedCluster,
    timeout: Option<Duration>,
    path: Path,
    add: HeaderMutations,
    retries: Option<CallRetries>,
    upstream: Vec<StringMatcher>,
    upstream_append: Vec<StringMatcher>,
    /// All but `:authority`, when nothing is said.
    client: Option<Vec<StringMatcher>>,
    client_on_success: Vec<StringMatcher>,
    metadata: Vec<StringMatcher>,
}

#[derive(Debug)]
enum Path {
    Prefixed(Box<[u8]>),
    Fixed(Box<[u8]>),
}

impl HttpService {
    pub(super) fn compile(proto: &pb::HttpService, clusters: &dyn Clusters) -> Result<Self, ConfigError> {
        let pb::HttpService {
            server_uri,
            path_prefix,
            path_override,
            authorization_request,
            authorization_response,
            retry_policy,
        } = proto;
        let uri = server_uri.as_ref().ok_or_else(|| ConfigError::field("server_uri", "is required"))?;
        let cluster = match &uri.http_upstream_type {
            Some(envoy_types::pb::envoy::config::core::v3::http_uri::HttpUpstreamType::Cluster(cluster)) => {
                cluster
            }
            None => return Err(ConfigError::field("server_uri.cluster", "is required")),
        };
        let path = match (&**path_prefix, &**path_override) {
            (prefix, "") if prefix.is_empty() || prefix.starts_with('/') => {
                Path::Prefixed(prefix.as_bytes().into())
            }
            (_, "") => return Err(ConfigError::field("path_prefix", "path_prefix should start with \"/\".")),
            ("", fixed) if fixed.starts_with('/') => Path::Fixed(fixed.as_bytes().into()),
            ("", _) => {
                return Err(ConfigError::field("path_override", "path_override should start with \"/\"."));
            }
            _ => return Err(ConfigError::new("Only one of path_prefix or path_override may be set.")),
        };
        let add = authorization_request.as_ref().map_or(&[][..], |request| &request.headers_to_add);
        let response = authorization_response.clone().unwrap_or_default();
        let list = |field: &'static str, list: &Option<ListStringMatcher>| {
            let path = || format!("authorization_response.{field}");
            list.as_ref().map(matchers).transpose().at(path).map(Option::unwrap_or_default)
        };
        let mut client = Some(list("allowed_client_headers", &response.allowed_client_headers)?);
        client = client.filter(|list| !list.is_empty());
        if let Some(client) = &mut client {
            client.extend(
                [":status", "content-length", "www-authenticate", "location"].map(StringMatcher::exact),
            );
        }
        let retries = retry_policy.as_ref().map(|policy| clusters.retry_policy(policy).at(|| "retry_policy"));
        Ok(Self {
            cluster: clusters.cluster(cluster),
            timeout: timeout("timeout", uri.timeout.as_ref(), Some(TIMEOUT)).at(|| "server_uri")?,
            path,
            add: HeaderMutations::overwriting(add).at(|| "authorization_request.headers_to_add")?,
            retries: retries.transpose()?,
            upstream: list("allowed_upstream_headers", &response.allowed_upstream_headers)?,
            upstream_append: list(
                "allowed_upstream_headers_to_append",
                &response.allowed_upstream_headers_to_append,
            )?,
            client,
            client_on_success: list(
                "allowed_client_headers_on_success",
                &response.allowed_client_headers_on_success,
            )?,
            metadata: list("dynamic_metadata_from_headers", &response.dynamic_metadata_from_headers)?,
        })
    }

    /// The head of the call.
    pub(super) fn request(
        &self,
        config: &Config,
        client: &Headers,
        shown: Shown<'_>,
        cx: &FormatContext<'_>,
    ) -> Headers {
        let mut head = Headers::with_capacity(16, 512);
        head.set_number(Known::ContentLength, shown.body.len() as u64);
        let mut add = |name: &[u8], value: &[u8]| match name {
            b"content-length" => {}
            b":path" => head.append(Known::Path, self.path(value)),
            name => head.append(name, value),
        };
        if config.request.raw_headers {
            check::each_header(&config.request, client, &mut add);
        } else {
            check::each_joined(&config.request, client, &mut add);
        }
        if let Some(partial) = shown.partial_text() {
            head.append(PARTIAL_BODY, partial);
        }
        if !self.add.is_empty() {
            self.add.apply_to_request(&mut head, cx);
        }
        head
    }

    fn path(&self, asked: &[u8]) -> Vec<u8> {
        match &self.path {
            Path::Prefixed(prefix) => [prefix, asked].concat(),
            Path::Fixed(path) => path.to_vec(),
        }
    }

    pub(super) fn call(&self, head: Headers, body: &[u8], clients: Rc<dyn Clients>) -> Box<dyn Call> {
        let request = Request {
            cluster: &self.cluster,
            head,
            timeout: self.timeout,
            retries: self.retries.as_ref(),
            hash: None,
            internal: true,
            forwarded_for: false,
        };
        clients.call(request, Some(Bytes::copy_from_slice(body)))
    }

    /// What a response means.
    pub(super) fn answer(self: &Arc<Self>, answered: Result<Response, CallError>) -> Answer {
        let Ok(Response { head, body, .. }) = answered else { return Answer::failed(None) };
        let status = head.status().unwrap_or(503);
        if status >= 500 {
            return Answer::failed(None);
        }
        let mut answer = Answer::default();
        let matches = |list: &[StringMatcher], name: &[u8]| list.iter().any(|matcher| matcher.is_match(name));
        let allowed = status == 200;
        for (name, value) in &head {
            let name = name.as_bytes();
            if name == HEADERS_TO_REMOVE.as_bytes() {
                if allowed {
                    let names = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
                    answer.request.remove.extend(names.filter(|name| !name.is_empty()).map(Into::into));
                }
                continue;
            }
            let field = || -> Field { (name.into(), value.into()) };
            if matches(&self.metadata, name) {
                let text = String::from_utf8_lossy(value);
                answer.metadata.insert(String::from_utf8_lossy(name).into(), Value::String(text.into()));
            }
            if !allowed {
                let client = self.client.as_ref();
                if client.map_or(name != b":authority", |list| matches(list, name)) {
                    answer.request.set.push(field());
                }
                continue;
            }
            if matches(&self.upstream, name) {
                answer.request.set.push(field());
            }
            if matches(&self.upstream_append, name) {
                answer.request.add.push(field());
            }
            if matches(&self.client_on_success, name) {
                answer.response.add.push(field());
            }
        }
        answer.verdict = if allowed { Verdict::Allowed } else { Verdict::Denied(status) };
        answer.body = body;
        answer
    }
}

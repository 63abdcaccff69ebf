//! Requests and policies for the tests.

use std::any::Any;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::{Certificate, ConnectionInfo, TlsInfo};
use waystation_filter_api::filter_state::{Object, Sharing};
use waystation_filter_api::stream::{Protocol, StreamInfo};
use waystation_http::Headers;
use waystation_matchers::Inputs;
use waystation_rbac::{Decision, Engine, Level};

/// What a request is, in plain terms.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) destination: SocketAddr,
    pub(crate) source: IpAddr,
    pub(crate) direct: IpAddr,
    pub(crate) remote: IpAddr,
    pub(crate) server_name: Option<String>,
    pub(crate) peer: Option<Peer>,
    /// The object `user` in the filter state of the stream, and of the connection.
    pub(crate) users: [Option<String>; 2],
}

/// An object in the filter state.
#[derive(Debug)]
struct User(String);

impl Object for User {
    fn serialize(&self) -> Option<Vec<u8>> {
        Some(self.0.clone().into())
    }

    fn text(&self) -> Option<&[u8]> {
        Some(self.0.as_bytes())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Who is behind TLS.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    pub(crate) uris: Vec<String>,
    pub(crate) names: Vec<String>,
    pub(crate) subject: String,
}

impl Request {
    pub(crate) fn get(path: &str) -> Self {
        let here: IpAddr = [127, 0, 0, 1].into();
        Self {
            path: path.to_owned(),
            headers: Vec::new(),
            destination: (here, 80).into(),
            source: here,
            direct: here,
            remote: here,
            server_name: None,
            peer: None,
            users: [None, None],
        }
    }

    pub(crate) fn head(&self) -> Headers {
        let pseudo = [(":method", "GET"), (":path", self.path.as_str()), (":authority", "a.test")];
        let headers = self.headers.iter().map(|(name, value)| (*name, value.as_str()));
        pseudo.into_iter().chain(headers).collect()
    }

    pub(crate) fn stream(&self) -> StreamInfo {
        let at = |ip: IpAddr| Address::Ip((ip, 9).into());
        let mut connection =
            ConnectionInfo::new(1, Instant::now(), Address::Ip(self.destination), at(self.source));
        connection.direct_remote_address = at(self.direct);
        connection.requested_server_name = self.server_name.as_deref().map(Into::into);
        connection.tls = self.peer.clone().map(|peer| {
            let Peer { uris, names, subject } = peer;
            let certificate =
                Certificate { uri_sans: uris, dns_sans: names, subject, ..Certificate::default() };
            Arc::new(TlsInfo { peer: Some(Box::new(certificate)), peer_verified: true, ..TlsInfo::default() })
        });
        let [of_stream, of_connection] = self.users.clone().map(|user| user.map(|user| Rc::new(User(user))));
        if let Some(user) = of_connection {
            connection.filter_state.get_mut().set("user", user, false, Sharing::None);
        }
        let mut stream = StreamInfo::new(
            1,
            Instant::now(),
            SystemTime::now(),
            Rc::new(connection),
            Some(Protocol::Http11),
        );
        stream.remote_address = at(self.remote);
        if let Some(user) = of_stream {
            stream.filter_state.set("user", user, false, Sharing::None);
        }
        stream
    }

    /// What `engine` says of it.
    pub(crate) fn decided(&self, engine: &Engine) -> (bool, Option<String>) {
        let (stream, head) = (self.stream(), self.head());
        let Decision { allowed, policy, .. } = engine.decide(&Inputs::request(&stream, &head));
        (allowed, policy.map(|name| name.to_string()))
    }
}

pub(crate) fn exact(text: &str) -> matcher::StringMatcher {
    let pattern = matcher::string_matcher::MatchPattern::Exact(text.into());
    matcher::StringMatcher { ignore_case: false, match_pattern: Some(pattern) }
}

pub(crate) fn path(text: matcher::StringMatcher) -> matcher::PathMatcher {
    matcher::PathMatcher { rule: Some(matcher::path_matcher::Rule::Path(text)) }
}

pub(crate) fn header(name: &str, text: matcher::StringMatcher) -> route::HeaderMatcher {
    let specifier = route::header_matcher::HeaderMatchSpecifier::StringMatch(text);
    route::HeaderMatcher {
        name: name.into(),
        header_match_specifier: Some(specifier),
        ..route::HeaderMatcher::default()
    }
}

pub(crate) fn permission(rule: pb::permission::Rule) -> pb::Permission {
    pb::Permission { rule: Some(rule) }
}

pub(crate) fn principal(identifier: pb::principal::Identifier) -> pb::Principal {
    pb::Principal { identifier: Some(identifier) }
}

pub(crate) fn policy(permission: pb::permission::Rule, principal: pb::principal::Identifier) -> pb::Policy {
    pb::Policy {
        permissions: vec![self::permission(permission)],
        principals: vec![self::principal(principal)],
        ..pb::Policy::default()
    }
}

pub(crate) fn rules(
    action: pb::rbac::Action,
    policies: impl IntoIterator<Item = (String, pb::Policy)>,
) -> pb::Rbac {
    let policies: HashMap<String, pb::Policy> = policies.into_iter().collect();
    pb::Rbac { action: action.into(), policies, audit_logging_options: None }
}

pub(crate) fn engine(rules: &pb::Rbac) -> Engine {
    Engine::compile(rules, Level::Http).expect("the policies are valid")
}

mod random;
mod scripted;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use prost::Message as _;
use waystation_xds::{Protocol, ResourceType, wire};

use super::{Core, Output, Peer, RequestError, StreamId};
use crate::{Resource, Snapshot};

const CDS: ResourceType = ResourceType::Cluster;
const EDS: ResourceType = ResourceType::ClusterLoadAssignment;
const LDS: ResourceType = ResourceType::Listener;
const RDS: ResourceType = ResourceType::RouteConfiguration;

/// Resources from `(type, name, content)`.
fn snapshot(resources: &[(ResourceType, &str, &str)]) -> Arc<Snapshot> {
    let resources = resources.iter().map(|(kind, name, content)| {
        Resource::new(kind.clone(), *name, Bytes::copy_from_slice(content.as_bytes()))
    });
    Arc::new(resources.map(Arc::new).collect())
}

/// A cluster that takes its endpoints from EDS, with something that changes.
fn eds_cluster(name: &str, timeout: u8) -> (ResourceType, &str, String) {
    // `type: EDS`, and `connect_timeout` as an unknown field would do as well.
    (CDS, name, String::from_utf8(vec![0x10, 3, 0x22, 2, 8, timeout]).expect("ASCII"))
}

/// A response of either protocol.
#[derive(Clone, Debug)]
struct Received {
    kind: ResourceType,
    nonce: String,
    resources: BTreeMap<String, Bytes>,
    removed: Vec<String>,
}

impl Received {
    fn decode(protocol: Protocol, message: Bytes) -> Self {
        let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).expect("a name");
        match protocol {
            Protocol::Sotw => {
                let response = wire::DiscoveryResponse::decode(message).expect("a response");
                // Contents are not messages here; a test that wants the name writes it first.
                let name = |value: &Bytes| text(value).split(' ').next().unwrap_or_default().to_owned();
                Self {
                    kind: ResourceType::from_url(&response.type_url),
                    nonce: response.nonce,
                    resources: response
                        .resources
                        .into_iter()
                        .map(|any| (name(&any.value), any.value))
                        .collect(),
                    removed: Vec::new(),
                }
            }
            Protocol::Delta => {
                let response = wire::DeltaDiscoveryResponse::decode(message).expect("a response");
                // `name?` is a name that the server knows nothing for.
                let resources = response.resources.into_iter().map(|resource| match resource.resource {
                    Some(any) => (text(&resource.name), any.value),
                    None => (text(&resource.name) + "?", Bytes::new()),
                });
                Self {
                    kind: ResourceType::from_url(&response.type_url),
                    nonce: response.nonce,
                    resources: resources.collect(),
                    removed: response.removed_resources.iter().map(text).collect(),
                }
            }
        }
    }

    /// `Cluster a b -c`.
    fn brief(&self) -> String {
        let mut text = format!("{:?}", self.kind);
        self.resources.keys().for_each(|name| text.extend([" ", name]));
        self.removed.iter().for_each(|name| text.extend([" -", name]));
        text
    }
}

/// A core with one ADS client.
struct Rig {
    core: Core,
    protocol: Protocol,
    id: StreamId,
    now: Instant,
    nonces: BTreeMap<ResourceType, String>,
}

impl Rig {
    fn new(protocol: Protocol, snapshot: Arc<Snapshot>) -> Self {
        Self::of(protocol, None, snapshot)
    }

    fn of(protocol: Protocol, kind: Option<ResourceType>, snapshot: Arc<Snapshot>) -> Self {
        let mut core = Core::new(snapshot);
        let id = core.open(Peer { address: "here".to_owned(), protocol, kind });
        Self { core, protocol, id, now: Instant::now(), nonces: BTreeMap::new() }
    }

    fn take(&mut self, output: Output) -> Vec<Received> {
        let received = output.messages.into_iter().map(|(id, message)| {
            assert_eq!(id, self.id);
            let received = Received::decode(self.protocol, message);
            self.nonces.insert(received.kind.clone(), received.nonce.clone());
            received
        });
        received.collect()
    }

    fn send(&mut self, message: Bytes) -> Result<Vec<Received>, RequestError> {
        let output = self.core.request(self.id, message, self.now)?;
        Ok(self.take(output))
    }

    fn publish(&mut self, snapshot: Arc<Snapshot>) -> Vec<Received> {
        let output = self.core.publish(snapshot, self.now);
        self.take(output)
    }

    fn tick(&mut self) -> Vec<Received> {
        let output = self.core.tick(self.now);
        self.take(output)
    }

    /// A state-of-the-world request with the last nonce.
    fn ask(&mut self, kind: &ResourceType, names: &[&str]) -> Vec<Received> {
        self.answer(kind, names, None)
    }

    fn answer(&mut self, kind: &ResourceType, names: &[&str], error: Option<&str>) -> Vec<Received> {
        let request = wire::DiscoveryRequest {
            type_url: kind.url().to_owned(),
            resource_names: names.iter().map(|name| (*name).to_owned()).collect(),
            response_nonce: self.nonces.get(kind).cloned().unwrap_or_default(),
            error_detail: error.map(|message| wire::Status { code: 13, message: message.to_owned() }),
            ..wire::DiscoveryRequest::default()
        };
        self.send(request.encode_to_vec().into()).expect("a good request")
    }

    /// An incremental request that answers nothing.
    fn change(
        &mut self,
        kind: &ResourceType,
        add: &[&str],
        drop: &[&str],
        held: &[(&str, &str)],
    ) -> Vec<Received> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let request = wire::DeltaDiscoveryRequest {
            type_url: kind.url().to_owned(),
            resource_names_subscribe: owned(add),
            resource_names_unsubscribe: owned(drop),
            initial_resource_versions: held
                .iter()
                .map(|(name, version)| ((*name).to_owned(), (*version).to_owned()))
                .collect(),
            ..wire::DeltaDiscoveryRequest::default()
        };
        self.send(request.encode_to_vec().into()).expect("a good request")
    }

    /// An incremental acknowledgement.
    fn ack(&mut self, kind: &ResourceType) -> Vec<Received> {
        let request = wire::DeltaDiscoveryRequest {
            type_url: kind.url().to_owned(),
            response_nonce: self.nonces.get(kind).cloned().unwrap_or_default(),
            ..wire::DeltaDiscoveryRequest::default()
        };
        self.send(request.encode_to_vec().into()).expect("a good request")
    }
}

fn briefs(received: &[Received]) -> Vec<String> {
    received.iter().map(Received::brief).collect()
}

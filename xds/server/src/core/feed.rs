use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use waystation_xds::{Protocol, ResourceType, wire};

use super::RequestError;
use crate::snapshot::version_of;
use crate::{Resource, Snapshot};

/// Names that a client may ask for of one type.
const MAX_NAMES: usize = 1_000_000;

/// One type on one stream: what the client asked for, what it has, and the response that it has not answered.
#[derive(Debug)]
pub(super) struct Feed {
    protocol: Protocol,
    kind: ResourceType,
    wildcard: bool,
    /// Names were asked for, so an empty list of a state-of-the-world request no longer means "everything".
    explicit: bool,
    names: BTreeSet<Arc<str>>,
    held: BTreeMap<Arc<str>, Held>,
    /// Names that were asked for again; who does so wants to hear of them again.
    asked_again: BTreeSet<Arc<str>>,
    /// The first request has been read.
    started: bool,
    /// The client waits for an answer to what it asked.
    owed: bool,
    /// The subscription or the snapshot has changed since it was last compared.
    stale: bool,
    pending: Pending,
    outstanding: Option<Sent>,
    sent: Option<String>,
    acked: Option<String>,
    refused: Option<Refused>,
}

/// What the client has under a name.
#[derive(Clone, Debug)]
enum Held {
    /// It was told that there is nothing.
    Absent,
    /// This version, from an earlier stream; its content is not known here.
    Version(Arc<str>),
    Sent(Arc<Resource>),
}

/// A response under way.
#[derive(Debug)]
struct Sent {
    nonce: String,
    version: String,
}

/// A response that the client refused.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Refused {
    pub(super) version: String,
    pub(super) message: String,
}

/// What could be sent.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Pending {
    /// Something is new or changed.
    pub(super) updates: bool,
    /// The client waits for something that it never had, or for being told that there is nothing.
    pub(super) answer: bool,
    /// Something that the client has is gone.
    pub(super) removals: bool,
}

/// Which part of it to send.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Part {
    /// All that is new or changed; what is gone stays for now.
    Updates,
    /// Only what the client asked for and never had.
    Answer,
    /// Takes away what is gone.
    Removals,
}

/// What became of the response that a request answers.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Answer {
    /// None was answered, or one that has been replaced since.
    None,
    Acknowledged,
    Refused,
}

/// A response to send.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) message: Bytes,
    /// The assignments of the EDS clusters in it.
    pub(super) eds_names: Vec<Arc<str>>,
}

impl Feed {
    pub(super) fn new(protocol: Protocol, kind: ResourceType) -> Self {
        Self {
            protocol,
            kind,
            wildcard: false,
            explicit: false,
            names: BTreeSet::new(),
            held: BTreeMap::new(),
            asked_again: BTreeSet::new(),
            started: false,
            owed: false,
            stale: true,
            pending: Pending::default(),
            outstanding: None,
            sent: None,
            acked: None,
            refused: None,
        }
    }

    pub(super) fn kind(&self) -> &ResourceType {
        &self.kind
    }

    pub(super) fn is_outstanding(&self) -> bool {
        self.outstanding.is_some()
    }

    pub(super) fn is_wildcard(&self) -> bool {
        self.wildcard
    }

    pub(super) fn names(&self) -> &BTreeSet<Arc<str>> {
        &self.names
    }

    /// The versions sent and acknowledged last, and the last refusal not followed by an acknowledgement.
    pub(super) fn versions(&self) -> (Option<&str>, Option<&str>, Option<&Refused>) {
        (self.sent.as_deref(), self.acked.as_deref(), self.refused.as_ref())
    }

    /// The subscription of a state-of-the-world request: all its names, each time.
    pub(super) fn subscribe_sotw(&mut self, names: Vec<String>) -> Result<(), RequestError> {
        let mut wanted: BTreeSet<Arc<str>> = names.into_iter().map(Arc::from).collect();
        let star = wanted.remove("*");
        self.explicit |= !wanted.is_empty() || star;
        let wildcard = star || (wanted.is_empty() && !self.explicit && self.has_legacy_wildcard());
        if wanted.len() > MAX_NAMES {
            return Err(RequestError::TooManyNames);
        }
        if self.started && (wildcard, &wanted) == (self.wildcard, &self.names) {
            return Ok(());
        }
        self.owed |= !self.started || (wildcard && !self.wildcard) || !wanted.is_subset(&self.names);
        self.started = true;
        (self.wildcard, self.names) = (wildcard, wanted);
        self.stale = true;
        Ok(())
    }

    /// The change of a subscription in an incremental request.
    pub(super) fn subscribe_delta(
        &mut self,
        subscribe: Vec<String>,
        unsubscribe: &[String],
        versions: BTreeMap<String, String>,
    ) -> Result<(), RequestError> {
        if self.started && subscribe.is_empty() && unsubscribe.is_empty() {
            return Ok(());
        }
        if !self.started {
            self.started = true;
            self.wildcard = subscribe.is_empty() && self.has_legacy_wildcard();
            self.owed = true;
            if versions.len() > MAX_NAMES {
                return Err(RequestError::TooManyNames);
            }
            let held =
                versions.into_iter().map(|(name, version)| (name.into(), Held::Version(version.into())));
            self.held = held.collect();
        } else {
            self.asked_again.extend(subscribe.iter().map(|name| Arc::from(name.as_str())));
            self.owed |= !subscribe.is_empty();
        }
        for name in subscribe {
            if name == "*" {
                self.wildcard = true;
            } else {
                self.names.insert(name.into());
            }
        }
        if self.names.len() > MAX_NAMES {
            return Err(RequestError::TooManyNames);
        }
        for name in unsubscribe {
            if name == "*" {
                self.wildcard = false;
            } else {
                self.names.remove(name.as_str());
            }
        }
        self.stale = true;
        Ok(())
    }

    /// Takes the acknowledgement or refusal in a request.
    pub(super) fn answered(&mut self, nonce: &str, error: Option<wire::Status>) -> Answer {
        let Some(sent) = self.outstanding.take_if(|sent| sent.nonce == nonce) else {
            return Answer::None;
        };
        match error {
            None => {
                self.acked = Some(sent.version);
                self.refused = None;
                Answer::Acknowledged
            }
            Some(status) => {
                self.refused = Some(Refused { version: sent.version, message: status.message });
                Answer::Refused
            }
        }
    }

    /// The snapshot is another one.
    pub(super) fn invalidate(&mut self) {
        self.stale = true;
    }

    /// Sends a name again even though the client has it.
    pub(super) fn forget(&mut self, name: &str) {
        self.stale |= self.held.remove(name).is_some();
    }

    /// Compares what the client has with what it should have.
    pub(super) fn pending(&mut self, snapshot: &Snapshot) -> Pending {
        if !self.stale || !self.started {
            return self.pending;
        }
        self.stale = false;
        self.forget_unwanted(snapshot);
        let resources = snapshot.of(&self.kind);
        if self.protocol == Protocol::Sotw && !self.is_full_state() {
            // There is no way to say that a resource is gone; should it come back, it is new.
            self.held.retain(|name, _| resources.contains_key(name));
        }
        let mut pending = Pending::default();
        for resource in self.wanted(snapshot) {
            match self.held.get(resource.name()) {
                None => (pending.updates, pending.answer) = (true, self.owed),
                Some(held) => pending.updates |= !held.is(resource),
            }
        }
        if self.protocol == Protocol::Delta && self.unknown(snapshot).next().is_some() {
            (pending.updates, pending.answer) = (true, self.owed);
        }
        // An initialising client waits even for "nothing".
        let answers_nothing = match self.protocol {
            Protocol::Sotw => self.is_full_state() || self.wildcard,
            Protocol::Delta => self.wildcard && self.held.is_empty(),
        };
        pending.answer |= self.owed && answers_nothing;
        self.owed &= pending.answer;
        pending.removals = self.gone(snapshot).next().is_some();
        self.pending = pending;
        pending
    }

    /// Makes the response for a part of what is pending.
    pub(super) fn respond(&mut self, part: Part, snapshot: &Snapshot, nonce: String) -> Response {
        let is_new = |held: Option<&Held>, resource: &Resource| match part {
            Part::Updates => held.is_none_or(|held| !held.is(resource)),
            Part::Answer => held.is_none(),
            Part::Removals => false,
        };
        // What was asked for by two names is sent once.
        let changed: BTreeMap<&Arc<str>, &Arc<Resource>> = self
            .wanted(snapshot)
            .filter(|resource| is_new(self.held.get(resource.name()), resource))
            .map(|resource| (resource.name(), resource))
            .collect();
        let changed: Vec<Arc<Resource>> = changed.into_values().cloned().collect();
        let eds_names = changed.iter().filter_map(|resource| resource.eds_name().cloned()).collect();
        let (version, message) = match self.protocol {
            Protocol::Sotw => self.respond_sotw(part, snapshot, changed, &nonce),
            Protocol::Delta => self.respond_delta(part, snapshot, changed, &nonce),
        };
        if part != Part::Removals {
            self.owed = false;
        }
        self.stale = true;
        self.sent = Some(version.clone());
        self.outstanding = Some(Sent { nonce, version });
        Response { message, eds_names }
    }

    fn respond_sotw(
        &mut self,
        part: Part,
        snapshot: &Snapshot,
        changed: Vec<Arc<Resource>>,
        nonce: &str,
    ) -> (String, Bytes) {
        let listed: Vec<Arc<Resource>> = if self.is_full_state() {
            // What is not listed is gone, so what may not go yet is listed.
            let mut all: BTreeMap<Arc<str>, Arc<Resource>> = BTreeMap::new();
            if part != Part::Removals {
                all.extend(self.gone(snapshot).filter_map(|(name, held)| match held {
                    Held::Sent(resource) => Some((name.clone(), resource.clone())),
                    Held::Absent | Held::Version(_) => None,
                }));
            }
            all.extend(self.wanted(snapshot).map(|resource| (resource.name().clone(), resource.clone())));
            self.held.clear();
            all.into_values().collect()
        } else {
            changed
        };
        for resource in &listed {
            self.held.insert(resource.name().clone(), Held::Sent(resource.clone()));
        }
        let held = self.held.iter().filter_map(|(name, held)| Some((name, held.version()?)));
        let version = version_of(held);
        let response = wire::DiscoveryResponse {
            version_info: version.clone(),
            resources: listed.iter().map(|resource| resource.to_any()).collect(),
            type_url: self.kind.url().to_owned(),
            nonce: nonce.to_owned(),
            control_plane: Some(control_plane()),
        };
        (version, response.encode_to_vec().into())
    }

    fn respond_delta(
        &mut self,
        part: Part,
        snapshot: &Snapshot,
        changed: Vec<Arc<Resource>>,
        nonce: &str,
    ) -> (String, Bytes) {
        let removed: Vec<Arc<str>> = if part == Part::Removals {
            self.gone(snapshot).map(|(name, _)| name.clone()).collect()
        } else {
            self.unknown(snapshot).cloned().collect()
        };
        for resource in &changed {
            self.held.insert(resource.name().clone(), Held::Sent(resource.clone()));
        }
        for name in &removed {
            if self.names.contains(name) {
                self.held.insert(name.clone(), Held::Absent);
            } else {
                self.held.remove(name);
            }
        }
        let version = snapshot.version(&self.kind);
        let name_of = |name: &Arc<str>| Bytes::copy_from_slice(name.as_bytes());
        let mut resources: Vec<_> = changed.iter().map(|resource| resource.to_wrapped()).collect();
        let mut removed_resources: Vec<_> = removed.iter().map(name_of).collect();
        if self.kind == ResourceType::VirtualHost && part != Part::Removals {
            // A request that waits for a virtual host goes on when its alias comes back without one; of a removal Envoy
            // tells it nothing.
            resources.extend(removed_resources.drain(..).map(|name| wire::Resource {
                aliases: vec![name.clone()],
                name,
                ..wire::Resource::default()
            }));
        }
        let response = wire::DeltaDiscoveryResponse {
            system_version_info: version.clone(),
            resources,
            type_url: self.kind.url().to_owned(),
            nonce: nonce.to_owned(),
            removed_resources,
            control_plane: Some(control_plane()),
        };
        (version, response.encode_to_vec().into())
    }

    /// What there is of what was asked for. What has aliases is not part of "everything": it is sent to who asks for it.
    fn wanted<'s>(&'s self, snapshot: &'s Snapshot) -> impl Iterator<Item = &'s Arc<Resource>> {
        let sent_unasked = |resource: &&Arc<Resource>| resource.aliases().is_empty();
        let all = self.wildcard.then(|| snapshot.of(&self.kind).values().filter(sent_unasked));
        let named = self.names.iter().filter_map(|name| snapshot.find(&self.kind, name));
        let named = named.filter(move |resource| !self.wildcard || !sent_unasked(resource));
        all.into_iter().flatten().chain(named)
    }

    /// Names asked for that do not exist, of which the client has not been told.
    fn unknown<'s>(&'s self, snapshot: &'s Snapshot) -> impl Iterator<Item = &'s Arc<str>> {
        let unheard = self.names.iter().filter(|name| !self.held.contains_key(*name));
        unheard.filter(|name| snapshot.find(&self.kind, name).is_none())
    }

    /// What the client has and should no longer have.
    fn gone<'s>(&'s self, snapshot: &'s Snapshot) -> impl Iterator<Item = (&'s Arc<str>, &'s Held)> {
        let resources = snapshot.of(&self.kind);
        self.held
            .iter()
            .filter(|(name, held)| !matches!(held, Held::Absent) && !resources.contains_key(*name))
    }

    /// Forgets what is no longer asked for, which the client has dropped, too, and what is asked for again.
    fn forget_unwanted(&mut self, snapshot: &Snapshot) {
        for name in std::mem::take(&mut self.asked_again) {
            self.held.remove(&name);
            if let Some(resource) = snapshot.find(&self.kind, &name) {
                self.held.remove(resource.name());
            }
        }
        let (wildcard, names) = (self.wildcard, &self.names);
        self.held.retain(|name, held| {
            let is_absent = matches!(held, Held::Absent);
            let aliases = match held {
                Held::Sent(resource) => resource.aliases(),
                Held::Absent | Held::Version(_) => {
                    snapshot.of(&self.kind).get(name).map_or(&[][..], |resource| resource.aliases())
                }
            };
            // The rest is of interest only to who asked by name: a client may make up names without end.
            let is_part_of_everything = wildcard && !is_absent && aliases.is_empty();
            is_part_of_everything || names.contains(name) || aliases.iter().any(|alias| names.contains(alias))
        });
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether a state-of-the-world response lists everything. Of types unknown here that is the safe assumption.
    fn is_full_state(&self) -> bool {
        self.kind.is_full_state() || matches!(self.kind, ResourceType::Other(_))
    }

    /// Whether a first request without names asks for everything. VHDS begins so: a proxy without the on-demand filter
    /// has no more virtual hosts than it is sent unasked.
    fn has_legacy_wildcard(&self) -> bool {
        self.is_full_state() || self.kind == ResourceType::VirtualHost
    }
}

impl Held {
    fn version(&self) -> Option<&Arc<str>> {
        match self {
            Self::Absent => None,
            Self::Version(version) => Some(version),
            Self::Sent(resource) => Some(resource.version()),
        }
    }

    fn is(&self, resource: &Resource) -> bool {
        self.version() == Some(resource.version())
    }
}

/// How this server names itself.
fn control_plane() -> wire::ControlPlane {
    wire::ControlPlane { identifier: format!("waystation-xds-server/{}", env!("CARGO_PKG_VERSION")) }
}

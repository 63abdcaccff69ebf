use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;

use crate::{Protocol, wire};

/// A response taken apart, the same for both protocols.
#[derive(Debug)]
pub(super) struct Envelope {
    pub(super) version: Arc<str>,
    pub(super) nonce: String,
    pub(super) type_url: String,
    /// Who answered.
    pub(super) identifier: String,
    pub(super) items: Vec<Item>,
    /// Delta: `removed_resources`.
    pub(super) removed: Vec<Text>,
    /// Why the response can not be used at all, although it could be decoded.
    pub(super) fault: Option<String>,
}

/// One resource of a response; everything is a slice of the message.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) name: Text,
    /// Its own version, where it has one.
    pub(super) version: Option<Text>,
    pub(super) aliases: Vec<Text>,
    pub(super) ttl: Option<Duration>,
    /// Absent in heartbeats, and for aliases that do not resolve.
    pub(super) body: Option<Bytes>,
}

/// Valid UTF-8 that shares the message's memory.
#[derive(Clone, Debug)]
pub(super) struct Text(Bytes);

const WRAPPER: &[u8] = b"type.googleapis.com/envoy.service.discovery.v3.Resource";

impl Text {
    fn new(bytes: Bytes) -> Result<Self, String> {
        match std::str::from_utf8(&bytes) {
            Ok(_) => Ok(Self(bytes)),
            Err(_) => Err(format!("resource name or version is not UTF-8: {}", bytes.escape_ascii())),
        }
    }

    pub(super) fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("validated by Text::new")
    }
}

impl Envelope {
    /// Decodes a response. `expected` is the type of a stream that carries one type only; such servers may leave
    /// the response's own type URL out.
    pub(super) fn decode(
        protocol: Protocol,
        message: Bytes,
        expected: Option<&str>,
    ) -> Result<Self, prost::DecodeError> {
        match protocol {
            Protocol::Sotw => {
                wire::DiscoveryResponse::decode(message).map(|response| Self::from_sotw(response, expected))
            }
            Protocol::Delta => wire::DeltaDiscoveryResponse::decode(message)
                .map(|response| Self::from_delta(response, expected)),
        }
    }

    fn from_sotw(response: wire::DiscoveryResponse, expected: Option<&str>) -> Self {
        let mut envelope = Self::new(
            response.version_info,
            response.nonce,
            response.type_url,
            response.control_plane,
            expected,
        );
        envelope.items.reserve(response.resources.len());
        for any in response.resources {
            let item = if any.type_url == WRAPPER {
                match wire::Resource::decode(any.value) {
                    Ok(resource) => envelope.item(resource),
                    Err(error) => Err(format!("malformed envoy.service.discovery.v3.Resource: {error}")),
                }
            } else {
                envelope.item(wire::Resource { resource: Some(any), ..wire::Resource::default() })
            };
            envelope.push(item);
        }
        envelope
    }

    fn from_delta(response: wire::DeltaDiscoveryResponse, expected: Option<&str>) -> Self {
        let version = response.system_version_info;
        let mut envelope =
            Self::new(version, response.nonce, response.type_url, response.control_plane, expected);
        envelope.items.reserve(response.resources.len());
        for resource in response.resources {
            let item = envelope.item(resource);
            envelope.push(item);
        }
        for name in response.removed_resources {
            match Text::new(name) {
                Ok(name) => envelope.removed.push(name),
                Err(reason) => envelope.blame(reason),
            }
        }
        envelope
    }

    fn new(
        version: String,
        nonce: String,
        type_url: String,
        control_plane: Option<wire::ControlPlane>,
        expected: Option<&str>,
    ) -> Self {
        let mut fault = None;
        let type_url = match expected {
            Some(expected) if type_url.is_empty() => expected.to_owned(),
            Some(expected) if type_url != expected => {
                fault = Some(format!(
                    "type URL {type_url} of the response does not match the requested {expected}"
                ));
                expected.to_owned()
            }
            _ => type_url,
        };
        Self {
            version: version.into(),
            nonce,
            type_url,
            identifier: control_plane.unwrap_or_default().identifier,
            items: Vec::new(),
            removed: Vec::new(),
            fault,
        }
    }

    fn item(&self, resource: wire::Resource) -> Result<Item, String> {
        let body = match resource.resource {
            Some(any) if any.type_url != self.type_url.as_bytes() => {
                return Err(format!(
                    "type URL {} embedded in an individual Any does not match the message-wide type URL {} in \
                     DiscoveryResponse",
                    any.type_url.escape_ascii(),
                    self.type_url
                ));
            }
            any => any.map(|any| any.value),
        };
        let mut name = resource.name;
        if name.is_empty() {
            name = resource.resource_name.unwrap_or_default().name;
        }
        if name.is_empty()
            && let Some(body) = &body
        {
            name = first_field(body)?;
        }
        let version = if resource.version.is_empty() { None } else { Some(Text::new(resource.version)?) };
        Ok(Item {
            name: Text::new(name)?,
            version,
            aliases: resource.aliases.into_iter().map(Text::new).collect::<Result<_, _>>()?,
            ttl: resource.ttl.and_then(duration),
            body,
        })
    }

    fn push(&mut self, item: Result<Item, String>) {
        match item {
            Ok(item) => self.items.push(item),
            Err(reason) => self.blame(reason),
        }
    }

    /// Keeps the first fault: the rest usually follows from it.
    fn blame(&mut self, reason: String) {
        self.fault.get_or_insert(reason);
    }
}

fn duration(ttl: wire::Duration) -> Option<Duration> {
    let seconds = u64::try_from(ttl.seconds).ok()?;
    let ttl = Duration::new(seconds, u32::try_from(ttl.nanos).unwrap_or(0).min(999_999_999));
    // Longer than any process lives; keeps `Instant` arithmetic from overflowing.
    (!ttl.is_zero()).then(|| ttl.min(Duration::from_secs(10 * 365 * 86_400)))
}

/// The name of a bare resource: in all xDS types it is field 1 (`name`, `cluster_name`). Only the top-level tags
/// are walked; the last occurrence counts, as in protobuf.
fn first_field(body: &Bytes) -> Result<Bytes, String> {
    use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
    let malformed = |error| format!("malformed resource: {error}");
    let mut rest = body.clone();
    let mut name = Bytes::new();
    while !rest.is_empty() {
        let (tag, wire_type) = decode_key(&mut rest).map_err(malformed)?;
        if tag == 1 && wire_type == WireType::LengthDelimited {
            let length = decode_varint(&mut rest).map_err(malformed)?;
            match usize::try_from(length) {
                Ok(length) if length <= rest.len() => name = rest.split_to(length),
                _ => return Err("malformed resource: truncated".to_owned()),
            }
        } else {
            skip_field(wire_type, tag, &mut rest, DecodeContext::default()).map_err(malformed)?;
        }
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CDS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";

    fn any(url: &str, value: &'static [u8]) -> wire::Any {
        wire::Any { type_url: Bytes::copy_from_slice(url.as_bytes()), value: Bytes::from_static(value) }
    }

    fn sotw(resources: Vec<wire::Any>) -> Envelope {
        let response = wire::DiscoveryResponse { resources, type_url: CDS.into(), ..Default::default() };
        Envelope::decode(Protocol::Sotw, response.encode_to_vec().into(), None).expect("encoded above")
    }

    #[test]
    fn the_name_of_a_bare_resource_is_its_first_field_wherever_it_stands() {
        // connect_timeout (4) before name (1).
        let envelope = sotw(vec![any(CDS, b"\x22\x02\x08\x05\x0a\x01c")]);
        assert_eq!(envelope.items[0].name.as_str(), "c");
        assert!(envelope.fault.is_none());
    }

    #[test]
    fn wrapped_resources_carry_version_and_ttl() {
        let wrapped = wire::Resource {
            version: "7".into(),
            name: "c".into(),
            resource: Some(any(CDS, b"\x0a\x01c")),
            ttl: Some(wire::Duration { seconds: 3, nanos: 500 }),
            ..Default::default()
        };
        let wrapped = wire::Any { type_url: WRAPPER.into(), value: wrapped.encode_to_vec().into() };
        let envelope = sotw(vec![wrapped]);
        let item = &envelope.items[0];
        assert_eq!(item.version.as_ref().map(Text::as_str), Some("7"));
        assert_eq!(item.ttl, Some(Duration::new(3, 500)));
        assert_eq!(item.body.as_deref(), Some(&b"\x0a\x01c"[..]));
    }

    #[test]
    fn foreign_types_and_broken_resources_are_faults() {
        let foreign = sotw(vec![any("type.googleapis.com/x.Y", b"")]);
        assert!(
            foreign.fault.is_some_and(|fault| fault.contains("does not match the message-wide type URL"))
        );
        assert!(sotw(vec![any(CDS, b"\x0a\x09c")]).fault.is_some());
        assert!(sotw(vec![any(CDS, b"\x0a\x01\xff")]).fault.is_some());
    }
}

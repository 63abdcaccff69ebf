//! `google.protobuf.FieldMask` on wire bytes.

use envoy_types::pb::google::protobuf::Any;
use prost::Message as _;
use prost::bytes::Buf as _;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};
use waystation_schema::{Field, Kind, Message};

/// Whether `path` (proto names, dots between levels) leads to a field. As in Envoy, nothing below a list has a path.
pub(super) fn names_field(message: Message, path: &str) -> bool {
    let mut inside = Some(message);
    path.split('.').all(|name| {
        let Some(field) = inside.and_then(|message| message.field_by_name(name)) else {
            return false;
        };
        inside = field.message().filter(|_| !field.is_repeated());
        true
    })
}

/// Keeps the fields at `paths` of an element of a list. They may go on inside of its one `Any`. `None` when one of them
/// leads nowhere, or to a whole `Any`.
pub(super) fn apply_to_element(message: Message, wire: &[u8], paths: &[&str]) -> Option<Vec<u8>> {
    let mut any: Option<(u32, &str, Vec<&str>)> = None;
    for path in paths {
        let (name, below) = path.split_once('.').unwrap_or((path, ""));
        let field = message.field_by_name(name);
        let holds_any = |field: &Field| {
            !field.is_repeated() && field.message().is_some_and(|inner| inner.kind() == Kind::Any)
        };
        match (field.filter(holds_any), &mut any) {
            (None, _) if names_field(message, path) => {}
            (Some(field), None) => any = Some((field.number(), name, vec![below])),
            (Some(_), Some((_, known, paths))) if *known == name => paths.push(below),
            (None, _) | (Some(_), Some(_)) => return None,
        }
    }
    if let Some((number, _, inner_paths)) = any {
        let held =
            fields(wire).filter_map(|(at, payload, _)| Any::decode(payload?).ok().filter(|_| at == number));
        for held in held {
            let inner = Message::find_by_url(&held.type_url);
            if inner.is_some_and(|inner| !inner_paths.iter().all(|path| names_field(inner, path))) {
                return None;
            }
        }
    }
    Some(apply(message, wire, paths))
}

/// Keeps the fields at `paths`; what is not a well-formed message is left out.
pub(super) fn apply(message: Message, wire: &[u8], paths: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, payload, whole) in fields(wire) {
        let Some(field) = message.field(number) else {
            continue;
        };
        let name = field.name();
        if paths.contains(&name) {
            out.extend_from_slice(whole);
            continue;
        }
        let below: Vec<&str> =
            paths.iter().filter_map(|path| path.strip_prefix(name)?.strip_prefix('.')).collect();
        if let (false, Some(payload), Some(inner)) = (below.is_empty(), payload, field.message()) {
            let kept = if inner.kind() == Kind::Any {
                inside_any(payload, &below)
            } else {
                apply(inner, payload, &below)
            };
            encode_key(number, WireType::LengthDelimited, &mut out);
            encode_varint(kept.len() as u64, &mut out);
            out.extend_from_slice(&kept);
        }
    }
    out
}

/// Masks what an `Any` holds; a message of unknown type is kept whole.
fn inside_any(wire: &[u8], paths: &[&str]) -> Vec<u8> {
    let Ok(any) = Any::decode(wire) else {
        return Vec::new();
    };
    match Message::find_by_url(&any.type_url) {
        Some(message) => {
            let value = apply(message, &any.value, paths);
            Any { type_url: any.type_url, value }.encode_to_vec()
        }
        None => wire.to_vec(),
    }
}

/// The fields of a message: number, the bytes inside of what is length-delimited, and the whole of it. Ends where the
/// message is not well-formed.
fn fields(mut rest: &[u8]) -> impl Iterator<Item = (u32, Option<&[u8]>, &[u8])> {
    std::iter::from_fn(move || {
        let start = rest;
        let (number, wire_type) = decode_key(&mut rest).ok()?;
        let payload = payload(wire_type, &mut rest)?;
        let payload = (wire_type == WireType::LengthDelimited).then_some(payload);
        Some((number, payload, &start[..start.len() - rest.len()]))
    })
}

/// Takes one value from the front; the bytes inside it when it is length-delimited.
fn payload<'a>(wire_type: WireType, rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = match wire_type {
        WireType::Varint => {
            decode_varint(rest).ok()?;
            return Some(&[]);
        }
        WireType::ThirtyTwoBit => 4,
        WireType::SixtyFourBit => 8,
        WireType::LengthDelimited => usize::try_from(decode_varint(rest).ok()?).ok()?,
        WireType::StartGroup | WireType::EndGroup => return None,
    };
    let payload = rest.get(..length)?;
    rest.advance(length);
    Some(payload)
}

#[cfg(test)]
mod tests {
    use super::{apply, apply_to_element, names_field};
    use envoy_types::pb::envoy::config::cluster::v3::Cluster;
    use envoy_types::pb::google::protobuf::Duration;
    use prost::Message as _;
    use waystation_schema::Message;

    #[test]
    fn keeps_what_the_paths_name() {
        let cluster = Cluster {
            name: "a".into(),
            alt_stat_name: "b".into(),
            connect_timeout: Some(Duration { seconds: 3, nanos: 5 }),
            ..Default::default()
        };
        let message = Message::find("envoy.config.cluster.v3.Cluster").unwrap();
        let kept = apply(message, &cluster.encode_to_vec(), &["name", "connect_timeout.seconds"]);
        let kept = Cluster::decode(&*kept).unwrap();
        assert_eq!((kept.name.as_str(), kept.alt_stat_name.as_str()), ("a", ""));
        assert_eq!(kept.connect_timeout, Some(Duration { seconds: 3, nanos: 0 }));
    }

    #[test]
    fn paths_that_lead_nowhere() {
        let message = Message::find("envoy.admin.v3.ClustersConfigDump").unwrap();
        assert!(names_field(message, "version_info") && names_field(message, "static_clusters"));
        assert!(!names_field(message, "nonsense") && !names_field(message, "static_clusters.cluster"));

        let message = Message::find("envoy.admin.v3.ClustersConfigDump.StaticCluster").unwrap();
        let cluster = Cluster { name: "a".into(), ..Default::default() };
        let value = cluster.encode_to_vec();
        let type_url = "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned();
        let held = envoy_types::pb::envoy::admin::v3::clusters_config_dump::StaticCluster {
            cluster: Some(envoy_types::pb::google::protobuf::Any { type_url, value }),
            ..Default::default()
        };
        let wire = held.encode_to_vec();
        let masked = |paths: &[&str]| apply_to_element(message, &wire, paths);
        assert!(masked(&["cluster.name", "last_updated"]).is_some());
        for bad in ["cluster", "cluster.nonsense", "cluster.load_assignment.endpoints.locality", "nonsense"] {
            assert_eq!(masked(&["last_updated", bad]), None, "{bad}");
        }
    }
}

//! `google.protobuf.FieldMask` on wire bytes.

use envoy_types::pb::google::protobuf::Any;
use prost::Message as _;
use prost::bytes::Buf as _;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};
use waystation_schema::{Kind, Message, Type};

/// Keeps the fields at `paths` (proto names, dots between levels); a path applies to every element of a list. What is not
/// a well-formed message is left out.
pub(super) fn apply(message: Message, wire: &[u8], paths: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = wire;
    while !rest.is_empty() {
        let start = rest;
        let Ok((number, wire_type)) = decode_key(&mut rest) else {
            break;
        };
        let Some(payload) = payload(wire_type, &mut rest) else {
            break;
        };
        let whole = &start[..start.len() - rest.len()];
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
        if let (false, Type::Message, Some(inner)) = (below.is_empty(), field.ty(), field.message()) {
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
    use super::apply;
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
}

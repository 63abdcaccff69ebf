//! Doing to a request and its response what the service says.

use std::collections::BTreeMap;

use waystation_format::{Allowed, Operation};
use waystation_http::{HeaderName, Headers, Known, is_valid_value};
use waystation_matchers::query_parameters;

use super::answer::{Answer, Field, Query, RequestHeaders, ResponseHeaders};
use super::config::Config;

/// What the service asks for is not to be done, nor anything else it says.
#[derive(Debug)]
pub(super) struct Rejected;

/// A checked name and its value; nothing for what is left out.
fn checked<'f>(
    config: &Config,
    (name, value): &'f Field,
) -> Result<Option<(HeaderName, &'f [u8])>, Rejected> {
    let parsed = str::from_utf8(name).ok().and_then(|name| HeaderName::parse(name).ok());
    match parsed.filter(|_| is_valid_value(value)) {
        Some(name) => Ok(Some((name, value))),
        None if config.validate_mutations => Err(Rejected),
        // A message would come apart on it.
        None => Ok(None),
    }
}

/// Whether the rules, if there are any, let a header be changed so.
fn permitted(
    config: &Config,
    operation: Operation,
    name: &HeaderName,
    value: &[u8],
) -> Result<bool, Rejected> {
    let Some(rules) = &config.rules else { return Ok(true) };
    match rules.check(operation, name.as_name().as_bytes(), value) {
        Allowed::Yes => Ok(true),
        Allowed::Ignore => Ok(false),
        Allowed::Fail => Err(Rejected),
    }
}

/// `host` is what the request knows as `:authority`.
fn target(name: HeaderName) -> HeaderName {
    if name.as_name().known() == Some(Known::Host) { Known::Authority.into() } else { name }
}

/// Changes the request head: sets, adds, appends, removes.
pub(super) fn apply_to_request(config: &Config, answer: &Answer, head: &mut Headers) -> Result<(), Rejected> {
    let RequestHeaders { set, add, append, remove } = &answer.request;
    let lists = [(set, Operation::Set), (add, Operation::Set), (append, Operation::Append)];
    for (place, (list, operation)) in lists.into_iter().enumerate() {
        for field in list {
            let Some((name, value)) = checked(config, field)? else { continue };
            if !permitted(config, operation, &name, value)? {
                continue;
            }
            let name = target(name);
            match place {
                0 => replace(head, &name, value, Known::is_inline_in_request),
                1 => push(head, &name, value, Known::is_inline_in_request),
                _ if head.contains(&name) => head.append_joined(&name, ",", value),
                _ => {}
            }
        }
    }
    for name in remove {
        let Some(name) = str::from_utf8(name).ok().and_then(|name| HeaderName::parse(name).ok()) else {
            continue;
        };
        let fixed = name.as_name().is_pseudo() || name.as_name().known() == Some(Known::Host);
        if !(config.rules.is_none() && fixed) && permitted(config, Operation::Remove, &name, b"")? {
            head.remove(&name);
        }
    }
    Ok(())
}

/// Changes the query: parameters are sorted by name, as Envoy leaves them.
pub(super) fn apply_to_query(config: &Config, query: &Query, head: &mut Headers) -> Result<(), Rejected> {
    let Query { set, remove } = query;
    if set.is_empty() && remove.is_empty() {
        return Ok(());
    }
    let valid =
        |text: &[u8]| text.iter().all(|byte| byte.is_ascii_graphic() && !b"\"#&<>[]\\^`{|}".contains(byte));
    if config.validate_mutations && set.iter().any(|(key, value)| !valid(key) || !valid(value)) {
        return Err(Rejected);
    }
    let Some(path) = head.path() else { return Ok(()) };
    let mut parameters: BTreeMap<&[u8], Vec<&[u8]>> = BTreeMap::new();
    for (key, value) in query_parameters(path) {
        parameters.entry(key).or_default().push(value);
    }
    // Bytes that would end the request line are nobody's parameter.
    let safe = |text: &[u8]| text.iter().all(|byte| *byte > b' ' && *byte != 0x7f);
    for (key, value) in set.iter().filter(|(key, value)| safe(key) && safe(value)) {
        parameters.insert(key, vec![value]);
    }
    for key in remove {
        parameters.remove(&**key);
    }
    let end = path.iter().position(|byte| *byte == b'?').unwrap_or(path.len());
    let mut target = path[..end].to_vec();
    let mut delimiter = b'?';
    for (key, values) in &parameters {
        for value in values {
            target.push(std::mem::replace(&mut delimiter, b'&'));
            target.extend_from_slice(key);
            target.push(b'=');
            target.extend_from_slice(value);
        }
    }
    head.set(Known::Path, target);
    Ok(())
}

/// The headers of a reply.
pub(super) fn of_reply(config: &Config, headers: &RequestHeaders) -> Result<Headers, Rejected> {
    let mut reply = Headers::new();
    for field in &headers.set {
        if let Some((name, value)) = checked(config, field)?.filter(|(name, _)| !name.as_name().is_pseudo()) {
            push(&mut reply, &name, value, Known::is_inline_in_response);
        }
    }
    Ok(reply)
}

/// A checked header.
type Change = (HeaderName, Box<[u8]>);

/// What becomes of the response head.
#[derive(Debug)]
pub(super) struct ResponseChanges {
    add: Vec<Change>,
    set: Vec<Change>,
    add_if_absent: Vec<Change>,
    overwrite_if_exists: Vec<Change>,
}

impl ResponseChanges {
    /// Checks them; nothing when there are none.
    pub(super) fn new(config: &Config, headers: ResponseHeaders) -> Result<Option<Self>, Rejected> {
        let ResponseHeaders { add, set, add_if_absent, overwrite_if_exists } = headers;
        if [&add, &set, &add_if_absent, &overwrite_if_exists].iter().all(|list| list.is_empty()) {
            return Ok(None);
        }
        let check = |list: Vec<Field>| -> Result<Vec<Change>, Rejected> {
            let mut good = Vec::with_capacity(list.len());
            for field in list {
                let name = checked(config, &field)?.map(|(name, _)| name);
                good.extend(name.map(|name| (name, field.1)));
            }
            Ok(good)
        };
        Ok(Some(Self {
            add: check(add)?,
            set: check(set)?,
            add_if_absent: check(add_if_absent)?,
            overwrite_if_exists: check(overwrite_if_exists)?,
        }))
    }

    /// In Envoy's order.
    pub(super) fn apply(&self, head: &mut Headers) {
        for (name, value) in &self.add {
            push(head, name, value, Known::is_inline_in_response);
        }
        for (name, value) in &self.set {
            replace(head, name, value, Known::is_inline_in_response);
        }
        for (name, value) in &self.add_if_absent {
            if !head.contains(name) {
                head.append(name, value);
            }
        }
        for (name, value) in &self.overwrite_if_exists {
            if head.contains(name) {
                replace(head, name, value, Known::is_inline_in_response);
            }
        }
    }
}

/// Envoy's header map keeps one entry of its inline headers.
fn push(head: &mut Headers, name: &HeaderName, value: &[u8], inline: fn(Known) -> bool) {
    match name.as_name().known() {
        Some(known) if inline(known) => head.append_joined(known, ",", value),
        _ => head.append(name, value),
    }
}

/// It keeps the place of these, too.
fn replace(head: &mut Headers, name: &HeaderName, value: &[u8], inline: fn(Known) -> bool) {
    let known = name.as_name().known();
    if !known.is_some_and(|known| known.is_pseudo() || inline(known)) {
        head.remove(name);
    }
    head.set(name, value);
}

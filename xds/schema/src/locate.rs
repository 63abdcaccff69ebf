//! From a message path back to the place in the text that it came from.

use std::collections::HashMap;

use crate::document::{Document, NodeKind, Position, TextError};
use crate::{Format, json, yaml};

/// For each message path (`virtual_hosts[api].routes[3].route`) the line and column, from 1, of the deepest part
/// of it that `text` has: what the validating walk found in the wire bytes is shown where a person can mend it.
///
/// The text is parsed once. `None` for the formats that are not read into a document ([`Format::ProtoText`],
/// [`Format::ProtoBinary`]).
pub fn locate<'p>(
    format: Format,
    text: &str,
    paths: impl IntoIterator<Item = &'p str>,
) -> Result<Option<Vec<(u32, u32)>>, TextError> {
    let document = match format {
        Format::Json => json::parse(text)?,
        Format::Yaml => yaml::parse(text)?,
        Format::ProtoText | Format::ProtoBinary => return Ok(None),
    };
    let mut lists = Lists::default();
    let places = paths.into_iter().map(|path| {
        let Position { line, column } = find(&document, &mut lists, path);
        (line, column)
    });
    Ok(Some(places.collect()))
}

/// The elements of the lists that were looked into: a file may be one list of ten thousand resources.
type Lists = HashMap<usize, Vec<usize>>;

fn find(document: &Document<'_>, lists: &mut Lists, path: &str) -> Position {
    let mut node = 0;
    let mut position = document.position(0);
    let mut rest = path;
    while let Some((field, subscript, behind)) = segment(rest) {
        rest = behind;
        let Some((key, value)) = member(document, node, |name| same_field(name, field)) else { break };
        (node, position) = (value, document.position(key));
        let Some(subscript) = subscript else { continue };
        let Some((element, at)) = element(document, lists, node, subscript) else { break };
        (node, position) = (element, at);
    }
    position
}

/// Splits the first segment off: the field, its subscript, what follows.
fn segment(path: &str) -> Option<(&str, Option<&str>, &str)> {
    if path.is_empty() {
        return None;
    }
    let end = path.find(['.', '[']).unwrap_or(path.len());
    let (field, rest) = path.split_at(end);
    let Some(inside) = rest.strip_prefix('[') else {
        return Some((field, None, rest.strip_prefix('.').unwrap_or(rest)));
    };
    // Names may contain dots and brackets; the subscript ends where another segment starts, or the path.
    match inside.find("].") {
        Some(end) => Some((field, Some(&inside[..end]), &inside[end + 2..])),
        None => Some((field, Some(inside.strip_suffix(']').unwrap_or(inside)), "")),
    }
}

fn member(document: &Document<'_>, node: usize, is: impl Fn(&str) -> bool) -> Option<(usize, usize)> {
    if document.kind(node) != NodeKind::Object {
        return None;
    }
    document.members(node).find(|(key, _)| is(document.text(*key)))
}

/// A map's value by its key, an element by its index or its name. An element whose name is the index of another
/// is shown as that one; the reason beside the place names the right one.
fn element(
    document: &Document<'_>,
    lists: &mut Lists,
    node: usize,
    subscript: &str,
) -> Option<(usize, Position)> {
    if let Some((key, value)) = member(document, node, |name| name == subscript) {
        return Some((value, document.position(key)));
    }
    if document.kind(node) != NodeKind::Array {
        return None;
    }
    let elements = lists.entry(node).or_insert_with(|| document.elements(node).collect());
    let indexed = subscript.parse().ok().and_then(|index: usize| elements.get(index));
    let is_named = |element: &&usize| {
        let name = member(document, **element, |name| name == "name");
        name.is_some_and(|(_, value)| {
            document.kind(value) == NodeKind::String && document.text(value) == subscript
        })
    };
    let found = *indexed.or_else(|| elements.iter().find(is_named))?;
    Some((found, document.position(found)))
}

/// Whether a key, in snake_case or camelCase, is the field.
fn same_field(key: &str, field: &str) -> bool {
    let letters =
        |text| str::chars(text).filter(|letter| *letter != '_').map(|letter| letter.to_ascii_lowercase());
    letters(key).eq(letters(field))
}

#[cfg(test)]
mod tests {
    use super::locate;
    use crate::Format;

    #[test]
    fn paths_lead_back_to_the_text() {
        let text = "resources:\n- name: one\n- name: t.w[o]\n  filterChains:\n  - filters:\n    - {name: hcm, typed_config: {a: 1}}\n  metadata:\n    k: 3\n";
        let paths = [
            "resources[t.w[o]].filter_chains[0].filters[hcm].typed_config.a",
            "resources[1].metadata[k]",
            "resources[one].absent.below",
            "",
        ];
        let places = locate(Format::Yaml, text, paths).expect("it is YAML");
        assert_eq!(places, Some(vec![(6, 34), (8, 5), (2, 3), (1, 1)]));
    }
}

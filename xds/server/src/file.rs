//! One file: its text becomes resources, or one fault with its place.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use serde::Serialize;
use waystation_schema::{
    ConfigError, Finding, Format, Message, Place, TextError, TextOptions, Visitor, json_to_wire, locate,
    walk, yaml_to_wire,
};
use waystation_xds::{ResourceType, wire};

use crate::Resource;

/// Warnings kept per file.
const MAX_WARNINGS: usize = 100;

const RESPONSE: &str = "envoy.service.discovery.v3.DiscoveryResponse";
const WRAPPER: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";

/// What is wrong with a file, and where.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Fault {
    /// From 1; 0 when it is the file as a whole.
    pub line: u32,
    /// In characters, from 1; 0 when it is the file as a whole.
    pub column: u32,
    /// The message path and the reason.
    pub reason: String,
}

impl Fault {
    pub(crate) fn whole(reason: impl Into<String>) -> Self {
        Self { line: 0, column: 0, reason: reason.into() }
    }
}

/// `line:column: reason`, to stand behind a file's name and a colon.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "{}:{}: ", self.line, self.column)?;
        } else {
            f.write_str(" ")?;
        }
        f.write_str(&self.reason)
    }
}

/// A file that can be published.
#[derive(Clone, Debug, Default)]
pub(crate) struct Content {
    pub(crate) resources: Vec<Located>,
    /// What a proxy will not mind, and its user might.
    pub(crate) warnings: Vec<Fault>,
}

/// A resource and where it begins.
#[derive(Clone, Debug)]
pub(crate) struct Located {
    pub(crate) resource: Arc<Resource>,
    pub(crate) line: u32,
    pub(crate) column: u32,
}

/// Reads a file's text. A file without any resource is a fault: an editor that truncates before it writes must
/// not take everything away.
pub(crate) fn parse(format: Format, text: &[u8]) -> Result<Content, Fault> {
    let text = std::str::from_utf8(text)
        .map_err(|error| Fault::whole(format!("not UTF-8 from byte {} on", error.valid_up_to())))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut content = Content::default();
    let mut explicit = false;
    for document in documents(format, text) {
        explicit |= document.read(&mut content)?;
    }
    if content.resources.is_empty() && !explicit {
        return Err(Fault::whole(
            "no resources: delete the file, or write `resources: []`, to take them away",
        ));
    }
    let mut names = HashSet::new();
    for Located { resource, line, column } in &content.resources {
        for name in resource.names() {
            if !names.insert((resource.kind(), name)) {
                let reason = format!("a second {:?} {name} in this file", resource.kind());
                return Err(Fault { line: *line, column: *column, reason });
            }
        }
    }
    Ok(content)
}

/// What a document has, each with its path.
#[derive(Default)]
struct Found {
    resources: Vec<(String, Arc<Resource>)>,
    warnings: Vec<(String, String)>,
}

/// One document of a file.
struct Document<'t> {
    format: Format,
    text: &'t str,
    /// Lines of the file before it.
    offset: u32,
}

/// The documents of a YAML stream; JSON is one. Markers are recognised where YAML has them: at the start of a
/// line, even inside a block scalar.
fn documents(format: Format, text: &str) -> Vec<Document<'_>> {
    if format == Format::Json {
        return vec![Document { format, text, offset: 0 }];
    }
    let mut documents = Vec::new();
    let (mut start, mut offset) = (0, 0);
    let mut at = 0;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let begins = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        let ends = line.trim_end() == "...";
        if begins || ends {
            documents.push(Document { format, text: &text[start..at], offset });
            start = if ends { at + line.len() } else { at };
            offset = number as u32 + u32::from(ends);
        }
        at += line.len();
    }
    documents.push(Document { format, text: &text[start..], offset });
    documents.retain(|document| !document.is_blank());
    documents
}

impl Document<'_> {
    fn is_blank(&self) -> bool {
        self.text.lines().all(|line| {
            let line = line.trim();
            line.is_empty() || line.starts_with('#') || line == "---"
        })
    }

    /// Adds the document's resources; says whether it is a list, which may be empty on purpose.
    fn read(&self, content: &mut Content) -> Result<bool, Fault> {
        let shape = self.shape()?;
        let mut found = Found::default();
        let is_list = !shape.has("@type");
        if is_list {
            self.list(&shape, &mut found)?;
        } else {
            let any = wire::Any::decode(self.encode("google.protobuf.Any")?)
                .map_err(|error| Fault::whole(error.to_string()))?;
            self.add(any, "", &mut found)?;
        }
        // One pass over the text for all places.
        let room = MAX_WARNINGS - content.warnings.len().min(MAX_WARNINGS);
        found.warnings.truncate(room);
        let paths =
            found.resources.iter().map(|(path, _)| path).chain(found.warnings.iter().map(|(path, _)| path));
        let mut places = self.places(paths.map(String::as_str))?.into_iter();
        for ((_, resource), (line, column)) in found.resources.into_iter().zip(places.by_ref()) {
            content.resources.push(Located { resource, line, column });
        }
        for ((path, reason), (line, column)) in found.warnings.into_iter().zip(places) {
            content.warnings.push(Fault { line, column, reason: format!("{path}: {reason}") });
        }
        Ok(is_list)
    }

    fn list(&self, shape: &Shape, found: &mut Found) -> Result<(), Fault> {
        if !shape.has("resources") {
            let reason = "neither a resource (`@type`) nor a list of them (`resources`)".to_owned();
            return Err(Fault { line: self.offset + 1, column: 1, reason });
        }
        let response = wire::DiscoveryResponse::decode(self.encode(RESPONSE)?)
            .map_err(|error| Fault::whole(error.to_string()))?;
        if !response.version_info.is_empty() {
            let reason = "no effect here: versions are the hashes of what is served".to_owned();
            found.warnings.push(("version_info".to_owned(), reason));
        }
        for (index, any) in response.resources.into_iter().enumerate() {
            self.add(any, &format!("resources[{index}]"), found)?;
        }
        Ok(())
    }

    /// The keys at the top.
    fn shape(&self) -> Result<Shape, Fault> {
        Shape::decode(self.encode("google.protobuf.Struct")?).map_err(|error| Fault::whole(error.to_string()))
    }

    fn encode(&self, message: &str) -> Result<Bytes, Fault> {
        let message = Message::find(message).ok_or_else(|| Fault::whole(format!("{message} is missing")))?;
        let encoded = match self.format {
            Format::Json => json_to_wire(message, self.text, TextOptions::default()),
            _ => yaml_to_wire(message, self.text, TextOptions::default()),
        };
        encoded.map(|encoded| encoded.wire.into()).map_err(|error| self.text_fault(&error))
    }

    fn text_fault(&self, error: &TextError) -> Fault {
        let reason = error.config_error().to_string();
        Fault { line: error.line() + self.offset, column: error.column(), reason }
    }

    /// Checks a resource and takes it in; `path` is where it stands in the document.
    fn add(&self, mut any: wire::Any, path: &str, found: &mut Found) -> Result<(), Fault> {
        let mut path = path.to_owned();
        let (mut name, mut aliases) = (String::new(), Vec::new());
        if any.type_url == WRAPPER.as_bytes() {
            (name, aliases, any) = self.unwrap(&any, &path)?;
            path = join(&path, "resource");
        }
        let fault = |path: &str, error: &ConfigError| self.fault(path, error);
        let Some((url, message)) =
            std::str::from_utf8(&any.type_url).ok().and_then(|url| Some((url, Message::find_by_url(url)?)))
        else {
            return Err(fault(&path, &ConfigError::new("an empty resource: `@type` is missing")));
        };
        let mut judge = Judge::default();
        walk(message, &any.value, &mut judge).map_err(|error| fault(&path, &error))?;
        if name.is_empty() {
            name = own_name(message, &any.value);
        }
        if name.is_empty() {
            let reason = format!("a {} without a name", message.full_name());
            return Err(fault(&path, &ConfigError::new(reason)));
        }
        let warnings = judge.warnings.into_iter().map(|(place, reason)| (join(&path, &place), reason));
        found.warnings.extend(warnings);
        let mut resource = Resource::new(ResourceType::from_url(url), name, any.value);
        if !aliases.is_empty() {
            if *resource.kind() != ResourceType::VirtualHost {
                return Err(fault(
                    &path,
                    &ConfigError::new("only virtual hosts are asked for by their aliases"),
                ));
            }
            resource = resource.with_aliases(aliases);
        }
        found.resources.push((path, Arc::new(resource)));
        Ok(())
    }

    /// A resource that carries its name, and its aliases, beside it.
    fn unwrap(&self, any: &wire::Any, path: &str) -> Result<(String, Vec<Arc<str>>, wire::Any), Fault> {
        let fail = |field: &str, reason: &str| Err(self.fault(path, &ConfigError::field(field, reason)));
        let wrapper = match wire::Resource::decode(any.value.clone()) {
            Ok(wrapper) => wrapper,
            Err(error) => return fail("resource", &error.to_string()),
        };
        if wrapper.ttl.is_some() {
            return fail("ttl", "not supported: nobody would send the heartbeats");
        }
        if !wrapper.version.is_empty() {
            return fail("version", "not supported: versions are the hashes of what is served");
        }
        let name = String::from_utf8_lossy(&wrapper.name).into_owned();
        let aliases = wrapper.aliases.iter().map(|alias| String::from_utf8_lossy(alias).into()).collect();
        match wrapper.resource {
            Some(resource) => Ok((name, aliases, resource)),
            None => fail("resource", "is missing"),
        }
    }

    fn fault(&self, path: &str, error: &ConfigError) -> Fault {
        let whole = join(path, &error.path());
        let reason =
            if whole.is_empty() { error.reason().to_owned() } else { format!("{whole}: {}", error.reason()) };
        match self.places([whole.as_str()]) {
            Ok(places) => Fault { line: places[0].0, column: places[0].1, reason },
            Err(fault) => fault,
        }
    }

    /// Lines and columns in the file, as many as there are paths.
    fn places<'p>(&self, paths: impl IntoIterator<Item = &'p str>) -> Result<Vec<(u32, u32)>, Fault> {
        let mut paths = paths.into_iter().peekable();
        if paths.peek().is_none() {
            return Ok(Vec::new());
        }
        let places = locate(self.format, self.text, paths).map_err(|error| self.text_fault(&error))?;
        let places = places.expect("a document is JSON or YAML");
        Ok(places.into_iter().map(|(line, column)| (line + self.offset, column)).collect())
    }
}

/// What the walk finds, sorted: what no proxy takes is an error; what this project's proxy does not do is a
/// warning, because the proxy at the other end may be another one.
#[derive(Default)]
struct Judge {
    warnings: Vec<(String, String)>,
}

impl Visitor for Judge {
    fn found(&mut self, place: &Place<'_>, finding: &Finding<'_>) -> Result<(), ConfigError> {
        match finding {
            Finding::Malformed(_)
            | Finding::Constraint(_)
            | Finding::UnknownField { .. }
            | Finding::TypedStruct(_) => return Err(place.error(finding.to_string())),
            // What has no effect in our proxy is said by our proxy.
            Finding::Ignored { .. } => {}
            Finding::UnknownType { .. } | Finding::Deprecated { .. } => {
                self.warn(place, finding.to_string());
            }
            Finding::Rejected { .. } | Finding::RejectedType { .. } | Finding::Unclaimed => {
                self.warn(place, format!("waystation refuses this: {finding}"));
            }
        }
        Ok(())
    }
}

impl Judge {
    fn warn(&mut self, place: &Place<'_>, reason: String) {
        if self.warnings.len() < MAX_WARNINGS {
            self.warnings.push((place.path(), reason));
        }
    }
}

fn join(outer: &str, inner: &str) -> String {
    match (outer.is_empty(), inner.is_empty()) {
        (true, _) => inner.to_owned(),
        (_, true) => outer.to_owned(),
        _ => format!("{outer}.{inner}"),
    }
}

/// The name that a message has itself: in every xDS type it is the first field.
fn own_name(message: Message, value: &Bytes) -> String {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Named {
        #[prost(string, tag = "1")]
        name: String,
    }
    let is_name = message.field(1).is_some_and(|field| matches!(field.name(), "name" | "cluster_name"));
    if !is_name {
        return String::new();
    }
    Named::decode(value.clone()).map(|named| named.name).unwrap_or_default()
}

/// The keys of a `google.protobuf.Struct`.
#[derive(Clone, PartialEq, prost::Message)]
struct Shape {
    #[prost(message, repeated, tag = "1")]
    entries: Vec<Key>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Key {
    #[prost(string, tag = "1")]
    key: String,
}

impl Shape {
    fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| entry.key == key)
    }
}

#[cfg(test)]
mod tests {
    use super::{Content, parse};
    use waystation_schema::Format;

    fn names(content: &Content) -> Vec<String> {
        content
            .resources
            .iter()
            .map(|located| format!("{}@{}:{}", located.resource, located.line, located.column))
            .collect()
    }

    fn refused(text: &str) -> String {
        parse(Format::Yaml, text.as_bytes()).expect_err("it is faulty").to_string()
    }

    const CLUSTER: &str = "'@type': type.googleapis.com/envoy.config.cluster.v3.Cluster";

    #[test]
    fn lists_single_resources_and_streams_of_documents() {
        let list = format!("# clusters\nresources:\n- {CLUSTER}\n  name: a\n-\n  {CLUSTER}\n  name: b\n");
        assert_eq!(names(&parse(Format::Yaml, list.as_bytes()).unwrap()), ["Cluster a@3:3", "Cluster b@6:3"]);
        let stream = format!(
            "# two\n---\n{CLUSTER}\nname: a\n--- # and\n{CLUSTER}\nname: b\n...\n---\n{}",
            list.replace("name: ", "name: x")
        );
        let names = names(&parse(Format::Yaml, stream.as_bytes()).unwrap());
        assert_eq!(names[..2], ["Cluster a@3:1", "Cluster b@6:1"]);
        let json = r#"{"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "a"}"#;
        assert_eq!(parse(Format::Json, json.as_bytes()).unwrap().resources.len(), 1);
        assert_eq!(parse(Format::Yaml, b"resources: []").unwrap().resources.len(), 0);
    }

    #[test]
    fn names_beside_the_resource() {
        let text = "'@type': type.googleapis.com/envoy.service.discovery.v3.Resource\nname: routes/api\nresource:\n  '@type': type.googleapis.com/envoy.config.route.v3.VirtualHost\n  name: api\n  domains: ['*']\n";
        let content = parse(Format::Yaml, text.as_bytes()).unwrap();
        assert_eq!(names(&content), ["VirtualHost routes/api@3:1"]);
        let aliased =
            parse(Format::Yaml, format!("{text}aliases: [routes/a, routes/b]\n").as_bytes()).unwrap();
        let resource = &aliased.resources[0].resource;
        assert_eq!(resource.aliases(), ["routes/a".into(), "routes/b".into()]);
        assert!(parse(Format::Yaml, format!("{text}aliases: [routes/api]\n").as_bytes()).is_ok());
        assert_ne!(resource.version(), content.resources[0].resource.version());
        let cluster = "'@type': type.googleapis.com/envoy.service.discovery.v3.Resource\nname: c\naliases: [d]\nresource:\n  '@type': type.googleapis.com/envoy.config.cluster.v3.Cluster\n  name: c\n";
        assert!(refused(cluster).ends_with("only virtual hosts are asked for by their aliases"));
        assert_eq!(
            refused(&format!("{text}ttl: 3s\n")),
            "7:1: ttl: not supported: nobody would send the heartbeats"
        );
    }

    #[test]
    fn faults_have_their_place() {
        assert_eq!(
            refused(""),
            " no resources: delete the file, or write `resources: []`, to take them away"
        );
        assert_eq!(
            refused("---\n\nname: a\n"),
            "1:1: neither a resource (`@type`) nor a list of them (`resources`)"
        );
        assert_eq!(
            refused(&format!("---\n{CLUSTER}\nname: a\nnome: b\n")),
            "4:1: nome: envoy.config.cluster.v3.Cluster has no such field"
        );
        let broken =
            format!("resources:\n- {CLUSTER}\n  name: a\n- {CLUSTER}\n  name: b\n  connect_timeout: 0s\n");
        assert_eq!(
            refused(&broken),
            "6:3: resources[1].connect_timeout: Proto constraint validation failed \
             (ClusterValidationError.ConnectTimeout: value must be greater than 0s)"
        );
        assert!(refused(&format!("{CLUSTER}\nname: [")).starts_with("3:"));
        assert_eq!(
            refused(&format!("{CLUSTER}\nname: a\n---\n{CLUSTER}\nname: a\n")),
            "4:1: a second Cluster a in this file"
        );
        assert_eq!(
            refused("'@type': type.googleapis.com/nobody.Knows\n"),
            "1:10: @type: unknown type \"type.googleapis.com/nobody.Knows\""
        );
        assert_eq!(
            refused(&format!("{CLUSTER}\n")),
            "1:1: name: Proto constraint validation failed (ClusterValidationError.Name: value length must be at least 1 characters)"
        );
    }

    #[test]
    fn what_only_our_proxy_refuses_is_a_warning() {
        let text = format!("{CLUSTER}\nname: a\ntrack_timeout_budgets: true\n");
        let content = parse(Format::Yaml, text.as_bytes()).unwrap();
        assert_eq!(content.resources.len(), 1);
        assert_eq!(content.warnings.len(), 1, "{:?}", content.warnings);
        assert_eq!((content.warnings[0].line, content.warnings[0].column), (3, 1));
    }
}

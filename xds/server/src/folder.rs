//! The folder's files: which of them are good, and the snapshot that they make together. No I/O.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use waystation_schema::Format;
use waystation_xds::ResourceType;
use xxhash_rust::xxh64::xxh64;

use crate::file::{Content, Fault, Located, parse};
use crate::status::FileStatus;
use crate::{Snapshot, links};

/// What reading a folder brought: the content of each file, or why it could not be read.
pub(crate) type Files = BTreeMap<String, Result<Vec<u8>, String>>;

/// All files, by their path in the folder.
#[derive(Debug, Default)]
pub(crate) struct Folder {
    files: BTreeMap<String, File>,
    warnings: Vec<String>,
}

#[derive(Debug, Default)]
struct File {
    hash: Option<u64>,
    /// What is served of it.
    good: Option<Content>,
    /// What could be, were it not for a name that another file has.
    candidate: Option<Content>,
    fault: Option<Fault>,
}

/// What an update brought.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) snapshot: Option<Arc<Snapshot>>,
    /// For the console.
    pub(crate) notices: Vec<String>,
}

impl Folder {
    /// Takes the folder's present content. `show` names a file on the console.
    pub(crate) fn update(&mut self, found: &Files, show: impl Fn(&str) -> String) -> Change {
        let mut change = Change::default();
        let mut changed = false;
        self.files.retain(|path, _| {
            let stays = found.contains_key(path);
            if !stays {
                change.notices.push(format!("{}: gone, and its resources with it", show(path)));
                changed = true;
            }
            stays
        });
        let mut touched = BTreeSet::new();
        for (path, content) in found {
            let file = self.files.entry(path.clone()).or_default();
            if file.read(path, content) {
                touched.insert(path.clone());
            }
        }
        self.settle_names(&mut touched);
        for (path, file) in &mut self.files {
            if file.fault.is_none()
                && let Some(content) = file.candidate.take()
            {
                file.good = Some(content);
                changed = true;
                touched.insert(path.clone());
            }
            if touched.contains(path) {
                file.tell(&show(path), &mut change.notices);
            }
        }
        if !changed {
            return change;
        }
        let resources = self.files.values().flat_map(File::served).map(|located| located.resource.clone());
        let snapshot: Snapshot = resources.collect();
        let warnings = links::check(&snapshot);
        change.notices.extend(
            warnings.iter().filter(|new| !self.warnings.contains(new)).map(|new| format!("warning: {new}")),
        );
        self.warnings = warnings;
        change.snapshot = Some(Arc::new(snapshot));
        change
    }

    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub(crate) fn status(&self) -> BTreeMap<String, FileStatus> {
        let status = |file: &File| FileStatus {
            fault: file.fault.clone(),
            resources: file.served().len(),
            warnings: file.good.as_ref().map(|content| content.warnings.clone()).unwrap_or_default(),
        };
        self.files.iter().map(|(path, file)| (path.clone(), status(file))).collect()
    }

    /// Decides who has a name that several files want: who has it already, or else the first. The others stay
    /// as they were. Ends because each round turns a file back, and all files as they were had no name twice.
    fn settle_names(&mut self, touched: &mut BTreeSet<String>) {
        let mut turned_back: BTreeMap<String, Fault> = BTreeMap::new();
        loop {
            let mut owners: HashMap<(&ResourceType, &str), &str> = HashMap::new();
            let mut losers = BTreeMap::new();
            // First those that cannot be turned back.
            for certain in [true, false] {
                for (path, file) in &self.files {
                    let is_candidate = file.candidate.is_some() && !turned_back.contains_key(path);
                    if is_candidate == certain {
                        continue;
                    }
                    let content = if is_candidate { &file.candidate } else { &file.good };
                    for Located { resource, line, column } in
                        content.iter().flat_map(|content| &content.resources)
                    {
                        for name in resource.names() {
                            let owner = *owners.entry((resource.kind(), name)).or_insert(path);
                            if owner != path && is_candidate {
                                let reason = format!("{:?} {name} is in {owner}, too", resource.kind());
                                losers.entry(path.clone()).or_insert(Fault {
                                    line: *line,
                                    column: *column,
                                    reason,
                                });
                            }
                        }
                    }
                }
            }
            if losers.is_empty() {
                break;
            }
            turned_back.extend(losers);
        }
        for (path, file) in &mut self.files {
            if file.candidate.is_some() {
                let fault = turned_back.remove(path);
                if file.fault != fault {
                    touched.insert(path.clone());
                }
                file.fault = fault;
            }
        }
    }
}

impl File {
    /// Whether the content is another one.
    fn read(&mut self, path: &str, content: &Result<Vec<u8>, String>) -> bool {
        let content = match content {
            Ok(content) => content,
            Err(reason) => {
                let fault = Some(Fault::whole(reason.clone()));
                let changed = self.fault != fault;
                (self.hash, self.candidate, self.fault) = (None, None, fault);
                return changed;
            }
        };
        let hash = Some(xxh64(content, 0));
        if self.hash == hash {
            return false;
        }
        self.hash = hash;
        let format = Format::of_path(Path::new(path)).unwrap_or(Format::Yaml);
        (self.candidate, self.fault) = match parse(format, content) {
            Ok(content) => (Some(content), None),
            Err(fault) => (None, Some(fault)),
        };
        true
    }

    fn served(&self) -> &[Located] {
        self.good.as_ref().map_or(&[], |content| &content.resources)
    }

    fn tell(&self, path: &str, notices: &mut Vec<String>) {
        match &self.fault {
            Some(fault) => {
                let instead = if self.good.is_some() {
                    "its last good version stays"
                } else {
                    "nothing of it is served"
                };
                notices.push(format!("{path}:{fault}; {instead}"));
            }
            None => {
                let count = self.served().len();
                notices
                    .push(format!("{path}: {count} {}", if count == 1 { "resource" } else { "resources" }));
                let warnings = self.good.iter().flat_map(|content| &content.warnings);
                notices.extend(warnings.map(|warning| format!("{path}:{warning} (warning)")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Files, Folder};

    fn cluster(name: &str, timeout: u32) -> String {
        format!(
            "'@type': type.googleapis.com/envoy.config.cluster.v3.Cluster\nname: {name}\nconnect_timeout: {timeout}s\n"
        )
    }

    fn files(content: &[(&str, &str)]) -> Files {
        content.iter().map(|(path, text)| ((*path).to_owned(), Ok(text.as_bytes().to_vec()))).collect()
    }

    /// What is served, and what the console says.
    fn update(folder: &mut Folder, content: &[(&str, &str)]) -> (Option<String>, Vec<String>) {
        let change = folder.update(&files(content), |path| path.to_owned());
        let served = change.snapshot.map(|snapshot| {
            let names: Vec<&str> =
                snapshot.types().flat_map(|(_, resources)| resources.keys()).map(|name| &**name).collect();
            names.join(" ")
        });
        (served, change.notices)
    }

    #[test]
    fn bad_file_keeps_its_last_good_version() {
        let mut folder = Folder::default();
        let (a, b) = (cluster("a", 1), cluster("b", 1));
        assert_eq!(update(&mut folder, &[("1.yaml", &a), ("2.yaml", &b)]).0.unwrap(), "a b");
        let (served, notices) = update(&mut folder, &[("1.yaml", &cluster("a", 0)), ("2.yaml", &b)]);
        assert_eq!(served, None);
        assert_eq!(
            notices,
            ["1.yaml:3:1: connect_timeout: Proto constraint validation failed \
              (ClusterValidationError.ConnectTimeout: value must be greater than 0s); its last good version stays"]
        );
        assert_eq!(update(&mut folder, &[("1.yaml", &cluster("a", 0)), ("2.yaml", &b)]), (None, vec![]));
        // The others go on.
        assert_eq!(update(&mut folder, &[("1.yaml", "["), ("2.yaml", &cluster("c", 1))]).0.unwrap(), "a c");
        assert_eq!(folder.status()["1.yaml"].fault.as_ref().map(|fault| fault.line), Some(2));
        assert_eq!(update(&mut folder, &[("2.yaml", &cluster("c", 1))]).0.unwrap(), "c");
    }

    #[test]
    fn a_name_belongs_to_one_file() {
        let mut folder = Folder::default();
        let a = cluster("a", 1);
        // At first, the first has it.
        let (served, notices) = update(&mut folder, &[("1.yaml", &a), ("2.yaml", &a)]);
        assert_eq!(served.unwrap(), "a");
        assert!(
            notices.contains(&"2.yaml:1:1: Cluster a is in 1.yaml, too; nothing of it is served".to_owned())
        );
        // Given up here, it goes there: in one step, for the proxy never sees it gone.
        assert_eq!(update(&mut folder, &[("1.yaml", &cluster("b", 1)), ("2.yaml", &a)]).0.unwrap(), "a b");
        // Later, who has it keeps it, whatever the order.
        let (served, notices) =
            update(&mut folder, &[("0.yaml", &a), ("1.yaml", &cluster("b", 1)), ("2.yaml", &a)]);
        assert_eq!(served, None);
        assert_eq!(notices, ["0.yaml:1:1: Cluster a is in 2.yaml, too; nothing of it is served"]);
        // Two files swap their names.
        let (served, _) = update(&mut folder, &[("1.yaml", &a), ("2.yaml", &cluster("b", 1))]);
        assert_eq!(served.unwrap(), "a b");
    }

    #[test]
    fn an_alias_is_a_name() {
        let host = |name: &str, aliases: &str| {
            format!(
                "'@type': type.googleapis.com/envoy.service.discovery.v3.Resource\nname: {name}\n\
                 aliases: [{aliases}]\nresource:\n  '@type': type.googleapis.com/envoy.config.route.v3.VirtualHost\n  \
                 name: {name}\n  domains: [{name}.example]\n"
            )
        };
        let mut folder = Folder::default();
        let first = host("rc/a", "rc/x");
        let (served, notices) = update(&mut folder, &[("1.yaml", &first), ("2.yaml", &host("rc/b", "rc/x"))]);
        assert_eq!(served.unwrap(), "rc/a");
        let expected = "2.yaml:4:1: VirtualHost rc/x is in 1.yaml, too; nothing of it is served";
        assert!(notices.contains(&expected.to_owned()), "{notices:?}");
        // Nor may an alias hide another one's own name.
        let (served, notices) = update(&mut folder, &[("1.yaml", &first), ("2.yaml", &host("rc/x", "rc/y"))]);
        assert_eq!((served, notices), (None, vec![expected.to_owned()]));
        let twice = host("rc/b", "rc/y, rc/y");
        let (_, notices) = update(&mut folder, &[("1.yaml", &first), ("2.yaml", &twice)]);
        let expected = "2.yaml:4:1: a second VirtualHost rc/y in this file; nothing of it is served";
        assert_eq!(notices, [expected]);
    }
}

//! `docs/support.md`, generated from the ledger.

use std::fs;

use crate::run::root;

/// Writes the table, or fails when the one in the tree is not what the ledger says.
pub(crate) fn run(write: bool) -> Result<(), String> {
    let path = root().join("docs/support.md");
    let fresh = waystation_schema::ledger::support_markdown();
    if write {
        fs::create_dir_all(root().join("docs")).map_err(|error| error.to_string())?;
        return fs::write(&path, fresh).map_err(|error| format!("{}: {error}", path.display()));
    }
    match fs::read_to_string(&path) {
        Ok(current) if current == fresh => Ok(()),
        Ok(_) => Err("docs/support.md is stale: run `cargo xtask support --write`".to_owned()),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

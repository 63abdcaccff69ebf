//! Header mutations of one level.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::HeaderValueOption;
use waystation_format::HeaderMutations;
use waystation_schema::{At, ConfigError};

/// The header mutations of one level; nothing when the level has none, so that ten thousand routes without any cost
/// no memory and no time.
#[derive(Clone, Debug, Default)]
pub struct Mutations(Option<Arc<HeaderMutations>>);

impl Mutations {
    /// Compiles `<direction>_headers_to_add` and `<direction>_headers_to_remove`.
    pub(crate) fn compile(
        add: &[HeaderValueOption],
        remove: &[String],
        direction: &str,
    ) -> Result<Self, ConfigError> {
        if add.is_empty() && remove.is_empty() {
            return Ok(Self(None));
        }
        let mutations = HeaderMutations::compile(add, remove).at(|| format!("{direction}_headers_to_add"))?;
        Ok(Self(Some(Arc::new(mutations))))
    }

    /// The mutations, if there are any.
    pub fn get(&self) -> Option<&HeaderMutations> {
        self.0.as_deref()
    }
}

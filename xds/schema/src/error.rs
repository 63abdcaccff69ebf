use std::fmt;

/// Why a piece of configuration was refused, and where it stands.
///
/// The path is built from the inside out: the code that finds the fault states the reason, each caller on the
/// way up adds its own segment with [`ConfigError::at`]. The text ends up verbatim in the NACK, on the console
/// and in the admin pages.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ConfigError {
    /// Segments from the innermost outwards, e.g. `["timeout", "route", "routes[3]"]`.
    segments: Vec<String>,
    reason: String,
}

impl ConfigError {
    /// An error at the place where it was found; callers add the path.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { segments: Vec::new(), reason: reason.into() }
    }

    /// An error about the direct field `field`.
    pub fn field(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::new(reason).at(field)
    }

    /// Adds the enclosing segment: a field name, or `field[key]` for an element of a list.
    #[must_use]
    pub fn at(mut self, segment: impl Into<String>) -> Self {
        self.segments.push(segment.into());
        self
    }

    /// The same place with another reason.
    #[must_use]
    pub(crate) fn with_reason(mut self, change: impl FnOnce(String) -> String) -> Self {
        self.reason = change(self.reason);
        self
    }

    /// The reason without the path.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The path from the outermost message, e.g. `filter_chains[0].filters[hcm].route_config`.
    pub fn path(&self) -> String {
        let mut path = String::new();
        for segment in self.segments.iter().rev() {
            // An element of a list that is itself the field has no name: `headers[2]`.
            if !path.is_empty() && !segment.starts_with('[') {
                path.push('.');
            }
            path.push_str(segment);
        }
        path
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.segments.is_empty() {
            f.write_str(&self.reason)
        } else {
            write!(f, "{}: {}", self.path(), self.reason)
        }
    }
}

impl std::error::Error for ConfigError {}

/// Adds a path segment to the error of a conversion.
pub trait At<T> {
    /// Adds the enclosing segment; it is only built when there is an error.
    fn at<S: Into<String>>(self, segment: impl FnOnce() -> S) -> Result<T, ConfigError>;
}

impl<T> At<T> for Result<T, ConfigError> {
    fn at<S: Into<String>>(self, segment: impl FnOnce() -> S) -> Result<T, ConfigError> {
        self.map_err(|error| error.at(segment()))
    }
}

#[cfg(test)]
mod tests {
    use super::{At, ConfigError};

    #[test]
    fn path_reads_from_the_outside_in() {
        let inner: Result<(), _> = Err(ConfigError::field("timeout", "must be positive"));
        let error = inner.at(|| "route").at(|| format!("routes[{}]", 3)).unwrap_err();
        assert_eq!(error.to_string(), "routes[3].route.timeout: must be positive");
        assert_eq!(error.path(), "routes[3].route.timeout");
        let listed = ConfigError::field("[2]", "is too long").at("headers_to_add").at("route");
        assert_eq!(listed.path(), "route.headers_to_add[2]");
    }
}

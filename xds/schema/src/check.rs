//! The walk with a policy: what is an error, what a warning.

use crate::error::ConfigError;
use crate::message::Message;
use crate::walk::{Finding, Place, Visitor, walk};

/// How strict a check is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Policy {
    /// Fields and types that the schema or the ledger does not know are warnings, not errors: Envoy's
    /// `--allow-unknown-static-fields`, and its default for dynamic resources. Not so the fields of a message that the ledger
    /// calls strict.
    pub allow_unknown: bool,
    /// Deprecated fields that Envoy refuses by default are warnings, not errors: the runtime key
    /// `envoy.features.enable_all_deprecated_features`.
    pub allow_disallowed: bool,
}

/// What a check accepted and a user should know, each line with its path.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Report {
    /// Unknown fields and types, with [`Policy::allow_unknown`].
    pub unknown: Vec<String>,
    /// Deprecated fields and values.
    pub deprecated: Vec<String>,
    /// Fields that are accepted and have no effect.
    pub ignored: Vec<String>,
}

/// Walks `bytes`, a `message` on the wire, and returns the first error or a report.
pub fn check(message: Message, bytes: &[u8], policy: Policy) -> Result<Report, ConfigError> {
    let mut checker = Checker { policy, report: Report::default() };
    walk(message, bytes, &mut checker)?;
    Ok(checker.report)
}

struct Checker {
    policy: Policy,
    report: Report,
}

impl Visitor for Checker {
    fn found(&mut self, place: &Place<'_>, finding: &Finding<'_>) -> Result<(), ConfigError> {
        let error = place.error(finding.to_string());
        let list = match finding {
            Finding::Malformed(_)
            | Finding::Constraint(_)
            | Finding::Rejected { .. }
            | Finding::RejectedType { .. }
            | Finding::TypedStruct(_) => return Err(error),
            Finding::UnknownField { message, .. } if message.is_strict() => return Err(error),
            Finding::UnknownType { .. } | Finding::UnknownField { .. } | Finding::Unclaimed => {
                if !self.policy.allow_unknown {
                    return Err(error);
                }
                &mut self.report.unknown
            }
            Finding::Deprecated { field, value, .. } => {
                let disallowed = value.map_or_else(|| field.is_disallowed(), |value| value.is_disallowed());
                if disallowed && !self.policy.allow_disallowed {
                    return Err(error);
                }
                &mut self.report.deprecated
            }
            Finding::Ignored { .. } => &mut self.report.ignored,
        };
        list.push(error.to_string());
        Ok(())
    }
}

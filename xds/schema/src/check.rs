//! The walk with a policy: what is an error, what a warning.

use crate::error::ConfigError;
use crate::message::Message;
use crate::walk::{Finding, Place, Visitor, walk};

/// How strict a check is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Policy {
    /// Fields and types that the schema or the ledger does not know are warnings, not errors: Envoy's
    /// `--allow-unknown-static-fields`, and its default for dynamic resources.
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
        let unknown = self.policy.allow_unknown;
        let (list, reason) = match finding {
            Finding::Malformed(error) => return Err(place.error(format!("not a protobuf message: {error}"))),
            Finding::Constraint(violation) => return Err(place.error(violation.to_string())),
            Finding::Rejected { reason } => return Err(place.error(format!("not supported: {reason}"))),
            Finding::TypedStruct(error) => return Err(place.error(error.to_string())),
            Finding::RejectedType { message, reason } if reason.is_empty() => {
                return Err(place.error(format!("{} is not accepted here", message.full_name())));
            }
            Finding::RejectedType { message, reason } => {
                return Err(place.error(format!("{} is not supported: {reason}", message.full_name())));
            }
            Finding::UnknownType { url } => {
                let reason = format!("unknown type {url:?}");
                if !unknown {
                    return Err(place.error(reason));
                }
                (&mut self.report.unknown, reason)
            }
            Finding::UnknownField { message, number } => {
                let reason = format!("{} has no field with number {number}", message.full_name());
                if !unknown {
                    return Err(place.error(reason));
                }
                (&mut self.report.unknown, reason)
            }
            Finding::Unclaimed => {
                let reason = "not supported: the ledger has no entry for it".to_owned();
                if !unknown {
                    return Err(place.error(reason));
                }
                (&mut self.report.unknown, reason)
            }
            Finding::Deprecated { message, field, value } => {
                let disallowed = value.map_or_else(|| field.is_disallowed(), |value| value.is_disallowed());
                let reason = match value {
                    None => {
                        format!("Using deprecated option '{}.{}'", message.full_name(), field.name())
                    }
                    Some(value) => format!(
                        "Using deprecated value {} for enum '{}.{}'",
                        value.name(),
                        message.full_name(),
                        field.name()
                    ),
                };
                if disallowed && !self.policy.allow_disallowed {
                    return Err(place.error(format!("{reason}, which is refused by default")));
                }
                (&mut self.report.deprecated, reason)
            }
            Finding::Ignored { reason } => (&mut self.report.ignored, format!("ignored: {reason}")),
        };
        list.push(place.error(reason).to_string());
        Ok(())
    }
}

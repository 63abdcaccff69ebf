//! Headers to add, overwrite and remove.

use std::borrow::Cow;

use envoy_types::pb::envoy::config::common::mutation_rules::v3 as rules;
use envoy_types::pb::envoy::config::core::v3 as core;
use smallvec::SmallVec;
use waystation_http::{HeaderName, Headers, Known, is_valid_value};
use waystation_matchers::StringMatcher;
use waystation_schema::{At, ConfigError};

use crate::formatter::{FormatContext, Formatter};

/// Compiled `*_headers_to_add` and `*_headers_to_remove` of one level.
#[derive(Clone, Debug, Default)]
pub struct HeaderMutations {
    remove: Box<[HeaderName]>,
    add: Box<[Addition]>,
}

/// A compiled list of `envoy.config.common.mutation_rules.v3.HeaderMutation`, done one after the other.
#[derive(Clone, Debug, Default)]
pub struct HeaderMutationList(Box<[Mutation]>);

#[derive(Clone, Debug)]
enum Mutation {
    Remove(HeaderName),
    RemoveOnMatch(StringMatcher),
    Add(Addition),
}

#[derive(Clone, Debug)]
struct Addition {
    name: HeaderName,
    value: Value,
    action: Action,
    keep_empty: bool,
}

#[derive(Clone, Debug)]
enum Value {
    Literal(Box<[u8]>),
    Format(Formatter),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Action {
    Append,
    AddIfAbsent,
    Overwrite,
    OverwriteIfExists,
}

/// What the changed headers are to the operators in the values. They are read as they were before the change, in place
/// of what the context has in that role.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    Request,
    Response,
    Other,
}

impl HeaderMutations {
    /// Compiles the two lists; errors name the element (`[2].header.value`).
    pub fn compile(add: &[core::HeaderValueOption], remove: &[String]) -> Result<Self, ConfigError> {
        let addition = |(index, option)| Addition::compile(option).at(|| format!("[{index}]"));
        let removal = |(index, name): (usize, &String)| removable(name).at(|| format!("[{index}]"));
        Ok(Self {
            remove: remove.iter().enumerate().map(removal).collect::<Result<_, _>>()?,
            add: add.iter().enumerate().map(addition).collect::<Result<_, _>>()?,
        })
    }

    /// Compiles headers that take the place of those of their names, as side calls get them (`initial_metadata`,
    /// `headers_to_add`).
    pub fn overwriting(headers: &[core::HeaderValue]) -> Result<Self, ConfigError> {
        let option = |header: &core::HeaderValue| core::HeaderValueOption {
            header: Some(header.clone()),
            append_action: core::header_value_option::HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
            ..core::HeaderValueOption::default()
        };
        Self::compile(&headers.iter().map(option).collect::<Vec<_>>(), &[])
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }

    /// Applies removals, then additions, to headers that are neither the request's nor the response's head, such as
    /// trailers.
    pub fn apply(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        self.apply_as(headers, cx, Role::Other);
    }

    /// As [`apply`](Self::apply) for the request head, which `%REQ()%` reads as it is: leave `cx.request` unset.
    pub fn apply_to_request(&self, request: &mut Headers, cx: &FormatContext<'_>) {
        self.apply_as(request, cx, Role::Request);
    }

    /// As [`apply`](Self::apply) for the response head, which `%RESP()%` reads as it is: leave `cx.response` unset.
    pub fn apply_to_response(&self, response: &mut Headers, cx: &FormatContext<'_>) {
        self.apply_as(response, cx, Role::Response);
    }

    /// Envoy removes first; then it decides on all additions by the headers as they are now; then it overwrites; then
    /// it appends.
    fn apply_as(&self, headers: &mut Headers, cx: &FormatContext<'_>, role: Role) {
        for name in &self.remove {
            headers.remove(name);
        }
        match &*self.add {
            [] => {}
            // Nothing to keep apart, nothing to remember.
            [only] => only.apply(headers, cx, role),
            additions => apply_together(additions, headers, cx, role),
        }
    }
}

/// An addition's value, if it is wanted.
type Decided<'a> = Option<Cow<'a, [u8]>>;

fn apply_together(additions: &[Addition], headers: &mut Headers, cx: &FormatContext<'_>, role: Role) {
    let decided: SmallVec<[Decided<'_>; 8]> =
        additions.iter().map(|addition| addition.decide(headers, cx, role)).collect();
    for overwrites in [true, false] {
        for (addition, value) in additions.iter().zip(&decided) {
            if let Some(value) = value
                && addition.action.overwrites() == overwrites
            {
                addition.write(headers, value, role);
            }
        }
    }
}

impl HeaderMutationList {
    /// Compiles the list; errors name the element (`[2].append.header.value`).
    pub fn compile(protos: &[rules::HeaderMutation]) -> Result<Self, ConfigError> {
        use rules::header_mutation::Action as Proto;
        let compile = |(index, proto): (usize, &rules::HeaderMutation)| {
            let rules::HeaderMutation { action } = proto;
            let mutation = match action {
                None => Err(ConfigError::field("action", "is required")),
                Some(Proto::Remove(name)) => removable(name).map(Mutation::Remove).at(|| "remove"),
                Some(Proto::Append(option)) => Addition::compile(option).map(Mutation::Add).at(|| "append"),
                Some(Proto::RemoveOnMatch(rules::header_mutation::RemoveOnMatch { key_matcher })) => {
                    key_matcher
                        .as_ref()
                        .ok_or_else(|| ConfigError::new("is required"))
                        .and_then(StringMatcher::compile)
                        .map(Mutation::RemoveOnMatch)
                        .at(|| "remove_on_match.key_matcher")
                }
            };
            mutation.at(|| format!("[{index}]"))
        };
        Ok(Self(protos.iter().enumerate().map(compile).collect::<Result<_, _>>()?))
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Changes headers that are neither the request's nor the response's head, such as trailers.
    pub fn apply(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        self.apply_as(headers, cx, Role::Other);
    }

    /// Changes the request head, which `%REQ()%` reads as it is: leave `cx.request` unset.
    pub fn apply_to_request(&self, request: &mut Headers, cx: &FormatContext<'_>) {
        self.apply_as(request, cx, Role::Request);
    }

    /// Changes the response head, which `%RESP()%` reads as it is: leave `cx.response` unset.
    pub fn apply_to_response(&self, response: &mut Headers, cx: &FormatContext<'_>) {
        self.apply_as(response, cx, Role::Response);
    }

    fn apply_as(&self, headers: &mut Headers, cx: &FormatContext<'_>, role: Role) {
        for mutation in &self.0 {
            match mutation {
                Mutation::Remove(name) => {
                    headers.remove(name);
                }
                Mutation::RemoveOnMatch(matcher) => {
                    headers.retain(|name, _| name.is_pseudo() || !matcher.is_match(name.as_bytes()));
                }
                Mutation::Add(addition) => addition.apply(headers, cx, role),
            }
        }
    }
}

impl Addition {
    fn compile(proto: &core::HeaderValueOption) -> Result<Self, ConfigError> {
        #[expect(deprecated, reason = "configurations still use append")]
        let core::HeaderValueOption { header, append, append_action, keep_empty_value } = proto;
        let header = header.as_ref().ok_or_else(|| ConfigError::field("header", "is required"))?;
        let core::HeaderValue { key, value, raw_value } = header;
        let action = match (append, append_action) {
            (Some(append), 0) if append.value => Action::Append,
            (Some(_), 0) => Action::Overwrite,
            (Some(_), _) => {
                return Err(ConfigError::field(
                    "append_action",
                    "Both append and append_action are set and it's not allowed",
                ));
            }
            (None, 0) => Action::Append,
            (None, 1) => Action::AddIfAbsent,
            (None, 2) => Action::Overwrite,
            (None, 3) => Action::OverwriteIfExists,
            (None, _) => return Err(ConfigError::field("append_action", "is not a known value")),
        };
        let value = match (&**value, &**raw_value) {
            (value, []) => Value::compile(value)
                .at(|| "value")
                .and_then(|value| value.checked("value"))
                .at(|| "header")?,
            ("", raw) => Value::Literal(raw.into()).checked("raw_value").at(|| "header")?,
            _ => {
                return Err(ConfigError::field("header", "only one of value and raw_value can be set"));
            }
        };
        let name =
            HeaderName::parse(key).map_err(|error| ConfigError::field("header.key", error.to_string()))?;
        if is_routing(&name) {
            return Err(ConfigError::field("header.key", ":-prefixed or host headers may not be modified"));
        }
        Ok(Self { name, value, action, keep_empty: *keep_empty_value })
    }

    fn apply(&self, headers: &mut Headers, cx: &FormatContext<'_>, role: Role) {
        if let Some(value) = self.decide(headers, cx, role) {
            self.write(headers, &value, role);
        }
    }

    fn decide(&self, headers: &Headers, cx: &FormatContext<'_>, role: Role) -> Decided<'_> {
        if !self.is_wanted(headers) {
            return None;
        }
        let value = match &self.value {
            Value::Literal(value) => Cow::Borrowed(&**value),
            Value::Format(formatter) => Cow::Owned(role.format(formatter, headers, cx)),
        };
        self.accepts(&value).then_some(value)
    }

    fn is_wanted(&self, headers: &Headers) -> bool {
        match self.action {
            Action::Append | Action::Overwrite => true,
            Action::AddIfAbsent => !headers.contains(&self.name),
            Action::OverwriteIfExists => headers.contains(&self.name),
        }
    }

    /// A value made of metadata may hold anything; one that could split the message is dropped.
    fn accepts(&self, value: &[u8]) -> bool {
        (self.keep_empty || !value.is_empty()) && is_valid_value(value)
    }

    #[inline]
    fn write(&self, headers: &mut Headers, value: &[u8], role: Role) {
        let known = self.name.as_name().known();
        if self.action.overwrites() {
            // Envoy's header map keeps the place of its inline headers only.
            if !known.is_some_and(|known| role.is_inline(known)) {
                headers.remove(&self.name);
            }
            return headers.set(&self.name, value);
        }
        match known {
            Some(known) if role.is_inline(known) => headers.append_joined(known, ",", value),
            _ => headers.append(&self.name, value),
        }
    }
}

impl Action {
    fn overwrites(self) -> bool {
        matches!(self, Self::Overwrite | Self::OverwriteIfExists)
    }
}

impl Value {
    fn compile(text: &str) -> Result<Self, ConfigError> {
        let formatter = Formatter::compile_omitting_empty(&legacy_arguments(text))?;
        Ok(match formatter.literal() {
            Some(text) => Self::Literal(text.as_bytes().into()),
            None => Self::Format(formatter),
        })
    }

    fn checked(self, field: &str) -> Result<Self, ConfigError> {
        match &self {
            Self::Literal(value) if !is_valid_value(value) => {
                Err(ConfigError::field(field, "must not hold NUL, CR or LF"))
            }
            _ => Ok(self),
        }
    }
}

impl Role {
    fn format(self, formatter: &Formatter, headers: &Headers, cx: &FormatContext<'_>) -> Vec<u8> {
        let cx = match self {
            Self::Request => FormatContext { request: Some(headers), ..*cx },
            Self::Response => FormatContext { response: Some(headers), ..*cx },
            Self::Other => *cx,
        };
        let mut out = Vec::with_capacity(64);
        formatter.write(&cx, &mut out);
        out
    }

    fn is_inline(self, name: Known) -> bool {
        match self {
            Self::Request => name.is_inline_in_request(),
            Self::Response => name.is_inline_in_response(),
            Self::Other => name.is_inline_in_trailers(),
        }
    }
}

/// Whether a header decides where a request goes: not for `*_headers_to_add` to change.
fn is_routing(name: &HeaderName) -> bool {
    name.as_name().is_pseudo() || name.as_name().known() == Some(Known::Host)
}

fn removable(name: &str) -> Result<HeaderName, ConfigError> {
    if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
        return Err(ConfigError::new(":-prefixed or host headers may not be removed"));
    }
    HeaderName::parse(name).map_err(|error| ConfigError::new(error.to_string()))
}

/// Rewrites operators that once had a syntax of their own in header values: `%UPSTREAM_METADATA(["a", "b"])%` and
/// `%DYNAMIC_METADATA(["a", "b"])%` to `(a:b)`, `%PER_REQUEST_STATE(x)%` to `%FILTER_STATE(x:PLAIN)%`.
fn legacy_arguments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("%%") {
            out.push_str("%%");
            rest = after;
        } else if let Some((command, after)) = legacy_command(&rest[1..]) {
            out.push('%');
            out.push_str(&command);
            out.push('%');
            rest = after;
        } else {
            // A command ends at the next percent sign, which must not be taken for the start of one.
            let end = rest[1..].find('%').map_or(rest.len(), |end| end + 2);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        }
    }
    out.push_str(rest);
    out
}

fn legacy_command(text: &str) -> Option<(String, &str)> {
    if let Some(arguments) = text.strip_prefix("PER_REQUEST_STATE(") {
        let (name, after) = arguments.split_once(")%")?;
        return Some((format!("FILTER_STATE({name}:PLAIN)"), after));
    }
    let (name, arguments) = text.split_once('(')?;
    if name != "UPSTREAM_METADATA" && name != "DYNAMIC_METADATA" {
        return None;
    }
    let (arguments, after) = arguments.split_once(")%")?;
    let keys: Vec<String> = serde_json::from_str(arguments.trim()).ok()?;
    Some((format!("{name}({})", keys.join(":")), after))
}

#[cfg(test)]
mod tests;

//! URI templates: `/{country}/videos/{file}.m4s`, to match paths and to rewrite them.

use std::fmt;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use prost::Name;
use regex::bytes;
use waystation_filter_api::wire::{type_name, unpack};
use waystation_schema::{At, ConfigError};

/// Bounds of Envoy's own parser.
const MAX_TEMPLATE: usize = 256;
const MAX_VARIABLES: usize = 5;
const MAX_NAME: usize = 16;

/// What `*` matches: the characters of a path segment (RFC 3986 section 3.3), percent-encoding included.
const SEGMENT: &str = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=*]+";
/// What `**` matches.
const SEGMENTS: &str = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=*/]*";

/// A compiled `UriTemplateMatchConfig.path_template`.
#[derive(Clone)]
pub struct UriTemplate {
    regex: bytes::Regex,
    template: Box<str>,
    /// Group `n + 1` captures variable `n`.
    variables: Box<[Box<str>]>,
    literal_prefix: Box<[u8]>,
}

/// A compiled `UriTemplateRewriteConfig.path_template_rewrite`.
#[derive(Clone, Debug)]
pub struct UriRewrite {
    template: UriTemplate,
    parts: Box<[Part]>,
}

#[derive(Clone, Debug)]
enum Part {
    Literal(Box<str>),
    Group(usize),
}

impl UriTemplate {
    /// Compiles the text form.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn compile(template: &str) -> Result<Self, ConfigError> {
        check_start(template)?;
        let mut parser = Parser { rest: template, regex: r"\A".into(), variables: Vec::new(), ended: false };
        parser.path()?;
        let regex = bytes::Regex::new(&format!(r"{}\z", parser.regex))
            .map_err(|error| ConfigError::new(format!("invalid path template: {error}")))?;
        let literal = template.find(['*', '{']).unwrap_or(template.len());
        Ok(Self {
            regex,
            template: template.into(),
            variables: parser.variables.into(),
            literal_prefix: template.as_bytes()[..literal].into(),
        })
    }

    /// Compiles an extension of the category `envoy.path.match`, of which there is one.
    ///
    /// # Errors
    /// For another extension, or what is wrong with the template.
    pub fn compile_extension(proto: &TypedExtensionConfig) -> Result<Self, ConfigError> {
        let any = proto.typed_config.as_ref();
        let any = any.ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
        let name = type_name(any);
        let compiled = if name == UriTemplateMatchConfig::full_name() {
            let UriTemplateMatchConfig { path_template } = unpack(any)?;
            Self::compile(&path_template).at(|| "path_template")
        } else {
            Err(ConfigError::new(format!(
                "Didn't find a registered implementation for '{}' with type URL: '{name}'",
                proto.name
            )))
        };
        compiled.at(|| "typed_config")
    }

    /// Whether it matches a path without its query.
    pub fn is_match(&self, path: &[u8]) -> bool {
        self.regex.is_match(path)
    }

    /// What every matching path begins with.
    pub fn literal_prefix(&self) -> &[u8] {
        &self.literal_prefix
    }
}

impl fmt::Debug for UriTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("UriTemplate").field(&self.template).finish()
    }
}

impl UriRewrite {
    /// Compiles a rewrite of the paths that `template` matches.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn compile(rewrite: &str, template: &UriTemplate) -> Result<Self, ConfigError> {
        check_start(rewrite)?;
        let mut parts = Vec::new();
        let mut rest = rewrite;
        while !rest.is_empty() {
            let literal = rest.find(['{', '}', '*']).unwrap_or(rest.len());
            if literal > 0 {
                check_literal(&rest[..literal])?;
                parts.push(Part::Literal(rest[..literal].into()));
                rest = &rest[literal..];
                continue;
            }
            let named = rest.strip_prefix('{').and_then(|named| named.split_once('}'));
            let Some((name, after)) = named else {
                return Err(ConfigError::new("only literal text and {name} may stand in a rewrite"));
            };
            let Some(variable) = template.variables.iter().position(|variable| &**variable == name) else {
                return Err(ConfigError::new(format!(
                    "`{name}` is not a variable of `{}`",
                    template.template
                )));
            };
            parts.push(Part::Group(variable + 1));
            rest = after;
        }
        Ok(Self { template: template.clone(), parts: parts.into() })
    }

    /// The new path, if the template matches.
    pub fn rewrite(&self, path: &[u8]) -> Option<Vec<u8>> {
        let captures = self.template.regex.captures(path)?;
        let mut out = Vec::with_capacity(path.len());
        for part in &self.parts {
            match part {
                Part::Literal(text) => out.extend_from_slice(text.as_bytes()),
                Part::Group(group) => {
                    out.extend_from_slice(captures.get(*group).map_or(&[][..], |found| found.as_bytes()))
                }
            }
        }
        Some(out)
    }
}

struct Parser<'a> {
    rest: &'a str,
    regex: String,
    variables: Vec<Box<str>>,
    /// `**` was there: only literal text may follow.
    ended: bool,
}

impl Parser<'_> {
    fn path(&mut self) -> Result<(), ConfigError> {
        let mut after_operator = false;
        while let Some(c) = self.rest.chars().next() {
            if !matches!(c, '*' | '{') {
                self.literal(&['*', '{'])?;
                after_operator = false;
                continue;
            }
            if after_operator {
                return Err(ConfigError::new("operators must be separated by literal text"));
            }
            after_operator = true;
            if c == '*' { self.glob()? } else { self.variable()? }
        }
        Ok(())
    }

    fn literal(&mut self, until: &[char]) -> Result<(), ConfigError> {
        let end = self.rest.find(until).unwrap_or(self.rest.len());
        let (text, rest) = self.rest.split_at(end);
        check_literal(text)?;
        self.regex.push_str(&regex::escape(text));
        self.rest = rest;
        Ok(())
    }

    fn glob(&mut self) -> Result<(), ConfigError> {
        if self.ended {
            return Err(ConfigError::new("`**` must be the last operator"));
        }
        if let Some(rest) = self.rest.strip_prefix("**") {
            self.regex.push_str(SEGMENTS);
            self.ended = true;
            self.rest = rest;
        } else {
            self.regex.push_str(SEGMENT);
            self.rest = &self.rest[1..];
        }
        if self.rest.starts_with('*') {
            return Err(ConfigError::new("operators must be separated by literal text"));
        }
        Ok(())
    }

    fn variable(&mut self) -> Result<(), ConfigError> {
        let Some((body, after)) = self.rest[1..].split_once('}') else {
            return Err(ConfigError::new("`{` without `}`"));
        };
        let (name, pattern) = body.split_once('=').unwrap_or((body, "*"));
        let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic());
        if !starts_well
            || name.len() > MAX_NAME
            || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        {
            return Err(ConfigError::new(format!("`{name}` is not a variable name")));
        }
        if self.variables.iter().any(|variable| &**variable == name) {
            return Err(ConfigError::new(format!("variable `{name}` stands twice")));
        }
        if self.variables.len() == MAX_VARIABLES {
            return Err(ConfigError::new(format!("more than {MAX_VARIABLES} variables")));
        }
        if pattern.is_empty() || pattern.contains('{') {
            return Err(ConfigError::new(format!("`{pattern}` is not a variable's pattern")));
        }
        self.variables.push(name.into());
        self.regex.push('(');
        self.rest = pattern;
        while let Some(c) = self.rest.chars().next() {
            if c == '*' { self.glob()? } else { self.literal(&['*'])? }
        }
        self.regex.push(')');
        self.rest = after;
        Ok(())
    }
}

fn check_start(template: &str) -> Result<(), ConfigError> {
    if !template.starts_with('/') || template.len() > MAX_TEMPLATE {
        return Err(ConfigError::new(format!(
            "must start with `/` and have at most {MAX_TEMPLATE} characters"
        )));
    }
    Ok(())
}

fn check_literal(text: &str) -> Result<(), ConfigError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._~%!$&'()+,;:@=/".contains(c);
    match text.chars().find(|c| !allowed(*c)) {
        Some(c) => Err(ConfigError::new(format!("`{c}` may not stand in a path template"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{UriRewrite, UriTemplate};

    #[test]
    fn the_documented_examples() {
        for (template, path) in [
            ("/videos/*/*/*.m4s", "/videos/123414/hls/1080p5000_00001.m4s"),
            ("/videos/{file}", "/videos/1080p5000_00001.m4s"),
            ("/**.mpd", "/content/123/india/dash/55/manifest.mpd"),
            ("/api/v{version}/users/{id}.json", "/api/v2/users/456.json"),
        ] {
            assert!(UriTemplate::compile(template).unwrap().is_match(path.as_bytes()), "{template}");
        }
        for (template, rewrite, path, expected) in [
            ("/{one}/{two}", "/{two}/{one}", "/cat/dog", "/dog/cat"),
            ("/videos/{language=lang/*}/*", "/{language}", "/videos/lang/en/video.m4s", "/lang/en"),
            (
                "/content/{format}/{lang}/{id}/{file}.vtt",
                "/{lang}/{format}/{file}.vtt",
                "/content/hls/en-us/12345/en_193913.vtt",
                "/en-us/hls/en_193913.vtt",
            ),
        ] {
            let template = UriTemplate::compile(template).unwrap();
            let rewritten = UriRewrite::compile(rewrite, &template).unwrap().rewrite(path.as_bytes());
            assert_eq!(rewritten.as_deref(), Some(expected.as_bytes()));
        }
    }

    #[test]
    fn segments_end_at_slashes_and_faults_are_named() {
        let template = UriTemplate::compile("/a/*/c").unwrap();
        assert!(!template.is_match(b"/a/b/b/c") && !template.is_match(b"/a//c"));
        assert_eq!(template.literal_prefix(), b"/a/");
        for bad in ["a", "/**/*", "/{a}/{a}", "/{a", "/{1a}", "/***", "/{a}{b}", "/{a=}", "/ "] {
            assert!(UriTemplate::compile(bad).is_err(), "{bad}");
        }
        assert!(UriRewrite::compile("/{x}", &template).is_err());
        assert!(UriRewrite::compile("/*", &template).is_err());
    }
}

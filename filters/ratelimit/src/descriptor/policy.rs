//! `RateLimit`: a list of actions, each of which adds an entry to a descriptor.

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::r#type::v3 as types;
use smallvec::SmallVec;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::value::Value;
use waystation_format::Formatter;
use waystation_matchers::MetadataPath;
use waystation_schema::{At as _, ConfigError};

use super::action::{Action, Request, metadata_path, text_of};
use super::{Descriptor, HeadersOption, LimitOverride};

/// The most hits that a request can count for.
const MAX_HITS: u64 = 1_000_000_000;

/// A compiled list of `RateLimit`s.
#[derive(Debug, Default)]
pub struct Policies(Box<[Policy]>);

/// A compiled `RateLimit`.
#[derive(Debug)]
pub struct Policy {
    /// Only filters of the same stage apply it.
    pub stage: u32,
    /// The name under which runtime disables it, if it has one.
    pub disable_key: Option<Box<str>>,
    /// Whether it is applied when the stream is over rather than to the request.
    pub on_stream_done: bool,
    actions: Box<[Action]>,
    limit: Option<Limit>,
    hits: Option<HitsAddend>,
    headers: HeadersOption,
}

/// Where a list of policies stands, which decides what they may say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// A route or virtual host. All its requests count for one hit: Envoy knows no `hits_addend` there.
    Route,
    /// A filter's own list, which has neither stages nor limit overrides.
    LocalFilter,
}

#[derive(Debug)]
enum Limit {
    Metadata(MetadataPath),
    Fixed(LimitOverride),
}

/// How many hits a request counts for.
#[derive(Debug)]
pub struct HitsAddend {
    amount: Amount,
    gives_back: bool,
}

#[derive(Debug)]
enum Amount {
    Fixed(u64),
    /// One command operator, which must come to a number.
    Formatted(Formatter),
}

impl Policies {
    /// Compiles a list that stands at `place`.
    ///
    /// # Errors
    /// When one of them is malformed, or says what it may not say there; the error names it.
    pub fn compile(
        protos: &[pb::RateLimit],
        place: Place,
        field: &str,
        runtime: &Runtime,
    ) -> Result<Self, ConfigError> {
        let compile = |(i, proto)| Policy::compile(proto, place, runtime).at(|| format!("{field}[{i}]"));
        Ok(Self(protos.iter().enumerate().map(compile).collect::<Result<_, _>>()?))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The policies, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Policy> {
        self.0.iter()
    }
}

impl Policy {
    fn compile(proto: &pb::RateLimit, place: Place, runtime: &Runtime) -> Result<Self, ConfigError> {
        let pb::RateLimit {
            stage,
            disable_key,
            actions,
            limit,
            hits_addend,
            apply_on_stream_done,
            x_ratelimit_option: _,
        } = proto;
        let hits = hits_addend.as_ref().map(HitsAddend::compile).transpose()?;
        let hits = hits.filter(|_| place == Place::LocalFilter);
        if place == Place::LocalFilter {
            if stage.is_some() || !disable_key.is_empty() {
                return Err(ConfigError::new("'stage' field and 'disable_key' field are not supported"));
            }
            if limit.is_some() {
                return Err(ConfigError::new("'limit' field is not supported"));
            }
        }
        let action = |(i, proto)| Action::compile(proto, runtime).at(|| format!("actions[{i}]"));
        Ok(Self {
            stage: stage.map_or(0, |stage| stage.value),
            disable_key: (!disable_key.is_empty()).then(|| disable_key.as_str().into()),
            on_stream_done: *apply_on_stream_done,
            actions: actions.iter().enumerate().map(action).collect::<Result<_, _>>()?,
            limit: limit.as_ref().map(Limit::compile).transpose().at(|| "limit")?,
            hits,
            headers: match proto.x_ratelimit_option() {
                pb::rate_limit::XRateLimitOption::Unspecified => HeadersOption::Inherit,
                pb::rate_limit::XRateLimitOption::Off => HeadersOption::Off,
                pb::rate_limit::XRateLimitOption::DraftVersion03 => HeadersOption::On,
            },
        })
    }

    /// The request's descriptor; nothing when an action has no entry to add.
    pub fn descriptor(&self, request: &Request<'_>) -> Option<Descriptor> {
        let mut descriptor = Descriptor { headers: self.headers, ..Descriptor::default() };
        for action in &self.actions {
            action.append(request, &mut descriptor.entries)?;
        }
        if let Some(hits) = &self.hits {
            descriptor.hits = Some(hits.amount(request)?);
            descriptor.gives_back = hits.gives_back;
        }
        descriptor.limit = self.limit.as_ref().and_then(|limit| limit.get(request));
        Some(descriptor)
    }
}

impl Limit {
    fn compile(proto: &pb::rate_limit::Override) -> Result<Self, ConfigError> {
        use pb::rate_limit::r#override::OverrideSpecifier as Specifier;
        match &proto.override_specifier {
            Some(Specifier::DynamicMetadata(source)) => {
                let path = metadata_path(source.metadata_key.as_ref());
                Ok(Self::Metadata(path.at(|| "metadata_key").at(|| "dynamic_metadata")?))
            }
            Some(Specifier::RateLimit(limit)) => Ok(Self::Fixed(LimitOverride {
                requests_per_unit: limit.requests_per_unit,
                unit: limit.unit,
            })),
            None => Err(ConfigError::field("override_specifier", "is required")),
        }
    }

    /// The limit; what metadata do not say properly is none.
    fn get(&self, request: &Request<'_>) -> Option<LimitOverride> {
        match self {
            Self::Fixed(limit) => Some(*limit),
            Self::Metadata(path) => {
                let value = path.find(&request.info.metadata)?;
                let Value::Number(requests) = value.at(&["requests_per_unit"])? else { return None };
                let unit = types::RateLimitUnit::from_str_name(value.at(&["unit"])?.as_str()?)?;
                Some(LimitOverride { requests_per_unit: *requests as u32, unit: unit as i32 })
            }
        }
    }
}

impl HitsAddend {
    fn compile(proto: &pb::rate_limit::HitsAddend) -> Result<Self, ConfigError> {
        let pb::rate_limit::HitsAddend { number, format, is_negative_hits } = proto;
        let amount = match (number, format.as_str()) {
            (Some(number), "") => Amount::Fixed(number.value),
            (None, format) if !format.is_empty() => {
                let formatter =
                    Formatter::compile_omitting_empty(format).at(|| "format").at(|| "hits_addend")?;
                if !formatter.is_one_operator() {
                    return Err(ConfigError::new("hits_addend format must contain exactly one substitution"));
                }
                Amount::Formatted(formatter)
            }
            _ => return Err(ConfigError::new("hits_addend must contain either a format or a number")),
        };
        Ok(Self { amount, gives_back: *is_negative_hits })
    }

    /// The number of hits; nothing when what was to be one is none.
    fn amount(&self, request: &Request<'_>) -> Option<u64> {
        match &self.amount {
            Amount::Fixed(number) => Some(*number),
            Amount::Formatted(formatter) => {
                let text = text_of(formatter, request);
                str::from_utf8(&text).ok()?.parse().ok().filter(|hits| *hits <= MAX_HITS)
            }
        }
    }
}

/// Descriptors of one request: few, so they are kept in place.
pub(crate) type Descriptors = SmallVec<[Descriptor; 2]>;

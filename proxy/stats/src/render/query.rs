//! The query string of `/stats` and `/stats/prometheus`.

use regex::Regex;

use super::{BucketMode, Format, Options, StatType};

/// A parsed query.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// How to render.
    pub format: Format,
    /// What to render.
    pub options: Options,
}

impl Query {
    /// Parses the decoded parameters of `/stats`. The error is the body of a 400 answer, in Envoy's words.
    pub fn parse<'a>(parameters: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, String> {
        let mut query = Self::default();
        let mut seen: Vec<&str> = Vec::new();
        for (name, value) in parameters {
            // As in Envoy the first of a name counts.
            if !seen.contains(&name) {
                seen.push(name);
                query.apply(name, value)?;
            }
        }
        query.check()
    }

    /// As [`Query::parse`], for `/stats/prometheus`.
    pub fn parse_prometheus<'a>(
        parameters: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, String> {
        let mut query = Self::parse(parameters.into_iter().filter(|(name, _)| *name != "format"))?;
        query.format = Format::Prometheus;
        query.check()
    }

    fn apply(&mut self, name: &str, value: &str) -> Result<(), String> {
        let options = &mut self.options;
        match name {
            "usedonly" => options.used_only = true,
            "text_readouts" => options.text_readouts = true,
            "invert_filter" => options.invert_filter = true,
            // Empty is as good as absent: what a form sends whose field was left alone.
            "filter" | "format" | "type" | "histogram_buckets" | "hidden" if value.is_empty() => {}
            "filter" => {
                let regex = Regex::new(value);
                options.filter =
                    Some(regex.map_err(|error| format!("Invalid re2 regex: {}", short_reason(&error)))?);
            }
            "format" => {
                self.format = match value {
                    "text" => Format::Text,
                    "json" => Format::Json,
                    "prometheus" => Format::Prometheus,
                    "html" => Format::Html,
                    "active-html" => Format::ActiveHtml,
                    _ => {
                        return Err("usage: /stats?format=(html|active-html|json|prometheus|text)\n\n".into());
                    }
                };
            }
            "type" => {
                options.only = match value {
                    "All" => None,
                    "Counters" => Some(StatType::Counters),
                    "Gauges" => Some(StatType::Gauges),
                    "Histograms" => Some(StatType::Histograms),
                    "TextReadouts" => Some(StatType::TextReadouts),
                    _ => return Err("invalid &type= param".into()),
                };
            }
            "histogram_buckets" => {
                options.buckets = match value {
                    "none" => BucketMode::Unset,
                    "cumulative" => BucketMode::Cumulative,
                    "disjoint" => BucketMode::Disjoint,
                    "detailed" => BucketMode::Detailed,
                    "summary" => BucketMode::Summary,
                    "prometheusnative" => {
                        return Err("unsupported prometheusnative histogram type when not using protobuf \
                                    exposition format"
                            .into());
                    }
                    _ => {
                        return Err("usage: /stats?histogram_buckets=(cumulative|disjoint|detailed|summary|\
                                    prometheusnative)\n"
                            .into());
                    }
                };
            }
            "hidden" => {
                options.hidden_only = match value {
                    "include" | "exclude" => false,
                    "only" => true,
                    _ => return Err("usage: /stats?hidden=(include|only|exclude)\n\n".into()),
                };
            }
            _ => {}
        }
        Ok(())
    }

    fn check(self) -> Result<Self, String> {
        let disjointed = matches!(self.options.buckets, BucketMode::Disjoint | BucketMode::Detailed);
        if self.format == Format::Prometheus && disjointed {
            return Err(UNSUPPORTED_BUCKETS.into());
        }
        Ok(self)
    }
}

/// What is wrong with an expression, on one line: the ones before the last say where.
pub fn short_reason(error: &regex::Error) -> String {
    let text = error.to_string();
    text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

const UNSUPPORTED_BUCKETS: &str = "unsupported prometheus histogram bucket mode";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_values_get_envoys_answers() {
        let error = |name, value| Query::parse([(name, value)]).unwrap_err();
        assert_eq!(error("type", "bogus"), "invalid &type= param");
        assert_eq!(
            error("format", "bogus"),
            "usage: /stats?format=(html|active-html|json|prometheus|text)\n\n"
        );
        assert_eq!(
            error("histogram_buckets", "bogus"),
            "usage: /stats?histogram_buckets=(cumulative|disjoint|detailed|summary|prometheusnative)\n"
        );
        assert_eq!(error("filter", "("), "Invalid re2 regex: unclosed group");
        assert_eq!(error("hidden", "bogus"), "usage: /stats?hidden=(include|only|exclude)\n\n");
        assert_eq!(
            Query::parse_prometheus([("histogram_buckets", "detailed")]).unwrap_err(),
            "unsupported prometheus histogram bucket mode"
        );
    }

    #[test]
    fn the_first_of_a_name_counts_and_empty_ones_do_not() {
        let query = Query::parse([("type", "Gauges"), ("type", "bogus"), ("format", "")]).unwrap();
        assert_eq!((query.options.only, query.format), (Some(StatType::Gauges), Format::Text));
    }

    #[test]
    fn the_prometheus_path_wins_over_the_format() {
        let query = Query::parse_prometheus([("format", "bogus"), ("usedonly", "")]).unwrap();
        assert_eq!(query.format, Format::Prometheus);
        assert!(query.options.used_only);
    }
}

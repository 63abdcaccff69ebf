//! `/stats?format=json`: `{"stats":[{"name":..,"value":..},..,{"histograms":..}]}`.

use std::io::Write as _;
use std::sync::Arc;

use super::{BucketMode, Options, Section, Walk, numbers};
use crate::cells::{Cells, Leaf};
use crate::histogram::{Bins, QUANTILES, Summary};
use crate::store::{Kind, StoreInner, Value};

pub(super) struct Json {
    walk: Walk,
    state: State,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Nothing written yet.
    Start,
    /// `{"stats":[` written.
    Empty,
    /// At least one scalar written.
    Scalars,
    /// The histograms object is open.
    Histograms,
    Done,
}

impl Json {
    pub(super) fn new(store: &Arc<StoreInner>, options: Options) -> Self {
        Self { walk: Walk::new(store, options), state: State::Start }
    }

    /// Appends the next stat; false at the end.
    pub(super) fn step(&mut self, out: &mut Vec<u8>) -> bool {
        match self.state {
            State::Done => return false,
            State::Start => {
                out.extend_from_slice(b"{\"stats\":[");
                self.state = State::Empty;
            }
            State::Empty | State::Scalars | State::Histograms => {}
        }
        let buckets = self.walk.options.buckets;
        let in_histograms = self.walk.section == Some(Section::Histograms);
        let state = &mut self.state;
        let more = self.walk.step(|cells, leaf, name| {
            if *state != State::Empty {
                out.push(b',');
            }
            if !in_histograms {
                *state = State::Scalars;
                scalar(out, cells, leaf, name);
                return;
            }
            if *state != State::Histograms {
                open_histograms(out, buckets);
                *state = State::Histograms;
            }
            histogram(out, cells, leaf, name, buckets);
        });
        if !more {
            if self.state == State::Histograms {
                out.extend_from_slice(if is_object(buckets) { b"]}}" } else { b"]}" });
            }
            out.extend_from_slice(b"]}");
            self.state = State::Done;
        }
        more
    }
}

/// Whether the histograms come with the list of quantiles, or as a plain array.
fn is_object(buckets: BucketMode) -> bool {
    matches!(buckets, BucketMode::Unset | BucketMode::Summary | BucketMode::Detailed)
}

fn scalar(out: &mut Vec<u8>, cells: &Cells, leaf: Leaf, name: &str) {
    out.extend_from_slice(b"{\"name\":");
    string(out, name);
    out.extend_from_slice(b",\"value\":");
    match cells.kind(leaf) {
        Kind::TextReadout => string(out, &cells.text().unwrap_or_default()),
        Kind::Counter | Kind::Gauge | Kind::Histogram(_) => {
            out.extend_from_slice(itoa::Buffer::new().format(cells.scalar(leaf).0).as_bytes());
        }
    }
    out.push(b'}');
}

fn open_histograms(out: &mut Vec<u8>, buckets: BucketMode) {
    let (quantiles, histograms) = match buckets {
        BucketMode::Unset | BucketMode::Summary => ("supported_quantiles", "computed_quantiles"),
        BucketMode::Detailed => ("supported_percentiles", "details"),
        BucketMode::Cumulative | BucketMode::Disjoint => {
            out.extend_from_slice(b"{\"histograms\":[");
            return;
        }
    };
    append(out, format_args!("{{\"histograms\":{{\"{quantiles}\":["));
    list(out, QUANTILES.iter(), |out, quantile| append(out, format_args!("{quantile}")));
    append(out, format_args!("],\"{histograms}\":["));
}

fn histogram(out: &mut Vec<u8>, cells: &Cells, leaf: Leaf, name: &str, mode: BucketMode) {
    let empty;
    let recorded = match cells.value(leaf).0 {
        Value::Histogram(recorded) => recorded,
        Value::Counter(_) | Value::Gauge(_) | Value::TextReadout(_) => None,
    };
    let summary = match recorded.as_deref() {
        Some(summary) => summary,
        None => {
            empty = Summary::empty(cells.buckets(leaf));
            &empty
        }
    };
    out.extend_from_slice(b"{\"name\":");
    string(out, name);
    match mode {
        BucketMode::Unset | BucketMode::Summary => {
            out.extend_from_slice(b",\"values\":[");
            quantiles(out, summary);
        }
        BucketMode::Cumulative | BucketMode::Disjoint => {
            out.extend_from_slice(b",\"buckets\":[");
            list(out, super::buckets(summary, mode), |out, bucket| {
                let bound = numbers::to_chars(bucket.bound);
                let (interval, cumulative) = (bucket.interval, bucket.cumulative);
                append(
                    out,
                    format_args!(
                        "{{\"upper_bound\":{bound},\"interval\":{interval},\"cumulative\":{cumulative}}}"
                    ),
                );
            });
        }
        BucketMode::Detailed => {
            out.extend_from_slice(b",\"totals\":[");
            bins(out, &summary.cumulative);
            out.extend_from_slice(b"],\"intervals\":[");
            bins(out, &summary.interval);
            out.extend_from_slice(b"],\"percentiles\":[");
            quantiles(out, summary);
        }
    }
    out.extend_from_slice(b"]}");
}

fn quantiles(out: &mut Vec<u8>, summary: &Summary) {
    let values =
        summary.interval.reported_quantiles().into_iter().zip(summary.cumulative.reported_quantiles());
    list(out, values, |out, (interval, cumulative)| {
        out.extend_from_slice(b"{\"cumulative\":");
        quantile(out, cumulative);
        out.extend_from_slice(b",\"interval\":");
        quantile(out, interval);
        out.push(b'}');
    });
}

fn quantile(out: &mut Vec<u8>, value: f64) {
    if value.is_nan() {
        out.extend_from_slice(b"null");
    } else {
        out.extend_from_slice(numbers::to_chars(value).as_bytes());
    }
}

fn bins(out: &mut Vec<u8>, bins: &Bins) {
    list(out, bins.iter(), |out, bin| {
        let (lower, width) = (numbers::to_chars(bin.lower), numbers::to_chars(bin.width));
        append(out, format_args!("{{\"lower_bound\":{lower},\"width\":{width},\"count\":{}}}", bin.count));
    });
}

fn list<T>(out: &mut Vec<u8>, items: impl Iterator<Item = T>, mut each: impl FnMut(&mut Vec<u8>, T)) {
    for (at, item) in items.enumerate() {
        if at != 0 {
            out.push(b',');
        }
        each(out, item);
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c < ' ' || c == '"' || c == '\\') {
        let (plain, special) = rest.split_at(at);
        out.extend_from_slice(plain.as_bytes());
        match special.as_bytes()[0] {
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            control if control < b' ' => append(out, format_args!("\\u{control:04x}")),
            quoted => out.extend_from_slice(&[b'\\', quoted]),
        }
        // What is special is ASCII.
        rest = &special[1..];
    }
    out.extend_from_slice(rest.as_bytes());
    out.push(b'"');
}

fn append(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a Vec accepts every write");
}

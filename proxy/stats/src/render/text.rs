//! `/stats`: one line per stat.

use std::io::Write as _;
use std::sync::Arc;

use super::{BucketMode, Options, Walk, numbers};
use crate::cells::{Cells, Leaf};
use crate::histogram::{Bins, QUANTILES, Summary};
use crate::store::{Kind, StoreInner, Value};

pub(super) struct Text {
    walk: Walk,
}

impl Text {
    pub(super) fn new(store: &Arc<StoreInner>, options: Options) -> Self {
        Self { walk: Walk::new(store, options) }
    }

    /// Appends the next stat; false at the end.
    pub(super) fn step(&mut self, out: &mut Vec<u8>) -> bool {
        let buckets = self.walk.options.buckets;
        self.walk.step(|cells, leaf, name| line(out, cells, leaf, name, buckets))
    }
}

fn line(out: &mut Vec<u8>, cells: &Cells, leaf: Leaf, name: &str, buckets: BucketMode) {
    out.extend_from_slice(name.as_bytes());
    match cells.kind(leaf) {
        Kind::Counter | Kind::Gauge => {
            out.extend_from_slice(b": ");
            out.extend_from_slice(itoa::Buffer::new().format(cells.scalar(leaf).0).as_bytes());
        }
        Kind::TextReadout | Kind::Histogram(_) => match cells.value(leaf).0 {
            Value::TextReadout(text) => {
                out.extend_from_slice(b": \"");
                // As Envoy's Html::Utility::sanitize: a text cannot break out of the quotes or the line's markup.
                out.extend_from_slice(sanitized(&text).as_bytes());
                out.push(b'"');
            }
            Value::Histogram(Some(summary)) => histogram(out, &summary, buckets),
            Value::Histogram(None) => out.extend_from_slice(b": No recorded values"),
            Value::Counter(_) | Value::Gauge(_) => {}
        },
    }
    out.push(b'\n');
}

fn histogram(out: &mut Vec<u8>, summary: &Summary, buckets: BucketMode) {
    match buckets {
        BucketMode::Unset | BucketMode::Summary => {
            out.extend_from_slice(b": ");
            quantiles(out, summary);
        }
        BucketMode::Cumulative | BucketMode::Disjoint => {
            out.push(b':');
            for bucket in super::buckets(summary, buckets) {
                append(
                    out,
                    format_args!(
                        " B{}({},{})",
                        numbers::general(bucket.bound, 6),
                        bucket.interval,
                        bucket.cumulative
                    ),
                );
            }
        }
        BucketMode::Detailed => {
            out.extend_from_slice(b":\n  totals=");
            bins(out, &summary.cumulative);
            out.extend_from_slice(b"\n  intervals=");
            bins(out, &summary.interval);
            out.extend_from_slice(b"\n  summary=");
            quantiles(out, summary);
        }
    }
}

fn quantiles(out: &mut Vec<u8>, summary: &Summary) {
    let values =
        summary.interval.reported_quantiles().into_iter().zip(summary.cumulative.reported_quantiles());
    for (at, (percent, (interval, cumulative))) in QUANTILES.iter().zip(values).enumerate() {
        let separator = if at == 0 { "" } else { " " };
        let (interval, cumulative) = (numbers::shortest(interval), numbers::shortest(cumulative));
        append(out, format_args!("{separator}P{percent}({interval},{cumulative})"));
    }
}

fn bins(out: &mut Vec<u8>, bins: &Bins) {
    for (at, bin) in bins.iter().enumerate() {
        let separator = if at == 0 { "" } else { ", " };
        let (lower, width) = (numbers::general(bin.lower, 6), numbers::general(bin.width, 6));
        append(out, format_args!("{separator}{lower},{width}:{}", bin.count));
    }
}

fn append(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a Vec accepts every write");
}

fn sanitized(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => clean.push_str("&amp;"),
            '<' => clean.push_str("&lt;"),
            '>' => clean.push_str("&gt;"),
            '"' => clean.push_str("&quot;"),
            '\'' => clean.push_str("&#39;"),
            other => clean.push(other),
        }
    }
    clean
}

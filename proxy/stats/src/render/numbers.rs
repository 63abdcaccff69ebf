//! Floating point numbers as the C++ libraries that Envoy uses print them.

use std::fmt::Write as _;

/// `%.<precision>g`.
pub(super) fn general(value: f64, precision: usize) -> String {
    if !value.is_finite() {
        return non_finite(value).to_owned();
    }
    let scientific = format!("{value:.*e}", precision - 1);
    // `{:e}` always writes an exponent.
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if exponent < -4 || exponent >= precision as i32 {
        return with_exponent(trim_zeros(mantissa), exponent);
    }
    let decimals = usize::try_from(precision as i32 - 1 - exponent).unwrap_or(0);
    trim_zeros(&format!("{value:.decimals$}")).to_owned()
}

/// The shortest digits that read back the same, as `fmt::format("{}")` writes them.
pub(super) fn shortest(value: f64) -> String {
    if !value.is_finite() {
        return non_finite(value).to_owned();
    }
    if value != 0. && !(1e-4..1e16).contains(&value.abs()) { exponential(value) } else { value.to_string() }
}

/// The same digits as `std::to_chars` writes them: in whichever notation is shorter.
pub(super) fn to_chars(value: f64) -> String {
    let (fixed, exponential) = (value.to_string(), exponential(value));
    if exponential.len() < fixed.len() { exponential } else { fixed }
}

fn exponential(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    with_exponent(mantissa, exponent.parse().unwrap_or(0))
}

fn with_exponent(mantissa: &str, exponent: i32) -> String {
    let mut number = mantissa.to_owned();
    let sign = if exponent < 0 { '-' } else { '+' };
    write!(number, "e{sign}{:02}", exponent.abs()).expect("a String accepts every write");
    number
}

fn non_finite(value: f64) -> &'static str {
    match value {
        _ if value.is_nan() => "nan",
        _ if value > 0. => "inf",
        _ => "-inf",
    }
}

fn trim_zeros(number: &str) -> &str {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_envoy_printed_them() {
        assert_eq!(general(3_600_000., 6), "3.6e+06");
        assert_eq!(general(600_000., 6), "600000");
        assert_eq!(general(0.5, 6), "0.5");
        assert_eq!(general(3_600_000., 32), "3600000");
        assert_eq!(general(2. * 10. * 11. / 21., 32), "10.476190476190476275064611400012");
        assert_eq!(general(0., 32), "0");
        assert_eq!(to_chars(300_000.), "3e+05");
        assert_eq!(to_chars(60_000.), "60000");
        assert_eq!(to_chars(1_800_000.), "1800000");
        assert_eq!(to_chars(0.1), "0.1");
        assert_eq!(shortest(44.666666666666664), "44.666666666666664");
        assert_eq!(shortest(f64::NAN), "nan");
        assert_eq!(shortest(1e16), "1e+16");
        assert_eq!(shortest(195.), "195");
    }
}

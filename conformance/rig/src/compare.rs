//! Finding where two results differ.

use serde_json::Value;

use crate::case::Deviation;

/// One place where results differ.
#[derive(Debug, Clone)]
pub(crate) struct Difference {
    pub(crate) path: String,
    pub(crate) expected: String,
    pub(crate) got: String,
}

/// All differences between what was expected and what came.
pub(crate) fn differences(expected: &Value, got: &Value) -> Vec<Difference> {
    let mut out = Vec::new();
    walk("", expected, got, &mut out);
    out
}

fn walk(path: &str, expected: &Value, got: &Value, out: &mut Vec<Difference>) {
    match (expected, got) {
        (Value::Object(a), Value::Object(b)) => {
            for (key, value) in a {
                walk(&join(path, key), value, b.get(key).unwrap_or(&Value::Null), out);
            }
            for (key, value) in b.iter().filter(|(k, _)| !a.contains_key(*k)) {
                walk(&join(path, key), &Value::Null, value, out);
            }
        }
        // Header lines are compared line by line under their names, so that a deviation can name one.
        (Value::Array(a), Value::Array(b)) if path.ends_with("headers") => {
            let (a, b) = (lines(a), lines(b));
            for line in a.iter().filter(|l| count(&a, l) > count(&b, l)) {
                out.push(Difference {
                    path: join(path, name(line)),
                    expected: (*line).into(),
                    got: "-".into(),
                });
            }
            for line in b.iter().filter(|l| count(&b, l) > count(&a, l)) {
                out.push(Difference {
                    path: join(path, name(line)),
                    expected: "-".into(),
                    got: (*line).into(),
                });
            }
            if out.is_empty() && a != b {
                out.push(Difference { path: path.into(), expected: a.join(" | "), got: b.join(" | ") });
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            for i in 0..a.len().max(b.len()) {
                let null = Value::Null;
                walk(&format!("{path}[{i}]"), a.get(i).unwrap_or(&null), b.get(i).unwrap_or(&null), out);
            }
        }
        (a, b) if a != b => out.push(Difference { path: path.into(), expected: text(a), got: text(b) }),
        _ => {}
    }
}

fn lines(values: &[Value]) -> Vec<&str> {
    values.iter().filter_map(Value::as_str).collect()
}

fn count(lines: &[&str], line: &str) -> usize {
    lines.iter().filter(|l| **l == line).count()
}

fn name(line: &str) -> &str {
    line.split(": ").next().unwrap_or(line)
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        other => other.to_string(),
    }
}

/// True when the deviation covers the place.
pub(crate) fn covers(deviation: &Deviation, path: &str) -> bool {
    deviation.at.iter().any(|at| {
        let mut rest = path;
        for (i, part) in at.split("[]").enumerate() {
            if i > 0 {
                let Some(end) = rest.strip_prefix('[').and_then(|r| r.find(']').map(|e| &r[e + 1..])) else {
                    return false;
                };
                rest = end;
            }
            let Some(after) = rest.strip_prefix(part) else { return false };
            rest = after;
        }
        true
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_header_difference_names_the_header() {
        let a = json!({"steps": [{"headers": ["a: 1", "b: 2"]}]});
        let b = json!({"steps": [{"headers": ["a: 1", "b: 3"]}]});
        let found = differences(&a, &b);
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|d| d.path == "steps[0].headers.b"));
    }

    #[test]
    fn a_deviation_covers_any_index() {
        let deviation = Deviation { reason: String::new(), at: vec!["steps[].headers.b".into()] };
        assert!(covers(&deviation, "steps[7].headers.b"));
        assert!(!covers(&deviation, "steps[7].headers.c"));
        assert!(!covers(&deviation, "log[0]"));
    }
}

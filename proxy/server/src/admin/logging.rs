//! `/logging`.

use std::fmt::Write as _;

use hyper::{Response, StatusCode};

use super::{Body, Query, text};
use crate::log::{self, COMPONENTS, Level};

const USAGE: &str = "usage: /logging?<name>=<level> (change single level)
usage: /logging?paths=name1:level1,name2:level2,... (change multiple levels)
usage: /logging?level=<level> (change all levels)
usage: /logging?group=<group_name>:<level> (change group of loggers)
levels: trace debug info warning error critical off 
";

pub(super) fn logging(query: &Query) -> Response<Body> {
    match change(query) {
        Ok(()) => text(StatusCode::OK, listing()),
        Err(reason) => text(StatusCode::BAD_REQUEST, format!("error: {reason}\n\n{USAGE}{}", listing())),
    }
}

fn listing() -> String {
    let mut body = String::from("active loggers:\n");
    for component in COMPONENTS {
        let level = log::level(component).map_or("off", Level::name);
        // Writing to a string does not fail.
        let _ = writeln!(body, "  {component}: {level}");
    }
    body.push('\n');
    body
}

fn change(query: &Query) -> Result<(), String> {
    let mut pairs = query.pairs();
    let Some((name, value)) = pairs.next() else {
        return Ok(());
    };
    if pairs.next().is_some() {
        return Err("invalid number of parameters".to_owned());
    }
    if value.is_empty() {
        return Ok(());
    }
    let parse = |level: &str| Level::parse(level).ok_or_else(|| "unknown logger level".to_owned());
    match name {
        "level" => {
            log::set_all(parse(value)?);
            Ok(())
        }
        "paths" => {
            let mut changes = Vec::new();
            for part in value.split(',').filter(|part| !part.is_empty()) {
                let (name, level) = part.split_once(':').unwrap_or((part, ""));
                if name.is_empty() || level.is_empty() {
                    return Err("empty logger name or empty logger level".to_owned());
                }
                let level = parse(level)?;
                if log::level(name).is_none() {
                    return Err("unknown logger name".to_owned());
                }
                changes.push((name, level));
            }
            for (name, level) in changes {
                log::set_level(name, level);
            }
            Ok(())
        }
        "group" => Err("group parameter requires fine-grain logging to be enabled".to_owned()),
        name => {
            let level = parse(value)?;
            if log::set_level(name, level) { Ok(()) } else { Err("unknown logger name".to_owned()) }
        }
    }
}

//! The application log, in Envoy's format and by Envoy's components.
//!
//! Code logs through `tracing` with the component as target (`tracing::info!(target: "config", ...)`); anything else
//! counts as `misc`. Levels are atomics that `/logging` changes while the process runs.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, RwLock};
use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

/// Envoy's default `--log-format`.
pub const DEFAULT_FORMAT: &str = "[%Y-%m-%d %T.%e][%t][%l][%n] [%g:%#] %v";

/// Envoy's log levels.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(u8)]
pub enum Level {
    /// Everything.
    Trace,
    /// For debugging.
    Debug,
    /// What an operator may want to know.
    Info,
    /// What an operator should look at.
    Warning,
    /// What went wrong.
    Error,
    /// What ends the process.
    Critical,
    /// Nothing.
    Off,
}

impl Level {
    const ALL: [Self; 7] =
        [Self::Trace, Self::Debug, Self::Info, Self::Warning, Self::Error, Self::Critical, Self::Off];

    /// Reads a level by name; `warn` is `warning`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "warn" => Some(Self::Warning),
            _ => Self::ALL.into_iter().find(|level| level.name() == name),
        }
    }

    /// The level's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
            Self::Critical => "critical",
            Self::Off => "off",
        }
    }

    fn of(level: tracing::Level) -> Self {
        match level {
            tracing::Level::TRACE => Self::Trace,
            tracing::Level::DEBUG => Self::Debug,
            tracing::Level::INFO => Self::Info,
            tracing::Level::WARN => Self::Warning,
            tracing::Level::ERROR => Self::Error,
        }
    }
}

/// Envoy's logger names in its order; `/logging` lists them all.
#[rustfmt::skip]
pub const COMPONENTS: &[&str] = &[
    "a2a", "admin", "ai_protocol_manager", "alternate_protocols_cache", "aws", "assert", "backtrace",
    "basic_auth", "cache_filter", "client", "config", "connection", "conn_handler", "compression",
    "credential_injector", "decompression", "dns", "dubbo", "envoy_bug", "ext_authz", "ext_proc",
    "rocketmq", "file", "filter", "forward_proxy", "geolocation", "grpc", "happy_eyeballs", "hc",
    "health_checker", "http", "http2", "hystrix", "init", "io", "jwt", "json_rpc", "kafka",
    "key_value_store", "lua", "local_rate_limit", "main", "matcher", "mcp", "misc", "mongo",
    "multi_connection", "notification", "oauth2", "quic", "quic_stream", "pool", "rate_limit_quota", "rbac",
    "rds", "redis", "router", "runtime", "stats", "secret", "sse", "tap", "testing", "thrift", "tracing",
    "upstream", "udp", "wasm", "websocket", "golang", "stats_sinks", "dynamic_modules", "ip_tagging",
];

const MISC: &str = "misc";

static LEVELS: [AtomicU8; 128] = [const { AtomicU8::new(Level::Info as u8) }; 128];

/// The level of a component in force.
pub fn level(component: &str) -> Option<Level> {
    let index = index(component)?;
    Some(Level::ALL[usize::from(LEVELS[index].load(Ordering::Relaxed))])
}

/// Sets one component's level; `false` when there is no such component.
pub fn set_level(component: &str, level: Level) -> bool {
    let known = index(component).map(|index| LEVELS[index].store(level as u8, Ordering::Relaxed));
    tracing::callsite::rebuild_interest_cache();
    known.is_some()
}

/// Sets every component's level.
pub fn set_all(level: Level) {
    for slot in &LEVELS {
        slot.store(level as u8, Ordering::Relaxed);
    }
    tracing::callsite::rebuild_interest_cache();
}

fn index(component: &str) -> Option<usize> {
    COMPONENTS.iter().position(|known| *known == component)
}

/// The component that a target stands for: crates of others, and places of ours that name none, count as `misc`.
fn component_of(target: &str) -> usize {
    let name = if target.starts_with("h2") { "http2" } else { target };
    index(name).or_else(|| index(MISC)).unwrap_or_default()
}

/// `tracing` has no level above error; whether an error is critical shows when it is recorded.
fn is_enabled(metadata: &Metadata<'_>) -> bool {
    let highest = match Level::of(*metadata.level()) {
        Level::Error => Level::Critical,
        level => level,
    };
    highest as u8 >= threshold(metadata)
}

fn threshold(metadata: &Metadata<'_>) -> u8 {
    LEVELS[component_of(metadata.target())].load(Ordering::Relaxed)
}

/// Where the log goes; reopened on SIGUSR1.
struct Sink {
    path: Option<PathBuf>,
    file: Option<File>,
}

/// What lines look like; the bootstrap may say so after the first ones are written.
static FORMAT: RwLock<Option<Arc<Pattern>>> = RwLock::new(None);

static SINK: Mutex<Sink> = Mutex::new(Sink { path: None, file: None });

/// Starts logging. Called once; a second call is ignored.
pub fn init(format: &str, escape: bool) {
    set_format(format);
    let layer = EnvoyLayer { escape };
    let subscriber = tracing_subscriber::registry().with(layer);
    // Only the embedding tests set a subscriber before; theirs stays.
    drop(tracing::subscriber::set_global_default(subscriber));
}

/// Has the log written to a file from now on, which is appended to.
pub fn write_to(path: &Path) -> io::Result<()> {
    let file = open(path)?;
    *SINK.lock() = Sink { path: Some(path.to_owned()), file: Some(file) };
    Ok(())
}

/// Lines look like this from now on: a pattern of spdlog's flags, as `--log-format` takes it.
pub fn set_format(format: &str) {
    *FORMAT.write() = Some(Arc::new(Pattern::parse(format)));
}

/// Opens the log file again (SIGUSR1, `/reopen_logs`), so that a rotated one can be moved away.
pub fn reopen() -> io::Result<()> {
    let mut sink = SINK.lock();
    if let Some(path) = sink.path.clone() {
        sink.file = Some(open(&path)?);
    }
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

struct EnvoyLayer {
    escape: bool,
}

impl<S: Subscriber> Layer<S> for EnvoyLayer {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // Decided once for each place that logs, and again when levels change: a place that is off costs one load.
        if is_enabled(metadata) { Interest::always() } else { Interest::never() }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        // What no component shows costs one comparison, wherever it is.
        let lowest = LEVELS[..COMPONENTS.len()].iter().map(|level| level.load(Ordering::Relaxed)).min()?;
        Some(match Level::ALL[usize::from(lowest)] {
            Level::Trace => LevelFilter::TRACE,
            Level::Debug => LevelFilter::DEBUG,
            Level::Info => LevelFilter::INFO,
            Level::Warning => LevelFilter::WARN,
            Level::Error | Level::Critical => LevelFilter::ERROR,
            Level::Off => LevelFilter::OFF,
        })
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        is_enabled(metadata)
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut message = Message::default();
        event.record(&mut message);
        if self.escape {
            message.text = message.text.escape_default().to_string();
        }
        let metadata = event.metadata();
        let level = if message.critical { Level::Critical } else { Level::of(*metadata.level()) };
        if (level as u8) < threshold(metadata) {
            return;
        }
        let Some(format) = FORMAT.read().clone() else { return };
        let line = format.line(&Record {
            time: OffsetDateTime::now_utc(),
            level,
            component: COMPONENTS[component_of(metadata.target())],
            file: metadata.file().unwrap_or_default(),
            line: metadata.line().unwrap_or_default(),
            text: &message.text,
        });
        let mut sink = SINK.lock();
        // There is nobody left to tell when the log itself cannot be written.
        let _ = match &mut sink.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
    }
}

/// The message of an event with its fields appended as `key=value`. The field `critical = true` raises the level.
#[derive(Default)]
struct Message {
    text: String,
    critical: bool,
}

impl Visit for Message {
    fn record_bool(&mut self, field: &Field, value: bool) {
        if field.name() == "critical" {
            self.critical = value;
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = if field.name() == "message" {
            let fields = std::mem::take(&mut self.text);
            write!(self.text, "{value:?}{fields}")
        } else {
            write!(self.text, " {}={value:?}", field.name())
        };
    }
}

struct Record<'a> {
    time: OffsetDateTime,
    level: Level,
    component: &'a str,
    file: &'a str,
    line: u32,
    text: &'a str,
}

/// A compiled spdlog pattern: the flags that Envoy documents; others are printed as they stand.
struct Pattern(Vec<Part>);

enum Part {
    Text(String),
    Flag(char),
}

impl Pattern {
    fn parse(text: &str) -> Self {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut chars = text.chars();
        while let Some(char) = chars.next() {
            match (char, char == '%') {
                (_, true) => match chars.next() {
                    Some('%') => literal.push('%'),
                    Some(flag) => {
                        if !literal.is_empty() {
                            parts.push(Part::Text(std::mem::take(&mut literal)));
                        }
                        parts.push(Part::Flag(flag));
                    }
                    None => literal.push('%'),
                },
                (char, false) => literal.push(char),
            }
        }
        if !literal.is_empty() {
            parts.push(Part::Text(literal));
        }
        Self(parts)
    }

    fn line(&self, record: &Record<'_>) -> String {
        let mut line = String::with_capacity(record.text.len() + 96);
        for part in &self.0 {
            // Writing to a string does not fail.
            let _ = match part {
                Part::Text(text) => line.write_str(text),
                Part::Flag(flag) => write_flag(*flag, record, &mut line),
            };
        }
        line.push('\n');
        line
    }
}

fn write_flag(flag: char, record: &Record<'_>, out: &mut String) -> fmt::Result {
    let time = &record.time;
    let file_name =
        || Path::new(record.file).file_name().map_or_else(Default::default, |name| name.to_string_lossy());
    match flag {
        'Y' => write!(out, "{:04}", time.year()),
        'C' => write!(out, "{:02}", time.year() % 100),
        'm' => write!(out, "{:02}", u8::from(time.month())),
        'd' => write!(out, "{:02}", time.day()),
        'H' => write!(out, "{:02}", time.hour()),
        'M' => write!(out, "{:02}", time.minute()),
        'S' => write!(out, "{:02}", time.second()),
        'T' | 'X' => write!(out, "{:02}:{:02}:{:02}", time.hour(), time.minute(), time.second()),
        'F' => write!(out, "{:09}", time.nanosecond()),
        'f' => write!(out, "{:06}", time.microsecond()),
        'e' => write!(out, "{:03}", time.millisecond()),
        'E' => {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            write!(out, "{}", since.as_secs())
        }
        'z' => out.write_str("+00:00"),
        't' => write!(out, "{}", thread_id()),
        'P' => write!(out, "{}", std::process::id()),
        'l' => out.write_str(record.level.name()),
        'L' => out.write_str(&record.level.name()[..1].to_uppercase()),
        'n' => out.write_str(record.component),
        'v' | '_' => out.write_str(record.text),
        'j' => write_json_escaped(record.text, out),
        's' => out.write_str(&file_name()),
        'g' => out.write_str(record.file),
        '#' => write!(out, "{}", record.line),
        '@' => write!(out, "{}:{}", file_name(), record.line),
        other => write!(out, "%{other}"),
    }
}

/// The inside of a JSON string.
fn write_json_escaped(text: &str, out: &mut String) -> fmt::Result {
    for char in text.chars() {
        match char {
            '"' | '\\' => write!(out, "\\{char}")?,
            '\n' => out.write_str("\\n")?,
            char if char.is_control() => write!(out, "\\u{:04x}", u32::from(char))?,
            char => out.write_char(char)?,
        }
    }
    Ok(())
}

fn thread_id() -> u64 {
    thread_local! {
        static ID: u64 = std::fs::read_link("/proc/thread-self")
            .ok()
            .and_then(|link| link.file_name()?.to_str()?.parse().ok())
            .unwrap_or_default();
    }
    ID.with(|id| *id)
}

#[cfg(test)]
mod tests {
    use super::{DEFAULT_FORMAT, Level, Pattern, Record};
    use time::macros::datetime;

    #[test]
    fn the_default_format_reads_as_envoys() {
        let record = Record {
            time: datetime!(2026-01-02 03:04:05.006 UTC),
            level: Level::Warning,
            component: "config",
            file: "src/a.rs",
            line: 7,
            text: "hello",
        };
        let line = Pattern::parse(DEFAULT_FORMAT).line(&record);
        let (head, tail) = line.split_once("][").unwrap();
        assert_eq!(head, "[2026-01-02 03:04:05.006");
        assert!(tail.ends_with("][warning][config] [src/a.rs:7] hello\n"), "{tail}");
        assert_eq!(Pattern::parse("%L %% %q").line(&record), "W % %q\n");
        let quoting = Record { text: "a \"b\"\n\t", ..record };
        let json = Pattern::parse(r#"{"level":"%l","message":"%j"}"#).line(&quoting);
        assert_eq!(json, "{\"level\":\"warning\",\"message\":\"a \\\"b\\\"\\n\\u0009\"}\n");
    }

    #[test]
    fn levels_by_name() {
        assert_eq!(Level::parse("warn"), Some(Level::Warning));
        assert_eq!(Level::parse("bogus"), None);
    }
}

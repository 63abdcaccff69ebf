//! Envoy's command line.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::log::Level;
use crate::registry;

/// What to do with the configuration (`--mode`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    /// Serve traffic.
    #[default]
    Serve,
    /// Check it and exit.
    Validate,
    /// Initialise fully, then exit.
    InitOnly,
}

impl Mode {
    /// As `/server_info` prints it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Serve => "Serve",
            Self::Validate => "Validate",
            Self::InitOnly => "InitOnly",
        }
    }
}

/// Envoy's flags as they stand on the command line.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "waystation",
    disable_version_flag = true,
    args_override_self = false,
    about = "A proxy that stands wherever an envoy binary stands.",
    after_help = "Subcommands: `waystation check CONFIG` prints what of a configuration would be rejected or \
                  ignored; `waystation xds-server --dir DIR` serves a folder of resources over xDS."
)]
struct Flags {
    /// Universal tag for all stats, `tag:value` (repeatable).
    #[arg(long = "stats-tag", value_name = "string")]
    stats_tag: Vec<String>,
    /// Enable core dumps.
    #[arg(long)]
    enable_core_dump: bool,
    /// Hot restart socket permissions. No effect: sockets are not handed between processes.
    #[arg(long, value_name = "string")]
    socket_mode: Option<String>,
    /// Hot restart socket path. No effect: sockets are not handed between processes.
    #[arg(long, value_name = "string")]
    socket_path: Option<String>,
    /// Comma-separated list of extensions to disable.
    #[arg(long, value_name = "string")]
    disable_extensions: Option<String>,
    /// Take the default number of workers from the cpuset (always so here).
    #[arg(long)]
    cpuset_threads: bool,
    /// Mutex contention tracing: the request path has no mutex, so there is nothing to trace.
    #[arg(long)]
    enable_mutex_tracing: bool,
    /// Disable hot restart (always so here).
    #[arg(long)]
    disable_hot_restart: bool,
    /// One of serve (default), validate, init_only.
    #[arg(long, value_name = "string", default_value = "serve")]
    mode: String,
    /// Hot restart: seconds until the parent is told to exit. No effect without hot restart.
    #[arg(long, value_name = "uint32_t", default_value = "900")]
    parent_shutdown_time_s: u32,
    /// Drain behaviour: gradual (default) or immediate.
    #[arg(long, value_name = "string", default_value = "gradual")]
    drain_strategy: String,
    /// Seconds over which replaced and removed listeners drain.
    #[arg(long, value_name = "uint32_t", default_value = "600")]
    drain_time_s: u32,
    /// Seconds that SIGTERM and SIGINT wait for open connections before the process exits.
    #[arg(long, value_name = "uint32_t", default_value = "5")]
    shutdown_drain_time_s: u32,
    /// Access log buffer size at which it is flushed, in KB.
    #[arg(long, value_name = "uint32_t", default_value = "64")]
    file_flush_min_size_kb: u32,
    /// Interval for access log flushing in msec.
    #[arg(long, value_name = "uint32_t", default_value = "10000")]
    file_flush_interval_msec: u32,
    /// Zone name; overrides node.locality.zone.
    #[arg(long, value_name = "string")]
    service_zone: Option<String>,
    /// Node name; overrides node.id.
    #[arg(long, value_name = "string")]
    service_node: Option<String>,
    /// Cluster name; overrides node.cluster.
    #[arg(long, value_name = "string")]
    service_cluster: Option<String>,
    /// Print the hot restart compatibility version.
    #[arg(long)]
    hot_restart_version: bool,
    /// Hot restart epoch; only 0, or --skip-hot-restart-on-no-parent.
    #[arg(long, value_name = "uint32_t", default_value = "0")]
    restart_epoch: u32,
    /// Path to the log file; standard error when not given.
    #[arg(long, value_name = "string")]
    log_path: Option<OsString>,
    /// Control logging by file instead of by component: not available.
    #[arg(long)]
    enable_fine_grain_logging: bool,
    /// Escape C-style escape sequences in log messages.
    #[arg(long)]
    log_format_escaped: bool,
    /// Log format in spdlog syntax.
    #[arg(long, value_name = "string", default_value = crate::log::DEFAULT_FORMAT)]
    log_format: String,
    /// Comma-separated component log levels, e.g. upstream:debug,config:trace.
    #[arg(long, value_name = "string")]
    component_log_level: Option<String>,
    /// Log level: trace, debug, info, warning, warn, error, critical, off.
    #[arg(short = 'l', long = "log-level", value_name = "string", default_value = "info")]
    log_level: String,
    /// The local IP address version.
    #[arg(long, value_name = "string", default_value = "v4")]
    local_address_ip_version: String,
    /// Write the admin address to this file.
    #[arg(long, value_name = "string")]
    admin_address_path: Option<OsString>,
    /// One log entry for a whole stack trace (always so here).
    #[arg(long)]
    log_stacktrace_single_entry: bool,
    /// Do not log deprecated fields.
    #[arg(long)]
    skip_deprecated_logs: bool,
    /// Accept unknown fields in dynamic configuration without a warning.
    #[arg(long)]
    ignore_unknown_dynamic_fields: bool,
    /// Reject unknown fields in dynamic configuration.
    #[arg(long)]
    reject_unknown_dynamic_fields: bool,
    /// Accept unknown fields in static configuration.
    #[arg(long, alias = "allow-unknown-fields")]
    allow_unknown_static_fields: bool,
    /// Configuration as YAML on the command line, merged over --config-path.
    #[arg(long, value_name = "string")]
    config_yaml: Option<String>,
    /// Path to the configuration file (.yaml, .json, .pb, .pb_text).
    #[arg(short = 'c', long = "config-path", value_name = "string")]
    config_path: Option<OsString>,
    /// Number of worker threads.
    #[arg(long, value_name = "uint32_t")]
    concurrency: Option<u32>,
    /// Where to write the base id.
    #[arg(long, value_name = "string")]
    base_id_path: Option<OsString>,
    /// Hot restart: take no stats from the parent.
    #[arg(long)]
    skip_hot_restart_parent_stats: bool,
    /// Hot restart: start even though there is no parent.
    #[arg(long)]
    skip_hot_restart_on_no_parent: bool,
    /// Choose a base id.
    #[arg(long)]
    use_dynamic_base_id: bool,
    /// Tells several processes on one host apart.
    #[arg(long, value_name = "uint32_t", default_value = "0")]
    base_id: u32,
    /// Print the version and exit.
    #[arg(long)]
    version: bool,
    /// Arguments after `--` are ignored, as Envoy does.
    #[arg(last = true, hide = true)]
    ignored: Vec<OsString>,
}

/// The command line after all checks.
#[derive(Clone, Debug)]
pub struct Options {
    /// Universal stat tags in order.
    pub stats_tags: Vec<(String, String)>,
    /// `--mode`.
    pub mode: Mode,
    /// `--concurrency`; the number of CPUs this process may use when not given. At least 1.
    pub concurrency: u32,
    /// `--config-path`.
    pub config_path: Option<PathBuf>,
    /// `--config-yaml`.
    pub config_yaml: Option<String>,
    /// `--allow-unknown-static-fields`.
    pub allow_unknown_static_fields: bool,
    /// `--reject-unknown-dynamic-fields`.
    pub reject_unknown_dynamic_fields: bool,
    /// `--ignore-unknown-dynamic-fields`.
    pub ignore_unknown_dynamic_fields: bool,
    /// `--skip-deprecated-logs`.
    pub skip_deprecated_logs: bool,
    /// `--admin-address-path`.
    pub admin_address_path: Option<PathBuf>,
    /// `--local-address-ip-version v6`.
    pub local_address_v6: bool,
    /// `--log-level`.
    pub log_level: Level,
    /// `--component-log-level` as given, for `/server_info`.
    pub component_log_level: String,
    /// The component levels.
    pub component_levels: Vec<(String, Level)>,
    /// `--log-format`.
    pub log_format: String,
    /// `--log-format-escaped`.
    pub log_format_escaped: bool,
    /// `--log-path`.
    pub log_path: Option<PathBuf>,
    /// `--service-cluster`.
    pub service_cluster: String,
    /// `--service-node`.
    pub service_node: String,
    /// `--service-zone`.
    pub service_zone: String,
    /// `--drain-time-s`.
    pub drain_time: Duration,
    /// `--drain-strategy immediate`.
    pub drain_immediately: bool,
    /// `--parent-shutdown-time-s`.
    pub parent_shutdown_time: Duration,
    /// `--shutdown-drain-time-s`.
    pub shutdown_drain_time: Duration,
    /// `--file-flush-interval-msec`.
    pub file_flush_interval: Duration,
    /// `--file-flush-min-size-kb`.
    pub file_flush_min_size_kb: u32,
    /// `--base-id`, or the one chosen.
    pub base_id: u32,
    /// `--base-id-path`.
    pub base_id_path: Option<PathBuf>,
    /// `--use-dynamic-base-id`.
    pub use_dynamic_base_id: bool,
    /// `--restart-epoch`.
    pub restart_epoch: u32,
    /// `--disable-hot-restart`.
    pub disable_hot_restart: bool,
    /// `--cpuset-threads`.
    pub cpuset_threads: bool,
    /// `--enable-core-dump`.
    pub enable_core_dump: bool,
    /// `--disable-extensions`, each `category/name`; none that this binary has, for those cannot be disabled.
    pub disabled_extensions: Vec<String>,
    /// `--socket-path`, for `/server_info`.
    pub socket_path: String,
}

/// What a command line asks for.
#[derive(Debug)]
pub enum Command {
    /// Run with these options.
    Run(Box<Options>),
    /// `--version`.
    Version,
    /// `--hot-restart-version`.
    HotRestartVersion,
    /// `--help`: the text.
    Help(String),
}

/// A command line that is refused: what goes to standard error; the exit code is 1.
#[derive(Debug, Eq, PartialEq)]
pub struct UsageError(pub String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// Reads a command line, the program's name first.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let flags = match Flags::try_parse_from(args) {
        Ok(flags) => flags,
        Err(error) if error.kind() == ErrorKind::DisplayHelp => return Ok(Command::Help(error.to_string())),
        Err(error) => return Err(tclap_error(&error)),
    };
    if flags.version {
        return Ok(Command::Version);
    }
    if flags.hot_restart_version {
        return Ok(Command::HotRestartVersion);
    }
    Options::check(flags).map(|options| Command::Run(Box::new(options)))
}

/// The error in the words of Envoy's parser, which launchers' logs and scripts know.
fn tclap_error(error: &clap::Error) -> UsageError {
    let argument = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(argument)) => argument.split(' ').next().unwrap_or_default().to_owned(),
        Some(ContextValue::Strings(arguments)) => arguments.join(" "),
        _ => String::new(),
    };
    let reason = match error.kind() {
        ErrorKind::UnknownArgument => "Couldn't find match for argument".to_owned(),
        ErrorKind::ArgumentConflict => "Argument already set!".to_owned(),
        ErrorKind::InvalidValue | ErrorKind::ValueValidation | ErrorKind::WrongNumberOfValues => {
            match error.get(ContextKind::InvalidValue) {
                Some(ContextValue::String(value)) if !value.is_empty() => {
                    format!("Couldn't read argument value from string '{value}'")
                }
                _ => "Missing a value for this argument!".to_owned(),
            }
        }
        _ => error.to_string(),
    };
    UsageError(format!("PARSE ERROR: Argument: {argument}\n             {reason}"))
}

impl Options {
    fn check(flags: Flags) -> Result<Self, UsageError> {
        let refuse = |text: String| Err(UsageError(format!("error: {text}")));
        let log_level = match Level::parse(&flags.log_level) {
            Some(level) => level,
            None => return refuse(format!("invalid log level specified '{}'", flags.log_level)),
        };
        let mode = match flags.mode.as_str() {
            "serve" => Mode::Serve,
            "validate" => Mode::Validate,
            "init_only" => Mode::InitOnly,
            other => return refuse(format!("unknown mode '{other}'")),
        };
        let drain_immediately = match flags.drain_strategy.as_str() {
            "gradual" => false,
            "immediate" => true,
            other => return refuse(format!("unknown drain-strategy '{other}'")),
        };
        if !matches!(flags.local_address_ip_version.as_str(), "v4" | "v6") {
            return refuse(format!("unknown IP address version '{}'", flags.local_address_ip_version));
        }
        let disabled_extensions: Vec<String> = flags
            .disable_extensions
            .iter()
            .flat_map(|list| list.split(','))
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect();
        // What this binary has it would still use: better not to start than to seem hardened.
        if let Some(name) = disabled_extensions.iter().find(|name| registry::is_known(name)) {
            return refuse(format!("--disable-extensions: extension '{name}' cannot be disabled"));
        }
        let component_log_level = flags.component_log_level.unwrap_or_default();
        let component_levels = match component_levels(&component_log_level) {
            Ok(levels) => levels,
            Err(text) => return refuse(text),
        };
        let mut stats_tags: Vec<(String, String)> = Vec::new();
        for tag in &flags.stats_tag {
            let parts = tag.split_once(':').filter(|(name, value)| {
                !name.is_empty()
                    && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
                    && !value.is_empty()
                    && !value.contains('.')
            });
            let Some((name, value)) = parts else {
                return refuse(format!("misformatted stats-tag '{tag}'"));
            };
            // The first of one name counts, as in Envoy.
            if !stats_tags.iter().any(|(known, _)| known == name) {
                stats_tags.push((name.to_owned(), value.to_owned()));
            }
        }
        if flags.restart_epoch > 0 && flags.use_dynamic_base_id {
            return refuse(format!(
                "cannot use --restart-epoch={} with --use-dynamic-base-id",
                flags.restart_epoch
            ));
        }
        let restarts = flags.restart_epoch > 0 && !flags.disable_hot_restart && mode != Mode::Validate;
        if restarts && !flags.skip_hot_restart_on_no_parent {
            return refuse(format!(
                "--restart-epoch={} needs a parent process to take sockets from, which is not available; start \
                 with epoch 0, or add --skip-hot-restart-on-no-parent",
                flags.restart_epoch
            ));
        }
        if flags.enable_fine_grain_logging {
            return refuse(
                "--enable-fine-grain-logging is not available: log levels are set by component".to_owned(),
            );
        }
        if flags.concurrency.is_some_and(|concurrency| concurrency > 1024) {
            return refuse("--concurrency is limited to 1024".to_owned());
        }
        let base_id = if flags.use_dynamic_base_id { std::process::id() } else { flags.base_id };
        Ok(Self {
            stats_tags,
            mode,
            concurrency: flags.concurrency.unwrap_or_else(default_concurrency).max(1),
            config_path: path(flags.config_path),
            config_yaml: flags.config_yaml,
            allow_unknown_static_fields: flags.allow_unknown_static_fields,
            reject_unknown_dynamic_fields: flags.reject_unknown_dynamic_fields,
            ignore_unknown_dynamic_fields: flags.ignore_unknown_dynamic_fields,
            skip_deprecated_logs: flags.skip_deprecated_logs,
            admin_address_path: path(flags.admin_address_path),
            local_address_v6: flags.local_address_ip_version == "v6",
            log_level,
            component_log_level,
            component_levels,
            log_format: flags.log_format,
            log_format_escaped: flags.log_format_escaped,
            log_path: path(flags.log_path),
            service_cluster: flags.service_cluster.unwrap_or_default(),
            service_node: flags.service_node.unwrap_or_default(),
            service_zone: flags.service_zone.unwrap_or_default(),
            drain_time: Duration::from_secs(flags.drain_time_s.into()),
            drain_immediately,
            parent_shutdown_time: Duration::from_secs(flags.parent_shutdown_time_s.into()),
            shutdown_drain_time: Duration::from_secs(flags.shutdown_drain_time_s.into()),
            file_flush_interval: Duration::from_millis(flags.file_flush_interval_msec.into()),
            file_flush_min_size_kb: flags.file_flush_min_size_kb,
            base_id,
            base_id_path: path(flags.base_id_path),
            use_dynamic_base_id: flags.use_dynamic_base_id,
            restart_epoch: flags.restart_epoch,
            disable_hot_restart: flags.disable_hot_restart,
            cpuset_threads: flags.cpuset_threads,
            enable_core_dump: flags.enable_core_dump,
            disabled_extensions,
            socket_path: flags.socket_path.unwrap_or_else(|| "@envoy_domain_socket".to_owned()),
        })
    }
}

/// An empty path is one that is not given: scripts pass variables that may be empty.
fn path(flag: Option<OsString>) -> Option<PathBuf> {
    flag.filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// `upstream:debug,config:trace`.
fn component_levels(text: &str) -> Result<Vec<(String, Level)>, String> {
    let mut levels = Vec::new();
    if text.is_empty() {
        return Ok(levels);
    }
    for part in text.split(',') {
        let Some((component, level)) = part.split_once(':') else {
            return Err(format!("component log level not correctly specified '{part}'"));
        };
        let level = Level::parse(level).ok_or_else(|| format!("invalid log level specified '{level}'"))?;
        levels.push((component.to_owned(), level));
    }
    Ok(levels)
}

/// The CPUs this process may use: affinity (the cpuset) and cgroup quota.
fn default_concurrency() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::{Command, Mode, Options, parse};

    fn options(args: &[&str]) -> Options {
        match parse(std::iter::once("envoy").chain(args.iter().copied()).map(Into::into)) {
            Ok(Command::Run(options)) => *options,
            other => panic!("{other:?}"),
        }
    }

    fn error(args: &[&str]) -> String {
        parse(std::iter::once("envoy").chain(args.iter().copied()).map(Into::into)).unwrap_err().0
    }

    #[test]
    fn launchers_command_lines_are_taken() {
        let istio = options(&[
            "-c",
            "etc/istio/proxy/envoy-rev.json",
            "--drain-time-s",
            "45",
            "--drain-strategy",
            "immediate",
            "--local-address-ip-version",
            "v4",
            "--file-flush-interval-msec",
            "1000",
            "--disable-hot-restart",
            "--allow-unknown-static-fields",
            "-l",
            "warning",
            "--component-log-level",
            "misc:error",
            "--skip-deprecated-logs",
            "--concurrency",
            "1",
        ]);
        assert_eq!(istio.concurrency, 1);
        assert!(istio.drain_immediately && istio.allow_unknown_static_fields);
        assert_eq!(istio.component_levels.len(), 1);
        let gateway = options(&[
            "--service-cluster",
            "c",
            "--service-node",
            "n",
            "--config-yaml",
            "admin: {}",
            "--log-level",
            "warn",
            "--cpuset-threads",
            "--drain-strategy",
            "immediate",
            "--admin-address-path",
            "f",
            "--",
            "--run-id",
            "7",
        ]);
        assert_eq!(gateway.service_node, "n");
        assert_eq!(gateway.mode, Mode::Serve);
        assert_eq!(options(&["--mode=validate", "--config-path=x"]).mode, Mode::Validate);
        assert!(options(&["--allow-unknown-fields"]).allow_unknown_static_fields);
        assert_eq!(options(&["--restart-epoch", "1", "--disable-hot-restart"]).restart_epoch, 1);
        let tagged = options(&["--stats-tag", "a:b", "--stats-tag", "a:c"]);
        assert_eq!(tagged.stats_tags, [("a".to_owned(), "b".to_owned())]);
        assert_eq!(options(&["-c", "", "--component-log-level", "", "--log-path", ""]).config_path, None);
    }

    #[test]
    fn refusals_speak_envoys_words() {
        for (args, part) in [
            (&["--bogus"][..], "Couldn't find match for argument"),
            (&["--concurrency", "abc"], "Couldn't read argument value from string 'abc'"),
            (&["--concurrency"], "Missing a value for this argument!"),
            (&["-l", "bogus"], "error: invalid log level specified 'bogus'"),
            (&["--mode", "bogus"], "error: unknown mode 'bogus'"),
            (&["--stats-tag", "bad"], "error: misformatted stats-tag 'bad'"),
            (
                &["--restart-epoch", "1", "--use-dynamic-base-id"],
                "error: cannot use --restart-epoch=1 with --use-dynamic-base-id",
            ),
            (&["--base-id", "1", "--base-id", "2"], "Argument already set!"),
            (&["--restart-epoch", "1"], "error: --restart-epoch=1 needs a parent process"),
            (&["--component-log-level", "http:info,"], "component log level not correctly specified ''"),
        ] {
            let text = error(args);
            assert!(text.contains(part), "{args:?}: {text}");
        }
    }
}

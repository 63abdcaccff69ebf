//! The command line: Envoy's flags, and the subcommands of our own.

pub mod check;
pub mod options;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use prost::Message as _;
use waystation_schema::At as _;
use waystation_stats::Store;

use crate::admin::access_log::AdminLogs;
use crate::bootstrap::{Bootstrap, LoadError};
use crate::config_source::Backing;
use crate::context::Shared;
use crate::control::MainThread;
use crate::server::Server;
use crate::{admin, log, registry, stats_config, version};
use options::{Command, Mode, Options};

/// Runs the process.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    match args.get(1).and_then(|first| first.to_str()) {
        Some("check") => return check::main(&args[2..]),
        Some("xds-server") => return waystation_xds_server::cli::main(&args[2..]),
        _ => {}
    }
    let program = args.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match options::parse(args) {
        Ok(Command::Version) => {
            println!("\n{program}  version: {}\n", version::version());
            ExitCode::SUCCESS
        }
        Ok(Command::HotRestartVersion) => {
            eprintln!("disabled");
            ExitCode::SUCCESS
        }
        Ok(Command::Help(text)) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Ok(Command::Run(options)) => run(*options),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> ExitCode {
    log::set_all(options.log_level);
    for (component, level) in &options.component_levels {
        if !log::set_level(component, *level) {
            eprintln!("error: invalid component specified '{component}'");
            return ExitCode::FAILURE;
        }
    }
    log::init(&options.log_format, options.log_format_escaped);
    let file = options.config_path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
    let validate = options.mode == Mode::Validate;
    match start(options) {
        Ok(()) => {
            if validate {
                println!("configuration '{file}' OK");
            }
            ExitCode::SUCCESS
        }
        Err(reason) => {
            tracing::error!(target: "main", critical = true, "error initializing configuration '{file}': {reason}");
            if !validate {
                tracing::info!(target: "main", "exiting");
                eprintln!("{reason}");
            }
            ExitCode::FAILURE
        }
    }
}

fn start(options: Options) -> Result<(), String> {
    // Validation leaves the log where its user looks.
    if let Some(path) = options.log_path.as_ref().filter(|_| options.mode != Mode::Validate) {
        log::write_to(path).map_err(|error| {
            let path = path.display();
            format!("Failed to open log-file '{path}'. e.what(): unable to open file '{path}': {error}")
        })?;
    }
    let bootstrap = Bootstrap::load(&options).map_err(|error: LoadError| error.to_string())?;
    if let Some(format) = bootstrap.log_format(&options).map_err(|error| error.to_string())? {
        log::set_format(&format);
    }
    report(&bootstrap, &options);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start a runtime: {error}"))?;
    let options = Arc::new(options);
    runtime.block_on(serve(bootstrap, options))
}

/// What the walk found, once, at the start.
fn report(bootstrap: &Bootstrap, options: &Options) {
    for name in &options.disabled_extensions {
        tracing::warn!(target: "misc", "failed to disable unknown extension '{name}'");
    }
    for unknown in &bootstrap.report.unknown {
        tracing::warn!(target: "config", "{unknown}");
    }
    if !options.skip_deprecated_logs {
        for deprecated in &bootstrap.report.deprecated {
            tracing::warn!(target: "config", "{deprecated}");
        }
    }
    if bootstrap.proto.hds_config.is_some() {
        tracing::warn!(
            target: "config",
            "hds_config is ignored: health discovery is not implemented, the management server gets no health reports"
        );
    }
    for ignored in &bootstrap.report.ignored {
        tracing::info!(target: "config", "{ignored}");
    }
}

async fn serve(bootstrap: Bootstrap, options: Arc<Options>) -> Result<(), String> {
    let text = |error: waystation_schema::ConfigError| error.to_string();
    let config = stats_config::compile(&bootstrap.proto, &options).map_err(text)?;
    let backing = Backing::new(bootstrap.proto.node.as_ref(), &bootstrap.clusters);
    let shared = Shared::new(Store::new(config), bootstrap.node(), backing, &options);
    let mut node: core::Node = bootstrap.proto.node.clone().unwrap_or_default();
    version::identify(&mut node);
    node.extensions = registry::extensions();
    let admin_address = bootstrap
        .proto
        .admin
        .as_ref()
        .map(admin::address)
        .transpose()
        .at(|| "admin")
        .map_err(text)?
        .flatten();
    let allowed = bootstrap.proto.admin.as_ref().map(admin::allowed_paths).transpose();
    let allowed = allowed.at(|| "admin").map_err(text)?.unwrap_or_default();
    let logs = bootstrap.proto.admin.as_ref().map(|proto| AdminLogs::compile(proto, &shared)).transpose();
    let logs = logs.at(|| "admin").map_err(text)?.unwrap_or_default();
    let unknown = bootstrap.report.unknown.len() as u64;
    let server = Server::new(bootstrap, Arc::clone(&options), Arc::clone(&shared), node.clone())?;
    server.count_unknown_static(unknown);
    if options.mode == Mode::Validate {
        return Ok(());
    }
    if let Some(path) = &options.base_id_path {
        write_output("base id", path, &options.base_id.to_string());
    }
    let (main, jobs) = MainThread::channel();
    if let Some(address) = admin_address {
        let socket = crate::address::bind(&address, false)
            .and_then(|socket| crate::address::listen_on(&socket, &address, 128).map(|()| socket))
            .map_err(|error| format!("cannot bind '{}': {error}", address.address))?;
        if let Some(path) = &options.admin_address_path {
            let bound = admin::address_text(&socket).unwrap_or_default();
            write_output("admin address", path, &bound);
        }
        let node = node.encode_to_vec().into();
        admin::spawn(socket, Arc::clone(&shared), Arc::clone(&options), main.clone(), node, allowed, logs)
            .map_err(|error| format!("cannot start the admin thread: {error}"))?;
    }
    server.run(main, jobs).await.map_err(|error| error.to_string())
}

/// Tells a launcher something in a file; one that cannot be written ends nothing, as in Envoy.
fn write_output(what: &str, path: &Path, text: &str) {
    if let Err(error) = std::fs::write(path, text) {
        let path = path.display();
        tracing::error!(
            target: "admin",
            critical = true,
            "cannot open {what} output file {path} for writing: {error}"
        );
    }
}

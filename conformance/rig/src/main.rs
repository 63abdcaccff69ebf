//! The differential rig: one case file is run against real Envoy and against waystation, and everything an
//! outsider can see is compared: responses, what upstreams received, access log lines, stats, exit codes.
//!
//! A case is a few lines of YAML below `conformance/cases`; [`case`] is the format. [`bootstrap`] turns the
//! shorthand of a file into a bootstrap, [`session`] runs it against one binary, [`run`] compares two.

#![forbid(unsafe_code)]

mod abuse;
mod bootstrap;
mod case;
mod certs;
mod client;
mod compare;
mod control_plane;
mod h2spec;
mod launchers;
mod place;
mod proxy;
mod report;
mod run;
mod session;
mod steps;
mod upstream;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};

/// Compares waystation with Envoy.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Selection {
    /// Folder of the cases.
    #[arg(long, default_value = "conformance/cases")]
    cases: PathBuf,
    /// Part of a file's name, of a case's name, or `file::case`.
    #[arg(long)]
    filter: Option<String>,
    /// Case files at a time.
    #[arg(long, default_value_t = 4)]
    jobs: usize,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compares the subject with Envoy, or with what Envoy answered before.
    Run {
        #[command(flatten)]
        selection: Selection,
        /// The Envoy binary.
        #[arg(long)]
        envoy: Option<PathBuf>,
        /// The binary to be judged.
        #[arg(long)]
        subject: PathBuf,
        /// Folder of recorded answers, used instead of an Envoy.
        #[arg(long, num_args = 0..=1, default_missing_value = "conformance/golden")]
        golden: Option<PathBuf>,
        /// Shows every difference.
        #[arg(long, short)]
        verbose: bool,
    },
    /// Stores Envoy's answers.
    Record {
        #[command(flatten)]
        selection: Selection,
        /// The Envoy binary.
        #[arg(long)]
        envoy: PathBuf,
        /// Folder of recorded answers.
        #[arg(long, default_value = "conformance/golden")]
        golden: PathBuf,
        /// Runs that have to agree.
        #[arg(long, default_value_t = 1)]
        times: usize,
        /// Prints what is stored.
        #[arg(long)]
        show: bool,
    },
    /// Drives the subject by a real go-control-plane server, over every transport.
    ControlPlane {
        /// The program built from `conformance/go-control-plane`.
        #[arg(long)]
        go: PathBuf,
        /// The binary to be judged.
        #[arg(long)]
        subject: PathBuf,
    },
    /// Runs h2spec against both; what Envoy passes the subject must pass.
    H2spec {
        /// The h2spec binary.
        #[arg(long)]
        h2spec: PathBuf,
        /// The Envoy binary.
        #[arg(long)]
        envoy: PathBuf,
        /// The binary to be judged.
        #[arg(long)]
        subject: PathBuf,
    },
    /// Floods, slowness and garbage.
    Abuse {
        /// The Envoy binary; without it only survival is judged.
        #[arg(long)]
        envoy: Option<PathBuf>,
        /// The binary to be judged.
        #[arg(long)]
        subject: PathBuf,
    },
    /// Starts the subject as real launchers do.
    Launchers {
        /// The binary to be judged.
        #[arg(long)]
        subject: PathBuf,
    },
    /// Counts the cases by topic.
    List {
        #[command(flatten)]
        selection: Selection,
    },
    /// Prints the bootstraps that files stand for.
    Show {
        #[command(flatten)]
        selection: Selection,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    perform(Cli::parse().command).await.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

async fn perform(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run { selection, envoy, subject, golden, verbose } => {
            let oracle = match (envoy, golden) {
                (_, Some(dir)) => run::Oracle::Golden(dir),
                (Some(binary), None) => run::Oracle::Envoy(absolute(binary)?),
                (None, None) => bail!("--envoy or --golden"),
            };
            let filter = selection.filter.as_deref();
            run::compare(&selection.cases, filter, &oracle, &absolute(subject)?, selection.jobs, verbose)
                .await
        }
        Command::Record { selection, envoy, golden, times, show } => {
            let filter = selection.filter.as_deref();
            run::record(
                &selection.cases,
                filter,
                &absolute(envoy)?,
                &golden,
                selection.jobs,
                times.max(1),
                show,
            )
            .await
        }
        Command::ControlPlane { go, subject } => {
            control_plane::run(&absolute(go)?, &absolute(subject)?).await
        }
        Command::H2spec { h2spec, envoy, subject } => {
            h2spec::run(&absolute(h2spec)?, &absolute(envoy)?, &absolute(subject)?).await
        }
        Command::Abuse { envoy, subject } => {
            let envoy = envoy.map(absolute).transpose()?;
            abuse::run(envoy.as_deref(), &absolute(subject)?).await
        }
        Command::Launchers { subject } => launchers::run(&absolute(subject)?).await,
        Command::List { selection } => run::list(&selection.cases, selection.filter.as_deref()),
        Command::Show { selection } => {
            let certs = certs::Certs::generate()?;
            for file in case::load(&selection.cases, selection.filter.as_deref())? {
                println!("# {}\n{}", file.name, session::show(&file, &certs).await?);
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn absolute(path: PathBuf) -> Result<PathBuf> {
    std::fs::canonicalize(&path).with_context(|| path.display().to_string())
}

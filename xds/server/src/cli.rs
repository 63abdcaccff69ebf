//! `waystation xds-server`.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::net::TcpListener;

use crate::{Server, TlsFiles};

/// Serves a folder of YAML and JSON resources over xDS: ADS and each type's own service, state of the world,
/// delta and REST, on one port. The folder is watched; a file that is not valid keeps its last good version.
///
/// A virtual host wrapped in an envoy.service.discovery.v3.Resource with aliases is sent only to a proxy that asks for
/// one of its names, `ROUTE_CONFIGURATION/HOST`, on behalf of a request.
#[derive(Debug, Parser)]
#[command(name = "waystation xds-server", no_binary_name = true)]
struct Options {
    /// The folder, with all folders in it.
    #[arg(long)]
    dir: PathBuf,
    /// Where to serve xDS. Port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:18000", value_name = "ADDRESS")]
    listen: String,
    /// Where to show files, connected nodes, versions, ACKs and NACKs (`/`, `/status`).
    #[arg(long, default_value = "127.0.0.1:18001", value_name = "ADDRESS")]
    admin: String,
    /// Serve xDS over TLS, with this certificate chain in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Accept only clients with a certificate signed by one of these CAs in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    client_ca: Option<PathBuf>,
}

/// Runs the subcommand; `args` are those behind its name.
///
/// The addresses that were bound go to the standard output, one line each; everything else to the standard error.
pub fn main(args: &[OsString]) -> ExitCode {
    let options = match Options::try_parse_from(args) {
        Ok(options) => options,
        Err(error) => {
            // Help goes to the standard output, a complaint to the standard error; neither can be helped further.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result =
        runtime.map_err(|error| error.to_string()).and_then(|runtime| runtime.block_on(run(options)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("xds-server: {reason}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<(), String> {
    let mut builder = Server::builder(&options.dir);
    let mut scheme = "plain";
    if let (Some(cert), Some(key)) = (options.tls_cert, options.tls_key) {
        builder = builder.tls(TlsFiles { cert, key, client_ca: options.client_ca });
        scheme = "TLS";
    }
    let (listener, address) = bind(&options.listen).await?;
    let (admin_listener, admin_address) = bind(&options.admin).await?;
    let server = builder.start().map_err(|error| error.to_string())?;
    println!("xDS ({scheme}): {address}");
    println!("admin: http://{admin_address}/");
    tokio::select! {
        () = server.serve(listener) => {}
        () = server.serve_admin(admin_listener) => {}
        result = asked_to_stop() => result.map_err(|error| error.to_string())?,
    }
    Ok(())
}

async fn bind(address: &str) -> Result<(TcpListener, String), String> {
    let fail = |error: io::Error| format!("cannot listen on {address}: {error}");
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    let bound = listener.local_addr().map_err(fail)?;
    Ok((listener, bound.to_string()))
}

async fn asked_to_stop() -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result,
        _ = terminate.recv() => Ok(()),
    }
}

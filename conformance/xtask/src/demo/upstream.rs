//! The services behind the proxy: each answers every request with its name.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

/// Starts a service on a free port; it lives as long as the process.
pub(super) fn start(name: &'static str) -> Result<SocketAddr, String> {
    let explain = |error: std::io::Error| format!("upstream {name}: {error}");
    let listener = TcpListener::bind("127.0.0.1:0").map_err(explain)?;
    let address = listener.local_addr().map_err(explain)?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(stream, name));
        }
    });
    Ok(address)
}

/// Answers request after request until the proxy closes the connection.
fn serve(stream: TcpStream, name: &str) {
    let _ = stream.set_nodelay(true);
    let response = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}\n", name.len() + 1);
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        match stream.read_line(&mut line) {
            Ok(0) | Err(_) => return,
            // The demo sends no bodies: an empty line ends a request.
            Ok(_) if line == "\r\n" => {
                if stream.get_mut().write_all(response.as_bytes()).is_err() {
                    return;
                }
            }
            Ok(_) => {}
        }
    }
}

//! A blocking HTTP/1.1 client, just large enough for the demo.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// For connecting, and for each read and write.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A keep-alive connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: BufReader<TcpStream>,
}

/// A whole response.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: u16,
    headers: Vec<(String, String)>,
    pub(super) body: String,
}

impl Connection {
    pub(super) fn open(address: SocketAddr) -> Result<Self, String> {
        let explain = |error: std::io::Error| format!("connecting to {address}: {error}");
        let stream = TcpStream::connect_timeout(&address, TIMEOUT).map_err(explain)?;
        stream.set_read_timeout(Some(TIMEOUT)).map_err(explain)?;
        stream.set_write_timeout(Some(TIMEOUT)).map_err(explain)?;
        stream.set_nodelay(true).map_err(explain)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    pub(super) fn get(&mut self, path: &str) -> Result<Response, String> {
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: demo.local\r\nuser-agent: waystation-demo\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes()).map_err(|error| format!("sending: {error}"))?;
        let status_line = self.line()?;
        let status = status_line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| format!("not a status line: {status_line:?}"))?;
        let mut response = Response { status, headers: Vec::new(), body: String::new() };
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| format!("not a header: {line:?}"))?;
            response.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        response.body = self.body(&response)?;
        Ok(response)
    }

    fn body(&mut self, response: &Response) -> Result<String, String> {
        let mut body = Vec::new();
        if response.header("transfer-encoding") == Some("chunked") {
            loop {
                let line = self.line()?;
                let length =
                    usize::from_str_radix(line.trim(), 16).map_err(|_| format!("not a chunk: {line:?}"))?;
                self.read(length, &mut body)?;
                self.line()?;
                if length == 0 {
                    break;
                }
            }
        } else {
            let length = response.header("content-length").and_then(|length| length.parse().ok());
            self.read(length.ok_or("a response without length")?, &mut body)?;
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    fn read(&mut self, length: usize, body: &mut Vec<u8>) -> Result<(), String> {
        let start = body.len();
        body.resize(start + length, 0);
        self.stream.read_exact(&mut body[start..]).map_err(|error| format!("reading the body: {error}"))
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err("the connection was closed".to_owned()),
            Ok(_) => Ok(line.trim_end_matches(['\r', '\n']).to_owned()),
            Err(error) => Err(format!("reading: {error}")),
        }
    }
}

impl Response {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }
}

/// One request on a connection of its own.
pub(super) fn get(address: SocketAddr, path: &str) -> Result<Response, String> {
    Connection::open(address)?.get(path)
}

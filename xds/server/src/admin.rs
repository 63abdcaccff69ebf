//! The admin endpoint: a page for people, JSON for everything else.

use std::convert::Infallible;
use std::fmt::{self, Write as _};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;

use crate::Server;
use crate::status::{FeedStatus, Status};

/// A connection to the admin port.
pub(crate) async fn connection(server: Server, socket: TcpStream) {
    let service = service_fn(|request| {
        let response = respond(&server, &request);
        async move { Ok::<_, Infallible>(response) }
    });
    // What ends a connection is the client's business.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(socket), service)
        .await;
}

fn respond(server: &Server, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return reply(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "GET it\n".to_owned());
    }
    match request.uri().path() {
        "/" => reply(StatusCode::OK, "text/html; charset=utf-8", page(&server.status())),
        "/status" => match serde_json::to_string_pretty(&server.status()) {
            Ok(json) => reply(StatusCode::OK, "application/json", json + "\n"),
            Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
        },
        _ => reply(StatusCode::NOT_FOUND, "text/plain", "there are / and /status\n".to_owned()),
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

const HEAD: &str = "<!doctype html><html lang=en><meta charset=utf-8><title>waystation xds-server</title>\n\
    <style>body{font:14px/1.4 system-ui,sans-serif;margin:2em;color-scheme:light dark}\
    table{border-collapse:collapse;margin-bottom:2em}td,th{padding:.2em .8em;text-align:left;vertical-align:top;\
    border-bottom:1px solid #8884}.bad{color:#c22}code{font-size:12px}</style>\n\
    <h1>waystation xds-server</h1><p>The same as JSON: <a href=/status>/status</a></p>\n";

/// The page. Writing to a string cannot fail, hence the results left alone.
fn page(status: &Status) -> String {
    let mut out = String::from(HEAD);
    out.push_str("<h2>Served</h2><table><tr><th>Type<th>Resources<th>Version\n");
    for (url, kind) in &status.types {
        let (url, version) = (Escaped(short(url)), Escaped(&kind.version));
        let _ = writeln!(out, "<tr><td>{url}<td>{}<td><code>{version}</code>", kind.resources);
    }
    out.push_str("</table><h2>Files</h2><table><tr><th>File<th>Resources served<th>State\n");
    for (path, file) in &status.files {
        let _ = write!(out, "<tr><td>{}<td>{}<td>", Escaped(path), file.resources);
        match &file.fault {
            Some(fault) => {
                let fault = fault.to_string();
                let _ = write!(out, "<span class=bad>{}</span>", Escaped(&fault));
            }
            None => out.push_str("good"),
        }
        for warning in &file.warnings {
            let warning = warning.to_string();
            let _ = write!(out, "<br>warning: {}", Escaped(&warning));
        }
        out.push('\n');
    }
    out.push_str("</table>");
    for warning in &status.warnings {
        let _ = writeln!(out, "<p>warning: {}</p>", Escaped(warning));
    }
    out.push_str("<h2>Streams</h2><table><tr><th>Node<th>Cluster<th>Peer<th>Stream<th>Types\n");
    for stream in &status.streams {
        let _ = write!(
            out,
            "<tr><td>{}<td>{}<td>{}<td>{}, {}<td>",
            Escaped(&stream.node),
            Escaped(&stream.cluster),
            Escaped(&stream.peer),
            Escaped(&stream.service),
            stream.protocol,
        );
        stream.types.iter().for_each(|feed| describe(&mut out, feed));
        out.push('\n');
    }
    out.push_str("</table></html>\n");
    out
}

fn describe(out: &mut String, feed: &FeedStatus) {
    let _ = write!(out, "{}: ", Escaped(short(&feed.type_url)));
    match (&feed.sent, &feed.refused) {
        (_, Some(refusal)) => {
            let _ = write!(
                out,
                "<span class=bad>refused <code>{}</code>: {}</span>",
                Escaped(&refusal.version),
                Escaped(&refusal.detail)
            );
        }
        (None, None) => out.push_str("nothing sent yet"),
        (Some(sent), None) if feed.awaiting_answer => {
            let _ = write!(out, "sent <code>{}</code>, not yet answered", Escaped(sent));
        }
        (Some(sent), None) => {
            let _ = write!(out, "acknowledged <code>{}</code>", Escaped(sent));
        }
    }
    out.push_str("<br>");
}

fn short(url: &str) -> &str {
    url.rsplit_once('.').map_or(url, |(_, name)| name)
}

/// Text in HTML.
struct Escaped<'t>(&'t str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for letter in self.0.chars() {
            match letter {
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '&' => f.write_str("&amp;")?,
                '"' => f.write_str("&quot;")?,
                '\n' => f.write_str("<br>")?,
                _ => f.write_char(letter)?,
            }
        }
        Ok(())
    }
}

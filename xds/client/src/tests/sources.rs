//! Files and REST polling, through the driver.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::harness::{CDS, EDS, Seen, brief, options, sotw, toy};
use super::integration::{next_update, patience, runtime, transport};
use crate::{
    Client, Event, Failure, Interest, PathSource, Protocol, ResourceType, RestSource, Source,
    SubscriptionSpec, Via,
};

fn from_path(kind: ResourceType, path: PathSource, interest: Interest) -> SubscriptionSpec {
    SubscriptionSpec { kind, source: Source::Path(Arc::new(path)), interest, init_fetch_timeout: None }
}

fn client() -> Client {
    let (transport, _) = transport("127.0.0.1:9".parse().unwrap());
    Client::new(options(Protocol::Sotw, 5), transport)
}

/// Puts content in place the way that writers of configuration do it.
fn replace(path: &std::path::Path, content: &[u8]) {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, content).unwrap();
    fs::rename(&temporary, path).unwrap();
}

#[test]
fn file_is_read_again_when_it_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cds.yaml");
    fs::write(&path, sotw(&CDS, "1", "", &[toy("a", &[], "1"), toy("b", &[], "1")])).unwrap();
    runtime().block_on(patience(async {
        let mut client = client();
        let source = PathSource { path: path.clone(), watched_directory: None };
        let id = client.subscribe(from_path(CDS, source, Interest::Wildcard)).unwrap();
        let update = next_update(&mut client).await;
        assert_eq!(update.resources.len(), 2);
        client.applied(update.token, Vec::new());

        replace(&path, &sotw(&CDS, "2", "", &[toy("a", &[], "2")]));
        let update = next_update(&mut client).await;
        assert_eq!((update.resources.len(), &*update.resources[0].name), (1, "a"));
        assert_eq!(update.removed, [Arc::from("b")]);
        client.applied(update.token, Vec::new());
        let stats = client.core().subscription_stats(id).unwrap();
        assert_eq!((stats.update_success, &*stats.version_text), (2, "2"));

        replace(&path, b"broken");
        let event = client.next().await;
        let Event::Disconnected { via: Via::File, target, message, .. } = event else { panic!("{event:?}") };
        assert!(target.ends_with("cds.yaml") && message == "not a config", "{target}: {message}");
        let event = client.next().await;
        assert!(
            matches!(event, Event::Failed { sub, failure: Failure::Unreadable } if sub == id),
            "{event:?}"
        );
        assert_eq!(client.core().subscription_stats(id).unwrap().update_failure, 1);
        assert_eq!(client.core().held(&CDS).count(), 1);
    }));
}

#[test]
fn kubernetes_swaps_a_link_in_the_watched_directory() {
    let directory = tempfile::tempdir().unwrap();
    let data = |number: u32| directory.path().join(format!("..data-{number}"));
    for number in 1..=2 {
        fs::create_dir(data(number)).unwrap();
        let content = sotw(&EDS, &number.to_string(), "", &[toy("e", &[], &number.to_string())]);
        fs::write(data(number).join("eds.yaml"), content).unwrap();
    }
    let link = |number: u32| {
        let temporary = directory.path().join("..data_tmp");
        std::os::unix::fs::symlink(data(number), &temporary).unwrap();
        fs::rename(temporary, directory.path().join("..data")).unwrap();
    };
    link(1);
    std::os::unix::fs::symlink("..data/eds.yaml", directory.path().join("eds.yaml")).unwrap();
    runtime().block_on(patience(async {
        let mut client = client();
        let source = PathSource {
            path: directory.path().join("eds.yaml"),
            watched_directory: Some(directory.path().to_owned()),
        };
        client.subscribe(from_path(EDS, source, Interest::Names(vec!["e".into()]))).unwrap();
        let update = next_update(&mut client).await;
        client.applied(update.token, Vec::new());
        assert_eq!(&*update.version, "1");
        link(2);
        assert_eq!(&*next_update(&mut client).await.version, "2");
    }));
}

#[test]
fn second_subscription_to_a_file_and_a_name_that_is_not_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("eds.yaml");
    fs::write(&path, sotw(&EDS, "1", "", &[toy("e", &[], "1"), toy("f", &[], "1")])).unwrap();
    runtime().block_on(patience(async {
        let mut client = client();
        let source = PathSource { path: path.clone(), watched_directory: None };
        let names = |name: &str| Interest::Names(vec![name.into()]);
        for name in ["e", "f"] {
            client.subscribe(from_path(EDS, source.clone(), names(name))).unwrap();
            let update = next_update(&mut client).await;
            client.applied(update.token, Vec::new());
            assert_eq!(&*update.resources[0].name, name);
        }
        let missing = client.subscribe(from_path(EDS, source, names("g"))).unwrap();
        let event = client.next().await;
        let Event::Failed { sub, failure: Failure::Rejected(reason) } = event else { panic!("{event:?}") };
        assert_eq!(sub, missing);
        assert!(reason.starts_with("no resource named g in "), "{reason}");
    }));
}

#[test]
fn rest_is_polled() {
    runtime().block_on(patience(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (transport, _) = transport(listener.local_addr().unwrap());
        let (requests, mut seen) = mpsc::channel(8);
        let server = tokio::spawn(async move {
            for number in 1.. {
                let (socket, _) = listener.accept().await.unwrap();
                let requests = requests.clone();
                let service =
                    hyper::service::service_fn(move |request| answer(number, request, requests.clone()));
                let io = hyper_util::rt::TokioIo::new(socket);
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
            }
        });
        let _server = AbortOnDropHandle::new(server);

        let mut client = Client::new(options(Protocol::Sotw, 5), transport);
        let rest = RestSource {
            target: "rest_cluster".into(),
            refresh_delay: Duration::from_millis(5),
            request_timeout: Duration::from_secs(5),
        };
        let id = client
            .subscribe(SubscriptionSpec {
                kind: EDS,
                source: Source::Rest(Arc::new(rest)),
                interest: Interest::Names(vec!["e".into()]),
                init_fetch_timeout: None,
            })
            .unwrap();
        for version in ["1", "2"] {
            let update = next_update(&mut client).await;
            assert_eq!(&*update.version, version);
            client.applied(update.token, Vec::new());
        }
        assert!(client.core().subscription_stats(id).unwrap().update_failure >= 1);
        let mut polls = Vec::new();
        while let Ok((path, body)) = seen.try_recv() {
            assert_eq!(path, "/v3/discovery:endpoints");
            let body = std::str::from_utf8(&body).unwrap();
            let bytes: Vec<u8> = (0..body.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&body[at..at + 2], 16).unwrap())
                .collect();
            polls.push(brief(&Seen::decode(Protocol::Sotw, &bytes.into())));
        }
        assert_eq!(
            polls[..3],
            ["ClusterLoadAssignment [e]", "ClusterLoadAssignment v1 [e]", "ClusterLoadAssignment v1 [e]"]
        );
    }));
}

type Polled = (String, Bytes);

/// Version 1, then an error, then version 2.
async fn answer(
    number: u32,
    request: http::Request<hyper::body::Incoming>,
    polled: mpsc::Sender<Polled>,
) -> Result<http::Response<Full<Bytes>>, std::convert::Infallible> {
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await.expect("a body").to_bytes();
    polled.send((path, body)).await.expect("the test runs");
    let version = if number == 1 { "1" } else { "2" };
    let mut response = http::Response::new(Full::new(sotw(&EDS, version, "", &[toy("e", &[], version)])));
    if number == 2 {
        *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
    }
    Ok(response)
}

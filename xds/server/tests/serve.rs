//! The whole server over TCP, with this project's client: files in, resources out.

use std::fs;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use waystation_schema::{JsonStyle, Message, TextOptions, json_to_wire, wire_to_json};
use waystation_xds::{
    BoxedIo, Client, ConfigCodec, Connect, Event, GrpcService, GrpcSource, Interest, Options, Protocol,
    Rejection, ResourceType, RestSource, Source, SubscriptionSpec, Transport, Update,
};
use waystation_xds_server::{Server, TlsFiles};

const CDS: ResourceType = ResourceType::Cluster;
const EDS: ResourceType = ResourceType::ClusterLoadAssignment;

fn cluster(name: &str, timeout: u32) -> String {
    format!(
        "'@type': type.googleapis.com/envoy.config.cluster.v3.Cluster\nname: {name}\ntype: EDS\n\
         eds_cluster_config: {{eds_config: {{ads: {{}}}}}}\nconnect_timeout: {timeout}s\n"
    )
}

fn endpoints(name: &str) -> String {
    format!(
        "resources:\n- '@type': type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment\n  \
         cluster_name: {name}\n"
    )
}

/// A folder, its server, and what the server says.
struct Rig {
    folder: tempfile::TempDir,
    server: Server,
    address: SocketAddr,
    admin: SocketAddr,
    lines: mpsc::Receiver<String>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Rig {
    async fn new(files: &[(&str, &str)]) -> Self {
        Self::with(files, None).await
    }

    async fn with(files: &[(&str, &str)], tls: Option<TlsFiles>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in files {
            put(folder.path(), name, text);
        }
        let (sender, lines) = mpsc::channel(1000);
        let mut builder = Server::builder(folder.path()).console(move |line| {
            let _ = sender.try_send(line.to_owned());
        });
        if let Some(tls) = tls {
            builder = builder.tls(tls);
        }
        let server = builder.start().expect("it starts");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let admin = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addresses = [&listener, &admin].map(|listener| listener.local_addr().expect("bound"));
        let (first, second) = (server.clone(), server.clone());
        let tasks = [
            AbortOnDropHandle::new(tokio::spawn(async move { first.serve(listener).await })),
            AbortOnDropHandle::new(tokio::spawn(async move { second.serve_admin(admin).await })),
        ];
        Self { folder, server, address: addresses[0], admin: addresses[1], lines, _tasks: tasks }
    }

    fn put(&self, name: &str, text: &str) {
        put(self.folder.path(), name, text);
    }

    /// Waits for a line on the console.
    async fn told(&mut self, part: &str) -> String {
        loop {
            let line = self.lines.recv().await.expect("the server runs");
            if line.contains(part) {
                return line;
            }
        }
    }

    fn client(&self, protocol: Protocol) -> Client {
        let source = GrpcSource::new(protocol, GrpcService::new("xds"));
        let node = {
            #[derive(Clone, PartialEq, prost::Message)]
            struct Node {
                #[prost(string, tag = "1")]
                id: String,
                #[prost(string, tag = "2")]
                cluster: String,
            }
            Node { id: "n1".to_owned(), cluster: "fleet".to_owned() }.encode_to_vec().into()
        };
        let options = Options { node, ads: Some(Arc::new(source)), seed: 1, unix_ms: 0 };
        Client::new(options, Transport { connect: Arc::new(Dial(self.address)), codec: Arc::new(Json) })
    }
}

/// Moves a file into place, which shows as one event.
fn put(folder: &Path, name: &str, text: &str) {
    let place = folder.join(name);
    fs::create_dir_all(place.parent().expect("it is in the folder")).expect("a folder");
    let draft = folder.join(".draft");
    fs::write(&draft, text).expect("it can be written");
    fs::rename(draft, place).expect("it can be moved");
}

struct Dial(SocketAddr);

impl Connect for Dial {
    fn connect(&self, _: &str, _: bool) -> Pin<Box<dyn Future<Output = io::Result<BoxedIo>> + Send>> {
        let address = self.0;
        Box::pin(async move { TcpStream::connect(address).await.map(|stream| Box::new(stream) as BoxedIo) })
    }
}

/// REST bodies, with the real schema.
struct Json;

impl ConfigCodec for Json {
    fn decode_file(&self, _: &Path, _: &[u8]) -> Result<Bytes, String> {
        Err("no files here".to_owned())
    }

    fn request_to_json(&self, request: &[u8]) -> Result<String, String> {
        let message = Message::find("envoy.service.discovery.v3.DiscoveryRequest").expect("it exists");
        let mut json = String::new();
        wire_to_json(message, request, &mut json, JsonStyle::default())
            .map_err(|error| format!("{error:?}"))?;
        Ok(json)
    }

    fn response_from_json(&self, json: &[u8]) -> Result<Bytes, String> {
        let message = Message::find("envoy.service.discovery.v3.DiscoveryResponse").expect("it exists");
        let text = std::str::from_utf8(json).map_err(|error| error.to_string())?;
        let encoded = json_to_wire(message, text, TextOptions::default());
        encoded.map(|encoded| encoded.wire.into()).map_err(|error| error.to_string())
    }
}

fn wants(kind: ResourceType, interest: Interest) -> SubscriptionSpec {
    SubscriptionSpec { kind, source: Source::Ads, interest, init_fetch_timeout: None }
}

async fn update(client: &mut Client, kind: &ResourceType) -> Update {
    loop {
        if let Event::Update(update) = client.next().await {
            client.applied(update.token, Vec::new());
            if update.kind == *kind {
                return update;
            }
        }
    }
}

fn names(update: &Update) -> Vec<&str> {
    update.resources.iter().map(|resource| &*resource.name).collect()
}

/// Until the server's status shows it; the client goes on meanwhile.
async fn until(
    client: &mut Client,
    server: &Server,
    shows: impl Fn(&waystation_xds_server::status::Status) -> bool,
) {
    while !shows(&server.status()) {
        tokio::select! {
            event = client.next() => if let Event::Update(update) = event { client.applied(update.token, Vec::new()) },
            () = tokio::task::yield_now() => {}
        }
    }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(20), test).await.expect("this takes milliseconds")
    })
}

#[test]
fn both_protocols_follow_the_folder() {
    for protocol in [Protocol::Sotw, Protocol::Delta] {
        run(async {
            let rig = Rig::new(&[("a.yaml", &cluster("a", 1)), ("deep/down/e.yml", &endpoints("a"))]).await;
            let mut client = rig.client(protocol);
            client.subscribe(wants(CDS, Interest::Wildcard)).expect("there is ADS");
            client.subscribe(wants(EDS, Interest::Names(vec!["a".into()]))).expect("there is ADS");
            assert_eq!(names(&update(&mut client, &CDS).await), ["a"]);
            assert_eq!(names(&update(&mut client, &EDS).await), ["a"]);
            rig.put("b.json", &serde_json::json!({"@type": CDS.url(), "name": "b"}).to_string());
            assert_eq!(names(&update(&mut client, &CDS).await), ["b"]);
            fs::remove_file(rig.folder.path().join("a.yaml")).expect("it is there");
            let removed = update(&mut client, &CDS).await.removed;
            assert_eq!(removed.iter().map(|name| &**name).collect::<Vec<_>>(), ["a"]);
            until(&mut client, &rig.server, |status| {
                let stream = &status.streams[0];
                (stream.node.as_str(), stream.cluster.as_str()) == ("n1", "fleet")
                    && stream.types.iter().all(|feed| feed.sent == feed.acknowledged && !feed.awaiting_answer)
            })
            .await;
            drop(client);
        });
    }
}

#[test]
fn bad_file_keeps_its_last_good_version_and_never_reaches_a_proxy() {
    run(async {
        let mut rig = Rig::new(&[("a.yaml", &cluster("a", 1)), ("b.yaml", &cluster("b", 1))]).await;
        let mut client = rig.client(Protocol::Delta);
        client.subscribe(wants(CDS, Interest::Wildcard)).expect("there is ADS");
        assert_eq!(names(&update(&mut client, &CDS).await), ["a", "b"]);
        rig.put("a.yaml", &cluster("a", 0));
        let line = rig.told("last good version").await;
        assert!(line.contains("a.yaml:5:1: connect_timeout: Proto constraint validation failed"), "{line}");
        let status = rig.server.status();
        assert_eq!(
            status.files["a.yaml"].fault.as_ref().map(|fault| (fault.line, fault.column)),
            Some((5, 1))
        );
        assert_eq!(status.files["a.yaml"].resources, 1);
        // The next thing that the client hears of is another file's change.
        rig.put("b.yaml", &cluster("b", 2));
        assert_eq!(names(&update(&mut client, &CDS).await), ["b"]);
        rig.put("a.yaml", &cluster("a", 3));
        assert_eq!(names(&update(&mut client, &CDS).await), ["a"]);
        assert!(rig.server.status().files["a.yaml"].fault.is_none());
    });
}

#[test]
fn refusal_is_shown() {
    run(async {
        let mut rig = Rig::new(&[("a.yaml", &cluster("a", 1))]).await;
        let mut client = rig.client(Protocol::Sotw);
        client.subscribe(wants(CDS, Interest::Wildcard)).expect("there is ADS");
        let update = loop {
            if let Event::Update(update) = client.next().await {
                break update;
            }
        };
        client.applied(update.token, vec![Rejection { name: "a".into(), reason: "too green".into() }]);
        tokio::select! {
            line = rig.told("refused") => assert!(line.contains("too green") && line.contains("node 'n1'"), "{line}"),
            event = client.next() => panic!("{event:?}"),
        }
        let page = http(rig.admin, "GET", "/", "").await;
        assert!(page.contains("too green"), "{page}");
        let status = http(rig.admin, "GET", "/status", "").await;
        let status: serde_json::Value =
            serde_json::from_str(status.split_once("\r\n\r\n").expect("a head").1).expect("JSON");
        assert_eq!(
            status["streams"][0]["types"][0]["refused"]["detail"],
            "Error adding/updating cluster(s) a: too green"
        );
    });
}

#[test]
fn streams_of_one_type_and_rest() {
    run(async {
        let rig = Rig::new(&[("a.yaml", &cluster("a", 1)), ("e.yaml", &endpoints("a"))]).await;
        let mut client = rig.client(Protocol::Sotw);
        for protocol in [Protocol::Sotw, Protocol::Delta] {
            let source = Source::Grpc(Arc::new(GrpcSource::new(protocol, GrpcService::new("own"))));
            let spec = SubscriptionSpec { source, ..wants(EDS, Interest::Names(vec!["a".into()])) };
            let own = client.subscribe(spec).expect("a source");
            assert_eq!(names(&update(&mut client, &EDS).await), ["a"]);
            client.unsubscribe(own);
        }
        let second = Duration::from_secs(1);
        let rest = RestSource { target: "rest".into(), refresh_delay: second, request_timeout: 5 * second };
        let spec =
            SubscriptionSpec { source: Source::Rest(Arc::new(rest)), ..wants(CDS, Interest::Wildcard) };
        client.subscribe(spec).expect("a source");
        assert_eq!(names(&update(&mut client, &CDS).await), ["a"]);

        let answer =
            http(rig.address, "POST", "/v3/discovery:endpoints", "{\"resourceNames\": [\"a\"]}").await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"clusterName\":\"a\""), "{answer}");
        let refused = http(rig.address, "POST", "/v3/discovery:clusters", "[]").await;
        assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
        let missing = http(rig.address, "POST", "/v3/discovery:nothing", "{}").await;
        assert!(missing.starts_with("HTTP/1.1 404 "), "{missing}");
    });
}

#[test]
fn tls_with_client_certificates() {
    run(async {
        let certified = rcgen::generate_simple_self_signed(["xds.local".to_owned()]).expect("a certificate");
        let folder = tempfile::tempdir().expect("a folder");
        let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
        fs::write(&cert, certified.cert.pem()).expect("it can be written");
        fs::write(&key, certified.signing_key.serialize_pem()).expect("it can be written");
        let tls = TlsFiles { cert: cert.clone(), key: key.clone(), client_ca: Some(cert.clone()) };
        let rig = Rig::with(&[("a.yaml", &cluster("a", 1))], Some(tls)).await;

        let certificate = CertificateDer::from_pem_file(&cert).expect("PEM");
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.clone()).expect("a certificate");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let versions = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider has them")
            .with_root_certificates(roots);
        let anonymous = versions.clone().with_no_client_auth();
        let known = versions
            .with_client_auth_cert(vec![certificate], PrivateKeyDer::from_pem_file(&key).expect("PEM"))
            .expect("they belong together");
        for (config, expected) in [(known, "HTTP/1.1 200"), (anonymous, "")] {
            let socket = TcpStream::connect(rig.address).await.expect("it listens");
            let name = ServerName::try_from("xds.local").expect("a name");
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            let mut socket = connector.connect(name, socket).await.expect("the certificate is good");
            let mut answer = String::new();
            // Who is not let in learns so when reading.
            if socket.write_all(request("POST", "/v3/discovery:clusters", "{}").as_bytes()).await.is_ok() {
                let _ = socket.read_to_string(&mut answer).await;
            }
            assert!(answer.starts_with(expected) && answer.is_empty() == expected.is_empty(), "{answer:?}");
        }
    });
}

fn request(method: &str, path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

async fn http(address: SocketAddr, method: &str, path: &str, body: &str) -> String {
    let mut socket = TcpStream::connect(address).await.expect("it listens");
    socket.write_all(request(method, path, body).as_bytes()).await.expect("it reads");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.expect("it answers");
    answer
}

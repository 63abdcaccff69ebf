//! The cost of a head: into [`Headers`], out of them, and looking things up in between.

use std::hint::black_box;
use std::sync::Arc;

use bytes::BytesMut;
use criterion::{Criterion, criterion_group, criterion_main};
use waystation_http::h1::{ClientConn, Config, ServerConn};
use waystation_http::{Headers, Known, PathOptions, normalize_path};

const CURL: &[u8] =
    b"GET /api/v1/items?limit=10 HTTP/1.1\r\nHost: example.com:8080\r\nUser-Agent: curl/8.5.0\r\n\
                      Accept: */*\r\n\r\n";
const BROWSER: &[u8] = b"GET /index.html HTTP/1.1\r\nHost: www.example.com\r\nConnection: keep-alive\r\n\
    Cache-Control: max-age=0\r\nsec-ch-ua: \"Chromium\";v=\"130\", \"Not?A_Brand\";v=\"99\"\r\nsec-ch-ua-mobile: ?0\r\n\
    Upgrade-Insecure-Requests: 1\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like \
    Gecko) Chrome/130.0.0.0 Safari/537.36\r\nAccept: text/html,application/xhtml+xml,application/xml;q=0.9,\
    image/avif,image/webp,*/*;q=0.8\r\nAccept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: \
    en-GB,en;q=0.9\r\nCookie: session=0123456789abcdef0123456789abcdef; theme=dark\r\n\r\n";

fn codec(criterion: &mut Criterion) {
    let config = Arc::new(Config::default());
    for (name, bytes) in [("curl", CURL), ("browser", BROWSER)] {
        criterion.bench_function(&format!("read request head, {name}"), |bencher| {
            let (mut headers, mut input) = (Headers::new(), BytesMut::with_capacity(16 * 1024));
            bencher.iter(|| {
                input.clear();
                input.extend_from_slice(bytes);
                let mut conn = ServerConn::new(config.clone());
                black_box(conn.receive(&mut input, &mut headers)).is_ok()
            });
        });
    }
    let mut request = Headers::new();
    let mut input = BytesMut::from(CURL);
    assert!(ServerConn::new(config.clone()).receive(&mut input, &mut request).is_ok());
    criterion.bench_function("write request head, curl", |bencher| {
        let mut out = BytesMut::with_capacity(16 * 1024);
        bencher.iter(|| {
            out.clear();
            ClientConn::new(config.clone()).send_head(black_box(&request), true, &mut out);
        });
    });
}

fn headers(criterion: &mut Criterion) {
    let mut headers = Headers::new();
    let mut input = BytesMut::from(BROWSER);
    assert!(ServerConn::new(Arc::default()).receive(&mut input, &mut headers).is_ok());
    criterion.bench_function("get, known and present", |bencher| {
        bencher.iter(|| black_box(&headers).get(Known::Cookie).map(<[u8]>::len));
    });
    criterion.bench_function("get, known and absent", |bencher| {
        bencher.iter(|| black_box(&headers).get(Known::XEnvoyMaxRetries).map(<[u8]>::len));
    });
    criterion.bench_function("get, other and present", |bencher| {
        bencher.iter(|| black_box(&headers).get("sec-ch-ua-mobile").map(<[u8]>::len));
    });
    criterion.bench_function("get, other and absent", |bencher| {
        bencher.iter(|| black_box(&headers).get("x-tenant-name").map(<[u8]>::len));
    });
    criterion.bench_function("normalize a plain path", |bencher| {
        let options = PathOptions { normalize: true, merge_slashes: true, ..PathOptions::default() };
        bencher.iter(|| normalize_path(black_box(b"/api/v1/items?limit=10"), options));
    });
}

criterion_group!(benches, codec, headers);
criterion_main!(benches);

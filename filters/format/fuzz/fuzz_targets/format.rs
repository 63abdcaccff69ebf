//! A format string (up to the first NUL) is compiled and written for a request whose path, certificate header and
//! other header are the rest of the input.
#![no_main]

use std::rc::Rc;
use std::time::{Instant, SystemTime};

use libfuzzer_sys::fuzz_target;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::stream::StreamInfo;
use waystation_format::{AccessLogType, FormatContext, Formatter};
use waystation_http::{Headers, Known};

fuzz_target!(|input: &[u8]| {
    let (format, value) = match input.iter().position(|byte| *byte == 0) {
        Some(nul) => (&input[..nul], &input[nul + 1..]),
        None => (input, &b""[..]),
    };
    let Ok(format) = std::str::from_utf8(format) else { return };
    let Ok(formatter) = Formatter::compile(format) else { return };
    let mut request = Headers::new();
    if waystation_http::is_valid_value(value) {
        request.append(Known::Path, value);
        request.append(Known::XForwardedClientCert, value);
        request.append(Known::XRequestId, value);
    }
    let address = Address::Ip(([127, 0, 0, 1], 80).into());
    let connection = ConnectionInfo::new(1, Instant::now(), address.clone(), address);
    let start = connection.start;
    let info = StreamInfo::new(1, start, SystemTime::now(), Rc::new(connection), None);
    let cx = FormatContext {
        request: Some(&request),
        response: Some(&request),
        trailers: None,
        info: &info,
        local_reply_body: "",
        log_type: AccessLogType::NotSet,
        now: start,
    };
    let mut out = Vec::new();
    formatter.write(&cx, &mut out);
    if let Some(literal) = formatter.literal() {
        assert_eq!(literal.as_bytes(), out);
    }
});

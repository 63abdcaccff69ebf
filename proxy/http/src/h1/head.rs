//! Reading a head into [`Headers`].

use std::borrow::Cow;
use std::mem::MaybeUninit;

use bytes::{Buf, BytesMut};

use super::body::Piece;
use super::lenient::{self, Kind};
use super::{Config, Error, HeaderCase, Preserve, Underscores, Version};
use crate::headers::{Headers, parse_decimal};
use crate::known::Known;

/// Header slots on the stack; a higher configured limit costs an allocation per head.
const STACK_FIELDS: usize = 128;

/// What the framing decision needs to know of a head's fields.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fields {
    pub(super) content_length: Option<u64>,
    /// `content-length` stands more than once, or is not a plain number.
    pub(super) bad_content_length: bool,
    pub(super) has_content_length: bool,
    pub(super) chunked: bool,
    pub(super) has_transfer_encoding: bool,
    pub(super) has_connection: bool,
    pub(super) has_upgrade: bool,
    /// Headers left out for an underscore in their name.
    pub(super) dropped: u32,
}

impl Fields {
    /// RFC 9112 section 6.3, the part common to requests and responses: one way of delimiting, or an error.
    pub(super) fn check(&self, headers: &mut Headers, config: &Config) -> Result<(), Error> {
        if self.has_transfer_encoding && self.has_content_length {
            if !(self.chunked && config.allow_chunked_length) {
                return Err(Error::ContentLengthAndChunked);
            }
            headers.remove(Known::ContentLength);
        } else if self.bad_content_length {
            return Err(Error::Codec);
        }
        if self.has_transfer_encoding && !self.chunked {
            return Err(Error::InvalidTransferEncoding);
        }
        Ok(())
    }
}

pub(super) struct RequestLine {
    pub(super) version: Version,
    pub(super) fields: Fields,
    pub(super) form: Form,
}

/// How the request target was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// A path, or `*`: `:path` holds it.
    Origin,
    /// Anything else: `:path` holds it for the caller to take apart.
    Other,
}

pub(super) struct StatusLine {
    pub(super) version: Version,
    pub(super) status: u16,
    pub(super) fields: Fields,
}

/// Reads a request head, leading empty lines skipped; `None` when it is not complete.
pub(super) fn receive_request(
    input: &mut BytesMut,
    searched: &mut u32,
    headers: &mut Headers,
    config: &Config,
) -> Result<Option<RequestLine>, Error> {
    if *searched == 0 {
        let blank = input.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        input.advance(blank);
    }
    let Some(first) = input.first() else { return Ok(None) };
    if !crate::name::is_token_byte(*first) {
        return Err(Error::Codec);
    }
    receive(input, searched, Kind::Request, config, |head, slots| {
        let mut request = httparse::Request::new(&mut []);
        let parsed = request.parse_with_uninit_headers(head, slots);
        let httparse::Status::Complete(len) = parsed? else { return Ok(None) };
        Ok(Some(fill_request(&request, headers, config).map(|line| (len, line))))
    })
}

/// Reads a response head; `None` when it is not complete.
pub(super) fn receive_response(
    input: &mut BytesMut,
    searched: &mut u32,
    headers: &mut Headers,
    config: &Config,
) -> Result<Option<StatusLine>, Error> {
    match input.first() {
        None => return Ok(None),
        Some(b'H') => {}
        Some(_) => return Err(Error::Codec),
    }
    receive(input, searched, Kind::Response, config, |head, slots| {
        let mut response = httparse::Response::new(&mut []);
        let parsed =
            httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut response, head, slots);
        let httparse::Status::Complete(len) = parsed? else { return Ok(None) };
        Ok(Some(fill_response(&response, headers, config).map(|line| (len, line))))
    })
}

/// Reads the trailers behind the last chunk, or their absence.
pub(super) fn receive_trailers(
    input: &mut BytesMut,
    searched: &mut u32,
    trailers: &mut Headers,
    config: &Config,
) -> Result<Piece, Error> {
    let empty = match &input[..] {
        [] | [b'\r'] => return Ok(Piece::NeedMore),
        [b'\r', b'\n', ..] => 2,
        [b'\n', ..] => 1,
        _ => 0,
    };
    if *searched == 0 && empty > 0 {
        input.advance(empty);
        return Ok(Piece::End);
    }
    let end = find_end(input, *searched as usize);
    *searched = input.len() as u32;
    if end.unwrap_or(input.len()) > config.max_head_bytes as usize {
        return Err(Error::HeadersTooLarge);
    }
    let Some(end) = end else { return Ok(Piece::NeedMore) };
    // Trailers are rare, so they always take the careful path.
    let block = lenient::canonical(&input[..end], Kind::Trailers)?;
    input.advance(end);
    if !config.enable_trailers {
        return Ok(Piece::End);
    }
    let mut slots = vec![httparse::EMPTY_HEADER; config.max_headers as usize + 1];
    let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(&block, &mut slots) else {
        return Err(Error::TooManyHeaders);
    };
    trailers.clear();
    let mut ignored = Fields::default();
    for field in fields.iter() {
        // RFC 9110 section 6.5.1: framing and routing fields must not come from trailers.
        let name = field.name;
        let forbidden = ["content-length", "transfer-encoding", "host", "connection", "upgrade"];
        if !forbidden.iter().any(|forbidden| name.eq_ignore_ascii_case(forbidden)) {
            append(field, trailers, &mut ignored, Known::is_inline_in_response, config)?;
        }
    }
    if trailers.len() > config.max_headers as usize {
        return Err(Error::TooManyHeaders);
    }
    Ok(if trailers.is_empty() { Piece::End } else { Piece::Trailers })
}

type Slots<'s, 'h> = &'s mut [MaybeUninit<httparse::Header<'h>>];

/// Runs `parse` over the input, and again over its canonical form when the input is not well-formed but acceptable.
/// An incomplete head is not parsed again before its end has arrived.
fn receive<T>(
    input: &mut BytesMut,
    searched: &mut u32,
    kind: Kind,
    config: &Config,
    mut parse: impl for<'h> FnMut(
        &'h [u8],
        Slots<'_, 'h>,
    ) -> Result<Option<Result<(usize, T), Error>>, httparse::Error>,
) -> Result<Option<T>, Error> {
    let max_bytes = config.max_head_bytes as usize;
    let max_headers = config.max_headers as usize;
    if *searched > 0 && find_end(input, *searched as usize).is_none() {
        return incomplete(input, searched, kind, max_bytes);
    }
    match with_slots(input, max_headers, &mut parse) {
        Ok(Some(parsed)) => {
            // The limit counts the raw bytes, and it comes before anything the head says.
            if head_len(input, &parsed).is_some_and(|len| len > max_bytes) {
                return Err(Error::HeadersTooLarge);
            }
            let (len, line) = parsed?;
            input.advance(len);
            *searched = 0;
            Ok(Some(line))
        }
        Ok(None) => incomplete(input, searched, kind, max_bytes),
        Err(error) => {
            let Some(end) = find_end(input, 0) else { return incomplete(input, searched, kind, max_bytes) };
            if end > max_bytes {
                return Err(Error::HeadersTooLarge);
            }
            if error == httparse::Error::TooManyHeaders {
                return Err(Error::TooManyHeaders);
            }
            let canonical = lenient::canonical(&input[..end], kind)?;
            let line = match with_slots(&canonical, max_headers, &mut parse) {
                Ok(Some(parsed)) => parsed?.1,
                Err(httparse::Error::TooManyHeaders) => return Err(Error::TooManyHeaders),
                Ok(None) | Err(_) => return Err(Error::Codec),
            };
            input.advance(end);
            *searched = 0;
            Ok(Some(line))
        }
    }
}

/// The length of a parsed head; of a refused one as well, so that an oversized head is always reported as that.
fn head_len<T>(input: &[u8], parsed: &Result<(usize, T), Error>) -> Option<usize> {
    match parsed {
        Ok((len, _)) => Some(*len),
        Err(_) => find_end(input, 0),
    }
}

fn with_slots<'h, T>(
    head: &'h [u8],
    max_headers: usize,
    parse: impl FnOnce(&'h [u8], Slots<'_, 'h>) -> T,
) -> T {
    if max_headers < STACK_FIELDS {
        let mut slots = [const { MaybeUninit::uninit() }; STACK_FIELDS];
        parse(head, &mut slots[..=max_headers])
    } else {
        let mut slots = vec![MaybeUninit::uninit(); max_headers + 1];
        parse(head, &mut slots)
    }
}

#[cold]
fn incomplete<T>(input: &[u8], searched: &mut u32, kind: Kind, max_bytes: usize) -> Result<Option<T>, Error> {
    // Garbage is answered when its first line is complete, not when the client gives up.
    if let Some(line_end) = memchr::memchr(b'\n', input)
        && (*searched as usize) <= line_end
    {
        lenient::check_first_line(&input[..line_end], kind)?;
    }
    if input.len() > max_bytes {
        return Err(Error::HeadersTooLarge);
    }
    *searched = input.len() as u32;
    Ok(None)
}

/// The end of the head: behind the first empty line, wherever `searched` bytes have been looked at already.
fn find_end(input: &[u8], searched: usize) -> Option<usize> {
    let mut from = searched.saturating_sub(3);
    loop {
        let line_end = from + memchr::memchr(b'\n', &input[from..])?;
        match &input[line_end + 1..] {
            [b'\n', ..] => return Some(line_end + 2),
            [b'\r', b'\n', ..] => return Some(line_end + 3),
            _ => from = line_end + 1,
        }
    }
}

fn fill_request(
    request: &httparse::Request<'_, '_>,
    headers: &mut Headers,
    config: &Config,
) -> Result<RequestLine, Error> {
    let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
        return Err(Error::Codec);
    };
    if !target.is_ascii() || !(config.allow_custom_methods || is_known_method(method.as_bytes())) {
        return Err(Error::Codec);
    }
    let origin = target.starts_with('/') || (target == "*" && method == "OPTIONS");
    if request.headers.len() > config.max_headers as usize {
        return Err(Error::TooManyHeaders);
    }
    headers.clear();
    if let HeaderCase::Preserve(Preserve { proper_added: true, .. }) = config.header_case {
        headers.set_spelling(true, b"");
    }
    headers.append(Known::Method, method);
    // Envoy keeps the host in one place, `:authority`, and joins repetitions.
    let mut hosts = request.headers.iter().filter(|field| is_host(field.name));
    if let Some(host) = hosts.next() {
        let authority = hosts.fold(Cow::Borrowed(host.value), |joined, more| {
            Cow::Owned([&joined[..], b",", more.value].concat())
        });
        headers.append_authority(host.name.as_bytes(), &authority, config.header_case.is_kept());
    }
    headers.append(Known::Path, target);
    let mut fields = Fields::default();
    for field in request.headers.iter().filter(|field| !is_host(field.name)) {
        append(field, headers, &mut fields, Known::is_inline_in_request, config)?;
    }
    let version = if version == 1 { Version::Http11 } else { Version::Http10 };
    Ok(RequestLine { version, fields, form: if origin { Form::Origin } else { Form::Other } })
}

fn fill_response(
    response: &httparse::Response<'_, '_>,
    headers: &mut Headers,
    config: &Config,
) -> Result<StatusLine, Error> {
    let (Some(status), Some(version)) = (response.code, response.version) else { return Err(Error::Codec) };
    if status < 100 {
        return Err(Error::Codec);
    }
    if response.headers.len() > config.max_headers as usize {
        return Err(Error::TooManyHeaders);
    }
    headers.clear();
    if let HeaderCase::Preserve(preserve) = config.header_case
        && preserve != Preserve::default()
    {
        let reason = response.reason.filter(|_| preserve.reason_phrase).unwrap_or_default();
        headers.set_spelling(preserve.proper_added, reason.as_bytes());
    }
    headers.append(Known::Status, itoa::Buffer::new().format(status));
    let mut fields = Fields::default();
    for field in response.headers.iter() {
        append(field, headers, &mut fields, Known::is_inline_in_response, config)?;
    }
    let version = if version == 1 { Version::Http11 } else { Version::Http10 };
    Ok(StatusLine { version, status, fields })
}

#[inline]
fn is_host(name: &str) -> bool {
    name.len() == 4 && name.eq_ignore_ascii_case("host")
}

#[inline]
fn append(
    field: &httparse::Header<'_>,
    headers: &mut Headers,
    fields: &mut Fields,
    joins: fn(Known) -> bool,
    config: &Config,
) -> Result<(), Error> {
    let (name, value) = (field.name.as_bytes(), field.value);
    if config.underscores != Underscores::Allow && name.contains(&b'_') {
        match config.underscores {
            Underscores::Reject => return Err(Error::UnexpectedUnderscore),
            Underscores::Drop | Underscores::Allow => {
                fields.dropped += 1;
                return Ok(());
            }
        }
    }
    if name.len() > usize::from(u16::MAX) {
        return Err(Error::HeadersTooLarge);
    }
    let before = headers.bits();
    let Some(known) = headers.append_wire(name, value, config.header_case.is_kept()) else {
        return Ok(());
    };
    match known {
        Known::ContentLength => {
            let length = parse_decimal(value);
            fields.bad_content_length |= fields.has_content_length || length.is_none();
            fields.has_content_length = true;
            fields.content_length = length;
        }
        Known::TransferEncoding => {
            fields.chunked = !fields.has_transfer_encoding && value.eq_ignore_ascii_case(b"chunked");
            fields.has_transfer_encoding = true;
            // Framing is the codec's own affair on both sides, so the field goes no further.
            headers.pop();
            if config.header_case.is_kept() {
                headers.spell_transfer_encoding(name);
            }
        }
        Known::Connection => fields.has_connection = true,
        Known::Upgrade => fields.has_upgrade = true,
        _ => {}
    }
    // Repeated lengths are judged as framing, above, and never joined.
    if before.has(known) && known != Known::ContentLength && joins(known) {
        headers.pop();
        headers.append_joined(known, ",", value);
    }
    Ok(())
}

/// The methods that Envoy's Balsa parser knows.
fn is_known_method(method: &[u8]) -> bool {
    matches!(
        method,
        b"GET"
            | b"POST"
            | b"PUT"
            | b"HEAD"
            | b"DELETE"
            | b"OPTIONS"
            | b"PATCH"
            | b"CONNECT"
            | b"TRACE"
            | b"ACL"
            | b"BIND"
            | b"CHECKOUT"
            | b"COPY"
            | b"LINK"
            | b"LOCK"
            | b"MERGE"
            | b"MKACTIVITY"
            | b"MKCALENDAR"
            | b"MKCOL"
            | b"MOVE"
            | b"MSEARCH"
            | b"NOTIFY"
            | b"PROPFIND"
            | b"PROPPATCH"
            | b"PURGE"
            | b"QUERY"
            | b"REBIND"
            | b"REPORT"
            | b"SEARCH"
            | b"SOURCE"
            | b"SUBSCRIBE"
            | b"UNBIND"
            | b"UNLINK"
            | b"UNLOCK"
            | b"UNSUBSCRIBE"
    )
}

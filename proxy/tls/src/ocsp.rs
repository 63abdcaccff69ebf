//! OCSP responses (RFC 6960) as far as stapling one needs it: whose it is, and until when it holds. The signature is the
//! client's to check.

use x509_parser::prelude::FromDer as _;
use x509_parser::time::ASN1Time;

const SEQUENCE: u8 = 0x30;
const OCTET_STRING: u8 = 0x04;
const INTEGER: u8 = 0x02;
const ENUMERATED: u8 = 0x0a;
const OBJECT_IDENTIFIER: u8 = 0x06;
const GENERALIZED_TIME: u8 = 0x18;
/// `[0]`, with something inside.
const CONTEXT_0: u8 = 0xa0;

/// `id-pkix-ocsp-basic`, 1.3.6.1.5.5.7.48.1.1.
const BASIC: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 0x30, 1, 1];

/// What a response says of its one certificate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Staple<'a> {
    pub(crate) serial: &'a [u8],
    /// `nextUpdate` in seconds since 1970. Without one there is newer information all the time, so that Envoy takes the
    /// response for expired.
    pub(crate) next_update: Option<i64>,
}

impl<'a> Staple<'a> {
    /// Reads a response in DER; the error is Envoy's text.
    pub(crate) fn parse(der: &'a [u8]) -> Result<Self, &'static str> {
        let malformed = "OCSP response is malformed";
        let mut response = Der(der).inside(SEQUENCE).ok_or(malformed)?;
        if response.take(ENUMERATED).ok_or(malformed)? != [0] {
            return Err("OCSP response was unsuccessful");
        }
        Self::of_response(response).ok_or(malformed)?
    }

    fn of_response(mut response: Der<'a>) -> Option<Result<Self, &'static str>> {
        let mut typed = response.inside(CONTEXT_0)?.inside(SEQUENCE)?;
        if typed.take(OBJECT_IDENTIFIER)? != BASIC {
            return Some(Err("Unknown OCSP response type"));
        }
        let mut data = Der(typed.take(OCTET_STRING)?).inside(SEQUENCE)?.inside(SEQUENCE)?;
        data.take(CONTEXT_0);
        let _responder = data.any()?;
        data.take(GENERALIZED_TIME)?;
        let mut responses = data.inside(SEQUENCE)?;
        let mut single = responses.inside(SEQUENCE)?;
        if !responses.0.is_empty() {
            return Some(Err("OCSP Response must be for one certificate only"));
        }
        let mut id = single.inside(SEQUENCE)?;
        let (_algorithm, _name, _key) = (id.take(SEQUENCE)?, id.take(OCTET_STRING)?, id.take(OCTET_STRING)?);
        let serial = id.take(INTEGER)?;
        let _status = single.any()?;
        single.take(GENERALIZED_TIME)?;
        let next_update = match single.inside(CONTEXT_0) {
            Some(time) => Some(ASN1Time::from_der(time.0).ok()?.1.timestamp()),
            None => None,
        };
        Some(Ok(Self { serial, next_update }))
    }
}

/// Elements of DER (X.690) that follow each other.
#[derive(Clone, Copy)]
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The elements inside the next one, if it has this tag.
    fn inside(&mut self, tag: u8) -> Option<Der<'a>> {
        self.take(tag).map(Der)
    }

    /// The content of the next element, if it has this tag; otherwise it stays the next.
    fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        if *self.0.first()? != tag { None } else { self.any() }
    }

    fn any(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = match self.0 {
            [_, length @ 0..=0x7f, rest @ ..] => (usize::from(*length), rest),
            [_, 0x81, a, rest @ ..] => (usize::from(*a), rest),
            [_, 0x82, a, b, rest @ ..] => (usize::from(*a) << 8 | usize::from(*b), rest),
            // Nothing in a response is longer than 64 KiB.
            _ => return None,
        };
        let content = rest.get(..length)?;
        self.0 = &rest[length..];
        Some(content)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{BASIC, Staple};

    fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let content = parts.concat();
        let length = content.len();
        let mut der = vec![tag];
        match u8::try_from(length) {
            Ok(short @ 0..=0x7f) => der.push(short),
            _ => der.extend([0x82, (length >> 8) as u8, length as u8]),
        }
        der.extend(content);
        der
    }

    fn single(serial: &[u8], next_update: Option<&[u8]>) -> Vec<u8> {
        let id =
            [element(0x30, &[]), element(4, &[&[1; 20]]), element(4, &[&[2; 20]]), element(2, &[serial])];
        let next = next_update.map(|time| element(0xa0, &[&element(0x18, &[time])])).unwrap_or_default();
        let id = element(0x30, &[&id.concat()]);
        element(0x30, &[&id, &element(0x80, &[]), &element(0x18, &[b"20200101000000Z"]), &next])
    }

    fn response(singles: &[u8]) -> Vec<u8> {
        let produced = element(0x18, &[b"20200101000000Z"]);
        let data = element(
            0x30,
            &[&element(0xa2, &[&element(4, &[&[3; 20]])]), &produced, &element(0x30, &[singles])],
        );
        let basic = element(0x30, &[&data, &element(0x30, &[]), &element(3, &[&[0; 65]])]);
        let typed = element(0x30, &[&element(6, &[BASIC]), &element(4, &[&basic])]);
        element(0x30, &[&element(0x0a, &[&[0]]), &element(0xa0, &[&typed])])
    }

    /// A response for the certificate of this serial number.
    pub(crate) fn staple(serial: &[u8], next_update: &str) -> Vec<u8> {
        response(&single(serial, Some(next_update.as_bytes())))
    }

    #[test]
    fn whose_it_is_and_until_when() {
        let der = staple(&[1, 2, 3], "20300102030405Z");
        assert_eq!(Staple::parse(&der), Ok(Staple { serial: &[1, 2, 3], next_update: Some(1_893_553_445) }));
        let der = response(&single(&[7], None));
        assert_eq!(Staple::parse(&der), Ok(Staple { serial: &[7], next_update: None }));
    }

    #[test]
    fn what_is_no_staple() {
        let refused = element(0x30, &[&element(0x0a, &[&[6]])]);
        assert_eq!(Staple::parse(&refused), Err("OCSP response was unsuccessful"));
        let two = [single(&[1], None), single(&[2], None)].concat();
        assert_eq!(Staple::parse(&response(&two)), Err("OCSP Response must be for one certificate only"));
        let whole = staple(&[1, 2, 3], "20300102030405Z");
        for cut in 0..whole.len() {
            assert!(Staple::parse(&whole[..cut]).is_err(), "{cut}");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x55;
            // Any answer will do that is not a panic.
            let _ = Staple::parse(&changed);
        }
    }
}

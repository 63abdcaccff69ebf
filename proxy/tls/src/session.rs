//! Resuming sessions: tickets under configured or random keys, and the bounded cache of stateful sessions.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::cipher::{
    AES_256, AES_CBC_IV_LEN, DecryptionContext, PaddedBlockDecryptingKey, PaddedBlockEncryptingKey,
    UnboundCipherKey,
};
use aws_lc_rs::{hmac, iv};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use parking_lot::Mutex;
use rustls::server::{ProducesTickets, StoresServerSessions};
use waystation_filter_api::data_source;
use waystation_schema::{At as _, ConfigError};

use crate::secret::unix_now;

/// How long a session can be resumed when nothing is configured: Envoy's default.
pub(crate) const SESSION_TIMEOUT: Duration = Duration::from_secs(7200);

/// The most stateful sessions of one context: BoringSSL's default.
const MAX_SESSIONS: usize = 20 * 1024;

/// The longest ticket that is looked at: more than any that carries a client's chain of usual size.
const MAX_TICKET: usize = 32 * 1024;

const NAME_LEN: usize = 16;
const HMAC_LEN: usize = 32;
const KEY_LEN: usize = NAME_LEN + HMAC_LEN + 32;

/// Compiled `TlsSessionTicketKeys`: the first seals, all open.
#[derive(Debug)]
pub(crate) struct TicketKeys {
    keys: Vec<Arc<TicketKey>>,
}

struct TicketKey {
    name: [u8; NAME_LEN],
    mac: hmac::Key,
    encrypt: PaddedBlockEncryptingKey,
    decrypt: PaddedBlockDecryptingKey,
}

impl TicketKeys {
    pub(crate) fn compile(proto: &pb::TlsSessionTicketKeys) -> Result<Self, ConfigError> {
        let pb::TlsSessionTicketKeys { keys } = proto;
        if keys.is_empty() {
            return Err(ConfigError::field("keys", "value must contain at least 1 item"));
        }
        let compile = |(index, source)| -> Result<Arc<TicketKey>, ConfigError> {
            let data = data_source::read_filled(Some(source));
            let key = data.and_then(|data| TicketKey::new(&data.unwrap_or_default().bytes));
            key.map(Arc::new).at(|| format!("keys[{index}]"))
        };
        Ok(Self { keys: keys.iter().enumerate().map(compile).collect::<Result<_, _>>()? })
    }
}

impl TicketKey {
    /// 80 bytes: name, HMAC key, AES key, as OpenSSL lays them out.
    fn new(bytes: &[u8]) -> Result<Self, ConfigError> {
        let bytes: &[u8; KEY_LEN] = bytes.try_into().map_err(|_| {
            ConfigError::new(format!(
                "Incorrect TLS session ticket key length. Length {}, expected length {KEY_LEN}.",
                bytes.len()
            ))
        })?;
        let (name, rest) = bytes.split_at(NAME_LEN);
        let (mac, cipher) = rest.split_at(HMAC_LEN);
        let unusable = |_| ConfigError::new("the key cannot be used");
        let key = || UnboundCipherKey::new(&AES_256, cipher);
        let mut own_name = [0; NAME_LEN];
        own_name.copy_from_slice(name);
        Ok(Self {
            name: own_name,
            mac: hmac::Key::new(hmac::HMAC_SHA256, mac),
            encrypt: key().and_then(PaddedBlockEncryptingKey::cbc_pkcs7).map_err(unusable)?,
            decrypt: key().and_then(PaddedBlockDecryptingKey::cbc_pkcs7).map_err(unusable)?,
        })
    }

    /// The MAC over everything, and over what the session is bound to without being in the ticket.
    fn sign(&self, binding: &[u8], sealed: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.mac);
        context.update(&(binding.len() as u64).to_be_bytes());
        context.update(binding);
        context.update(sealed);
        context.sign()
    }
}

impl fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TicketKey").finish_non_exhaustive()
    }
}

/// RFC 5077 section 4 under configured keys.
///
/// Keys are shared by contexts and by processes, so a ticket is bound to what the context demands of a client: a
/// session that was made where no certificate is asked for cannot be resumed where one is (Envoy: session context id).
#[derive(Debug)]
pub(crate) struct Tickets {
    pub(crate) keys: Arc<TicketKeys>,
    pub(crate) binding: [u8; 32],
    pub(crate) timeout: Duration,
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        seconds(self.timeout)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let key = self.keys.keys.first()?;
        let mut state = stamped(plain);
        let context = key.encrypt.encrypt(&mut state).ok()?;
        let iv: &[u8] = (&context).try_into().ok()?;
        let mut ticket = Vec::with_capacity(NAME_LEN + iv.len() + state.len() + HMAC_LEN);
        ticket.extend_from_slice(&key.name);
        ticket.extend_from_slice(iv);
        ticket.extend_from_slice(&state);
        let tag = key.sign(&self.binding, &ticket);
        ticket.extend_from_slice(tag.as_ref());
        Some(ticket)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        if ticket.len() > MAX_TICKET {
            return None;
        }
        let (sealed, tag) = ticket.split_at_checked(ticket.len().checked_sub(HMAC_LEN)?)?;
        let (name, rest) = sealed.split_at_checked(NAME_LEN)?;
        let (iv, state) = rest.split_at_checked(AES_CBC_IV_LEN)?;
        let key = self.keys.keys.iter().find(|key| key.name == name)?;
        let expected = key.sign(&self.binding, sealed);
        aws_lc_rs::constant_time::verify_slices_are_equal(expected.as_ref(), tag).ok()?;
        let mut state = state.to_vec();
        let context = DecryptionContext::Iv128(iv::FixedLength::try_from(iv).ok()?);
        let plain = key.decrypt.decrypt(&mut state, context).ok()?;
        fresh(plain, self.timeout)
    }
}

/// Tickets under random keys that rustls makes and rotates; only the timeout is ours.
#[derive(Debug)]
pub(crate) struct RandomTickets {
    pub(crate) inner: Arc<dyn ProducesTickets>,
    pub(crate) timeout: Duration,
}

impl ProducesTickets for RandomTickets {
    fn enabled(&self) -> bool {
        self.inner.enabled()
    }

    fn lifetime(&self) -> u32 {
        seconds(self.timeout).min(self.inner.lifetime())
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.inner.encrypt(&stamped(plain))
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        fresh(&self.inner.decrypt(ticket)?, self.timeout)
    }
}

/// Sessions kept here, for clients without tickets. At the bound the oldest goes.
#[derive(Debug)]
pub(crate) struct Sessions {
    inner: Mutex<SessionMap>,
    timeout: Duration,
}

#[derive(Debug, Default)]
struct SessionMap {
    by_id: HashMap<Vec<u8>, (Instant, Vec<u8>)>,
    /// In order of arrival; ids that were taken since are skipped when their turn comes.
    order: VecDeque<(Instant, Vec<u8>)>,
}

impl Sessions {
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { inner: Mutex::default(), timeout }
    }
}

impl StoresServerSessions for Sessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        let now = Instant::now();
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        while let Some((since, id)) = inner.order.front() {
            let expired = now.duration_since(*since) >= self.timeout;
            if inner.order.len() < MAX_SESSIONS && !expired {
                break;
            }
            if inner.by_id.get(id).is_some_and(|(stored, _)| stored == since) {
                inner.by_id.remove(id);
            }
            inner.order.pop_front();
        }
        inner.order.push_back((now, key.clone()));
        inner.by_id.insert(key, (now, value));
        true
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        let inner = self.inner.lock();
        let (since, value) = inner.by_id.get(key)?;
        (since.elapsed() < self.timeout).then(|| value.clone())
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        let (since, value) = self.inner.lock().by_id.remove(key)?;
        (since.elapsed() < self.timeout).then_some(value)
    }

    fn can_cache(&self) -> bool {
        true
    }
}

/// The time before the message, so that a ticket has an age whoever made it.
fn stamped(plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + plain.len() + 16);
    out.extend_from_slice(&unix_now().to_be_bytes());
    out.extend_from_slice(plain);
    out
}

fn fresh(stamped: &[u8], timeout: Duration) -> Option<Vec<u8>> {
    let (made, plain) = stamped.split_first_chunk::<8>()?;
    let age = unix_now().saturating_sub(i64::from_be_bytes(*made));
    // A clock that was set back makes no ticket old.
    (u64::try_from(age).unwrap_or(0) < timeout.as_secs()).then(|| plain.to_vec())
}

/// What a client is told; a week is the most that it may be (RFC 8446 section 4.6.1).
fn seconds(timeout: Duration) -> u32 {
    const WEEK: u32 = 7 * 24 * 60 * 60;
    u32::try_from(timeout.as_secs()).map_or(WEEK, |seconds| seconds.min(WEEK))
}

#[cfg(test)]
mod tests {
    use super::{MAX_SESSIONS, Sessions, TicketKey, TicketKeys, Tickets};
    use rustls::server::{ProducesTickets as _, StoresServerSessions as _};
    use std::sync::Arc;
    use std::time::Duration;

    fn tickets(keys: &[u8], binding: &[u8], timeout: u64) -> Tickets {
        let key = |seed: &u8| Arc::new(TicketKey::new(&[*seed; 80]).unwrap());
        let keys = Arc::new(TicketKeys { keys: keys.iter().map(key).collect() });
        let mut own = [0; 32];
        own[..binding.len()].copy_from_slice(binding);
        Tickets { keys, binding: own, timeout: Duration::from_secs(timeout) }
    }

    #[test]
    fn tickets_open_under_old_keys_but_not_elsewhere() {
        let old = tickets(&[1], b"context", 60);
        let ticket = old.encrypt(b"state").unwrap();
        assert_eq!(old.decrypt(&ticket).as_deref(), Some(&b"state"[..]));
        assert_eq!(tickets(&[2, 1], b"context", 60).decrypt(&ticket).as_deref(), Some(&b"state"[..]));
        assert_eq!(tickets(&[2], b"context", 60).decrypt(&ticket), None);
        assert_eq!(tickets(&[1], b"other", 60).decrypt(&ticket), None, "bound to its context");
        for index in 0..ticket.len() {
            let mut forged = ticket.clone();
            forged[index] ^= 1;
            assert_eq!(old.decrypt(&forged), None);
            assert_eq!(old.decrypt(&ticket[..index]), None);
        }
    }

    #[test]
    fn stateful_sessions_are_bounded() {
        let sessions = Sessions::new(Duration::from_secs(60));
        for index in 0..=MAX_SESSIONS {
            sessions.put(index.to_be_bytes().to_vec(), vec![1]);
        }
        assert_eq!(sessions.get(&0_usize.to_be_bytes()), None);
        assert_eq!(sessions.take(&1_usize.to_be_bytes()), Some(vec![1]));
        assert_eq!(sessions.take(&1_usize.to_be_bytes()), None);
        assert_eq!(Sessions::new(Duration::ZERO).get(b"x"), None);
    }
}

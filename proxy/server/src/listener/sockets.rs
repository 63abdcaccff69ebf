//! The sockets of a listener: bound on the main thread when it is added, so that a conflict is an answer to whoever sent
//! the listener; listening from when it is put in force, so that no client waits for a listener that is still warming; and
//! handed to the workers.

use std::io;
use std::sync::{Arc, Weak};

use socket2::Socket;
use waystation_filter_api::address::Address;

use super::config::{ListenAddress, Listener};
use crate::address;

/// Every socket of a listener, by its addresses. A listener and its update share those of an address that both have:
/// opened anew they would divide its connections with sockets that nobody accepts from, and a new Unix socket would take
/// the path away.
#[derive(Clone, Debug)]
pub struct Sockets {
    per_address: Vec<Arc<Bound>>,
}

/// The sockets of an address: one for each worker, or a single one that all workers share.
#[derive(Debug)]
struct Bound {
    wanted: ListenAddress,
    sockets: Vec<Socket>,
}

impl Sockets {
    /// Takes from `kept`, sockets of other states of this listener, and for a certain port or path from `left`, those of
    /// listeners that have gone; binds the rest. The error names the address as Envoy does.
    pub fn open(listener: &Listener, workers: u32, kept: &[&Self], left: &[Self]) -> Result<Self, String> {
        let mut kept: Vec<_> = kept.iter().flat_map(|sockets| sockets.per_address.iter().cloned()).collect();
        let mut left: Vec<_> = left.iter().flat_map(|sockets| sockets.per_address.iter().cloned()).collect();
        let mut per_address = Vec::with_capacity(listener.addresses.len());
        for wanted in &listener.addresses {
            let fits = |bound: &Arc<Bound>| bound.fits(wanted, listener.reuse_port);
            let any_port = wanted.address.ip().is_some_and(|ip| ip.port() == 0);
            // What had any port may still be served, or be taken by another: a removed listener's is not looked for.
            let found = take(&mut kept, fits).or_else(|| match any_port {
                true => None,
                false => take(&mut left, fits),
            });
            per_address.push(match found {
                Some(found) => found,
                None => Arc::new(Bound::open(wanted, listener.reuse_port, workers)?),
            });
        }
        Ok(Self { per_address })
    }

    /// No sockets: `bind_to_port: false`.
    pub fn none() -> Self {
        Self { per_address: Vec::new() }
    }

    /// Takes connections from now on; again, with another backlog. The error names the address.
    pub fn listen(&self, listener: &Listener) -> Result<(), String> {
        for (bound, wanted) in self.per_address.iter().zip(&listener.addresses) {
            for socket in &bound.sockets {
                address::listen_on(socket, wanted, listener.backlog).map_err(|error| {
                    format!("cannot listen on '{}': {}", wanted.address, strerror(&error))
                })?;
            }
        }
        Ok(())
    }

    /// Those of a listener that goes: see [`LeftSockets`].
    pub fn leave(&self) -> LeftSockets {
        LeftSockets { per_address: self.per_address.iter().map(Arc::downgrade).collect() }
    }

    /// How many addresses there are.
    pub fn len(&self) -> usize {
        self.per_address.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.per_address.is_empty()
    }

    /// A duplicate of one worker's socket of the address with this index, and the address.
    pub fn of_worker(&self, index: usize, worker: u32) -> io::Result<(Address, Socket)> {
        let Bound { wanted, sockets } = &*self.per_address[index];
        Ok((wanted.address.clone(), sockets[worker as usize % sockets.len()].try_clone()?))
    }

    /// The addresses they are bound to.
    pub fn local_addresses(&self) -> Vec<Address> {
        let first = self.per_address.iter().map(|bound| match &bound.wanted.address {
            Address::Ip(_) => bound.sockets.first().and_then(local_address),
            other => Some(other.clone()),
        });
        first.flatten().collect()
    }
}

/// Sockets that are open for as long as a worker, or another listener, has them.
#[derive(Debug, Default)]
pub struct LeftSockets {
    per_address: Vec<Weak<Bound>>,
}

impl LeftSockets {
    /// Those that are still open.
    pub fn open(&self) -> Sockets {
        Sockets { per_address: self.per_address.iter().filter_map(Weak::upgrade).collect() }
    }
}

impl Bound {
    fn open(wanted: &ListenAddress, reuse_port: bool, workers: u32) -> Result<Self, String> {
        let count = if reuse_port && wanted.address.ip().is_some() { workers.max(1) } else { 1 };
        let mut sockets: Vec<Socket> = Vec::new();
        let mut bound = wanted.clone();
        for _ in 0..count {
            let socket = address::bind(&bound, reuse_port)
                .map_err(|error| format!("cannot bind '{}': {}", wanted.address, strerror(&error)))?;
            if sockets.is_empty() && reuse_port {
                // Port 0: the first socket gets a port, the others share it.
                bound.address = local_address(&socket).unwrap_or(bound.address);
            }
            sockets.push(socket);
        }
        Ok(Self { wanted: wanted.clone(), sockets })
    }

    /// Whether they serve this address as well. A path has one socket, whatever its options: another would take it away
    /// from a listener that serves.
    fn fits(&self, wanted: &ListenAddress, reuse_port: bool) -> bool {
        match &self.wanted.address {
            Address::Ip(_) => self.wanted == *wanted && (self.sockets.len() == 1 || reuse_port),
            other => *other == wanted.address,
        }
    }
}

/// Takes out the first that fits, and wherever else it stands: an address that two states of a listener share.
fn take(bounds: &mut Vec<Arc<Bound>>, fits: impl Fn(&Arc<Bound>) -> bool) -> Option<Arc<Bound>> {
    let found = bounds.iter().find(|bound| fits(bound)).cloned()?;
    bounds.retain(|bound| !Arc::ptr_eq(bound, &found));
    Some(found)
}

fn local_address(socket: &Socket) -> Option<Address> {
    socket.local_addr().ok()?.as_socket().map(Address::Ip)
}

/// The C library's text without Rust's `(os error N)`.
fn strerror(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

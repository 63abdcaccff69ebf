//! The sockets of a listener: opened on the main thread, so that a conflict is an answer to whoever sent the listener,
//! and handed to the workers.

use std::io;

use socket2::Socket;
use waystation_filter_api::address::Address;

use super::config::{ListenAddress, Listener};
use crate::address;

/// Every socket of a listener: for each address, one for each worker, or a single one that all workers share.
#[derive(Debug)]
pub struct Sockets {
    per_address: Vec<(ListenAddress, Vec<Socket>)>,
}

impl Sockets {
    /// Opens them. The error names the address as Envoy does.
    pub fn open(listener: &Listener, workers: u32) -> Result<Self, String> {
        let mut per_address = Vec::with_capacity(listener.addresses.len());
        for wanted in &listener.addresses {
            let count = if listener.reuse_port && wanted.address.ip().is_some() { workers.max(1) } else { 1 };
            let mut sockets: Vec<Socket> = Vec::new();
            let mut bound = wanted.clone();
            for _ in 0..count {
                let socket = address::bind(&bound, count > 1 || listener.reuse_port, listener.backlog)
                    .map_err(|error| format!("cannot bind '{}': {}", wanted.address, strerror(&error)))?;
                if sockets.is_empty() && listener.reuse_port {
                    // Port 0: the first socket gets a port, the others share it.
                    bound.address = local_address(&socket).unwrap_or(bound.address);
                }
                sockets.push(socket);
            }
            per_address.push((wanted.clone(), sockets));
        }
        Ok(Self { per_address })
    }

    /// No sockets: `bind_to_port: false`.
    pub fn none() -> Self {
        Self { per_address: Vec::new() }
    }

    /// Whether they serve this listener as well.
    pub fn fit(&self, listener: &Listener) -> bool {
        let own = self.per_address.iter().map(|(wanted, _)| wanted);
        own.eq(listener.addresses.iter())
            && self.per_address.iter().all(|(wanted, sockets)| {
                sockets.len() == 1 || (listener.reuse_port && wanted.address.ip().is_some())
            })
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
        let (wanted, sockets) = &self.per_address[index];
        Ok((wanted.address.clone(), sockets[worker as usize % sockets.len()].try_clone()?))
    }

    /// The addresses they are bound to.
    pub fn local_addresses(&self) -> Vec<Address> {
        let first = self.per_address.iter().map(|(wanted, sockets)| match &wanted.address {
            Address::Ip(_) => sockets.first().and_then(local_address),
            other => Some(other.clone()),
        });
        first.flatten().collect()
    }
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

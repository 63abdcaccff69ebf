//! Which addresses are taken.

use waystation_filter_api::address::Address;
use waystation_schema::ConfigError;

use super::Listeners;
use crate::listener::config::Listener;

impl Listeners {
    /// Two listeners on one address would share its connections by chance. One that drains has given its address up; one
    /// that binds to port 0 has a port of its own.
    pub(super) fn check_addresses(&self, name: &str, listener: &Listener) -> Result<(), ConfigError> {
        let mut others = self.entries.iter().filter(|(other, _)| *other != name).flat_map(|(_, entry)| {
            let active = entry.active.as_ref().map(|running| &running.listener);
            active.into_iter().chain(entry.warming.as_ref().map(|warming| &warming.listener))
        });
        let has = |other: &Listener, address: &Address| {
            let any_port = address.ip().is_some_and(|ip| ip.port() == 0);
            !(any_port && other.bind_to_port) && other.addresses.iter().any(|own| own.address == *address)
        };
        if !others.any(|other| listener.addresses.iter().any(|own| has(other, &own.address))) {
            return Ok(());
        }
        let addresses: Vec<_> = listener.addresses.iter().map(|listen| listen.address.to_string()).collect();
        Err(ConfigError::new(format!(
            "error adding listener: '{name}' has duplicate address '{}' as existing listener, to check if the listener has \
             duplicated addresses with other listeners or 'enable_reuse_port' is set to 'false' for the listener",
            addresses.join(",")
        )))
    }
}

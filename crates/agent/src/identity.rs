//! Who the guest is to the host, and to itself: the token that opens it, its name, and its own addresses, which may not
//! use it.
//!
//! Invariant: all change together, and what was asked for under an old token is not stopped by a new one.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use tiffin_protocol::Boot;

/// One identity.
#[derive(Debug, PartialEq, Eq)]
pub struct Identity {
    /// The secret that every request must carry.
    pub token: String,
    /// The host name.
    pub hostname: String,
    /// The guest's own addresses, whose connections are closed unread.
    pub addresses: Vec<IpAddr>,
}

impl From<Boot> for Identity {
    fn from(boot: Boot) -> Self {
        let addresses = boot.addresses.iter().filter_map(|address| address.parse().ok()).collect();
        Identity { token: boot.token, hostname: boot.hostname, addresses }
    }
}

/// The identity of this moment.
#[derive(Debug)]
pub struct Current(RwLock<Arc<Identity>>);

impl Current {
    /// Starts as `identity`.
    pub fn new(identity: Identity) -> Self {
        Current(RwLock::new(Arc::new(identity)))
    }

    /// What holds now.
    pub fn get(&self) -> Arc<Identity> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on, `identity` alone holds.
    pub fn replace(&self, identity: Identity) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(identity);
    }
}

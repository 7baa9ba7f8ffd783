//! Which VM has which pair of addresses between its gateway and the host.

use std::{
    collections::HashMap,
    io,
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};

use ipnet::Ipv4Net;
use tiffin_types::id::VmId;

use super::blocking;
use crate::{
    EngineError,
    host::{
        filter,
        network::{self, Uplink},
    },
};

/// The pairs that VMs of this server have. Clones are the same pairs.
#[derive(Debug, Clone)]
pub(super) struct Uplinks {
    range: Ipv4Net,
    taken: Arc<Mutex<HashMap<VmId, Uplink>>>,
}

impl Uplinks {
    pub(super) fn new(range: Ipv4Net) -> Self {
        Self { range, taken: Arc::default() }
    }

    /// A pair that neither a VM of this server nor any interface of the host has. The search begins anywhere: a pair that
    /// another installation has given away shows on the host only once that VM's monitor has made the interface, and two
    /// that both began at the first pair would give away the same. The host forwards packets from
    /// then on, and its filter is there.
    pub(super) async fn take(&self, id: &VmId) -> Result<Uplink, EngineError> {
        let range = self.range;
        blocking(move || {
            network::enable_host_forwarding()?;
            filter::ensure_host(range).map_err(io::Error::other)
        })
        .await
        .map_err(|e| EngineError::host("letting the host forward packets", e))?;
        let on_host: Vec<Ipv4Addr> = nix::ifaddrs::getifaddrs()
            .map_err(|e| EngineError::host("reading the host's addresses", e))?
            .filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()))
            .collect();
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let capacity = Uplink::capacity(self.range);
        let first = rand::random::<u32>().checked_rem(capacity).unwrap_or(0);
        let free = (first..capacity)
            .chain(0..first)
            .filter_map(|index| Uplink::new(self.range, index))
            .find(|one| !on_host.contains(&one.host) && taken.values().all(|other| other.index != one.index))
            .ok_or_else(|| EngineError::NoCapacity(format!("no address is free in {}", self.range)))?;
        taken.insert(id.clone(), free);
        Ok(free)
    }

    /// A VM that an earlier server gave this pair has it still.
    pub(super) fn hold(&self, id: &VmId, uplink: Uplink) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), uplink);
    }

    /// The VM has none any more.
    pub(super) fn free(&self, id: &VmId) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

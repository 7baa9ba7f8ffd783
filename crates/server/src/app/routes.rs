//! Which host name leads into which VM: the table that the ingress asks at each request.
//!
//! Invariant: it is made of records alone (ports, and what VMs that run their image's program serve) and follows every
//! change of a VM's state. A VM that isn't RUNNING has its names and answers none; a deleted one has none. The agent's port
//! is never in it, and is refused once more when it is dialled.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use async_trait::async_trait;
use tiffin_engine::{Engine, EngineError, Target};
use tiffin_protocol::AGENT_PORT;
use tiffin_proxy::{Backend, Connection, Dial, DialError, Route, Upstreams};
use tiffin_store::{Port, Vm};
use tiffin_types::{
    id::{HostLabel, VmId},
    time::Timestamp,
    vm::VmState,
};

/// The table.
pub(crate) struct Routes {
    engine: Arc<dyn Engine>,
    /// `.` and the domain.
    ending: String,
    upstreams: Arc<Upstreams>,
    by_label: RwLock<HashMap<String, Arc<PortRoute>>>,
}

/// A port of a VM.
struct PortRoute {
    vm: VmId,
    port: u16,
    /// What the VM is, and since when that is said.
    state: Mutex<(VmState, Timestamp)>,
    backend: Arc<Backend>,
}

impl Routes {
    /// A table for names that end in `domain`.
    pub(crate) fn new(engine: Arc<dyn Engine>, domain: &str, upstreams: Arc<Upstreams>) -> Self {
        Self { engine, ending: format!(".{domain}"), upstreams, by_label: RwLock::default() }
    }

    /// The host name of a label.
    pub(crate) fn hostname(&self, label: &HostLabel) -> String {
        format!("{label}{}", self.ending)
    }

    /// From now on `label` leads to that port of a VM. It answers none before [`Routes::update`] has said what the VM is.
    pub(crate) fn set(&self, label: &HostLabel, vm: &VmId, port: u16) {
        if port == AGENT_PORT {
            return;
        }
        let mut by_label = self.by_label.write().unwrap_or_else(PoisonError::into_inner);
        if by_label.get(label.as_str()).is_some_and(|there| there.vm == *vm && there.port == port) {
            return;
        }
        let way = Way { engine: Arc::clone(&self.engine), vm: vm.clone(), port };
        let backend = Backend::new(way, &self.upstreams);
        let route = PortRoute {
            vm: vm.clone(),
            port,
            state: Mutex::new((VmState::Created, Timestamp::from_millis(0))),
            backend,
        };
        by_label.insert(label.as_str().to_owned(), Arc::new(route));
    }

    /// The same for a port's record.
    pub(crate) fn set_port(&self, port: &Port) {
        self.set(&port.label, &port.vm_id, port.port);
    }

    /// From now on that port of the VM has no name. What is under way there goes on.
    pub(crate) fn remove(&self, vm: &VmId, port: u16) {
        let mut by_label = self.by_label.write().unwrap_or_else(PoisonError::into_inner);
        by_label.retain(|_, route| route.vm != *vm || route.port != port);
    }

    /// A VM's record is new or has changed.
    pub(crate) fn follow(&self, vm: &Vm) {
        if let (Some(label), Some(port)) = (&vm.host_label, vm.service.and_then(|service| service.port)) {
            self.set(label, &vm.id, port);
        }
        self.update(vm);
    }

    /// What a VM is, for those of its ports that have names.
    pub(crate) fn update(&self, vm: &Vm) {
        let is_gone = vm.state == VmState::Deleted;
        let mut gone = Vec::new();
        {
            let mut by_label = self.by_label.write().unwrap_or_else(PoisonError::into_inner);
            by_label.retain(|_, route| {
                let is_its = route.vm == vm.id;
                if is_its {
                    route.is_now(vm.state, vm.updated_at);
                }
                if is_its && is_gone {
                    gone.push(Arc::clone(route));
                }
                !(is_its && is_gone)
            });
        }
        // Their connections are closed with no lock held.
        drop(gone);
    }

    /// Closes the connections into a VM that only wait for a next request.
    pub(crate) fn close_idle(&self, vm: &VmId) {
        let by_label = self.by_label.read().unwrap_or_else(PoisonError::into_inner);
        for route in by_label.values().filter(|route| route.vm == *vm) {
            route.backend.close_idle();
        }
    }
}

impl tiffin_proxy::Routes for Routes {
    fn route(&self, host: &str) -> Option<Arc<dyn Route>> {
        let label = host.strip_suffix(&self.ending)?;
        let by_label = self.by_label.read().unwrap_or_else(PoisonError::into_inner);
        by_label.get(label).map(|route| Arc::clone(route) as Arc<dyn Route>)
    }
}

impl PortRoute {
    /// Takes what is newer than what is known.
    fn is_now(&self, state: VmState, at: Timestamp) {
        let mut known = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if at < known.1 {
            return;
        }
        *known = (state, at);
        drop(known);
        if state != VmState::Running {
            // One into a paused VM would wait for its answer.
            self.backend.close_idle();
            self.backend.starts_anew();
        }
    }
}

#[async_trait]
impl Route for PortRoute {
    async fn backend(&self) -> Result<Arc<Backend>, DialError> {
        let (state, _) = *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state == VmState::Running {
            Ok(Arc::clone(&self.backend))
        } else {
            Err(DialError::NotRunning(state.to_string()))
        }
    }
}

/// The way to a port of a VM: by the engine, from inside the VM's network.
struct Way {
    engine: Arc<dyn Engine>,
    vm: VmId,
    port: u16,
}

#[async_trait]
impl Dial for Way {
    async fn dial(&self) -> Result<Connection, DialError> {
        if self.port == AGENT_PORT {
            return Err(DialError::Failed("the agent's port is not for dialling".into()));
        }
        match self.engine.dial(&self.vm, Target::Port(self.port)).await {
            Ok(connection) => Ok(Box::pin(connection)),
            Err(error) => Err(reason(error)),
        }
    }
}

/// What a failed dial is to the client.
fn reason(error: EngineError) -> DialError {
    match error {
        EngineError::Absent => DialError::NotRunning("not running".into()),
        EngineError::WrongState("not answering") => DialError::TimedOut,
        EngineError::WrongState(busy) if busy.starts_with("busy") => DialError::Busy,
        EngineError::WrongState(state) => DialError::NotRunning(state.into()),
        EngineError::Host { source, context } => match source.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::ConnectionRefused) => DialError::Refused,
            Some(io::ErrorKind::TimedOut) => DialError::TimedOut,
            _ => DialError::Failed(EngineError::Host { context, source }.into()),
        },
        other @ (EngineError::NoCapacity(_)
        | EngineError::Ended(_)
        | EngineError::Unsupported { .. }
        | EngineError::Invalid(_)
        | EngineError::BadSnapshot(_)) => DialError::Failed(other.into()),
    }
}

#[cfg(test)]
mod tests {
    use tiffin_engine::fake::Fake;
    use tiffin_proxy::{ProxyConfig, Routes as _};

    use super::*;

    #[tokio::test]
    async fn the_agents_port_is_never_routed_and_never_dialled() {
        let engine = Fake::new();
        let routes = Routes::new(engine.clone(), "vm.test", Upstreams::new(ProxyConfig::default()));
        let (label, vm) = (HostLabel::random(), VmId::random());
        routes.set(&label, &vm, AGENT_PORT);
        assert!(routes.route(&routes.hostname(&label)).is_none());
        let way = Way { engine, vm: vm.clone(), port: AGENT_PORT };
        assert!(matches!(way.dial().await, Err(DialError::Failed(_))));
        routes.set(&label, &vm, 8080);
        assert!(routes.route(&routes.hostname(&label)).is_some());
        for other in [format!("{label}.other.test"), format!("x.{label}.vm.test"), "vm.test".into(), label.to_string()]
        {
            assert!(routes.route(&other).is_none(), "{other}");
        }
    }

    #[test]
    fn what_a_dial_failed_by_is_told_apart() {
        let host = |kind| EngineError::host("connecting", io::Error::from(kind));
        assert!(matches!(reason(host(io::ErrorKind::ConnectionRefused)), DialError::Refused));
        assert!(matches!(reason(host(io::ErrorKind::TimedOut)), DialError::TimedOut));
        assert!(matches!(reason(host(io::ErrorKind::Other)), DialError::Failed(_)));
        assert!(matches!(reason(EngineError::Absent), DialError::NotRunning(_)));
        assert!(matches!(reason(EngineError::WrongState("paused")), DialError::NotRunning(state) if state == "paused"));
    }
}

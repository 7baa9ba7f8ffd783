//! Ports of VMs that are reached from outside.

use std::sync::Arc;

use serde_json::json;
use tiffin_protocol::AGENT_PORT;
use tiffin_store::{Port, PortInserted};
use tiffin_types::{account::Scope, id::VmId, limits};

use super::{App, auth::Caller, ingress::url, vms::vm_get};
use crate::error::AppError;

/// A port, and where it is reached.
pub(crate) struct Exposed {
    pub(crate) port: Port,
    pub(crate) hostname: String,
    pub(crate) url: String,
}

/// Gives a port of the caller's VM a host name; one that has one keeps it.
pub(crate) async fn port_create(app: &Arc<App>, caller: &Caller, id: &VmId, port: u16) -> Result<Exposed, AppError> {
    caller.require(Scope::Write)?;
    vm_get(app, caller, id).await?;
    is_reachable(app, port)?;
    let most = limits::PORTS_MAX;
    let port = match app.store.port_insert(id, port, most).await? {
        PortInserted::Done(port) => port,
        PortInserted::Refused => {
            // Or it was deleted just now.
            vm_get(app, caller, id).await?;
            return Err(AppError::Conflict {
                code: "too_many_ports",
                message: format!(
                    "the VM has {most} ports that are reached from outside, no more are allowed: remove one"
                ),
                details: json!({ "limit": most }),
            });
        }
    };
    // What the record says now is followed from here on.
    app.routes.set_port(&port);
    let vm = vm_get(app, caller, id).await;
    match &vm {
        Ok(vm) => app.routes.update(vm),
        Err(_) => app.routes.remove(id, port.port),
    }
    vm.map(|_| exposed(app, port))
}

/// The ports of the caller's VM that have host names.
pub(crate) async fn port_list(app: &App, caller: &Caller, id: &VmId) -> Result<Vec<Exposed>, AppError> {
    caller.require(Scope::Read)?;
    vm_get(app, caller, id).await?;
    Ok(app.store.port_list(id).await?.into_iter().map(|port| exposed(app, port)).collect())
}

/// Takes a port's host name away; requests under way are finished.
pub(crate) async fn port_delete(app: &App, caller: &Caller, id: &VmId, port: u16) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    vm_get(app, caller, id).await?;
    if !app.store.port_delete(id, port).await? {
        return Err(AppError::NotFound("port"));
    }
    app.routes.remove(id, port);
    Ok(())
}

fn is_reachable(app: &App, port: u16) -> Result<(), AppError> {
    if port == AGENT_PORT {
        return Err(AppError::field(
            "port",
            format!("must not be {AGENT_PORT}, which is the VM's agent's: take another"),
        ));
    }
    if app.config.ingress.listen.is_none() {
        return Err(AppError::Conflict {
            code: "ingress_off",
            message: "nothing is reached from outside on this server: its administrator has set ingress.listen to off"
                .into(),
            details: serde_json::Value::Null,
        });
    }
    Ok(())
}

fn exposed(app: &App, port: Port) -> Exposed {
    let hostname = app.routes.hostname(&port.label);
    Exposed { url: url(app, &hostname), hostname, port }
}

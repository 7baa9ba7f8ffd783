//! `/v1/vms/{id}/ports`

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use serde::Serialize;
use tiffin_types::{id::VmId, time::Timestamp};
use utoipa::ToSchema;

use super::request::{Id, IdAndPort};
use crate::{
    app::{
        App,
        auth::Caller,
        ports::{self, Exposed},
    },
    error::AppError,
};

/// A port of a VM that is reached from outside.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PortBody {
    #[schema(example = 8080)]
    port: u16,
    #[schema(example = "01jd4w5c1qzx6m0v5k2b8n7t3a.vm.localhost")]
    hostname: String,
    #[schema(example = "https://01jd4w5c1qzx6m0v5k2b8n7t3a.vm.localhost:3443/")]
    url: String,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
}

impl From<Exposed> for PortBody {
    fn from(exposed: Exposed) -> Self {
        let Exposed { port, hostname, url } = exposed;
        Self { port: port.port, hostname, url, created_at: port.created_at }
    }
}

/// Expose a port of a VM
///
/// Gives it a host name by which anybody reaches what listens there, over HTTPS. One that has a name keeps it. It goes with the
/// VM; while that isn't RUNNING, requests get 503. At most 16 ports of a VM.
#[utoipa::path(put, path = "/v1/vms/{id}/ports/{port}", operation_id = "port_create", tag = "VMs",
    params(("id" = String, Path), ("port" = u16, Path, minimum = 1, maximum = 65535)),
    responses((status = 200, description = "It is reached at `url`", body = PortBody), (status = 400), (status = 409)))]
pub(crate) async fn port_create(
    caller: Caller,
    State(app): State<Arc<App>>,
    IdAndPort(id, port): IdAndPort,
) -> Result<Json<PortBody>, AppError> {
    Ok(Json(ports::port_create(&app, &caller, &id, port).await?.into()))
}

/// List a VM's exposed ports
#[utoipa::path(get, path = "/v1/vms/{id}/ports", operation_id = "port_list", tag = "VMs", params(("id" = String, Path)),
    responses((status = 200, description = "Ports that are reached from outside, the least first", body = Vec<PortBody>)))]
pub(crate) async fn port_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
) -> Result<Json<Vec<PortBody>>, AppError> {
    let list = ports::port_list(&app, &caller, &id).await?;
    Ok(Json(list.into_iter().map(PortBody::from).collect()))
}

/// Stop exposing a port
///
/// Its host name leads nowhere from now on, and is never given to another. Requests under way are finished.
#[utoipa::path(delete, path = "/v1/vms/{id}/ports/{port}", operation_id = "port_delete", tag = "VMs",
    params(("id" = String, Path), ("port" = u16, Path, minimum = 1, maximum = 65535)),
    responses((status = 204, description = "It is reached no longer"), (status = 400)))]
pub(crate) async fn port_delete(
    caller: Caller,
    State(app): State<Arc<App>>,
    IdAndPort(id, port): IdAndPort,
) -> Result<StatusCode, AppError> {
    ports::port_delete(&app, &caller, &id, port).await?;
    Ok(StatusCode::NO_CONTENT)
}

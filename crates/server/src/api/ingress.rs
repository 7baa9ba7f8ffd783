//! `/v1/ingress`

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    app::{
        App,
        auth::Caller,
        ingress::{self, IngressFacts},
    },
    error::AppError,
};

/// How VMs are reached from outside.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct IngressBody {
    /// What host names end in.
    #[schema(example = "vm.localhost")]
    domain: String,
    /// The port in URLs; missing while the ingress is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 3443)]
    port: Option<u16>,
    /// The certificate to trust, in PEM, where the ingress has an authority of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_certificate: Option<String>,
}

/// See how VMs are reached from outside
#[utoipa::path(get, path = "/v1/ingress", operation_id = "ingress_get", tag = "VMs",
    responses((status = 200, description = "Domain, port, and the certificate to trust", body = IngressBody)))]
pub(crate) async fn ingress_get(caller: Caller, State(app): State<Arc<App>>) -> Result<Json<IngressBody>, AppError> {
    let IngressFacts { domain, port, authority } = ingress::ingress_get(&app, &caller)?;
    Ok(Json(IngressBody { domain, port, ca_certificate: authority }))
}

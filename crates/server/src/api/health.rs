//! `/health` and `/metrics`

use std::sync::Arc;

use axum::{
    Json,
    extract::{FromRequestParts, Request, State},
    http::{StatusCode, header},
    response::IntoResponse,
};
use serde::Serialize;
use tiffin_types::account::Scope;
use utoipa::ToSchema;

use crate::{
    app::{App, auth::Caller, health},
    error::AppError,
};

/// Whether the server can do its work.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HealthBody {
    /// `ok` or `unavailable`.
    #[schema(example = "ok")]
    status: &'static str,
    /// `ok` or `unavailable`.
    #[schema(example = "ok")]
    store: &'static str,
    /// What runs VMs.
    #[schema(example = "gvisor")]
    engine: &'static str,
    #[schema(example = "0.1.0")]
    version: &'static str,
}

/// Ask whether the server can do its work
#[utoipa::path(get, path = "/health", operation_id = "health_get", tag = "Server", security(()),
    responses((status = 200, description = "It can", body = HealthBody),
        (status = 503, description = "It can't now", body = HealthBody)))]
pub(crate) async fn health_get(State(app): State<Arc<App>>) -> (StatusCode, Json<HealthBody>) {
    let store = health::health_check(&app).await.store;
    let word = |works| if works { "ok" } else { "unavailable" };
    let status = if store { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = HealthBody {
        status: word(store),
        store: word(store),
        engine: app.engine.default_kind().name.as_str(),
        version: env!("CARGO_PKG_VERSION"),
    };
    (status, Json(body))
}

/// Read the server's measurements
///
/// In Prometheus' text format. Needs no key unless `metrics.require_key` is set, then one with the scope `admin`.
#[utoipa::path(get, path = "/metrics", operation_id = "metrics_get", tag = "Server", security(()),
    responses((status = 200, description = "Measurements", body = String, content_type = "text/plain")))]
pub(crate) async fn metrics_get(State(app): State<Arc<App>>, request: Request) -> Result<impl IntoResponse, AppError> {
    if app.config.metrics_require_key {
        let (mut parts, _) = request.into_parts();
        Caller::from_request_parts(&mut parts, &app).await?.require(Scope::Admin)?;
    }
    let text = health::metrics_render(&app).await;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
}

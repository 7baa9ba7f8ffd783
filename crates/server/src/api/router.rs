//! Which handler answers which request.

use std::sync::Arc;

use axum::{Router, middleware, routing::get};
use utoipa::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

use super::{
    accounts, activity, api_keys, cakework, docs, events, exec, exec_logs, files, gate, health, images, imports,
    ingress, layer, logs, openapi, overview, ports, scripts, sessions, snapshots, terminal, uploads, vm_logs, vms,
    webhooks,
};
use crate::{app::App, error::AppError};

/// Every operation of the API.
pub(super) fn operations() -> OpenApiRouter<Arc<App>> {
    let mut router = OpenApiRouter::with_openapi(openapi::Base::openapi())
        .routes(routes!(vms::vm_create, vms::vm_list))
        .routes(routes!(vms::vm_get, vms::vm_delete))
        .routes(routes!(vms::vm_start))
        .routes(routes!(vms::vm_stop))
        .routes(routes!(vms::vm_pause))
        .routes(routes!(vms::vm_resume))
        .routes(routes!(vms::vm_network_get))
        .routes(routes!(ports::port_list))
        .routes(routes!(ports::port_create, ports::port_delete))
        .routes(routes!(snapshots::vm_fork))
        .routes(routes!(snapshots::snapshot_create))
        .routes(routes!(snapshots::snapshot_list))
        .routes(routes!(snapshots::snapshot_get, snapshots::snapshot_delete))
        .routes(routes!(vm_logs::vm_log_get))
        .routes(routes!(logs::log_list))
        .routes(routes!(logs::log_follow))
        .routes(routes!(exec::exec_create))
        .routes(routes!(scripts::script_ts_run))
        .routes(routes!(scripts::script_js_run))
        .routes(routes!(terminal::terminal_open))
        .routes(routes!(files::file_list))
        .routes(routes!(files::files_upload))
        .routes(routes!(files::files_download))
        .routes(routes!(files::file_get, files::file_update))
        .routes(routes!(images::image_create, images::image_list))
        .routes(routes!(imports::image_import_list))
        .routes(routes!(images::image_get, images::image_delete))
        .routes(routes!(uploads::image_rootfs_update))
        .routes(routes!(uploads::image_kernel_update))
        .routes(routes!(images::image_default_update))
        .routes(routes!(accounts::account_create, accounts::account_list))
        .routes(routes!(accounts::account_get, accounts::account_update))
        .routes(routes!(api_keys::api_key_create, api_keys::api_key_list))
        .routes(routes!(api_keys::api_key_revoke))
        .routes(routes!(exec_logs::exec_log_list))
        .routes(routes!(overview::overview_get))
        .routes(routes!(activity::activity_list))
        .routes(routes!(events::event_list))
        .routes(routes!(webhooks::webhook_create, webhooks::webhook_list))
        .routes(routes!(webhooks::webhook_get, webhooks::webhook_update, webhooks::webhook_delete))
        .routes(routes!(webhooks::webhook_rotate))
        .routes(routes!(webhooks::webhook_test))
        .routes(routes!(webhooks::webhook_delivery_list))
        .routes(routes!(webhooks::webhook_delivery_retry))
        .routes(routes!(sessions::session_create))
        .routes(routes!(sessions::session_delete))
        .routes(routes!(sessions::session_get))
        .routes(routes!(ingress::ingress_get))
        .routes(routes!(health::health_get))
        .routes(routes!(health::metrics_get))
        .merge(cakework::operations());
    openapi::complete(router.get_openapi_mut());
    router
}

/// All that the server answers.
pub(crate) fn router(app: Arc<App>) -> Router {
    let (router, document) = operations().split_for_parts();
    let gate = Arc::new(gate::Gate::new(Arc::clone(&app), &document));
    router
        .route("/docs", get(docs::docs_redirect))
        .route("/docs/", get(docs::docs_index))
        .route("/docs/{page}", get(docs::docs_page))
        .merge(SwaggerUi::new("/swagger").url("/openapi.json", document))
        .fallback(|| async { AppError::NoRoute })
        .method_not_allowed_fallback(|| async { AppError::MethodNotAllowed })
        .layer(middleware::from_fn_with_state(gate, gate::pass))
        .layer(middleware::from_fn(layer::every_request))
        .with_state(app)
}

//! The second dialect: VMs that run their image's program. The rules are the same ([`crate::app`]); this is another way to
//! say them.
//!
//! Every operation is mounted twice, at the root and below [`PREFIX`]: clients of this dialect ask for `GET /v1/vms`, which
//! at the root is the other dialect's. Unknown fields of bodies are ignored here, and what has no answer is answered by `{}`.

mod images;
mod logs;
mod vms;

use std::sync::Arc;

use serde::Serialize;
use utoipa::{
    ToSchema,
    openapi::{OpenApi, PathItem},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::app::App;

/// Where all of it is mounted for clients that take every path for theirs.
const PREFIX: &str = "/cakework";

/// Every operation of the dialect, in both places.
pub(super) fn operations() -> OpenApiRouter<Arc<App>> {
    let mut prefixed = OpenApiRouter::new().nest(PREFIX, both_places().routes(routes!(vms::cakework_vm_v1_list)));
    tell_apart(prefixed.get_openapi_mut(), "prefixed_");
    let mut root = both_places();
    tell_apart(root.get_openapi_mut(), "");
    root.merge(prefixed)
}

fn both_places() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(images::cakework_image_import, images::cakework_image_import_by_query))
        .routes(routes!(vms::cakework_vm_start))
        .routes(routes!(vms::cakework_vm_get))
        .routes(routes!(logs::cakework_vm_log_list))
        .routes(routes!(vms::cakework_vm_stop))
        .routes(routes!(vms::cakework_vm_destroy))
        .routes(routes!(vms::cakework_vm_list))
        .routes(routes!(vms::cakework_vm_cache))
        .routes(routes!(vms::cakework_cached_start))
        .routes(routes!(logs::cakework_cached_log_list))
        .routes(routes!(vms::cakework_cached_stop))
        .routes(routes!(vms::cakework_cached_destroy))
}

/// Operations have ids of their own in the document, also where one handler serves two of them.
fn tell_apart(document: &mut OpenApi, prefix: &str) {
    for PathItem { get, post, .. } in document.paths.paths.values_mut() {
        let by_post = if get.is_some() { "posted_" } else { "" };
        for (operation, method) in [(get, ""), (post, by_post)] {
            if let Some(id) = operation.as_mut().and_then(|operation| operation.operation_id.as_mut()) {
                *id = format!("{prefix}{method}{id}");
            }
        }
    }
}

/// A route of the dialect, as it is at the root.
pub(super) fn unprefixed(route: &str) -> &str {
    route.strip_prefix(PREFIX).unwrap_or(route)
}

/// The answer where there is nothing to say: its clients want JSON.
#[derive(Serialize, ToSchema)]
struct Nothing {}

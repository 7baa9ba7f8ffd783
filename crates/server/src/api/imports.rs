//! `/v1/images/imports`: how far imports from registries are. They are begun in the other dialect.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use tiffin_types::time::Timestamp;
use utoipa::ToSchema;

use crate::{
    app::{
        App,
        auth::Caller,
        imports::{self, ImportNow, ImportStage},
    },
    error::AppError,
};

/// What an import is doing.
#[derive(Serialize, ToSchema, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ImportStatus {
    /// It waits for a place, finds out what the reference names, or waits for another import of the same.
    Resolving,
    /// It gets the layers.
    Receiving,
    /// It makes an image of them.
    Converting,
}

/// An import that is under way.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImportBody {
    /// As the request had it.
    #[schema(example = "ghcr.io/team/app:1.0")]
    image_uri: String,
    #[schema(value_type = String, format = DateTime)]
    started_at: Timestamp,
    status: ImportStatus,
    /// Bytes of layers that are here.
    received_bytes: u64,
    /// Bytes of all layers, once they are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_bytes: Option<u64>,
    /// Entries of layers that were read.
    converted_entries: u64,
}

impl From<ImportNow> for ImportBody {
    fn from(now: ImportNow) -> Self {
        Self {
            image_uri: now.image_uri,
            started_at: now.started_at,
            status: match now.stage {
                ImportStage::Resolving => ImportStatus::Resolving,
                ImportStage::Receiving => ImportStatus::Receiving,
                ImportStage::Converting => ImportStatus::Converting,
            },
            received_bytes: now.received_bytes,
            expected_bytes: now.expected_bytes,
            converted_entries: now.converted_entries,
        }
    }
}

/// List the imports that are under way
///
/// The account's own, in the order in which they began. One that is over is an image, or its request has said why not.
#[utoipa::path(get, path = "/v1/images/imports", operation_id = "image_import_list", tag = "Images",
    responses((status = 200, description = "How far each is", body = Vec<ImportBody>)))]
pub(crate) async fn image_import_list(
    caller: Caller,
    State(app): State<Arc<App>>,
) -> Result<Json<Vec<ImportBody>>, AppError> {
    let list = imports::image_import_list(&app, &caller)?;
    Ok(Json(list.into_iter().map(ImportBody::from).collect()))
}

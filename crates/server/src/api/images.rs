//! `/v1/images`

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use tiffin_store::Image;
use tiffin_types::time::Timestamp;
use utoipa::ToSchema;

use crate::{
    app::{App, auth::Caller, images},
    error::AppError,
};

/// What VMs are made of.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImageBody {
    #[schema(example = "01JD4W5C1QZX6M0V5K2B8N7T3A")]
    id: String,
    #[schema(example = "default")]
    name: String,
    description: String,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// Whether VMs are made of it when their creator names no image.
    is_default: bool,
    /// Whether it has a kernel of its own.
    has_kernel: bool,
    /// Whether it has a filesystem, so that VMs can be made of it.
    has_rootfs: bool,
    /// Bytes of its files.
    base_rootfs_bytes: i64,
    /// Bytes that it takes on the host.
    size_bytes: i64,
    /// Its content.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
}

impl From<Image> for ImageBody {
    fn from(image: Image) -> Self {
        Self {
            id: image.id.to_string(),
            name: image.name,
            description: image.description,
            created_at: image.created_at,
            is_default: image.is_default,
            has_kernel: false,
            has_rootfs: image.digest.is_some(),
            base_rootfs_bytes: image.rootfs_bytes,
            size_bytes: image.size_bytes,
            digest: image.digest.map(|digest| digest.to_string()),
        }
    }
}

/// List the images that VMs can be made of
#[utoipa::path(get, path = "/v1/images", operation_id = "image_list", tag = "Images",
    responses((status = 200, description = "The account's own images and those that everybody sees", body = Vec<ImageBody>)))]
pub(crate) async fn image_list(caller: Caller, State(app): State<Arc<App>>) -> Result<Json<Vec<ImageBody>>, AppError> {
    let list = images::image_list(&app, &caller).await?;
    Ok(Json(list.into_iter().map(ImageBody::from).collect()))
}

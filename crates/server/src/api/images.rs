//! `/v1/images`; uploads to them are in [`super::uploads`].

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use serde::Serialize;
use tiffin_store::Image;
use tiffin_types::{id::ImageId, limits, time::Timestamp};
use utoipa::ToSchema;

use super::{
    body::{Fields, JsonObject, NAME, name, text},
    request::Id,
};
use crate::{
    app::{
        App,
        auth::Caller,
        images::{self, ImageNow, ImageRequest, KeptUpload},
        uploads::Progress,
    },
    error::AppError,
};

/// An image to be made.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `image_request` reads")]
pub(crate) struct ImageCreate {
    /// A name for people; need not be unique.
    #[schema(min_length = 1, max_length = 100, example = "my-custom-image")]
    name: String,
    /// A sentence for people; may be empty.
    #[schema(max_length = 1000, example = "Alpine with Python 3.12")]
    description: String,
    /// Whether every account is to see it; needs the scope admin.
    #[schema(default = false)]
    shared: Option<bool>,
}

/// How far an image is.
#[derive(Serialize, ToSchema, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ImageStatus {
    /// It has no filesystem yet.
    Empty,
    /// Something is being received.
    Uploading,
    /// What was received is being checked and made an image of.
    Converting,
    /// VMs can be made of it.
    Ready,
    /// The last upload came to nothing, or not to its end; `error` says why. What it had before it still has: see `hasRootfs`.
    Failed,
    /// A piece of a file has come, and others are to: see `partialUploads`.
    Incomplete,
}

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
    /// Whether every account sees it.
    is_shared: bool,
    status: ImageStatus,
    /// Why the last upload came to nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// While something is uploaded: bytes that came.
    #[serde(skip_serializing_if = "Option::is_none")]
    received_bytes: Option<u64>,
    /// While something is uploaded: bytes that the client said would come.
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_bytes: Option<u64>,
    /// While something is uploaded: files of the filesystem that were read.
    #[serde(skip_serializing_if = "Option::is_none")]
    converted_entries: Option<u64>,
    /// Whether it was found damaged on the host's disk: no VMs are made of it until it is uploaded again.
    is_damaged: bool,
    /// What came of uploads that broke off: they can be gone on with.
    partial_uploads: Vec<PartialUploadBody>,
}

/// What came of an upload that broke off.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PartialUploadBody {
    /// What it is of: `rootfs` or `kernel`.
    #[schema(example = "rootfs")]
    part: &'static str,
    /// Bytes that came. The next request goes on there: `Content-Range: bytes 1048576-2097151/2097152`
    #[schema(example = 1048576)]
    received_bytes: u64,
    /// Bytes of the whole file, if the client said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_bytes: Option<u64>,
    /// The whole file's SHA-256, if the client said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    /// When it is removed, if nobody goes on with it.
    #[schema(value_type = String, format = DateTime)]
    expires_at: Timestamp,
}

impl From<KeptUpload> for PartialUploadBody {
    fn from(kept: KeptUpload) -> Self {
        Self {
            part: kept.partial.part.as_str(),
            received_bytes: kept.partial.received_bytes,
            expected_bytes: kept.partial.total_bytes,
            digest: kept.partial.digest.map(|digest| digest.to_string()),
            expires_at: kept.expires_at,
        }
    }
}

impl From<ImageNow> for ImageBody {
    fn from(ImageNow { image, progress, kept, is_damaged }: ImageNow) -> Self {
        Self {
            is_damaged,
            status: status(&image, progress, !kept.is_empty()),
            partial_uploads: kept.into_iter().map(PartialUploadBody::from).collect(),
            id: image.id.to_string(),
            name: image.name,
            description: image.description,
            created_at: image.created_at,
            is_default: image.is_default,
            has_kernel: image.kernel_digest.is_some(),
            has_rootfs: image.digest.is_some(),
            base_rootfs_bytes: image.rootfs_bytes,
            size_bytes: image.size_bytes.saturating_add(image.kernel_bytes),
            digest: image.digest.map(|digest| digest.to_string()),
            is_shared: image.account_id.is_none(),
            error: image.upload_error,
            received_bytes: progress.map(|progress| progress.received_bytes),
            expected_bytes: progress.and_then(|progress| progress.expected_bytes),
            converted_entries: progress.map(|progress| progress.converted_entries),
        }
    }
}

fn status(image: &Image, progress: Option<Progress>, is_partial: bool) -> ImageStatus {
    match progress {
        Some(progress) if progress.converting => ImageStatus::Converting,
        Some(_) => ImageStatus::Uploading,
        // One that was cut short and isn't written down as such yet.
        None if image.upload_error.is_some() || image.upload.is_some() => ImageStatus::Failed,
        None if is_partial => ImageStatus::Incomplete,
        None if image.digest.is_some() => ImageStatus::Ready,
        None => ImageStatus::Empty,
    }
}

/// Make an image
///
/// It is empty at first: upload a filesystem to it.
#[utoipa::path(post, path = "/v1/images", operation_id = "image_create", tag = "Images", request_body = ImageCreate,
    responses((status = 201, description = "The image", body = ImageBody), (status = 429)))]
pub(crate) async fn image_create(
    caller: Caller,
    State(app): State<Arc<App>>,
    body: JsonObject,
) -> Result<(StatusCode, Json<ImageBody>), AppError> {
    let request = image_request(body.fields())?;
    let image = images::image_create(&app, &caller, request).await?;
    Ok((StatusCode::CREATED, Json(image.into())))
}

/// List the images that VMs can be made of
#[utoipa::path(get, path = "/v1/images", operation_id = "image_list", tag = "Images",
    responses((status = 200, description = "The account's own images and those that everybody sees", body = Vec<ImageBody>)))]
pub(crate) async fn image_list(caller: Caller, State(app): State<Arc<App>>) -> Result<Json<Vec<ImageBody>>, AppError> {
    let list = images::image_list(&app, &caller).await?;
    Ok(Json(list.into_iter().map(ImageBody::from).collect()))
}

/// Get an image
#[utoipa::path(get, path = "/v1/images/{id}", operation_id = "image_get", tag = "Images", params(("id" = String, Path)),
    responses((status = 200, description = "The image, and how far an upload to it is", body = ImageBody)))]
pub(crate) async fn image_get(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<ImageId>,
) -> Result<Json<ImageBody>, AppError> {
    Ok(Json(images::image_get(&app, &caller, &id).await?.into()))
}

/// Make an image the default
///
/// The one that VMs are made of whose creator names none. With the scope admin and an image that everybody sees: for
/// every account that chose none of its own. Else for the account of the key alone.
#[utoipa::path(post, path = "/v1/images/{id}/set-default", operation_id = "image_default_update", tag = "Images",
    params(("id" = String, Path)),
    responses((status = 204, description = "It is the default"), (status = 409)))]
pub(crate) async fn image_default_update(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<ImageId>,
) -> Result<StatusCode, AppError> {
    images::image_set_default(&app, &caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Delete an image
///
/// Refused while VMs or snapshots are made of it, while it is a default, and during an upload to it.
#[utoipa::path(delete, path = "/v1/images/{id}", operation_id = "image_delete", tag = "Images",
    params(("id" = String, Path)),
    responses((status = 204, description = "Deleted"), (status = 409)))]
pub(crate) async fn image_delete(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<ImageId>,
) -> Result<StatusCode, AppError> {
    images::image_delete(&app, &caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn image_request(mut fields: Fields) -> Result<ImageRequest, AppError> {
    let name = fields.required("name", NAME, name);
    let expected =
        format!("must be a text of at most {} characters without control characters", limits::DESCRIPTION_CHARS);
    let description = fields.required("description", &expected, |value| {
        text(value).filter(|text| {
            text.chars().count() <= limits::DESCRIPTION_CHARS && !text.chars().any(|c| c.is_control() && c != '\n')
        })
    });
    let shared = fields.optional("shared", false, "must be true or false", |value| value.as_bool());
    let request = (|| Some(ImageRequest { name: name?, description: description?, shared: shared? }))();
    fields.finish_with(request, "name, description, shared are")
}

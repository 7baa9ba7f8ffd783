//! `/v1/vms/{id}/files`: archives in and out, single files, folders' lists. Bodies pass through in pieces.

use std::{io, sync::Arc};

use axum::{
    Json,
    body::Body,
    extract::{Extension, Request, State},
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use serde::Serialize;
use tiffin_protocol::{FileEntry, FileKind};
use tiffin_types::{
    id::VmId,
    path::{self, GuestPath, WORKSPACE},
    time::Timestamp,
};
use utoipa::ToSchema;

use super::{
    body::RawBody,
    layer::RequestId,
    request::{Id, Parameters},
};
use crate::{
    app::{
        App,
        auth::Caller,
        files::{self, Download},
    },
    error::{AppError, log_cause},
};

const ARCHIVE: &str = "application/gzip";
const ARCHIVES: [&str; 3] = [ARCHIVE, "application/x-gzip", BYTES];
const BYTES: &str = "application/octet-stream";

/// An entry of a folder.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FileBody {
    /// Its name; bytes that are no UTF-8 are replaced by U+FFFD.
    #[schema(example = "main.ts")]
    name: String,
    /// What it is: `file`, `directory`, `symlink` or `other`.
    #[serde(rename = "type")]
    #[schema(example = "file")]
    kind: &'static str,
    /// Bytes of a file; 0 for everything else.
    size: u64,
    /// Permission bits, in octal.
    #[schema(example = "644")]
    mode: String,
    /// When it was last changed.
    #[schema(value_type = String, format = DateTime)]
    modified_at: Timestamp,
}

impl From<FileEntry> for FileBody {
    fn from(entry: FileEntry) -> Self {
        let kind = match entry.kind {
            FileKind::File => "file",
            FileKind::Directory => "directory",
            FileKind::Symlink => "symlink",
            FileKind::Other => "other",
        };
        Self {
            name: entry.name,
            kind,
            size: entry.size,
            mode: format!("{:o}", entry.mode & 0o7777),
            modified_at: Timestamp::from_millis(entry.modified_ms),
        }
    }
}

/// List a folder of a VM
///
/// At most 5000 entries, by name; a folder with more is a 413.
#[utoipa::path(get, path = "/v1/vms/{id}/files", operation_id = "file_list", tag = "Files",
    params(("id" = String, Path),
        ("path" = Option<String>, Query, description = "The folder, at or below /workspace, which is the default", example = "/workspace/project")),
    responses((status = 200, description = "What is in it", body = Vec<FileBody>),
        (status = 409), (status = 413), (status = 429), (status = 502), (status = 504)))]
pub(crate) async fn file_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    mut parameters: Parameters,
) -> Result<Json<Vec<FileBody>>, AppError> {
    let path = parameters.optional("path", WORKSPACE.parse().ok(), path::EXPECTED, |text| Some(text.parse().ok()));
    let path = path?.ok_or_else(|| AppError::field("path", path::EXPECTED))?;
    parameters.finish("path is")?;
    let entries = files::file_list(&app, &caller, &id, &path).await?;
    Ok(Json(entries.into_iter().map(FileBody::from).collect()))
}

/// Upload an archive into a VM
///
/// Unpacks a gzipped tar into the folder `dest`, which is made if need be, as user and group 1000. Links, devices, FIFOs,
/// sockets, absolute names, names with `..` and entries that would be written through a link are refused. What is
/// refused, too large or cut short leaves nothing behind.
#[utoipa::path(post, path = "/v1/vms/{id}/files/upload", operation_id = "files_upload", tag = "Files",
    params(("id" = String, Path),
        ("dest" = String, Query, description = "The folder, at or below /workspace", example = "/workspace/project")),
    request_body(content = Vec<u8>, content_type = "application/gzip", description = "A tar.gz; also as application/x-gzip or application/octet-stream"),
    responses((status = 204, description = "All of it is there"),
        (status = 409), (status = 422), (status = 429), (status = 502), (status = 504)))]
pub(crate) async fn files_upload(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    mut parameters: Parameters,
    request: Request,
) -> Result<StatusCode, AppError> {
    let dest = parameters.required("dest", path::EXPECTED, |text| text.parse().ok())?;
    parameters.finish("dest is")?;
    let patience = app.config.http.body_timeout;
    let wanted = ("a gzipped tar", ARCHIVE);
    let mut body = RawBody::new(request, &ARCHIVES, wanted, app.config.files.upload_bytes, patience).await?;
    let done = files::files_upload(&app, &caller, &id, &dest, body.pieces()).await;
    if done.is_err() {
        body.drain(patience).await;
    }
    done.map(|_| StatusCode::NO_CONTENT)
}

/// Download a file or folder of a VM
///
/// As a gzipped tar, streamed. A failure in the middle breaks the connection off: an answer that ends properly is whole.
#[utoipa::path(get, path = "/v1/vms/{id}/files/download", operation_id = "files_download", tag = "Files",
    params(("id" = String, Path),
        ("path" = String, Query, description = "The file or folder, at or below /workspace", example = "/workspace/project")),
    responses((status = 200, description = "A tar.gz", body = Vec<u8>, content_type = "application/gzip"),
        (status = 409), (status = 413), (status = 429), (status = 502), (status = 504)))]
pub(crate) async fn files_download(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    Extension(request_id): Extension<RequestId>,
    mut parameters: Parameters,
) -> Result<Response, AppError> {
    let path = path_parameter(&mut parameters)?;
    parameters.finish("path is")?;
    let download = files::files_download(&app, &caller, &id, &path).await?;
    let name = format!("{}.tar.gz", path.name());
    Ok(streamed(download, ARCHIVE, &name, request_id))
}

/// Read a file of a VM
///
/// Its bytes, streamed. A failure in the middle breaks the connection off.
#[utoipa::path(get, path = "/v1/vms/{id}/files/content", operation_id = "file_get", tag = "Files",
    params(("id" = String, Path),
        ("path" = String, Query, description = "The file, below /workspace", example = "/workspace/main.ts")),
    responses((status = 200, description = "The file", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 409), (status = 413), (status = 429), (status = 502), (status = 504)))]
pub(crate) async fn file_get(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    Extension(request_id): Extension<RequestId>,
    mut parameters: Parameters,
) -> Result<Response, AppError> {
    let path = file_parameter(&mut parameters)?;
    parameters.finish("path is")?;
    let download = files::file_get(&app, &caller, &id, &path).await?;
    Ok(streamed(download, BYTES, path.name(), request_id))
}

/// Write a file of a VM
///
/// Whole or not at all, as user and group 1000; folders on the way are made, a file that is there is replaced.
#[utoipa::path(put, path = "/v1/vms/{id}/files/content", operation_id = "file_update", tag = "Files",
    params(("id" = String, Path),
        ("path" = String, Query, description = "The file, below /workspace", example = "/workspace/main.ts")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 204, description = "It is there"),
        (status = 409), (status = 422), (status = 429), (status = 502), (status = 504)))]
pub(crate) async fn file_update(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    mut parameters: Parameters,
    request: Request,
) -> Result<StatusCode, AppError> {
    let path = file_parameter(&mut parameters)?;
    parameters.finish("path is")?;
    let patience = app.config.http.body_timeout;
    let mut body = RawBody::new(request, &[BYTES], ("bytes", BYTES), app.config.files.file_bytes, patience).await?;
    let done = files::file_update(&app, &caller, &id, &path, body.pieces()).await;
    if done.is_err() {
        body.drain(patience).await;
    }
    done.map(|_| StatusCode::NO_CONTENT)
}

fn path_parameter(parameters: &mut Parameters) -> Result<GuestPath, AppError> {
    parameters.required("path", path::EXPECTED, |text| text.parse().ok())
}

/// The path of something that can be a file.
fn file_parameter(parameters: &mut Parameters) -> Result<GuestPath, AppError> {
    let path = path_parameter(parameters)?;
    if path.is_workspace() { Err(AppError::field("path", "must be a file below /workspace")) } else { Ok(path) }
}

/// The bytes as they come. One that breaks off breaks the answer off too, so that no client takes it for whole.
fn streamed(download: Download, kind: &'static str, name: &str, request_id: RequestId) -> Response {
    let pieces = stream::try_unfold((download, request_id), |(mut download, id)| async move {
        match download.next().await {
            Ok(Some(bytes)) => Ok(Some((bytes, (download, id)))),
            Ok(None) => Ok(None),
            Err(error) => {
                log_cause(&error, &id.0);
                Err(io::Error::other(error.inside()))
            }
        }
    });
    let headers: [(HeaderName, String); 3] = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{}\"", plain(name))),
        // What a guest's file says of itself is not for browsers to guess at.
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    (headers, Body::from_stream(pieces)).into_response()
}

/// A name that can stand in a header.
fn plain(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || "._- ".contains(c) { c } else { '_' }).collect()
}

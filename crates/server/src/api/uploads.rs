//! `PUT /v1/images/{id}/rootfs` and `/kernel`: bodies that are passed on as they come, and the headers that say which bytes of the
//! file they are.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use tiffin_store::Upload;
use tiffin_types::id::ImageId;
use utoipa::ToSchema;

use super::{body::RawBody, content_range, request::Id};
use crate::{
    app::{
        App,
        auth::Caller,
        uploads::{Announced, Outcome, Span, image_upload, image_upload_admit, upload_limit},
    },
    error::AppError,
};

/// What uploads are.
const OCTETS: &str = "application/octet-stream";

/// A piece of a file that has come.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PieceBody {
    /// Bytes of the file that are there: the next piece begins there.
    #[schema(example = 1048576)]
    received_bytes: u64,
}

/// Upload an image's filesystem
///
/// The body is an ext4 (or ext2, ext3) filesystem as it is, not compressed and without a partition table. It replaces the
/// one that the image has once it is whole; VMs keep what they were made of.
///
/// What has come when an upload breaks off is kept for a time (`partialUploads` of the image). `Content-Range: bytes
/// FIRST-LAST/TOTAL` goes on where it ended; without, or with FIRST 0, it begins anew.
#[utoipa::path(put, path = "/v1/images/{id}/rootfs", operation_id = "image_rootfs_update", tag = "Images",
    params(("id" = String, Path),
        ("Content-Range" = Option<String>, Header, description = "Which bytes of the file the body has: `bytes FIRST-LAST/TOTAL`; `bytes */TOTAL` with an empty body when all have come"),
        ("Repr-Digest" = Option<String>, Header, description = "The digest of the whole file (RFC 9530), `sha-256=:BASE64:`; a file that has another one is refused")),
    request_body(content = String, content_type = OCTETS),
    responses((status = 202, description = "The bytes are kept; more are to come", body = PieceBody), (status = 204, description = "VMs can be made of it"),
        (status = 408), (status = 409), (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn image_rootfs_update(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<ImageId>,
    request: Request,
) -> Result<Response, AppError> {
    update(&app, &caller, &id, Upload::Rootfs, request).await
}

/// Upload an image's kernel
///
/// The body is a Linux kernel for x86-64: a vmlinux (ELF, built with CONFIG_PVH) or a bzImage. VMs that are made of the image from then on
/// boot it, under an engine that boots kernels (qemu). It can be gone on with as a filesystem can.
#[utoipa::path(put, path = "/v1/images/{id}/kernel", operation_id = "image_kernel_update", tag = "Images",
    params(("id" = String, Path),
        ("Content-Range" = Option<String>, Header, description = "Which bytes of the file the body has: `bytes FIRST-LAST/TOTAL`; `bytes */TOTAL` with an empty body when all have come"),
        ("Repr-Digest" = Option<String>, Header, description = "The digest of the whole file (RFC 9530), `sha-256=:BASE64:`; a file that has another one is refused")),
    request_body(content = String, content_type = OCTETS),
    responses((status = 202, description = "The bytes are kept; more are to come", body = PieceBody), (status = 204, description = "The image has it"),
        (status = 408), (status = 409), (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn image_kernel_update(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<ImageId>,
    request: Request,
) -> Result<Response, AppError> {
    update(&app, &caller, &id, Upload::Kernel, request).await
}

async fn update(
    app: &Arc<App>,
    caller: &Caller,
    id: &ImageId,
    part: Upload,
    request: Request,
) -> Result<Response, AppError> {
    let patience = app.config.http.body_timeout;
    let said = announced(&request);
    // A missing type is let through: what comes is looked at anyway.
    let body =
        RawBody::new(request, &[OCTETS, ""], ("the file itself", OCTETS), upload_limit(app, part), patience).await?;
    let admitted = match said.and_then(|said| said.with_length(body.announced())) {
        Ok(announced) => image_upload_admit(app, caller, id, part, announced).await,
        Err(error) => Err(error),
    };
    match admitted {
        Ok(begun) => match image_upload(app, begun, pieces(body)).await? {
            Outcome::Done => Ok(StatusCode::NO_CONTENT.into_response()),
            Outcome::Incomplete { received_bytes } => {
                Ok((StatusCode::ACCEPTED, Json(PieceBody { received_bytes })).into_response())
            }
        },
        Err(error) => {
            body.drain(patience).await;
            Err(error)
        }
    }
}

fn announced(request: &Request) -> Result<Announced, AppError> {
    let span = content_range::content_range(request.headers())?.unwrap_or(Span::Whole(None));
    Ok(Announced { span, digest: content_range::repr_digest(request.headers())? })
}

impl Announced {
    /// Brings the range together with the body's length.
    fn with_length(self, length: Option<u64>) -> Result<Self, AppError> {
        let (span, wanted) = match self.span {
            Span::Whole(_) => return Ok(Self { span: Span::Whole(length), ..self }),
            span @ Span::Part { first, end, .. } => (span, end - first),
            span @ Span::Nothing { .. } => (span, 0),
        };
        match length {
            Some(length) if length != wanted => Err(AppError::field(
                "Content-Range",
                format!("names {wanted} bytes, and Content-Length {length}: they must be as many"),
            )),
            Some(_) | None => Ok(Self { span, ..self }),
        }
    }
}

fn pieces(body: RawBody) -> impl Stream<Item = Result<Bytes, AppError>> + Send {
    let broken = || AppError::BadRequest("the body broke off".into());
    body.into_pieces().map(move |piece| piece.map_err(|_| broken()))
}

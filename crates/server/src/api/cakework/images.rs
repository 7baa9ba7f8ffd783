//! `/v1/image/import`: images from registries.
//!
//! By `GET` the password is in the query. It is in no log of this server: requests are logged by their paths, and nothing of a
//! query is in the audit trail.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use serde_json::Value;
use tiffin_image::oci::Reference;
use utoipa::ToSchema;

use crate::{
    api::{
        body::{Fields, JsonObject, text},
        request::Parameters,
    },
    app::{
        App,
        auth::Caller,
        imports::{self, ImportRequest},
    },
    error::AppError,
    registry::Credentials,
};

/// Who has a password where nobody is named, as ECR wants it.
const USERNAME: &str = "AWS";
const SECRET: &str = "must be a text of at most 16384 characters without control characters";
const SECRET_CHARS: usize = 16_384;
const USER: &str = "must be a text of 1 to 255 characters without a colon and control characters";
const USER_CHARS: usize = 255;
const URI: &str = "must be a text such as registry.example.com/team/app:1.0";

/// What to import.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `request` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct CakeworkImageImport {
    /// `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`; without a host Docker Hub's, without a tag `latest`.
    #[schema(example = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/app:1.0")]
    image_uri: String,
    /// The registry's password or token; empty for what everybody may have. It is not kept.
    #[schema(max_length = 16384)]
    password: Option<String>,
    /// Whose password it is.
    #[schema(min_length = 1, max_length = 255, default = "AWS")]
    username: Option<String>,
}

/// An image that was imported.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CakeworkImported {
    #[schema(example = "01JD4W5C1QZX6M0V5K2B8N7T3A")]
    image_id: String,
}

/// Import an image from a registry
///
/// Answers when VMs can be made of it, which may take minutes; it goes on when the client goes away. `GET /v1/images/imports`
/// tells how far it is.
#[utoipa::path(post, path = "/v1/image/import", operation_id = "cakework_image_import", tag = "Images", request_body = CakeworkImageImport,
    responses((status = 200, description = "The image", body = CakeworkImported), (status = 429), (status = 503)))]
pub(crate) async fn cakework_image_import(
    caller: Caller,
    State(app): State<Arc<App>>,
    body: JsonObject,
) -> Result<Json<CakeworkImported>, AppError> {
    let request = request(body.fields())?;
    answer(imports::image_import(&app, &caller, request).await)
}

/// Import an image from a registry, by a query
///
/// As by `POST`, which is better: proxies on the way may write down the password.
#[utoipa::path(get, path = "/v1/image/import", operation_id = "cakework_image_import", tag = "Images",
    params(("imageUri" = String, Query), ("password" = Option<String>, Query), ("username" = Option<String>, Query)),
    responses((status = 200, description = "The image", body = CakeworkImported), (status = 429), (status = 503)))]
pub(crate) async fn cakework_image_import_by_query(
    caller: Caller,
    State(app): State<Arc<App>>,
    mut query: Parameters,
) -> Result<Json<CakeworkImported>, AppError> {
    let mut given = serde_json::Map::new();
    for name in ["imageUri", "password", "username"] {
        if let Some(text) = query.optional(name, None, URI, |text| Some(Some(text.to_owned())))? {
            given.insert(name.to_owned(), Value::String(text));
        }
    }
    let request = request(Fields::from(given))?;
    answer(imports::image_import(&app, &caller, request).await)
}

fn answer(imported: Result<tiffin_types::id::ImageId, AppError>) -> Result<Json<CakeworkImported>, AppError> {
    Ok(Json(CakeworkImported { image_id: imported?.to_string() }))
}

fn request(mut fields: Fields) -> Result<ImportRequest, AppError> {
    let image_uri = fields.required("imageUri", URI, text);
    let reference = image_uri.as_deref().and_then(|text| match text.trim().parse::<Reference>() {
        Ok(reference) => Some(reference),
        Err(error) => {
            fields.wrong("imageUri", error.to_string());
            None
        }
    });
    let plain = |most: usize| {
        move |value: Value| {
            text(value).filter(|text| text.chars().count() <= most && !text.contains(|c: char| c.is_control()))
        }
    };
    let password = fields.optional("password", String::new(), SECRET, plain(SECRET_CHARS));
    let username = fields.optional("username", USERNAME.to_owned(), USER, |value| {
        plain(USER_CHARS)(value).filter(|name| !name.is_empty() && !name.contains(':'))
    });
    let request = (|| {
        let (password, username) = (password?, username?);
        let credentials = (!password.is_empty()).then(|| Credentials { username, password: password.into() });
        Some(ImportRequest { image_uri: image_uri?, reference: reference?, credentials })
    })();
    fields.finish_leniently(request)
}

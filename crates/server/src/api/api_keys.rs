//! `/v1/admin/api-keys`

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use serde::Serialize;
use serde_json::Value;
use tiffin_store::ApiKey;
use tiffin_types::{
    account::Scope,
    id::{AccountId, ApiKeyId},
    time::Timestamp,
};
use utoipa::ToSchema;

use super::{
    body::{Fields, JsonObject, NAME, name, text},
    request::{Id, Parameters},
};
use crate::{
    app::{App, api_keys, api_keys::ApiKeyRequest, auth::Caller},
    error::AppError,
};

/// A key to make.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `key_request` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct ApiKeyCreate {
    #[schema(example = "ci", min_length = 1, max_length = 100)]
    name: String,
    /// What it may do: `read`; `write`, which includes `read`; `admin`, which includes both and manages accounts and keys.
    #[schema(example = json!(["write"]))]
    scopes: Vec<String>,
    /// From when on it is refused; never when missing.
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    /// Whose it is; the caller's own account when missing.
    #[schema(example = "acc-0123456789abcd")]
    account_id: Option<String>,
}

/// A key, without its secret.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ApiKeyBody {
    #[schema(example = "key-0123456789abcd")]
    id: String,
    account_id: String,
    name: String,
    /// How the key begins, after `tfn_`.
    prefix: String,
    #[schema(value_type = Vec<String>)]
    scopes: Vec<Scope>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    revoked_at: Option<Timestamp>,
    /// To the minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    last_used_at: Option<Timestamp>,
    /// The key itself; in the answer to its creation only.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
}

impl ApiKeyBody {
    fn new(key: ApiKey, text: Option<String>) -> Self {
        Self {
            id: key.id.to_string(),
            account_id: key.account_id.to_string(),
            name: key.name,
            prefix: key.prefix,
            scopes: key.scopes,
            created_at: key.created_at,
            expires_at: key.expires_at,
            revoked_at: key.revoked_at,
            last_used_at: key.last_used_at,
            key: text,
        }
    }
}

/// Make an API key
///
/// The answer shows the key this once. Needs the scope `admin`.
#[utoipa::path(post, path = "/v1/admin/api-keys", operation_id = "api_key_create", tag = "Administration",
    request_body = ApiKeyCreate, responses((status = 201, description = "Made", body = ApiKeyBody), (status = 404)))]
pub(crate) async fn api_key_create(
    caller: Caller,
    State(app): State<Arc<App>>,
    body: JsonObject,
) -> Result<(StatusCode, Json<ApiKeyBody>), AppError> {
    let (key, text) = api_keys::api_key_create(&app, &caller, key_request(body.fields())?).await?;
    Ok((StatusCode::CREATED, Json(ApiKeyBody::new(key, Some(text)))))
}

/// List API keys
///
/// Without their secrets. Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/admin/api-keys", operation_id = "api_key_list", tag = "Administration",
    params(("accountId" = Option<String>, Query, description = "Only that account's")),
    responses((status = 200, description = "Keys, revoked ones too", body = Vec<ApiKeyBody>)))]
pub(crate) async fn api_key_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    mut parameters: Parameters,
) -> Result<Json<Vec<ApiKeyBody>>, AppError> {
    let account = parameters.optional("accountId", None, ACCOUNT, |text| text.parse::<AccountId>().ok().map(Some))?;
    parameters.finish("accountId is")?;
    let list = api_keys::api_key_list(&app, &caller, account).await?;
    Ok(Json(list.into_iter().map(|key| ApiKeyBody::new(key, None)).collect()))
}

/// Revoke an API key
///
/// At once. Needs the scope `admin`.
#[utoipa::path(delete, path = "/v1/admin/api-keys/{id}", operation_id = "api_key_revoke", tag = "Administration",
    params(("id" = String, Path)),
    responses((status = 204, description = "Revoked"), (status = 409, description = "It is the key of this request")))]
pub(crate) async fn api_key_revoke(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<ApiKeyId>,
) -> Result<StatusCode, AppError> {
    api_keys::api_key_revoke(&app, &caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

const ACCOUNT: &str = "must be an account's id: acc- and 14 hexadecimal digits";

fn key_request(mut fields: Fields) -> Result<ApiKeyRequest, AppError> {
    let name = fields.required("name", NAME, name);
    let scopes = fields.required("scopes", "must be a list of one or more of read, write, admin", scopes);
    let account_id =
        fields.optional("accountId", None, ACCOUNT, |value| text(value)?.parse::<AccountId>().ok().map(Some));
    let future = "must be a moment in the future, such as 2030-01-21T10:30:00Z";
    let expires_at = fields.optional("expiresAt", None, future, |value| {
        text(value)?.parse::<Timestamp>().ok().filter(|at| *at > Timestamp::now()).map(Some)
    });
    let request =
        (|| Some(ApiKeyRequest { name: name?, scopes: scopes?, account_id: account_id?, expires_at: expires_at? }))();
    fields.finish_with(request, "name, scopes, expiresAt, accountId are")
}

fn scopes(value: Value) -> Option<Vec<Scope>> {
    let Value::Array(entries) = value else { return None };
    let mut scopes = entries.into_iter().map(|entry| text(entry)?.parse().ok()).collect::<Option<Vec<Scope>>>()?;
    scopes.sort();
    scopes.dedup();
    (!scopes.is_empty()).then_some(scopes)
}

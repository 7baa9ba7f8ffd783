//! API keys: made, listed and revoked by administrators.

use tiffin_store::{ApiKey, NewAdminKey, NewApiKey, Store, StoreError};
use tiffin_types::{
    account::{Quota, Scope},
    id::{AccountId, ApiKeyId},
    time::Timestamp,
};

use super::{
    App,
    auth::{Actor, Caller, FreshKey},
};
use crate::error::AppError;

/// A key to be made.
pub(crate) struct ApiKeyRequest {
    /// For people.
    pub(crate) name: String,
    /// What it may do.
    pub(crate) scopes: Vec<Scope>,
    /// Whose it is; the caller's own account when not said.
    pub(crate) account_id: Option<AccountId>,
    /// From when on it is refused.
    pub(crate) expires_at: Option<Timestamp>,
}

/// Makes a key; the text is shown this once.
pub(crate) async fn api_key_create(
    app: &App,
    caller: &Caller,
    request: ApiKeyRequest,
) -> Result<(ApiKey, String), AppError> {
    caller.require(Scope::Admin)?;
    let account_id = request.account_id.as_ref().unwrap_or(&caller.account_id);
    if app.store.account_get(account_id).await?.is_none() {
        return Err(AppError::NotFound("account"));
    }
    let fresh = FreshKey::random();
    let new = NewApiKey {
        account_id,
        name: &request.name,
        prefix: &fresh.prefix,
        secret_sha256: fresh.sha256,
        scopes: &request.scopes,
        expires_at: request.expires_at,
    };
    let key = app.store.api_key_create(new).await?;
    tracing::info!(key_id = %key.id, account_id = %key.account_id, by = caller.actor.id(), "API key {} made", key.id);
    Ok((key, fresh.text))
}

/// The keys of one account, or all.
pub(crate) async fn api_key_list(
    app: &App,
    caller: &Caller,
    account: Option<AccountId>,
) -> Result<Vec<ApiKey>, AppError> {
    caller.require(Scope::Admin)?;
    Ok(app.store.api_key_list(account.as_ref()).await?)
}

/// Revokes a key, at once. A key can't revoke itself: so no administrator can lock all of them out.
pub(crate) async fn api_key_revoke(app: &App, caller: &Caller, id: &ApiKeyId) -> Result<(), AppError> {
    caller.require(Scope::Admin)?;
    if matches!(&caller.actor, Actor::Key { id: own, .. } if own == id) {
        return Err(AppError::Conflict {
            code: "own_key",
            message: "a key can't revoke itself: use another key of scope admin".into(),
            details: serde_json::Value::Null,
        });
    }
    if !app.store.api_key_revoke(id, Timestamp::now()).await? {
        return Err(AppError::NotFound("API key"));
    }
    tracing::info!(key_id = %id, by = caller.actor.id(), "API key {id} revoked");
    Ok(())
}

/// Makes the first account, named `admin`, and its key, when the store has never had one.
///
/// # Errors
/// Whatever the store says.
pub async fn first_key(store: &Store, quota: Quota) -> Result<Option<String>, StoreError> {
    let fresh = FreshKey::random();
    let key = NewAdminKey {
        name: "admin",
        prefix: &fresh.prefix,
        secret_sha256: fresh.sha256,
        scopes: &[Scope::Admin],
        expires_at: None,
    };
    Ok(store.setup_admin("admin", quota, key).await?.map(|_| fresh.text))
}

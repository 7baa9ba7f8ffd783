//! Accounts: made, listed and given quotas by administrators.

use serde_json::Value;
use tiffin_store::{Account, StoreError};
use tiffin_types::{
    account::{Quota, Scope, Usage},
    id::AccountId,
};

use super::{App, auth::Caller};
use crate::error::AppError;

/// Makes an account; without a quota, with that of the configuration.
pub(crate) async fn account_create(
    app: &App,
    caller: &Caller,
    name: &str,
    quota: Option<Quota>,
) -> Result<Account, AppError> {
    caller.require(Scope::Admin)?;
    match app.store.account_create(name, quota.unwrap_or(app.config.quota)).await {
        Err(StoreError::Conflict(_)) => Err(AppError::Conflict {
            code: "name_taken",
            message: format!("there is an account named {name:?} already: choose another name"),
            details: Value::Null,
        }),
        made => Ok(made?),
    }
}

/// Every account.
pub(crate) async fn account_list(app: &App, caller: &Caller) -> Result<Vec<Account>, AppError> {
    caller.require(Scope::Admin)?;
    Ok(app.store.account_list().await?)
}

/// An account, and what it uses.
pub(crate) async fn account_get(app: &App, caller: &Caller, id: &AccountId) -> Result<(Account, Usage), AppError> {
    caller.require(Scope::Admin)?;
    let account = app.store.account_get(id).await?.ok_or(AppError::NotFound("account"))?;
    Ok((account, app.store.vm_usage(id).await?))
}

/// Changes an account's quota. VMs beyond a smaller one stay.
pub(crate) async fn account_set_quota(
    app: &App,
    caller: &Caller,
    id: &AccountId,
    quota: Quota,
) -> Result<(Account, Usage), AppError> {
    caller.require(Scope::Admin)?;
    if !app.store.account_set_quota(id, quota).await? {
        return Err(AppError::NotFound("account"));
    }
    account_get(app, caller, id).await
}

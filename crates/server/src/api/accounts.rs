//! `/v1/admin/accounts`

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use serde::Serialize;
use serde_json::Value;
use tiffin_store::Account;
use tiffin_types::{
    account::{Quota, Usage},
    id::AccountId,
    time::Timestamp,
};
use utoipa::ToSchema;

use super::{
    body::{Fields, JsonObject, NAME, name},
    request::Id,
};
use crate::{
    app::{App, accounts, auth::Caller},
    error::AppError,
};

/// The largest figure of a quota; the database's numbers take it with room to spare.
const QUOTA_MAX: u64 = 1_000_000_000;

/// An account to make.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `account_create` reads")]
pub(crate) struct AccountCreate {
    #[schema(example = "acme", min_length = 1, max_length = 100)]
    name: String,
    /// The configuration's when missing.
    quota: Option<QuotaBody>,
}

/// What changes of an account.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `account_update` reads")]
pub(crate) struct AccountUpdate {
    quota: QuotaBody,
}

/// What an account's VMs may use, or use, together.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct QuotaBody {
    /// VMs that exist.
    #[schema(minimum = 0, example = 10)]
    vms: u64,
    /// vCPUs of the VMs that are up.
    #[schema(minimum = 0, example = 20)]
    cpus: u64,
    /// Memory of the VMs that are up, in MiB.
    #[schema(minimum = 0, example = 20480)]
    mem_mb: u64,
    /// Disk of the VMs that exist, in MiB.
    #[schema(minimum = 0, example = 102_400)]
    disk_mb: u64,
}

/// An account.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AccountBody {
    #[schema(example = "acc-0123456789abcd")]
    id: String,
    name: String,
    quota: QuotaBody,
    /// What is in use; when one account is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<QuotaBody>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
}

impl AccountBody {
    fn new(account: Account, usage: Option<Usage>) -> Self {
        let Quota { vms, cpus, mem_mb, disk_mb } = account.quota;
        let used = |usage: Usage| QuotaBody {
            vms: usage.vms.into(),
            cpus: usage.cpus.into(),
            mem_mb: usage.mem_mb,
            disk_mb: usage.disk_mb,
        };
        Self {
            id: account.id.to_string(),
            name: account.name,
            quota: QuotaBody { vms: vms.into(), cpus: cpus.into(), mem_mb, disk_mb },
            usage: usage.map(used),
            created_at: account.created_at,
        }
    }
}

/// Make an account
///
/// Needs the scope `admin`. An account is of use once it has an API key.
#[utoipa::path(post, path = "/v1/admin/accounts", operation_id = "account_create", tag = "Administration",
    request_body = AccountCreate, responses((status = 201, description = "Made", body = AccountBody), (status = 409)))]
pub(crate) async fn account_create(
    caller: Caller,
    State(app): State<Arc<App>>,
    body: JsonObject,
) -> Result<(StatusCode, Json<AccountBody>), AppError> {
    let mut fields = body.fields();
    let name = fields.required("name", NAME, name);
    let quota = fields.take("quota").map_or(Some(None), |value| quota(&mut fields, value).map(Some));
    let request = (|| Some((name?, quota?)))();
    let (name, quota) = fields.finish_with(request, "name and quota are")?;
    let account = accounts::account_create(&app, &caller, &name, quota).await?;
    Ok((StatusCode::CREATED, Json(AccountBody::new(account, None))))
}

/// List accounts
///
/// Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/admin/accounts", operation_id = "account_list", tag = "Administration",
    responses((status = 200, description = "Every account, oldest first", body = Vec<AccountBody>)))]
pub(crate) async fn account_list(
    caller: Caller,
    State(app): State<Arc<App>>,
) -> Result<Json<Vec<AccountBody>>, AppError> {
    let list = accounts::account_list(&app, &caller).await?;
    Ok(Json(list.into_iter().map(|account| AccountBody::new(account, None)).collect()))
}

/// Get an account and what it uses
///
/// Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/admin/accounts/{id}", operation_id = "account_get", tag = "Administration",
    params(("id" = String, Path)), responses((status = 200, description = "The account", body = AccountBody)))]
pub(crate) async fn account_get(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<AccountId>,
) -> Result<Json<AccountBody>, AppError> {
    let (account, usage) = accounts::account_get(&app, &caller, &id).await?;
    Ok(Json(AccountBody::new(account, Some(usage))))
}

/// Change an account's quota
///
/// VMs beyond a smaller quota stay. Needs the scope `admin`.
#[utoipa::path(patch, path = "/v1/admin/accounts/{id}", operation_id = "account_update", tag = "Administration",
    request_body = AccountUpdate, params(("id" = String, Path)),
    responses((status = 200, description = "Changed", body = AccountBody)))]
pub(crate) async fn account_update(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<AccountId>,
    body: JsonObject,
) -> Result<Json<AccountBody>, AppError> {
    let mut fields = body.fields();
    let given = fields.required("quota", QUOTA, Some);
    let quota = given.and_then(|value| quota(&mut fields, value));
    let quota = fields.finish_with(quota, "quota is")?;
    let (account, usage) = accounts::account_set_quota(&app, &caller, &id, quota).await?;
    Ok(Json(AccountBody::new(account, Some(usage))))
}

const QUOTA: &str = "must be an object with vms, cpus, memMb and diskMb";

fn quota(fields: &mut Fields, value: Value) -> Option<Quota> {
    let Value::Object(mut object) = value else {
        fields.wrong("quota", QUOTA);
        return None;
    };
    let mut figure = |name: &str, most: u64| {
        let number = object.remove(name).and_then(|value| value.as_u64()).filter(|number| *number <= most);
        if number.is_none() {
            fields.wrong(format!("quota.{name}"), format!("must be a whole number from 0 to {most}"));
        }
        number
    };
    let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    let (vms, cpus) = (figure("vms", 1_000_000).map(small), figure("cpus", 1_000_000).map(small));
    let (mem_mb, disk_mb) = (figure("memMb", QUOTA_MAX), figure("diskMb", QUOTA_MAX));
    for name in object.keys() {
        fields.wrong(format!("quota.{name}"), "is no part of a quota: vms, cpus, memMb and diskMb are");
    }
    Some(Quota { vms: vms?, cpus: cpus?, mem_mb: mem_mb?, disk_mb: disk_mb? })
}

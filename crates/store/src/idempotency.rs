//! Idempotency keys: which create request made which VM, so that the same request again gets the same VM.
//!
//! Invariant: a key is an account's own and stands for one request; it is written in the transaction that makes the VM,
//! under the account's lock, so two requests with one key make one VM. Keys are kept until they are pruned.

use sqlx::AnyConnection;
use tiffin_types::{
    id::{AccountId, VmId},
    time::Timestamp,
};

use crate::{Store, StoreError, row::Fields};

/// A request's `Idempotency-Key` and what it asked for.
#[derive(Debug, Clone, Copy)]
pub struct Idempotency<'a> {
    /// The header's value.
    pub key: &'a str,
    /// The SHA-256 of the request, in whichever canonical form the caller always uses.
    pub request_sha256: [u8; 32],
}

/// What is known of a key.
pub(crate) enum Known {
    Unused,
    SameRequest(VmId),
    OtherRequest,
}

impl Store {
    /// Forgets the keys that were used before that moment; says how many.
    pub async fn idempotency_prune(&self, before: Timestamp) -> Result<u64, StoreError> {
        let done = sqlx::query("DELETE FROM idempotency_keys WHERE created_at < $1")
            .bind(before.as_millis())
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected())
    }

    /// Forgets the key that made the VM, so that the same request makes another: for a VM that could not be made for a
    /// reason that passes.
    pub async fn idempotency_forget(&self, vm: &VmId) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM idempotency_keys WHERE vm_id = $1").bind(vm.as_str()).execute(&self.pool).await?;
        Ok(())
    }
}

/// Looks a key up. What follows from a key that is unused only holds as long as the account is locked.
pub(crate) async fn find(
    account: &AccountId,
    asked: &Idempotency<'_>,
    tx: &mut AnyConnection,
) -> Result<Known, StoreError> {
    let row =
        sqlx::query("SELECT key AS id, request_sha256, vm_id FROM idempotency_keys WHERE account_id = $1 AND key = $2")
            .bind(account.as_str())
            .bind(asked.key)
            .fetch_optional(tx)
            .await?;
    let Some(row) = row else { return Ok(Known::Unused) };
    let fields = Fields::new("idempotency_keys", &row);
    match fields.sha256("request_sha256")? == asked.request_sha256 {
        true => Ok(Known::SameRequest(fields.parsed("vm_id")?)),
        false => Ok(Known::OtherRequest),
    }
}

/// Notes that a key made a VM.
pub(crate) async fn remember(
    account: &AccountId,
    asked: &Idempotency<'_>,
    vm: &VmId,
    at: Timestamp,
    tx: &mut AnyConnection,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO idempotency_keys (account_id, key, request_sha256, vm_id, created_at) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(account.as_str())
    .bind(asked.key)
    .bind(hex::encode(asked.request_sha256))
    .bind(vm.as_str())
    .bind(at.as_millis())
    .execute(tx)
    .await?;
    Ok(())
}

//! Making a VM's record: once per idempotency key, and only within the account's quota.

use sqlx::AnyConnection;
use tiffin_types::{
    account::Quota,
    id::{AccountId, Digest, HostLabel, SnapshotId},
    time::Timestamp,
    vm::{Lifetime, VmState},
};

use super::{Desired, Inserted, NewVm, Vm, json, provision_mode_name, vm_from};
use crate::{
    Idempotency, Store, StoreError,
    idempotency::{self, Known},
    quota,
    row::returned,
    webhooks,
};

impl Store {
    /// Makes a VM's record, in one transaction with the check of the account's quota and of the idempotency key.
    /// The VM counts as up at once, as it is about to start. An account that doesn't exist or an id that is taken is a
    /// [`StoreError::Conflict`].
    pub async fn vm_insert(
        &self,
        new: &NewVm,
        quota: &Quota,
        idempotency: Option<Idempotency<'_>>,
    ) -> Result<Inserted, StoreError> {
        self.insert_as(new, VmState::Created, quota, idempotency).await
    }

    /// As [`Store::vm_insert`], for a VM that the engine has brought up already: its record begins as RUNNING.
    pub async fn vm_insert_running(
        &self,
        new: &NewVm,
        quota: &Quota,
        idempotency: Option<Idempotency<'_>>,
    ) -> Result<Inserted, StoreError> {
        self.insert_as(new, VmState::Running, quota, idempotency).await
    }

    /// What [`Store::vm_insert`] would say of a key that was used before: [`Inserted::Replay`] or [`Inserted::KeyReused`].
    /// `None` for a new one, which may be used by somebody else the next moment.
    pub async fn vm_replay(&self, account: &AccountId, asked: Idempotency<'_>) -> Result<Option<Inserted>, StoreError> {
        let mut db = self.pool.acquire().await?;
        known(account, &asked, &mut db).await
    }

    async fn insert_as(
        &self,
        new: &NewVm,
        state: VmState,
        quota: &Quota,
        idempotency: Option<Idempotency<'_>>,
    ) -> Result<Inserted, StoreError> {
        let mut tx = self.pool.begin().await?;
        let inserted = insert_checked(new, state, quota, idempotency, &mut tx).await?;
        match inserted {
            Inserted::New(ref vm) => {
                // One that was booted ahead is RUNNING from the beginning.
                let has_moved = vm.state != VmState::Created;
                if has_moved {
                    webhooks::emit(&webhooks::Event::of_vm(vm), &mut tx).await?;
                }
                tx.commit().await?;
                if has_moved {
                    self.moved(vm);
                }
            }
            Inserted::Replay(_) | Inserted::KeyReused | Inserted::OverQuota(_) => tx.rollback().await?,
        }
        Ok(inserted)
    }
}

async fn insert_checked(
    new: &NewVm,
    state: VmState,
    limits: &Quota,
    idempotency: Option<Idempotency<'_>>,
    tx: &mut AnyConnection,
) -> Result<Inserted, StoreError> {
    if !quota::lock_account(&new.account_id, tx).await? {
        return Err(StoreError::Conflict(format!("no account {}", new.account_id)));
    }
    if let Some(asked) = &idempotency
        && let Some(known) = known(&new.account_id, asked, tx).await?
    {
        return Ok(known);
    }
    let used = quota::usage(&new.account_id, None, &mut *tx).await?;
    if let Err(exceeded) = quota::check_new(limits, &used, &new.size) {
        return Ok(Inserted::OverQuota(exceeded));
    }
    let vm = insert(new, state, tx).await?;
    if let Some(asked) = &idempotency {
        idempotency::remember(&new.account_id, asked, &vm.id, vm.created_at, tx).await?;
    }
    Ok(Inserted::New(vm))
}

/// What a key that was used before comes to.
async fn known(
    account: &AccountId,
    asked: &Idempotency<'_>,
    db: &mut AnyConnection,
) -> Result<Option<Inserted>, StoreError> {
    let id = match idempotency::find(account, asked, db).await? {
        Known::Unused => return Ok(None),
        Known::OtherRequest => return Ok(Some(Inserted::KeyReused)),
        Known::SameRequest(id) => id,
    };
    let query = sqlx::query(concat!("SELECT ", columns!(), " FROM vms WHERE id = $1")).bind(id.as_str());
    Ok(Some(Inserted::Replay(vm_from(&query.fetch_one(db).await?)?)))
}

/// A cached VM is made to be started later.
fn desired_at_first(new: &NewVm) -> Desired {
    match new.service.map(|service| service.lifetime) {
        Some(Lifetime::Cached) => Desired::Stopped,
        Some(Lifetime::OneTime) | None => Desired::Running,
    }
}

/// Makes a VM's record, whatever the quota says; RUNNING, it came up this moment.
pub(crate) async fn insert(new: &NewVm, state: VmState, tx: &mut AnyConnection) -> Result<Vm, StoreError> {
    let now = Timestamp::now().as_millis();
    let statement = sqlx::query(concat!(
        "INSERT INTO vms (id, account_id, image_id, image_digest, engine, isolation, cpus, mem_mb, disk_mb, egress,
             state, desired, provision_mode, created_at, updated_at, snapshot_id, started_at,
             host_label, lifetime, port, volume_gb, kernel_digest)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $14, $15, $16, $17, $18, $19, $20, $21)
         RETURNING ",
        columns!()
    ))
    .bind(new.id.as_str())
    .bind(new.account_id.as_str())
    .bind(new.image_id.as_str())
    .bind(new.image_digest.as_str())
    .bind(new.engine.as_str())
    .bind(new.isolation.as_str())
    .bind(i64::from(new.size.cpus))
    .bind(i64::from(new.size.mem_mb))
    .bind(i64::from(new.size.disk_mb))
    .bind(json(&new.egress))
    .bind(state.as_str())
    .bind(desired_at_first(new).as_str())
    .bind(provision_mode_name(new.provision_mode))
    .bind(now)
    .bind(new.snapshot_id.as_ref().map(SnapshotId::as_str))
    .bind((state == VmState::Running).then_some(now))
    .bind(HostLabel::random().to_string())
    .bind(new.service.map(|service| service.lifetime.as_str()))
    .bind(new.service.and_then(|service| service.port).map(i64::from))
    .bind(new.service.and_then(|service| service.volume_gb).map(i64::from))
    .bind(new.kernel_digest.as_ref().map(Digest::as_str));
    let row = returned(statement, tx)
        .await
        .map_err(|error| StoreError::or_conflict(error, format!("{} exists or its size is zero", new.id)))?;
    vm_from(&row.ok_or(sqlx::Error::RowNotFound)?)
}

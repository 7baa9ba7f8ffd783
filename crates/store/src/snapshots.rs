//! Snapshots: their records, and the changes of state that the transition table allows.
//!
//! Invariants: a state changes by compare-and-set only, to where [`SnapshotState::after`] says; a record goes only when
//! it was DELETING, so there is a record for whatever the engine may have.
//!
//! A snapshot counts for `diskMb` of its account's quota: while it is saved by the most that it may take (the VM's memory
//! and disk), then by what it takes.

mod fork;

use sqlx::any::AnyRow;
use tiffin_types::{
    account::Quota,
    id::{AccountId, Digest, ImageId, SnapshotId, VmId},
    snapshot::{SnapshotEvent, SnapshotState},
    time::Timestamp,
    vm::{EngineName, VmSize},
};

use crate::{
    QuotaExceeded, Store, StoreError, quota,
    row::{Fields, column, returned},
};
pub use fork::{Forked, NewFork};

/// A snapshot's record.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Whose it is.
    pub account_id: AccountId,
    /// The VM that was saved; that may be gone since.
    pub vm_id: VmId,
    /// A name for people; need not be unique.
    pub name: Option<String>,
    /// The image of the VM.
    pub image_id: ImageId,
    /// The image's content: a blob that must stay while this record is there.
    pub image_digest: Digest,
    /// The kernel that the VM booted, if its image had one of its own: VMs of the snapshot boot it after a stop.
    pub kernel_digest: Option<Digest>,
    /// What saved it, and can restore it.
    pub engine: EngineName,
    /// vCPUs, memory and disk of the VM.
    pub size: VmSize,
    /// What it is now, as far as known.
    pub state: SnapshotState,
    /// Whether it was saved for a fork, so that it is nobody's to see.
    pub fork: bool,
    /// What it takes on the host's disk; 0 while it is saved.
    pub size_bytes: u64,
    /// When its record was made.
    pub created_at: Timestamp,
}

/// A snapshot to be saved. It begins as SAVING.
#[derive(Debug, Clone)]
pub struct NewSnapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Whose it is.
    pub account_id: AccountId,
    /// The VM.
    pub vm_id: VmId,
    /// A name for people.
    pub name: Option<String>,
    /// The VM's image.
    pub image_id: ImageId,
    /// The image's content.
    pub image_digest: Digest,
    /// The VM's kernel, if its image had one of its own.
    pub kernel_digest: Option<Digest>,
    /// What will save it.
    pub engine: EngineName,
    /// The VM's size.
    pub size: VmSize,
}

/// What became of a [`Store::snapshot_insert`].
#[derive(Debug, Clone, PartialEq)]
pub enum SnapshotInserted {
    /// The record was made.
    New(Snapshot),
    /// There are too many, or there is no room on the disk by the quota; nothing was done.
    OverQuota(QuotaExceeded),
}

macro_rules! columns {
    () => {
        "id, account_id, vm_id, name, image_id, image_digest, kernel_digest, engine, cpus, mem_mb, disk_mb, state, fork, \
         size_bytes, created_at"
    };
}

impl Store {
    /// Makes a snapshot's record, in one transaction with the checks that the account has fewer than `most` and that its
    /// disk quota has room for all of the VM's memory and disk.
    pub async fn snapshot_insert(
        &self,
        new: &NewSnapshot,
        limits: &Quota,
        most: u32,
    ) -> Result<SnapshotInserted, StoreError> {
        let mut tx = self.pool.begin().await?;
        if !quota::lock_account(&new.account_id, &mut tx).await? {
            return Err(StoreError::Conflict(format!("no account {}", new.account_id)));
        }
        let have = sqlx::query("SELECT COUNT(*) AS snapshots FROM snapshots WHERE account_id = $1 AND fork = 0")
            .bind(new.account_id.as_str())
            .fetch_one(&mut *tx)
            .await?;
        let have = Fields::new("snapshots by account", &have).number("snapshots")?;
        let used = quota::usage(&new.account_id, None, &mut *tx).await?;
        let fits = quota::fits("snapshots", most.into(), have, 1)
            .and_then(|()| quota::fits("diskMb", limits.disk_mb, used.disk_mb, most_mb(&new.size)));
        if let Err(exceeded) = fits {
            tx.rollback().await?;
            return Ok(SnapshotInserted::OverQuota(exceeded));
        }
        let snapshot = insert(new, false, &mut *tx).await?;
        tx.commit().await?;
        Ok(SnapshotInserted::New(snapshot))
    }

    /// Takes a snapshot from `from` to where `event` leads; `None` when it isn't in `from` any more, or is gone.
    /// A transition that the table refuses is a bug: [`StoreError::Conflict`].
    pub async fn snapshot_transition(
        &self,
        id: &SnapshotId,
        from: SnapshotState,
        event: SnapshotEvent,
    ) -> Result<Option<Snapshot>, StoreError> {
        transition(id, from, event, None, &self.pool).await
    }

    /// Takes a snapshot from SAVING to READY, with what it takes on the disk; `None` when it isn't SAVING any more.
    pub async fn snapshot_saved(&self, id: &SnapshotId, size_bytes: u64) -> Result<Option<Snapshot>, StoreError> {
        transition(id, SnapshotState::Saving, SnapshotEvent::Saved, Some(size_bytes), &self.pool).await
    }

    /// Removes the record of a snapshot that was DELETING; nothing when there is none.
    pub async fn snapshot_forget(&self, id: &SnapshotId) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM snapshots WHERE id = $1 AND state = $2")
            .bind(id.as_str())
            .bind(SnapshotState::Deleting.as_str())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// The account's snapshot with that id, in any state; none that was saved for a fork.
    pub async fn snapshot_get(&self, account: &AccountId, id: &SnapshotId) -> Result<Option<Snapshot>, StoreError> {
        sqlx::query(concat!("SELECT ", columns!(), " FROM snapshots WHERE id = $1 AND account_id = $2 AND fork = 0"))
            .bind(id.as_str())
            .bind(account.as_str())
            .fetch_optional(&self.pool)
            .await?
            .map(|row| snapshot_from(&row))
            .transpose()
    }

    /// The account's snapshots in any state, oldest first; none that was saved for a fork.
    pub async fn snapshot_list(&self, account: &AccountId) -> Result<Vec<Snapshot>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM snapshots WHERE account_id = $1 AND fork = 0 ORDER BY created_at, id"
        ))
        .bind(account.as_str())
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(snapshot_from).collect()
    }

    /// Every snapshot that there is a record of, forks' too, oldest first: what the reconciler compares with the host.
    pub async fn snapshot_all(&self) -> Result<Vec<Snapshot>, StoreError> {
        let rows = sqlx::query(concat!("SELECT ", columns!(), " FROM snapshots ORDER BY created_at, id"))
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(snapshot_from).collect()
    }

    /// How many snapshots are in each state, forks' too; a state without any may be missing.
    pub async fn snapshot_counts(&self) -> Result<Vec<(SnapshotState, i64)>, StoreError> {
        let rows =
            sqlx::query("SELECT state AS id, COUNT(*) AS snapshots FROM snapshots GROUP BY state ORDER BY state")
                .fetch_all(&self.pool)
                .await?;
        rows.iter()
            .map(|row| {
                let fields = Fields::new("snapshots by state", row);
                Ok((fields.parsed("id")?, fields.number("snapshots")?))
            })
            .collect()
    }
}

/// The most that a snapshot of a VM of that size may take, in MiB.
fn most_mb(size: &VmSize) -> u64 {
    u64::from(size.mem_mb) + u64::from(size.disk_mb)
}

async fn insert<'e>(
    new: &NewSnapshot,
    fork: bool,
    db: impl sqlx::Executor<'e, Database = sqlx::Any>,
) -> Result<Snapshot, StoreError> {
    // Nobody would know what to free if the disk quota refused a fork for a file that is gone a moment later.
    let reserved = if fork { 0 } else { most_mb(&new.size) };
    let statement = sqlx::query(concat!(
        "INSERT INTO snapshots (id, account_id, vm_id, name, image_id, image_digest, engine, cpus, mem_mb, disk_mb,
             state, fork, size_bytes, reserved_mb, created_at, updated_at, kernel_digest)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, 0, $13, $14, $14, $15) RETURNING ",
        columns!()
    ))
    .bind(new.id.as_str())
    .bind(new.account_id.as_str())
    .bind(new.vm_id.as_str())
    .bind(new.name.as_deref())
    .bind(new.image_id.as_str())
    .bind(new.image_digest.as_str())
    .bind(new.engine.as_str())
    .bind(i64::from(new.size.cpus))
    .bind(i64::from(new.size.mem_mb))
    .bind(i64::from(new.size.disk_mb))
    .bind(SnapshotState::Saving.as_str())
    .bind(i64::from(fork))
    .bind(column(reserved))
    .bind(Timestamp::now().as_millis())
    .bind(new.kernel_digest.as_ref().map(Digest::as_str));
    let row = returned(statement, db)
        .await
        .map_err(|error| StoreError::or_conflict(error, format!("{} exists or its size is zero", new.id)))?;
    snapshot_from(&row.ok_or(sqlx::Error::RowNotFound)?)
}

async fn transition<'e>(
    id: &SnapshotId,
    from: SnapshotState,
    event: SnapshotEvent,
    size_bytes: Option<u64>,
    db: impl sqlx::Executor<'e, Database = sqlx::Any>,
) -> Result<Option<Snapshot>, StoreError> {
    let Some(to) = from.after(event) else {
        return Err(StoreError::Conflict(format!("{id}: {event:?} is refused in {from}")));
    };
    let statement = sqlx::query(concat!(
        "UPDATE snapshots SET state = $3, updated_at = $4,
             size_bytes = COALESCE($5, size_bytes),
             reserved_mb = CASE WHEN fork = 1 THEN 0 ELSE COALESCE($6, reserved_mb) END
         WHERE id = $1 AND state = $2 RETURNING ",
        columns!()
    ))
    .bind(id.as_str())
    .bind(from.as_str())
    .bind(to.as_str())
    .bind(Timestamp::now().as_millis())
    .bind(size_bytes.map(column))
    .bind(size_bytes.map(|bytes| column(bytes.div_ceil(1 << 20))));
    returned(statement, db).await?.map(|row| snapshot_from(&row)).transpose()
}

fn snapshot_from(row: &AnyRow) -> Result<Snapshot, StoreError> {
    let fields = Fields::new("snapshots", row);
    Ok(Snapshot {
        id: fields.parsed("id")?,
        account_id: fields.parsed("account_id")?,
        vm_id: fields.parsed("vm_id")?,
        name: fields.text_if_any("name")?,
        image_id: fields.parsed("image_id")?,
        image_digest: fields.parsed("image_digest")?,
        kernel_digest: fields.parsed_if_any("kernel_digest")?,
        engine: fields.parsed("engine")?,
        size: VmSize {
            cpus: fields.number("cpus")?,
            mem_mb: fields.number("mem_mb")?,
            disk_mb: fields.number("disk_mb")?,
        },
        state: fields.parsed("state")?,
        fork: fields.number::<i64>("fork")? == 1,
        size_bytes: fields.number("size_bytes")?,
        created_at: fields.time("created_at")?,
    })
}

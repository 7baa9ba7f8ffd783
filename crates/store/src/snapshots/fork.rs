//! Forks: a snapshot that is nobody's to see, and the VMs that are made of it, all or none.
//!
//! Invariant: as long as a fork's snapshot has a record that isn't DELETING, the fork isn't done, and whoever finds it
//! after a restart undoes it all. [`Store::fork_commit`] is the one moment at which it becomes done.

use sqlx::AnyConnection;
use tiffin_types::{
    account::Quota,
    id::{AccountId, SnapshotId},
    snapshot::{SnapshotEvent, SnapshotState},
    vm::{VmEvent, VmState},
};

use super::{NewSnapshot, insert, transition};
use crate::{
    Idempotency, NewVm, QuotaExceeded, Store, StoreError, Vm,
    idempotency::{self, Known},
    quota, vms, webhooks,
};

/// What a fork is to make: one or more VMs of one account and size, all of that snapshot.
#[derive(Debug, Clone)]
pub struct NewFork {
    /// The snapshot.
    pub snapshot: NewSnapshot,
    /// The VMs.
    pub vms: Vec<NewVm>,
}

/// What became of a [`Store::fork_insert`].
#[derive(Debug, Clone, PartialEq)]
pub enum Forked {
    /// The records were made: the snapshot is SAVING, the VMs are CREATED.
    New(Vec<Vm>),
    /// The same request made these VMs before; nothing was done. They may have moved on since, even to DELETED.
    Replay(Vec<Vm>),
    /// The idempotency key belongs to another request; nothing was done.
    KeyReused,
    /// They don't fit the quota together; nothing was done.
    OverQuota(QuotaExceeded),
}

impl Store {
    /// Makes the records of a fork, in one transaction with the check of the account's quota for all VMs together and
    /// of the idempotency key.
    pub async fn fork_insert(
        &self,
        new: &NewFork,
        limits: &Quota,
        idempotency: Option<Idempotency<'_>>,
    ) -> Result<Forked, StoreError> {
        let account = &new.snapshot.account_id;
        let mut tx = self.pool.begin().await?;
        if !quota::lock_account(account, &mut tx).await? {
            return Err(StoreError::Conflict(format!("no account {account}")));
        }
        if let Some(asked) = &idempotency
            && let Some(known) = known(account, asked, &mut tx).await?
        {
            return Ok(known);
        }
        let used = quota::usage(account, None, &mut *tx).await?;
        let sizes = new.vms.iter().map(|vm| vm.size);
        if let Err(exceeded) = quota::check_all(limits, &used, sizes) {
            tx.rollback().await?;
            return Ok(Forked::OverQuota(exceeded));
        }
        insert(&new.snapshot, true, &mut *tx).await?;
        let mut made = Vec::with_capacity(new.vms.len());
        for vm in &new.vms {
            made.push(vms::insert(vm, VmState::Created, &mut tx).await?);
        }
        if let (Some(asked), Some(first)) = (&idempotency, made.first()) {
            idempotency::remember(account, asked, &first.id, first.created_at, &mut tx).await?;
        }
        tx.commit().await?;
        Ok(Forked::New(made))
    }

    /// What [`Store::fork_insert`] would say of a key that was used before: [`Forked::Replay`] or [`Forked::KeyReused`].
    /// `None` for a new one, which may be used by somebody else the next moment.
    pub async fn fork_replay(&self, account: &AccountId, asked: Idempotency<'_>) -> Result<Option<Forked>, StoreError> {
        let mut db = self.pool.acquire().await?;
        known(account, &asked, &mut db).await
    }

    /// Takes every VM of the fork from STARTING to RUNNING and its snapshot from READY to DELETING, at once; the VMs as
    /// they are then, or `None`, and nothing changed, when one of them isn't STARTING any more.
    pub async fn fork_commit(&self, snapshot: &SnapshotId, made: &[Vm]) -> Result<Option<Vec<Vm>>, StoreError> {
        let mut tx = self.pool.begin().await?;
        let done = transition(snapshot, SnapshotState::Ready, SnapshotEvent::Remove, None, &mut *tx).await?;
        let mut running = Vec::with_capacity(made.len());
        for vm in made.iter().filter(|_| done.is_some()) {
            let change = Default::default();
            running.extend(vms::transition(&vm.id, VmState::Starting, VmEvent::Ready, &change, &mut *tx).await?);
        }
        if done.is_none() || running.len() != made.len() {
            tx.rollback().await?;
            return Ok(None);
        }
        for vm in &running {
            webhooks::emit(&webhooks::Event::of_vm(vm), &mut tx).await?;
        }
        tx.commit().await?;
        running.iter().for_each(|vm| self.moved(vm));
        Ok(Some(running))
    }

    /// The VMs that were made of a snapshot, deleted ones too. Meant for a fork's: of another there may be any number.
    pub async fn vm_list_of_snapshot(&self, snapshot: &SnapshotId) -> Result<Vec<Vm>, StoreError> {
        vms::of_snapshot(snapshot, &self.pool).await
    }
}

/// What a key that was used before comes to.
async fn known(
    account: &AccountId,
    asked: &Idempotency<'_>,
    db: &mut AnyConnection,
) -> Result<Option<Forked>, StoreError> {
    match idempotency::find(account, asked, db).await? {
        Known::Unused => Ok(None),
        Known::OtherRequest => Ok(Some(Forked::KeyReused)),
        Known::SameRequest(first) => Ok(Some(Forked::Replay(vms::siblings(&first, db).await?))),
    }
}

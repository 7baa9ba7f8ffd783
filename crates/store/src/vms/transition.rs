//! Moving a VM from one state to another, by compare-and-set.

use sqlx::Any;
use tiffin_types::{
    account::Quota,
    id::VmId,
    time::Timestamp,
    vm::{VmEvent, VmState},
};

use super::{Change, Desired, Reserve, Vm, json, provision_mode_name, vm_from};
use crate::{Store, StoreError, quota, row::returned, webhooks};

impl Store {
    /// Takes a VM from `from` to where `event` leads, with what else changes; the VM as it is then, or `None` when it
    /// isn't in `from` any more (somebody else moved it), doesn't exist, or is to start though it is to be deleted.
    ///
    /// The times are set here: `started_at` by [`VmEvent::Ready`], `deleted_at` by [`VmEvent::Delete`]. A delete makes
    /// the VM desired to be deleted, too. A transition that the table refuses is a bug: [`StoreError::Conflict`].
    pub async fn vm_transition(
        &self,
        id: &VmId,
        from: VmState,
        event: VmEvent,
        change: Change,
    ) -> Result<Option<Vm>, StoreError> {
        let mut tx = self.pool.begin().await?;
        let Some(vm) = transition(id, from, event, &change, &mut *tx).await? else {
            tx.rollback().await?;
            return Ok(None);
        };
        webhooks::emit(&webhooks::Event::of_vm(&vm), &mut tx).await?;
        tx.commit().await?;
        self.moved(&vm);
        Ok(Some(vm))
    }

    /// Takes a VM from `from` to STARTING, desired to be running and its last end forgotten, if its vCPUs and memory fit
    /// the account's quota beside the VMs that are up. In one transaction.
    pub async fn vm_start_reserve(&self, id: &VmId, from: VmState, quota: &Quota) -> Result<Reserve, StoreError> {
        let change = Change { end: Some(None), desired: Some(Desired::Running), provision_mode: None };
        let mut tx = self.pool.begin().await?;
        let Some(vm) = transition(id, from, VmEvent::Start, &change, &mut *tx).await? else {
            tx.rollback().await?;
            return Ok(Reserve::Lost);
        };
        quota::lock_account(&vm.account_id, &mut tx).await?;
        let used = quota::usage(&vm.account_id, Some(&vm.id), &mut *tx).await?;
        match quota::check_start(quota, &used, &vm.size) {
            Ok(()) => {
                webhooks::emit(&webhooks::Event::of_vm(&vm), &mut tx).await?;
                tx.commit().await?;
                self.moved(&vm);
                Ok(Reserve::Reserved(vm))
            }
            Err(exceeded) => {
                tx.rollback().await?;
                Ok(Reserve::OverQuota(exceeded))
            }
        }
    }

    /// Writes down what a VM is meant to be, without moving it: the intent, before the side effect. The VM as it is then,
    /// or `None` when it is deleted, or is to be deleted and something else is asked for, or doesn't exist.
    pub async fn vm_set_desired(&self, id: &VmId, desired: Desired) -> Result<Option<Vm>, StoreError> {
        let statement = sqlx::query(concat!(
            "UPDATE vms SET desired = $2, updated_at = $3
             WHERE id = $1 AND state <> 'DELETED' AND (desired <> 'deleted' OR $2 = 'deleted') RETURNING ",
            columns!()
        ))
        .bind(id.as_str())
        .bind(desired.as_str())
        .bind(Timestamp::now().as_millis());
        returned(statement, &self.pool).await?.map(|row| vm_from(&row)).transpose()
    }
}

pub(crate) async fn transition<'e>(
    id: &VmId,
    from: VmState,
    event: VmEvent,
    change: &Change,
    db: impl sqlx::Executor<'e, Database = Any>,
) -> Result<Option<Vm>, StoreError> {
    let Some(to) = from.after(event) else {
        return Err(StoreError::Conflict(format!("{id}: {event:?} is refused in {from}")));
    };
    let now = Timestamp::now().as_millis();
    let desired = if event == VmEvent::Delete { Some(Desired::Deleted) } else { change.desired };
    let statement = sqlx::query(concat!(
        "UPDATE vms SET state = $3, updated_at = $4,
             started_at = COALESCE($5, started_at),
             deleted_at = COALESCE($6, deleted_at),
             end_report = CASE WHEN $7 = 1 THEN $8 ELSE end_report END,
             desired = CASE WHEN desired = 'deleted' THEN desired ELSE COALESCE($9, desired) END,
             provision_mode = COALESCE($10, provision_mode)
         WHERE id = $1 AND state = $2 AND (desired <> 'deleted' OR $3 <> 'STARTING') RETURNING ",
        columns!()
    ))
    .bind(id.as_str())
    .bind(from.as_str())
    .bind(to.as_str())
    .bind(now)
    .bind((event == VmEvent::Ready).then_some(now))
    .bind((event == VmEvent::Delete).then_some(now))
    .bind(i64::from(change.end.is_some()))
    .bind(change.end.as_ref().and_then(Option::as_ref).map(json))
    .bind(desired.map(Desired::as_str))
    .bind(change.provision_mode.map(provision_mode_name));
    returned(statement, db).await?.map(|row| vm_from(&row)).transpose()
}

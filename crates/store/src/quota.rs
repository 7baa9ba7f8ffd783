//! What an account's VMs use, and whether more fits its quota.
//!
//! Invariant: a check and the write that it allows are one transaction, and transactions on one account's VMs go one
//! after the other ([`lock_account`]); so no race takes an account over its quota.

use sqlx::{Any, AnyConnection};
use tiffin_types::{
    account::{Quota, Usage},
    id::{AccountId, VmId},
    vm::VmSize,
};

use crate::{Store, StoreError, row::Fields};

/// Which part of a quota something doesn't fit in. If several, the first in the order vms, cpus, memMb, diskMb.
/// How many snapshots or webhooks there may be is no part of an account's own quota, and is told alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaExceeded {
    /// `vms`, `cpus`, `memMb`, `diskMb`, `snapshots` or `webhooks`.
    pub what: &'static str,
    /// The quota, in that unit.
    pub limit: u64,
    /// What other VMs use of it.
    pub used: u64,
    /// What was asked for on top.
    pub asked: u64,
}

/// Which VMs count for what: see [`Store::vm_usage`]. `$2` is a VM to leave out, or an empty text.
const USAGE: &str = "SELECT account_rows.id AS id,
        COUNT(vms.id) AS vms,
        CAST(COALESCE(SUM(vms.disk_mb), 0) + (SELECT COALESCE(SUM(snapshots.reserved_mb), 0) FROM snapshots
            WHERE snapshots.account_id = account_rows.id) AS BIGINT) AS disk_mb,
        CAST(COALESCE(SUM(CASE WHEN vms.state IN ('CREATED', 'STARTING', 'RUNNING', 'PAUSED', 'STOPPING')
            THEN vms.cpus ELSE 0 END), 0) AS BIGINT) AS cpus,
        CAST(COALESCE(SUM(CASE WHEN vms.state IN ('CREATED', 'STARTING', 'RUNNING', 'PAUSED', 'STOPPING')
            THEN vms.mem_mb ELSE 0 END), 0) AS BIGINT) AS mem_mb
    FROM accounts AS account_rows
    LEFT JOIN vms ON vms.account_id = account_rows.id AND vms.state <> 'DELETED' AND vms.id <> $2
    WHERE account_rows.id = $1 GROUP BY account_rows.id";

impl Store {
    /// What the account's VMs and snapshots use now. VMs that aren't deleted count for `vms` and `disk_mb`, snapshots for `disk_mb`; VMs that are up, and
    /// those just created, as they are about to start, for `cpus` and `mem_mb` too. Nothing for an unknown account.
    pub async fn vm_usage(&self, account: &AccountId) -> Result<Usage, StoreError> {
        usage(account, None, &self.pool).await
    }
}

/// Takes the account's row for the rest of the transaction, whose first statement this must be: on Postgres it locks
/// the row, on SQLite it takes the database's write lock. `false` when there is no such account.
pub(crate) async fn lock_account(account: &AccountId, tx: &mut AnyConnection) -> Result<bool, StoreError> {
    let done = sqlx::query("UPDATE accounts SET created_at = created_at WHERE id = $1")
        .bind(account.as_str())
        .execute(tx)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// What the account's VMs use, `except` aside.
pub(crate) async fn usage<'e>(
    account: &AccountId,
    except: Option<&VmId>,
    db: impl sqlx::Executor<'e, Database = Any>,
) -> Result<Usage, StoreError> {
    let row =
        sqlx::query(USAGE).bind(account.as_str()).bind(except.map_or("", VmId::as_str)).fetch_optional(db).await?;
    let Some(row) = row else { return Ok(Usage::default()) };
    let fields = Fields::new("usage of accounts", &row);
    Ok(Usage {
        vms: fields.number("vms")?,
        cpus: fields.number("cpus")?,
        mem_mb: fields.number("mem_mb")?,
        disk_mb: fields.number("disk_mb")?,
    })
}

/// Whether one more VM of that size fits, as one that is up.
pub(crate) fn check_new(quota: &Quota, used: &Usage, size: &VmSize) -> Result<(), QuotaExceeded> {
    check_all(quota, used, std::iter::once(*size))
}

/// Whether VMs of those sizes fit together, as ones that are up.
pub(crate) fn check_all(
    quota: &Quota,
    used: &Usage,
    sizes: impl Iterator<Item = VmSize> + Clone,
) -> Result<(), QuotaExceeded> {
    let sum = |of: fn(&VmSize) -> u32| sizes.clone().map(|size| u64::from(of(&size))).sum::<u64>();
    fits("vms", quota.vms.into(), used.vms.into(), sizes.clone().count() as u64)?;
    fits("cpus", quota.cpus.into(), used.cpus.into(), sum(|size| size.cpus))?;
    fits("memMb", quota.mem_mb, used.mem_mb, sum(|size| size.mem_mb))?;
    fits("diskMb", quota.disk_mb, used.disk_mb, sum(|size| size.disk_mb))
}

/// Whether a VM of that size, which exists already, may come up.
pub(crate) fn check_start(quota: &Quota, used: &Usage, size: &VmSize) -> Result<(), QuotaExceeded> {
    fits("cpus", quota.cpus.into(), used.cpus.into(), size.cpus.into())?;
    fits("memMb", quota.mem_mb, used.mem_mb, size.mem_mb.into())
}

/// Whether `asked` more fits.
pub(crate) fn fits(what: &'static str, limit: u64, used: u64, asked: u64) -> Result<(), QuotaExceeded> {
    match used.saturating_add(asked) <= limit {
        true => Ok(()),
        false => Err(QuotaExceeded { what, limit, used, asked }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tiffin_types::vm::VmState;

    #[test]
    fn live_and_new_vms_are_the_ones_that_count_as_up() {
        for state in VmState::ALL {
            let counted = USAGE.matches(&format!("'{state}'")).count() == 2;
            assert_eq!(counted, state.is_live() || state == VmState::Created, "{state}");
        }
    }
}

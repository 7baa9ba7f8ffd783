//! Lists of VMs page by page, deleted ones among them if asked for.
//!
//! Invariant: a page goes on after a VM by when it was made, which never changes: whatever is written meanwhile, no VM is
//! skipped or told of twice.

use tiffin_types::{
    id::{AccountId, ImageId, VmId},
    time::Timestamp,
    vm::VmState,
};

use super::{Vm, vm_from};
use crate::{Store, StoreError};

/// Which VMs a list has.
#[derive(Debug, Clone, Default)]
pub struct VmFilter {
    /// Made of this image.
    pub image_id: Option<ImageId>,
    /// In one of these states.
    pub states: Vec<VmState>,
}

/// The last VM of a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmCursor {
    /// When it was made.
    pub created_at: Timestamp,
    /// Its id.
    pub id: VmId,
}

impl Store {
    /// At most `limit` of the account's VMs, newest first, from after that VM on.
    pub async fn vm_page(
        &self,
        account: &AccountId,
        filter: &VmFilter,
        after: Option<&VmCursor>,
        limit: u32,
    ) -> Result<Vec<Vm>, StoreError> {
        // One text for every filter: what isn't asked for is empty, and matches.
        let states = filter.states.iter().map(|state| format!(",{state},")).collect::<String>();
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM vms
              WHERE account_id = $1 AND $2 LIKE '%,' || state || ',%' AND ($3 = '' OR image_id = $3)
                AND ($4 = '' OR created_at < $5 OR (created_at = $5 AND id < $4))
              ORDER BY created_at DESC, id DESC LIMIT $6"
        ))
        .bind(account.as_str())
        .bind(states)
        .bind(filter.image_id.as_ref().map_or("", ImageId::as_str))
        .bind(after.map_or("", |cursor| cursor.id.as_str()))
        .bind(after.map_or(0, |cursor| cursor.created_at.as_millis()))
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(vm_from).collect()
    }
}

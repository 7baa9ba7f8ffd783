//! Ports of VMs that are reached from outside, each by a host name of its own.
//!
//! Invariant: only VMs that aren't deleted have any, as far as anybody is told: what a deleted one had is forgotten later.

use sqlx::any::AnyRow;
use tiffin_types::{
    id::{HostLabel, VmId},
    time::Timestamp,
};

use crate::{Store, StoreError, row::Fields};

/// A port that is reached from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// What its host name begins with.
    pub label: HostLabel,
    /// Whose it is.
    pub vm_id: VmId,
    /// The port.
    pub port: u16,
    /// Since when.
    pub created_at: Timestamp,
}

/// What became of a [`Store::port_insert`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortInserted {
    /// It is reached from outside, now or since before.
    Done(Port),
    /// The VM has as many as may be, or is gone.
    Refused,
}

macro_rules! columns {
    () => {
        "ports.label, ports.vm_id, ports.port, ports.created_at"
    };
}

impl Store {
    /// Gives a VM's port a host name; one that has one keeps it. At most `most` of a VM.
    pub async fn port_insert(&self, vm: &VmId, port: u16, most: u32) -> Result<PortInserted, StoreError> {
        let mut tx = self.pool.begin().await?;
        sqlx::query(
            "INSERT INTO ports (label, vm_id, port, created_at)
             SELECT CAST($1 AS TEXT), vms.id, CAST($3 AS BIGINT), CAST($4 AS BIGINT) FROM vms
             WHERE vms.id = $2 AND vms.state <> 'DELETED'
               AND (SELECT COUNT(*) FROM ports WHERE ports.vm_id = $2) < CAST($5 AS BIGINT)
             ON CONFLICT (vm_id, port) DO NOTHING",
        )
        .bind(HostLabel::random().as_str())
        .bind(vm.as_str())
        .bind(i64::from(port))
        .bind(Timestamp::now().as_millis())
        .bind(i64::from(most))
        .execute(&mut *tx)
        .await?;
        let row = sqlx::query(concat!("SELECT ", columns!(), " FROM ports WHERE vm_id = $1 AND port = $2"))
            .bind(vm.as_str())
            .bind(i64::from(port))
            .fetch_optional(&mut *tx)
            .await?;
        tx.commit().await?;
        row.map_or(Ok(PortInserted::Refused), |row| port_from(&row).map(PortInserted::Done))
    }

    /// A VM's ports, the least first.
    pub async fn port_list(&self, vm: &VmId) -> Result<Vec<Port>, StoreError> {
        let rows = sqlx::query(concat!("SELECT ", columns!(), " FROM ports WHERE vm_id = $1 ORDER BY port"))
            .bind(vm.as_str())
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(port_from).collect()
    }

    /// The ports of all VMs that aren't deleted.
    pub async fn port_list_all(&self) -> Result<Vec<Port>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM ports JOIN vms ON vms.id = ports.vm_id WHERE vms.state <> 'DELETED' ORDER BY ports.label"
        ))
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(port_from).collect()
    }

    /// Takes a port's host name away for good. `false` when it has none.
    pub async fn port_delete(&self, vm: &VmId, port: u16) -> Result<bool, StoreError> {
        let done = sqlx::query("DELETE FROM ports WHERE vm_id = $1 AND port = $2")
            .bind(vm.as_str())
            .bind(i64::from(port))
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Forgets the ports of deleted VMs; how many they were.
    pub async fn port_prune(&self) -> Result<u64, StoreError> {
        let gone = "DELETE FROM ports WHERE vm_id IN (SELECT id FROM vms WHERE state = 'DELETED')";
        Ok(sqlx::query(gone).execute(&self.pool).await?.rows_affected())
    }
}

fn port_from(row: &AnyRow) -> Result<Port, StoreError> {
    let fields = Fields::new("ports", row);
    Ok(Port {
        label: fields.parsed("label")?,
        vm_id: fields.parsed("vm_id")?,
        port: fields.number("port")?,
        created_at: fields.time("created_at")?,
    })
}

//! Figures of the whole installation.

use crate::{Store, StoreError, row::Fields};

/// How much there is of what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// Images.
    pub images: u64,
    /// Snapshots that can be restored.
    pub snapshots: u64,
    /// Accounts.
    pub accounts: u64,
    /// API keys that are not revoked.
    pub api_keys: u64,
    /// vCPUs of the VMs that are up.
    pub cpus: u64,
    /// Memory of the VMs that are up, in MiB.
    pub mem_mb: u64,
    /// Disk of the VMs that exist, in MiB.
    pub disk_mb: u64,
}

impl Store {
    /// The figures of now.
    pub async fn figures(&self) -> Result<Figures, StoreError> {
        let row = sqlx::query(
            "SELECT 'figures' AS id,
                 (SELECT COUNT(*) FROM images) AS images,
                 (SELECT COUNT(*) FROM snapshots WHERE state = 'READY' AND fork = 0) AS snapshots,
                 (SELECT COUNT(*) FROM accounts) AS accounts,
                 (SELECT COUNT(*) FROM api_keys WHERE revoked_at IS NULL) AS api_keys,
                 CAST(COALESCE(SUM(CASE WHEN state IN ('CREATED', 'STARTING', 'RUNNING', 'PAUSED', 'STOPPING') THEN cpus ELSE 0 END), 0) AS BIGINT) AS cpus,
                 CAST(COALESCE(SUM(CASE WHEN state IN ('CREATED', 'STARTING', 'RUNNING', 'PAUSED', 'STOPPING') THEN mem_mb ELSE 0 END), 0) AS BIGINT) AS mem_mb,
                 CAST(COALESCE(SUM(disk_mb), 0) AS BIGINT) AS disk_mb
             FROM vms WHERE state <> 'DELETED'",
        )
        .fetch_one(&self.pool)
        .await?;
        let fields = Fields::new("figures", &row);
        Ok(Figures {
            images: fields.number("images")?,
            snapshots: fields.number("snapshots")?,
            accounts: fields.number("accounts")?,
            api_keys: fields.number("api_keys")?,
            cpus: fields.number("cpus")?,
            mem_mb: fields.number("mem_mb")?,
            disk_mb: fields.number("disk_mb")?,
        })
    }
}

//! VMs: their records, and the changes of state that the transition table allows.
//!
//! Invariants: a state changes by compare-and-set only, to where [`VmState::after`] says; once a VM is desired to be
//! deleted it stays so, whatever else is asked later; a deleted VM's record is kept and never changes.

use sqlx::any::AnyRow;
use tiffin_types::{
    id::{AccountId, Digest, HostLabel, ImageId, SnapshotId, VmId},
    network::EgressPolicy,
    time::Timestamp,
    vm::{EndReport, EngineName, Isolation, Lifetime, ProvisionMode, Service, VmSize, VmState},
};

use crate::{QuotaExceeded, Store, StoreError, row::Fields};

/// Where a VM is meant to get to; what it is now is its [`VmState`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Desired {
    /// Up.
    Running,
    /// Down, its disk kept.
    Stopped,
    /// Gone.
    Deleted,
}

impl Desired {
    /// The name in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Desired::Running => "running",
            Desired::Stopped => "stopped",
            Desired::Deleted => "deleted",
        }
    }
}

impl std::str::FromStr for Desired {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Desired::Running, Desired::Stopped, Desired::Deleted]
            .into_iter()
            .find(|desired| desired.as_str() == text)
            .ok_or("must be one of running, stopped, deleted")
    }
}

/// A VM's record.
#[derive(Debug, Clone, PartialEq)]
pub struct Vm {
    /// Its id.
    pub id: VmId,
    /// Whose it is.
    pub account_id: AccountId,
    /// The image it was made of; that may be gone since.
    pub image_id: ImageId,
    /// The image's content.
    pub image_digest: Digest,
    /// The image's kernel, if it had one of its own.
    pub kernel_digest: Option<Digest>,
    /// What runs it.
    pub engine: EngineName,
    /// What stands between it and the host.
    pub isolation: Isolation,
    /// vCPUs, memory and disk.
    pub size: VmSize,
    /// What it may reach outside.
    pub egress: EgressPolicy,
    /// What it is now, as far as known.
    pub state: VmState,
    /// What it is meant to be.
    pub desired: Desired,
    /// How it ended last, while it is down.
    pub end: Option<EndReport>,
    /// How it came up, or is to come up.
    pub provision_mode: ProvisionMode,
    /// The snapshot that it was restored from; that may be gone since.
    pub snapshot_id: Option<SnapshotId>,
    /// What its public host name begins with; records of old versions have none.
    pub host_label: Option<HostLabel>,
    /// What it is beyond a sandbox, if it is.
    pub service: Option<Service>,
    /// When its record was made.
    pub created_at: Timestamp,
    /// When its record changed last.
    pub updated_at: Timestamp,
    /// When it became RUNNING last after a start.
    pub started_at: Option<Timestamp>,
    /// When it became DELETED.
    pub deleted_at: Option<Timestamp>,
}

impl Vm {
    /// Whether it is for one run of its image's program.
    pub fn is_one_time(&self) -> bool {
        self.service.is_some_and(|service| service.lifetime == Lifetime::OneTime)
    }

    /// Whether it is kept to run its image's program again and again.
    pub fn is_cached(&self) -> bool {
        self.service.is_some_and(|service| service.lifetime == Lifetime::Cached)
    }
}

/// A VM to be made. It begins as CREATED; unless it is a cached one, it is desired to be running.
#[derive(Debug, Clone)]
pub struct NewVm {
    /// Its id.
    pub id: VmId,
    /// Whose it is.
    pub account_id: AccountId,
    /// The image it is made of.
    pub image_id: ImageId,
    /// The image's content.
    pub image_digest: Digest,
    /// The image's kernel, if it has one of its own.
    pub kernel_digest: Option<Digest>,
    /// What will run it.
    pub engine: EngineName,
    /// What stands between it and the host.
    pub isolation: Isolation,
    /// vCPUs, memory and disk.
    pub size: VmSize,
    /// What it may reach outside.
    pub egress: EgressPolicy,
    /// How it is to come up.
    pub provision_mode: ProvisionMode,
    /// The snapshot that it is restored from.
    pub snapshot_id: Option<SnapshotId>,
    /// What it is beyond a sandbox, if it is.
    pub service: Option<Service>,
}

/// What became of a [`Store::vm_insert`].
#[derive(Debug, Clone, PartialEq)]
pub enum Inserted {
    /// The VM was made.
    New(Vm),
    /// The same request made this VM before; nothing was done. The VM may have moved on since, even to DELETED.
    Replay(Vm),
    /// The idempotency key belongs to another request; nothing was done.
    KeyReused,
    /// It doesn't fit the quota; nothing was done.
    OverQuota(QuotaExceeded),
}

/// What became of a [`Store::vm_start_reserve`].
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "moved once, and mostly the large one")]
pub enum Reserve {
    /// It is STARTING, and counted as up.
    Reserved(Vm),
    /// Somebody else moved it, or it is to be deleted; nothing was done.
    Lost,
    /// It doesn't fit the quota; nothing was done.
    OverQuota(QuotaExceeded),
}

/// What changes along with a state; what is `None` stays as it is.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// How it ended; `Some(None)` forgets that.
    pub end: Option<Option<EndReport>>,
    /// What it is meant to be.
    pub desired: Option<Desired>,
    /// How it came up.
    pub provision_mode: Option<ProvisionMode>,
}

macro_rules! columns {
    () => {
        "id, account_id, image_id, image_digest, kernel_digest, engine, isolation, cpus, mem_mb, disk_mb, egress, state, desired, \
         end_report, provision_mode, snapshot_id, host_label, lifetime, port, volume_gb, created_at, updated_at, \
         started_at, deleted_at"
    };
}

mod insert;
mod page;
mod transition;

pub use page::{VmCursor, VmFilter};

pub(crate) use insert::insert;
pub(crate) use transition::transition;

impl Store {
    /// The account's VM with that id, a deleted one too.
    pub async fn vm_get(&self, account: &AccountId, id: &VmId) -> Result<Option<Vm>, StoreError> {
        sqlx::query(concat!("SELECT ", columns!(), " FROM vms WHERE id = $1 AND account_id = $2"))
            .bind(id.as_str())
            .bind(account.as_str())
            .fetch_optional(&self.pool)
            .await?
            .map(|row| vm_from(&row))
            .transpose()
    }

    /// The account's VMs that aren't deleted, oldest first.
    pub async fn vm_list(&self, account: &AccountId) -> Result<Vec<Vm>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM vms WHERE account_id = $1 AND state <> 'DELETED' ORDER BY created_at, id"
        ))
        .bind(account.as_str())
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(vm_from).collect()
    }

    /// Every account's VMs that aren't deleted, oldest first: what the reconciler compares with the host.
    pub async fn vm_not_deleted(&self) -> Result<Vec<Vm>, StoreError> {
        let rows =
            sqlx::query(concat!("SELECT ", columns!(), " FROM vms WHERE state <> 'DELETED' ORDER BY created_at, id"))
                .fetch_all(&self.pool)
                .await?;
        rows.iter().map(vm_from).collect()
    }

    /// How many VMs are in each state, deleted ones too; a state without VMs may be missing.
    pub async fn vm_counts(&self) -> Result<Vec<(VmState, i64)>, StoreError> {
        let rows = sqlx::query("SELECT state AS id, COUNT(*) AS vms FROM vms GROUP BY state ORDER BY state")
            .fetch_all(&self.pool)
            .await?;
        rows.iter()
            .map(|row| {
                let fields = Fields::new("vms by state", row);
                Ok((fields.parsed("id")?, fields.number("vms")?))
            })
            .collect()
    }
}

/// The VMs that were made of a snapshot, deleted ones too.
pub(crate) async fn of_snapshot<'e>(
    snapshot: &SnapshotId,
    db: impl sqlx::Executor<'e, Database = sqlx::Any>,
) -> Result<Vec<Vm>, StoreError> {
    let rows = sqlx::query(concat!("SELECT ", columns!(), " FROM vms WHERE snapshot_id = $1 ORDER BY created_at, id"))
        .bind(snapshot.as_str())
        .fetch_all(db)
        .await?;
    rows.iter().map(vm_from).collect()
}

/// The VMs that were made of the same snapshot as that one, itself among them, deleted ones too.
pub(crate) async fn siblings<'e>(
    id: &VmId,
    db: impl sqlx::Executor<'e, Database = sqlx::Any>,
) -> Result<Vec<Vm>, StoreError> {
    let rows = sqlx::query(concat!(
        "SELECT ",
        columns!(),
        " FROM vms WHERE snapshot_id = (SELECT one.snapshot_id FROM vms AS one WHERE one.id = $1) ORDER BY created_at, id"
    ))
    .bind(id.as_str())
    .fetch_all(db)
    .await?;
    rows.iter().map(vm_from).collect()
}

fn vm_from(row: &AnyRow) -> Result<Vm, StoreError> {
    let fields = Fields::new("vms", row);
    Ok(Vm {
        id: fields.parsed("id")?,
        account_id: fields.parsed("account_id")?,
        image_id: fields.parsed("image_id")?,
        image_digest: fields.parsed("image_digest")?,
        kernel_digest: fields.parsed_if_any("kernel_digest")?,
        engine: fields.parsed("engine")?,
        isolation: fields.named("isolation")?,
        size: VmSize {
            cpus: fields.number("cpus")?,
            mem_mb: fields.number("mem_mb")?,
            disk_mb: fields.number("disk_mb")?,
        },
        egress: fields.json("egress")?,
        state: fields.parsed("state")?,
        desired: fields.parsed("desired")?,
        end: fields.json_if_any("end_report")?,
        provision_mode: fields.named("provision_mode")?,
        snapshot_id: fields.parsed_if_any("snapshot_id")?,
        host_label: fields.parsed_if_any("host_label")?,
        service: service_from(&fields)?,
        created_at: fields.time("created_at")?,
        updated_at: fields.time("updated_at")?,
        started_at: fields.time_if_any("started_at")?,
        deleted_at: fields.time_if_any("deleted_at")?,
    })
}

fn service_from(fields: &Fields<'_>) -> Result<Option<Service>, StoreError> {
    let Some(lifetime) = fields.parsed_if_any("lifetime")? else { return Ok(None) };
    let (port, volume_gb) = (fields.number_if_any("port")?, fields.number_if_any("volume_gb")?);
    Ok(Some(Service { lifetime, port, volume_gb }))
}

/// A plain value as JSON text.
fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain structs with string keys always serialize")
}

fn provision_mode_name(mode: ProvisionMode) -> &'static str {
    match mode {
        ProvisionMode::Boot => "boot",
        ProvisionMode::Snapshot => "snapshot",
    }
}

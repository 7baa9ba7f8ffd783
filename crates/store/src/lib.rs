//! All of Tiffin's SQL: accounts, users and their sessions, API keys, images, VMs, snapshots, idempotency keys and webhooks, in SQLite
//! or Postgres.
//!
//! Invariants: one SQL text serves both databases; every operation is one statement or one transaction, and no
//! transaction is held across anything but the database; every transaction begins with a write, because SQLite refuses
//! (`database is locked`, however long one is ready to wait) to let one that has read become a writer after another
//! has written; a VM's state changes by compare-and-set only; a corrupt row is an error, never a panic.
//! It knows nothing of HTTP, engines or files, and doesn't judge keys: it keeps what the server decides.

mod accounts;
mod activity;
mod api_keys;
mod error;
mod exec_logs;
mod idempotency;
mod images;
mod open;
mod overview;
mod ports;
mod quota;
mod row;
mod sessions;
mod snapshots;
mod users;
mod vms;
mod watch;
mod webhooks;

pub use accounts::{Account, NewAdminKey};
pub use activity::{Activity, Performer, PerformerKind};
pub use api_keys::{ApiKey, NewApiKey};
pub use error::StoreError;
pub use exec_logs::{ExecKind, ExecLog, ExecOutcome};
pub use idempotency::Idempotency;
pub use images::{Image, ImageDeleted, ImageQuota, Imported, NewImage, Partial, Upload, Uploaded};
pub use overview::Figures;
pub use ports::{Port, PortInserted};
pub use quota::QuotaExceeded;
pub use sessions::Session;
pub use snapshots::{Forked, NewFork, NewSnapshot, Snapshot, SnapshotInserted};
pub use users::User;
pub use vms::{Change, Desired, Inserted, NewVm, Reserve, Vm, VmCursor, VmFilter};
pub use webhooks::{
    Attempt, Claimed, Delivery, DeliveryState, DisabledReason, NewWebhook, Redelivery, Settled, Verdict, Webhook,
    WebhookChange, WebhookTarget,
};

use std::sync::Arc;

use tokio::sync::Notify;

/// The database. Cheap to clone: clones share one bounded pool of connections.
#[derive(Debug, Clone)]
pub struct Store {
    pool: sqlx::AnyPool,
    watch: watch::Watch,
    /// Notified when something may be there to deliver to webhooks.
    outbox: Arc<Notify>,
}

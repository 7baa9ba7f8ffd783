//! Closing the difference between what the store says and what the engine sees: at start, on every end, and on a timer.
//!
//! Invariant: a reconciler takes no input but the two, is idempotent, and its next run is the retry. What to do is
//! decided by one pure function ([`decide`]).

mod decide;
mod images;
mod logs;
mod scrub;
mod snapshots;
mod tasks;
mod vms;

pub(crate) use images::settle_images;
pub(crate) use tasks::spawn_all;
pub(crate) use vms::{adopt_all, vm_reconcile};

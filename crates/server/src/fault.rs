//! Fault points: named places at which a test makes the process kill itself.
//!
//! Armed by the hidden setting `fault`, once, at start; without it a point costs one load. Nothing is cleaned up, as
//! with `kill -9`.

use std::sync::OnceLock;

static ARMED: OnceLock<String> = OnceLock::new();

/// Every point, in the order in which a VM's life passes them.
pub const POINTS: [&str; 30] = [
    "after_vm_insert",
    "after_start_intent",
    "after_engine_create",
    "after_engine_start",
    "before_running_commit",
    "after_running_commit",
    "after_stop_intent",
    "after_engine_stop",
    "after_delete_intent",
    "after_engine_destroy",
    // A snapshot's life.
    "after_snapshot_intent",
    "after_engine_save",
    "before_snapshot_commit",
    "after_snapshot_commit",
    "after_snapshot_delete_intent",
    "after_engine_snapshot_remove",
    // A fork passes those of a snapshot too, and those of a create for each clone.
    "after_fork_insert",
    "before_fork_commit",
    // A VM that runs its image's program passes those of a VM's life, too.
    "after_program_start",
    "after_prepare",
    "after_end_recorded",
    // A create that takes a VM that is up already.
    "after_pool_claim",
    // An upload to an image, and an image's end.
    "after_upload_begin",
    "after_upload_received",
    "after_upload_converted",
    "after_image_delete",
    // A delivery to a webhook.
    "after_delivery_claim",
    "before_delivery_settle",
    // An import.
    "after_import_received",
    "after_import_made",
];

/// Arms the point with this name, for the rest of the process's life.
pub(crate) fn arm(name: &str) {
    tracing::warn!(fault = name, "a fault point is armed: this process will kill itself");
    // Armed already means by an earlier server in this process, which only tests have.
    let _ = ARMED.set(name.to_owned());
}

/// Kills the process here if this point is armed.
pub(crate) fn point(name: &'static str) {
    debug_assert!(POINTS.contains(&name));
    if ARMED.get().is_some_and(|armed| armed == name) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        std::process::abort();
    }
}

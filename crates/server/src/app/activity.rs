//! The audit trail, read by administrators.

use std::sync::Arc;

use tiffin_store::Activity;
use tiffin_types::account::Scope;
use tokio::sync::{OwnedSemaphorePermit, broadcast};

use super::{App, auth::Caller};
use crate::error::AppError;

/// The newest entries, newest first; those before one when that is given.
pub(crate) async fn activity_list(
    app: &App,
    caller: &Caller,
    limit: u32,
    before: Option<&str>,
) -> Result<Vec<Activity>, AppError> {
    caller.require(Scope::Admin)?;
    Ok(app.store.activity_list(limit, before).await?)
}

/// What is written from now on, and a place among those who watch.
pub(crate) fn event_watch(
    app: &App,
    caller: &Caller,
) -> Result<(broadcast::Receiver<Arc<Activity>>, OwnedSemaphorePermit), AppError> {
    caller.require(Scope::Admin)?;
    let place = Arc::clone(&app.watchers).try_acquire_owned().map_err(|_| {
        AppError::TooMany(format!(
            "{} streams of events are open, the most there may be: close one, or raise limits.event_streams",
            app.config.limits.event_streams
        ))
    })?;
    Ok((app.journal.watch(), place))
}

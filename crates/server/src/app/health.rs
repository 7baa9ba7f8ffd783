//! Whether the server can do its work.

use std::time::Duration;

use super::App;

/// How long the database may take.
const PING: Duration = Duration::from_secs(3);

/// What works.
pub(crate) struct Health {
    /// Whether the database answers.
    pub(crate) store: bool,
}

/// Asks what the server depends on.
pub(crate) async fn health_check(app: &App) -> Health {
    let ping = tokio::time::timeout(PING, app.store.ping()).await;
    Health { store: matches!(ping, Ok(Ok(()))) }
}

/// The measurements, as Prometheus reads them.
pub(crate) async fn metrics_render(app: &App) -> String {
    if let Ok(Ok(counts)) = tokio::time::timeout(PING, app.store.vm_counts()).await {
        crate::metrics::vms(&counts);
    }
    if let Ok(Ok(counts)) = tokio::time::timeout(PING, app.store.snapshot_counts()).await {
        crate::metrics::snapshots(&counts);
    }
    app.metrics.run_upkeep();
    app.metrics.render()
}

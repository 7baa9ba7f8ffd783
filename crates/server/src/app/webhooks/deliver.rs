//! Sending what the store's outbox has: claimed by leases, a bounded number at once, and of each webhook few.
//!
//! Invariant: a slow receiver holds up nobody's deliveries but its own. Nothing is in memory alone: what a killed server
//! was sending is sent again once its lease has run out.

use std::{sync::Arc, time::Duration};

use tiffin_store::{Claimed, DisabledReason, Performer, PerformerKind, Settled, StoreError, Verdict, Webhook};
use tiffin_types::{id::WebhookId, time::Timestamp};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{DISABLED, attempt::attempt};
use crate::{
    app::{App, journal::Entry},
    error::chain,
    fault,
};

/// How much longer than an attempt may take a lease lasts.
const LEASE_SLACK: Duration = Duration::from_secs(5);
/// How long to leave the store alone at most: another server may have put something into it.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// How long to leave it alone when it fails, or when all that is due waits for a place.
const PAUSE: Duration = Duration::from_secs(1);

/// Delivers until the server is asked to shut down.
pub(crate) async fn deliver(app: Arc<App>) {
    let places = Arc::new(Semaphore::new(app.config.webhooks.in_flight.min(Semaphore::MAX_PERMITS)));
    loop {
        let wait = match claim_round(&app, &places).await {
            Ok(0) => match app.store.delivery_next_due().await {
                Ok(next) => until(next),
                Err(error) => failed(&error),
            },
            Ok(_) => continue,
            Err(error) => failed(&error),
        };
        // Whether there is news or the time is up, the next round looks.
        let _ = tokio::time::timeout(wait, app.store.webhook_news()).await;
    }
}

fn failed(error: &StoreError) -> Duration {
    tracing::warn!(error = chain(error), "deliveries of webhooks can't be read now");
    PAUSE
}

fn until(next: Option<Timestamp>) -> Duration {
    let Some(next) = next else { return LOOK_EVERY };
    let millis = next.as_millis().saturating_sub(Timestamp::now().as_millis());
    match u64::try_from(millis) {
        Ok(millis) if millis > 0 => Duration::from_millis(millis).min(LOOK_EVERY),
        Ok(_) | Err(_) => PAUSE,
    }
}

/// Claims what is due and there is a place for, and begins to send it; how much.
async fn claim_round(app: &Arc<App>, places: &Arc<Semaphore>) -> Result<usize, StoreError> {
    let config = &app.config.webhooks;
    let Ok(first) = Arc::clone(places).acquire_owned().await else { return Ok(0) };
    let mut free = vec![first];
    while let Ok(place) = Arc::clone(places).try_acquire_owned() {
        free.push(place);
    }
    let now = Timestamp::now();
    let due = app.store.delivery_due(now, config.in_flight_each, count(free.len())).await?;
    let mut begun = 0;
    for (webhook, busy) in due {
        let most = config.in_flight_each.saturating_sub(busy).min(count(free.len()));
        if most == 0 {
            break;
        }
        let lease = config.timeout + LEASE_SLACK;
        let until = now.plus_millis(i64::try_from(lease.as_millis()).unwrap_or(i64::MAX));
        for claimed in app.store.delivery_claim(&webhook, now, until, most).await? {
            let place = free.pop();
            let work = Arc::clone(app);
            begun += 1;
            app.tasks.spawn(async move { send(&work, claimed, place).await });
        }
    }
    Ok(begun)
}

fn count(places: usize) -> u32 {
    u32::try_from(places).unwrap_or(u32::MAX)
}

/// Sends one delivery and writes down what came of it.
async fn send(app: &App, claimed: Claimed, place: Option<OwnedSemaphorePermit>) {
    fault::point("after_delivery_claim");
    let webhook = claimed.delivery.webhook_id.clone();
    if let Err(error) = try_to_send(app, &claimed).await {
        // The lease runs out, and it is tried again.
        tracing::warn!(%webhook, error = chain(&error), "what came of a delivery can't be written down");
    }
    drop(place);
}

async fn try_to_send(app: &App, claimed: &Claimed) -> Result<(), StoreError> {
    let config = &app.config.webhooks;
    let webhook = &claimed.delivery.webhook_id;
    // Disabled or gone since: it stays as it is, or is pruned.
    let Some(target) = app.store.webhook_target(webhook, Timestamp::now()).await? else { return Ok(()) };
    let (attempt, verdict) = attempt(&app.outbound, config, &target, claimed).await;
    fault::point("before_delivery_settle");
    let word = match verdict {
        Verdict::Delivered => "delivered",
        Verdict::Again(_) => "again",
        Verdict::GiveUp => "given_up",
        Verdict::Gone => "gone",
    };
    crate::metrics::delivery(word);
    tracing::debug!(%webhook, event = claimed.delivery.event_type, status = attempt.status, verdict = word, "delivery");
    let patience = i64::try_from(config.disable_after.as_millis()).unwrap_or(i64::MAX);
    let settled = app.store.delivery_settle(claimed, attempt, verdict, Timestamp::now().plus_millis(-patience)).await?;
    match settled {
        Settled::Delivery | Settled::Nothing => {}
        Settled::Disabled(webhook, reason) => note_disabled(app, &webhook, reason).await,
    }
    Ok(())
}

/// Tells the audit trail, and by it whoever watches or has another webhook.
async fn note_disabled(app: &App, webhook: &Webhook, reason: DisabledReason) {
    let id: &WebhookId = &webhook.id;
    tracing::warn!(webhook = %id, reason = reason.as_str(), "webhook {id} disabled");
    let entry = Entry {
        event: DISABLED.into(),
        actor: Performer { kind: PerformerKind::System, id: None, name: None },
        account_id: Some(webhook.account_id.clone()),
        target: Some(id.to_string()),
        status: None,
        request_id: None,
        peer: None,
        details: Some(serde_json::json!({ "reason": reason.as_str() })),
        is_lasting: true,
    };
    app.journal.note_durably(entry).await;
}

//! Webhooks, and what is delivered to them.

use tiffin_store::{
    Activity, Attempt, Change, Claimed, DeliveryState, DisabledReason, NewWebhook, Performer, PerformerKind,
    Redelivery, Settled, Store, Verdict, Webhook, WebhookChange,
};
use tiffin_types::{
    id::{AccountId, DeliveryId, WebhookId},
    time::Timestamp,
    vm::{VmEvent, VmState},
};

use crate::fixtures::{Db, account, race, tamper, vm};

async fn hook(store: &Store, account: &AccountId, types: &[&str]) -> Webhook {
    let types: Vec<String> = types.iter().map(|kind| (*kind).to_owned()).collect();
    let new = NewWebhook {
        account_id: account,
        name: "test",
        url: "https://hooks.example.com/",
        enabled: true,
        event_types: &types,
        secret: "whsec_AAAA",
    };
    store.webhook_create(new, 10).await.unwrap().unwrap()
}

fn long_ago() -> Timestamp {
    Timestamp::from_millis(0)
}

fn soon() -> Timestamp {
    Timestamp::now().plus_millis(60_000)
}

async fn claim(store: &Store, hook: &WebhookId) -> Vec<Claimed> {
    store.delivery_claim(hook, Timestamp::now(), soon(), 10).await.unwrap()
}

fn tried(status: u16) -> Attempt {
    Attempt { at: Timestamp::now(), duration_ms: 5, status: Some(status), error: Some("no".into()) }
}

async fn types(store: &Store, hook: &Webhook) -> Vec<String> {
    let list = store.delivery_list(&hook.id, 100).await.unwrap();
    list.into_iter().map(|delivery| delivery.event_type).collect()
}

pub(crate) async fn a_webhook_reads_back_changes_and_is_its_accounts_own(db: Db) {
    let store = db.open().await;
    let (mine, other) = (account(&store, "a").await.id, account(&store, "b").await.id);
    let hook = hook(&store, &mine, &["vm_state", "vm_create"]).await;
    assert_eq!(store.webhook_get(&mine, &hook.id).await.unwrap(), Some(hook.clone()));
    assert_eq!(store.webhook_get(&other, &hook.id).await.unwrap(), None);
    assert_eq!(store.webhook_list(&mine).await.unwrap(), std::slice::from_ref(&hook));
    assert_eq!(hook.event_types, ["vm_state", "vm_create"]);
    let change = WebhookChange { url: Some("https://b.example/".into()), enabled: Some(false), ..Default::default() };
    assert_eq!(store.webhook_update(&other, &hook.id, &change).await.unwrap(), None);
    let changed = store.webhook_update(&mine, &hook.id, &change).await.unwrap().unwrap();
    assert_eq!((changed.name.as_str(), changed.url.as_str(), changed.enabled), ("test", "https://b.example/", false));
    assert!(!store.webhook_delete(&other, &hook.id).await.unwrap());
    assert!(store.webhook_delete(&mine, &hook.id).await.unwrap());
    assert!(!store.webhook_delete(&mine, &hook.id).await.unwrap());
}

pub(crate) async fn of_webhooks_made_at_once_as_many_as_allowed_are(db: Db) {
    let (one, two) = (db.open().await, db.open().await);
    let account = account(&one, "a").await.id;
    let made = race([&one, &two], 8, |store, _| {
        let account = account.clone();
        async move {
            let new = NewWebhook {
                account_id: &account,
                name: "x",
                url: "https://x.example/",
                enabled: true,
                event_types: &["*".to_owned()],
                secret: "s",
            };
            store.webhook_create(new, 3).await.unwrap()
        }
    })
    .await;
    assert_eq!(made.into_iter().flatten().count(), 3);
}

pub(crate) async fn the_secret_before_is_good_for_a_time(db: Db) {
    let store = db.open().await;
    let account = account(&store, "a").await.id;
    let hook = hook(&store, &account, &["*"]).await;
    let secrets =
        async |at: Timestamp| store.webhook_target(&hook.id, at).await.unwrap().map(|target| target.secrets).unwrap();
    let until = Timestamp::now().plus_millis(60_000);
    store.webhook_rotate(&account, &hook.id, "new", Some(until)).await.unwrap().unwrap();
    assert_eq!(secrets(Timestamp::now()).await, ["new", "whsec_AAAA"]);
    assert_eq!(secrets(until).await, ["new"]);
    store.webhook_rotate(&account, &hook.id, "newest", None).await.unwrap().unwrap();
    assert_eq!(secrets(Timestamp::now()).await, ["newest"]);
}

pub(crate) async fn a_vms_state_and_its_deliveries_are_written_together(db: Db) {
    let store = db.open().await;
    let (mine, other) = (account(&store, "a").await.id, account(&store, "b").await.id);
    let told = hook(&store, &mine, &["vm_create", "vm_state"]).await;
    let all = hook(&store, &mine, &["*"]).await;
    let similar = hook(&store, &mine, &["vm_states", "xvm_state", "vm-state"]).await;
    let disabled = hook(&store, &mine, &["*"]).await;
    let off = WebhookChange { enabled: Some(false), ..Default::default() };
    store.webhook_update(&mine, &disabled.id, &off).await.unwrap();
    let foreign = hook(&store, &other, &["*"]).await;
    let vm = vm(&store, &mine).await;
    let moved = store.vm_transition(&vm.id, VmState::Created, VmEvent::Start, Change::default()).await.unwrap();
    assert!(moved.is_some());
    for (hook, expected) in [(&told, 1), (&all, 1), (&similar, 0), (&disabled, 0), (&foreign, 0)] {
        assert_eq!(types(&store, hook).await.len(), expected, "{:?}", hook.event_types);
    }
    let claimed = claim(&store, &told.id).await.pop().unwrap();
    let body: serde_json::Value = serde_json::from_str(&claimed.body).unwrap();
    assert_eq!((&body["type"], &body["data"]["state"]), (&"vm_state".into(), &"STARTING".into()), "{body}");
    assert_eq!(body["id"], claimed.delivery.event_id.as_str());
    assert_eq!(claim(&store, &all.id).await[0].delivery.event_id, claimed.delivery.event_id);
    // What changes nothing tells nobody.
    let lost = store.vm_transition(&vm.id, VmState::Created, VmEvent::Start, Change::default()).await.unwrap();
    assert!(lost.is_none() && types(&store, &told).await.len() == 1);
}

pub(crate) async fn an_entry_of_the_journal_is_delivered_once_however_often_it_is_written(db: Db) {
    let store = db.open().await;
    let account = account(&store, "a").await.id;
    let hook = hook(&store, &account, &["vm_create"]).await;
    let entry = |id: &str, event: &str, account: Option<&AccountId>| Activity {
        id: id.into(),
        at: Timestamp::now(),
        event: event.into(),
        actor: Performer { kind: PerformerKind::System, id: None, name: None },
        account_id: account.cloned(),
        target: Some("vm-1".into()),
        status: Some(201),
        request_id: None,
        peer: None,
        details: None,
        is_lasting: false,
    };
    let entries =
        [entry("1", "vm_create", Some(&account)), entry("2", "vm_create", None), entry("3", "x", Some(&account))];
    store.journal_write(&entries, &[], 10).await.unwrap();
    store.journal_write(&entries, &[], 10).await.unwrap();
    assert_eq!(types(&store, &hook).await, ["vm_create"]);
}

pub(crate) async fn what_is_claimed_is_nobody_elses_until_the_lease_is_over(db: Db) {
    let (one, two) = (db.open().await, db.open().await);
    let account = account(&one, "a").await.id;
    let hook = hook(&one, &account, &["*"]).await;
    for _ in 0..5 {
        one.webhook_ping(&account, &hook.id).await.unwrap().unwrap();
    }
    let now = Timestamp::now();
    assert_eq!(one.delivery_due(now, 4, 10).await.unwrap(), [(hook.id.clone(), 0)]);
    let id = hook.id.clone();
    let claims = race([&one, &two], 8, |store, _| {
        let id = id.clone();
        async move { store.delivery_claim(&id, now, soon(), 2).await.unwrap() }
    })
    .await;
    let mut claimed: Vec<Claimed> = claims.into_iter().flatten().collect();
    let mut ids: Vec<DeliveryId> = claimed.iter().map(|one| one.delivery.id.clone()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!((claimed.len(), ids.len()), (5, 5), "each was claimed once");
    assert!(one.delivery_due(now, 10, 10).await.unwrap().is_empty());
    assert!(one.delivery_next_due().await.unwrap().unwrap() > now, "the next time is when the leases are over");
    // After the lease another server claims it, and what the first one finds counts no more.
    let later = soon().plus_millis(1);
    let again = two.delivery_claim(&hook.id, later, later.plus_millis(60_000), 1).await.unwrap().pop().unwrap();
    let lost = claimed.iter().position(|one| one.delivery.id == again.delivery.id).unwrap();
    let lost = claimed.swap_remove(lost);
    let settle =
        async |what: &Claimed| one.delivery_settle(what, tried(200), Verdict::Delivered, long_ago()).await.unwrap();
    assert_eq!(settle(&lost).await, Settled::Nothing);
    assert_eq!(settle(&again).await, Settled::Delivery);
    assert_eq!(settle(&again).await, Settled::Nothing);
}

pub(crate) async fn a_delivery_is_tried_until_it_is_settled_and_can_be_asked_for_again(db: Db) {
    let store = db.open().await;
    let account = account(&store, "a").await.id;
    let hook = hook(&store, &account, &["*"]).await;
    let id = store.webhook_ping(&account, &hook.id).await.unwrap().unwrap().id;
    for number in 1..=12 {
        let claimed = claim(&store, &hook.id).await.pop().unwrap();
        assert_eq!(store.delivery_again(&hook.id, &id).await.unwrap(), Redelivery::Underway);
        let verdict = if number < 12 { Verdict::Again(Timestamp::now()) } else { Verdict::GiveUp };
        store.delivery_settle(&claimed, tried(500), verdict, long_ago()).await.unwrap();
    }
    let failed = store.delivery_list(&hook.id, 1).await.unwrap().pop().unwrap();
    assert_eq!((failed.state, failed.attempts, failed.history.len()), (DeliveryState::Failed, 12, 10));
    assert!(claim(&store, &hook.id).await.is_empty());
    assert!(store.webhook_get(&account, &hook.id).await.unwrap().unwrap().failing_since.is_some());
    assert_eq!(store.delivery_again(&hook.id, &DeliveryId::random()).await.unwrap(), Redelivery::Unknown);
    assert!(matches!(store.delivery_again(&hook.id, &id).await.unwrap(), Redelivery::Queued(_)));
    let claimed = claim(&store, &hook.id).await.pop().unwrap();
    assert_eq!(claimed.delivery.attempts, 0);
    store.delivery_settle(&claimed, tried(200), Verdict::Delivered, long_ago()).await.unwrap();
    assert_eq!(store.webhook_get(&account, &hook.id).await.unwrap().unwrap().failing_since, None);
}

pub(crate) async fn a_webhook_that_fails_for_too_long_or_is_gone_is_disabled(db: Db) {
    let store = db.open().await;
    let account = account(&store, "a").await.id;
    for (verdict, reason) in
        [(Verdict::Again(Timestamp::now()), DisabledReason::Failing), (Verdict::Gone, DisabledReason::Gone)]
    {
        let hook = hook(&store, &account, &["*"]).await;
        for _ in 0..3 {
            store.webhook_ping(&account, &hook.id).await.unwrap().unwrap();
        }
        let claimed = claim(&store, &hook.id).await;
        if reason == DisabledReason::Failing {
            // Not yet: it fails only since now.
            let settled = store.delivery_settle(&claimed[0], tried(500), verdict, long_ago()).await.unwrap();
            assert_eq!(settled, Settled::Delivery);
        }
        let settled = store.delivery_settle(&claimed[1], tried(500), verdict, soon()).await.unwrap();
        let Settled::Disabled(disabled, why) = settled else { panic!("{settled:?}") };
        assert_eq!((disabled.id, disabled.enabled, why), (hook.id.clone(), false, reason));
        // Once.
        let settled = store.delivery_settle(&claimed[2], tried(500), verdict, soon()).await.unwrap();
        assert_eq!(settled, Settled::Delivery);
        assert!(store.webhook_target(&hook.id, Timestamp::now()).await.unwrap().is_none());
        assert!(store.delivery_due(soon(), 4, 10).await.unwrap().is_empty());
        let on = WebhookChange { enabled: Some(true), ..Default::default() };
        let enabled = store.webhook_update(&account, &hook.id, &on).await.unwrap().unwrap();
        assert_eq!((enabled.failing_since, enabled.disabled_reason), (None, None));
        store.webhook_delete(&account, &hook.id).await.unwrap();
    }
}

pub(crate) async fn those_with_the_least_under_way_come_first_and_the_busy_not_at_all(db: Db) {
    let store = db.open().await;
    let account = account(&store, "a").await.id;
    let (busy, less, free) = (
        hook(&store, &account, &["*"]).await.id,
        hook(&store, &account, &["*"]).await.id,
        hook(&store, &account, &["*"]).await.id,
    );
    for hook in [&busy, &less, &free] {
        for _ in 0..4 {
            store.webhook_ping(&account, hook).await.unwrap().unwrap();
        }
    }
    let now = Timestamp::now();
    store.delivery_claim(&busy, now, soon(), 3).await.unwrap();
    store.delivery_claim(&less, now, soon(), 1).await.unwrap();
    assert_eq!(store.delivery_due(now, 3, 10).await.unwrap(), [(free.clone(), 0), (less, 1)]);
    assert_eq!(store.delivery_due(now, 3, 1).await.unwrap(), [(free, 0)]);
}

pub(crate) async fn old_deliveries_are_forgotten_and_those_of_webhooks_that_are_gone(db: Db) {
    let store = db.open().await;
    let account = account(&store, "a").await.id;
    let hook = hook(&store, &account, &["*"]).await;
    for _ in 0..4 {
        store.webhook_ping(&account, &hook.id).await.unwrap().unwrap();
    }
    let claimed = claim(&store, &hook.id).await;
    for one in &claimed[..3] {
        store.delivery_settle(one, tried(200), Verdict::Delivered, long_ago()).await.unwrap();
    }
    tamper(&store, "UPDATE webhook_deliveries SET created_at = created_at - 1000 WHERE state = 'delivered'").await;
    assert_eq!(store.webhook_prune(long_ago(), 4).await.unwrap(), 0);
    // What still waits stays, however few are kept.
    assert_eq!(store.webhook_prune(long_ago(), 0).await.unwrap(), 3);
    assert_eq!(store.webhook_prune(soon(), 100).await.unwrap(), 1);
    store.webhook_ping(&account, &hook.id).await.unwrap().unwrap();
    tamper(&store, "DELETE FROM webhooks").await;
    assert_eq!(store.webhook_prune(long_ago(), 100).await.unwrap(), 1);
}

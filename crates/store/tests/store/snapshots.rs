//! Snapshots and forks.

use std::sync::{Arc, Mutex};

use tiffin_store::{
    Forked, Idempotency, Inserted, NewFork, NewSnapshot, NewVm, QuotaExceeded, Snapshot, SnapshotInserted, Store,
    StoreError, Vm,
};
use tiffin_types::{
    account::Quota,
    id::{AccountId, SnapshotId},
    snapshot::{SnapshotEvent, SnapshotState},
    vm::{ProvisionMode, VmEvent, VmState},
};

use crate::fixtures::{Db, QUOTA, SIZE, account, digest, new_vm, race, vm};

pub(crate) fn new_snapshot(of: &Vm) -> NewSnapshot {
    NewSnapshot {
        id: SnapshotId::random(),
        account_id: of.account_id.clone(),
        vm_id: of.id.clone(),
        name: Some("after \"setup\" – ü".to_owned()),
        image_id: of.image_id.clone(),
        image_digest: of.image_digest.clone(),
        kernel_digest: None,
        engine: of.engine,
        size: of.size,
    }
}

async fn snapshot(store: &Store, of: &Vm) -> Snapshot {
    match store.snapshot_insert(&new_snapshot(of), &QUOTA, 100).await.unwrap() {
        SnapshotInserted::New(snapshot) => snapshot,
        other => panic!("{other:?}"),
    }
}

fn new_fork(of: &Vm, count: usize) -> NewFork {
    let snapshot = new_snapshot(of);
    let clone = || NewVm {
        provision_mode: ProvisionMode::Snapshot,
        snapshot_id: Some(snapshot.id.clone()),
        service: None,
        ..new_vm(&of.account_id)
    };
    let vms = (0..count).map(|_| clone()).collect();
    NewFork { snapshot, vms }
}

pub(crate) async fn a_new_snapshot_reads_back_to_its_own_account_alone(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    let of = vm(&store, &ada.id).await;
    let made = snapshot(&store, &of).await;
    assert_eq!((made.state, made.size, made.fork, made.size_bytes), (SnapshotState::Saving, SIZE, false, 0));
    assert_eq!(made.name.as_deref(), Some("after \"setup\" – ü"));
    assert_eq!(store.snapshot_get(&ada.id, &made.id).await.unwrap(), Some(made.clone()));
    assert_eq!(store.snapshot_get(&bob.id, &made.id).await.unwrap(), None);
    assert_eq!(store.snapshot_list(&ada.id).await.unwrap(), std::slice::from_ref(&made));
    assert_eq!(store.snapshot_list(&bob.id).await.unwrap(), []);
    assert_eq!(store.snapshot_all().await.unwrap(), [made]);
    assert_eq!(store.snapshot_counts().await.unwrap(), [(SnapshotState::Saving, 1)]);
    let nobody = NewSnapshot { account_id: AccountId::random(), ..new_snapshot(&of) };
    assert!(matches!(store.snapshot_insert(&nobody, &QUOTA, 100).await, Err(StoreError::Conflict(_))));
}

pub(crate) async fn a_snapshot_goes_through_its_life_by_compare_and_set(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let id = snapshot(&store, &vm(&store, &ada.id).await).await.id;
    let ready = store.snapshot_saved(&id, 5_000_000_000).await.unwrap().unwrap();
    assert_eq!((ready.state, ready.size_bytes), (SnapshotState::Ready, 5_000_000_000));
    assert_eq!(store.snapshot_saved(&id, 1).await.unwrap(), None, "it is not SAVING any more");
    let refused = store.snapshot_transition(&id, SnapshotState::Ready, SnapshotEvent::Saved).await;
    assert!(matches!(refused, Err(StoreError::Conflict(_))));
    for (event, to) in [
        (SnapshotEvent::Lost, SnapshotState::Lost),
        (SnapshotEvent::Found, SnapshotState::Ready),
        (SnapshotEvent::Remove, SnapshotState::Deleting),
    ] {
        let from = store.snapshot_get(&ada.id, &id).await.unwrap().unwrap().state;
        let moved = store.snapshot_transition(&id, from, event).await.unwrap().unwrap();
        assert_eq!((moved.state, moved.size_bytes), (to, 5_000_000_000));
        assert_eq!(store.snapshot_transition(&id, from, event).await.unwrap(), None, "one wins");
    }
}

pub(crate) async fn only_what_is_deleting_is_forgotten(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let made = snapshot(&store, &vm(&store, &ada.id).await).await;
    store.snapshot_forget(&made.id).await.unwrap();
    assert_eq!(store.snapshot_all().await.unwrap().len(), 1);
    store.snapshot_transition(&made.id, made.state, SnapshotEvent::Remove).await.unwrap().unwrap();
    store.snapshot_forget(&made.id).await.unwrap();
    store.snapshot_forget(&made.id).await.expect("forgetting what is forgotten is fine");
    assert_eq!(store.snapshot_all().await.unwrap(), []);
}

pub(crate) async fn a_snapshot_counts_for_the_disk_by_what_it_may_take_then_by_what_it_takes(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let of = vm(&store, &ada.id).await;
    let disk = async || store.vm_usage(&ada.id).await.unwrap().disk_mb;
    let made = snapshot(&store, &of).await;
    assert_eq!(disk().await, 1024 + 2048);
    store.snapshot_saved(&made.id, (7 << 20) + 1).await.unwrap().unwrap();
    assert_eq!(disk().await, 1024 + 8);
    let tight = Quota { disk_mb: 1024 + 8 + 2047, ..QUOTA };
    let refused = store.snapshot_insert(&new_snapshot(&of), &tight, 100).await.unwrap();
    let exceeded = QuotaExceeded { what: "diskMb", limit: 1024 + 8 + 2047, used: 1024 + 8, asked: 2048 };
    assert_eq!(refused, SnapshotInserted::OverQuota(exceeded));
    let no_room = Quota { disk_mb: 1024 + 1024, ..QUOTA };
    assert!(matches!(store.vm_insert(&new_vm(&ada.id), &no_room, None).await.unwrap(), Inserted::OverQuota(_)));
    store.snapshot_transition(&made.id, SnapshotState::Ready, SnapshotEvent::Remove).await.unwrap().unwrap();
    assert_eq!(disk().await, 1024 + 8, "until its files are gone");
    store.snapshot_forget(&made.id).await.unwrap();
    assert_eq!(disk().await, 1024);
}

pub(crate) async fn of_inserts_at_once_exactly_as_many_as_allowed_succeed(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    let ada = account(&one, "ada").await;
    let of = vm(&one, &ada.id).await;
    let wide = Quota { disk_mb: 1_000_000, ..QUOTA };
    let results = race([&one, &other], 12, |store, _| {
        let new = new_snapshot(&of);
        async move { store.snapshot_insert(&new, &wide, 3).await.unwrap() }
    })
    .await;
    assert_eq!(results.iter().filter(|result| matches!(result, SnapshotInserted::New(_))).count(), 3);
    let refused = SnapshotInserted::OverQuota(QuotaExceeded { what: "snapshots", limit: 3, used: 3, asked: 1 });
    assert_eq!(results.iter().filter(|result| **result == refused).count(), 9);
}

pub(crate) async fn a_snapshots_image_stays_in_use(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let of = vm(&store, &ada.id).await;
    let made = snapshot(&store, &of).await;
    store.vm_transition(&of.id, VmState::Created, VmEvent::Delete, Default::default()).await.unwrap().unwrap();
    assert_eq!(store.digests_in_use().await.unwrap(), [digest(1)]);
    store.snapshot_transition(&made.id, made.state, SnapshotEvent::Remove).await.unwrap().unwrap();
    assert_eq!(store.digests_in_use().await.unwrap(), [digest(1)]);
    store.snapshot_forget(&made.id).await.unwrap();
    assert_eq!(store.digests_in_use().await.unwrap(), []);
}

pub(crate) async fn a_fork_is_made_whole_or_not_at_all(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let of = vm(&store, &ada.id).await;
    let parts = [
        (Quota { vms: 3, ..QUOTA }, QuotaExceeded { what: "vms", limit: 3, used: 1, asked: 3 }),
        (Quota { cpus: 3, ..QUOTA }, QuotaExceeded { what: "cpus", limit: 3, used: 1, asked: 3 }),
        (Quota { mem_mb: 4095, ..QUOTA }, QuotaExceeded { what: "memMb", limit: 4095, used: 1024, asked: 3072 }),
        (Quota { disk_mb: 4095, ..QUOTA }, QuotaExceeded { what: "diskMb", limit: 4095, used: 1024, asked: 3072 }),
    ];
    for (quota, exceeded) in parts {
        let refused = store.fork_insert(&new_fork(&of, 3), &quota, None).await.unwrap();
        assert_eq!(refused, Forked::OverQuota(exceeded));
        assert_eq!(store.vm_list(&ada.id).await.unwrap().len(), 1);
        assert_eq!(store.snapshot_all().await.unwrap(), []);
    }
    let exact = Quota { vms: 4, cpus: 4, mem_mb: 4096, disk_mb: 4096 };
    let new = new_fork(&of, 3);
    let Forked::New(clones) = store.fork_insert(&new, &exact, None).await.unwrap() else { panic!("it fits") };
    assert!(clones.iter().all(|clone| clone.state == VmState::Created));
    assert!(clones.iter().all(|clone| clone.snapshot_id.as_ref() == Some(&new.snapshot.id)));
    let recorded = store.snapshot_all().await.unwrap();
    assert!(recorded.len() == 1 && recorded[0].fork && recorded[0].state == SnapshotState::Saving);
    assert_eq!(store.snapshot_get(&ada.id, &new.snapshot.id).await.unwrap(), None, "it is nobody's to see");
    assert_eq!(store.snapshot_list(&ada.id).await.unwrap(), []);
    let mut listed = store.vm_list_of_snapshot(&new.snapshot.id).await.unwrap();
    listed.sort_by(|a, b| a.id.cmp(&b.id));
    let mut made = clones;
    made.sort_by(|a, b| a.id.cmp(&b.id));
    assert_eq!(listed, made);
}

pub(crate) async fn a_fork_is_done_in_one_moment_or_not(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let of = vm(&store, &ada.id).await;
    for deleted_meanwhile in [true, false] {
        let new = new_fork(&of, 3);
        let id = new.snapshot.id.clone();
        let Forked::New(clones) = store.fork_insert(&new, &QUOTA, None).await.unwrap() else { panic!("it fits") };
        let mut starting = Vec::new();
        for clone in clones {
            let moved = store.vm_transition(&clone.id, clone.state, VmEvent::Start, Default::default()).await.unwrap();
            starting.push(moved.unwrap());
        }
        assert_eq!(store.fork_commit(&id, &starting).await.unwrap(), None, "it isn't saved yet");
        store.snapshot_saved(&id, 1).await.unwrap().unwrap();
        if deleted_meanwhile {
            let last = &starting[2];
            store.vm_transition(&last.id, last.state, VmEvent::Delete, Default::default()).await.unwrap().unwrap();
            assert_eq!(store.fork_commit(&id, &starting).await.unwrap(), None);
            let now = store.vm_get(&ada.id, &starting[0].id).await.unwrap().unwrap();
            assert_eq!(now.state, VmState::Starting, "nothing is changed");
        } else {
            let told = Arc::new(Mutex::new(Vec::new()));
            let heard = Arc::clone(&told);
            store.watch_vms(move |vm| heard.lock().unwrap().push((vm.id.clone(), vm.state)));
            let running = store.fork_commit(&id, &starting).await.unwrap().unwrap();
            let expected: Vec<_> = running.iter().map(|clone| (clone.id.clone(), VmState::Running)).collect();
            assert_eq!(*told.lock().unwrap(), expected);
            assert!(running.iter().all(|clone| clone.state == VmState::Running && clone.started_at.is_some()));
            let of_this = store.snapshot_all().await.unwrap().into_iter().find(|snapshot| snapshot.id == id).unwrap();
            assert_eq!(of_this.state, SnapshotState::Deleting);
        }
    }
}

pub(crate) async fn a_fork_with_a_key_is_made_once(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    let ada = account(&one, "ada").await;
    let of = vm(&one, &ada.id).await;
    let results = race([&one, &other], 8, |store, _| {
        let new = new_fork(&of, 2);
        async move {
            let asked = Idempotency { key: "k", request_sha256: [1; 32] };
            store.fork_insert(&new, &QUOTA, Some(asked)).await.unwrap()
        }
    })
    .await;
    assert_eq!(results.iter().filter(|result| matches!(result, Forked::New(_))).count(), 1);
    for result in &results {
        let (Forked::New(clones) | Forked::Replay(clones)) = result else { panic!("{result:?}") };
        assert_eq!(clones.len(), 2);
    }
    assert_eq!(one.vm_list(&ada.id).await.unwrap().len(), 3);
    let asked = Idempotency { key: "k", request_sha256: [2; 32] };
    assert_eq!(one.fork_insert(&new_fork(&of, 2), &QUOTA, Some(asked)).await.unwrap(), Forked::KeyReused);
}

pub(crate) async fn a_vm_that_runs_already_begins_as_running_within_the_quota(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let one = Quota { vms: 1, ..QUOTA };
    let asked = || Some(Idempotency { key: "k", request_sha256: [1; 32] });
    let Inserted::New(made) = store.vm_insert_running(&new_vm(&ada.id), &one, asked()).await.unwrap() else {
        panic!("it fits")
    };
    assert_eq!((made.state, made.started_at), (VmState::Running, Some(made.created_at)));
    assert_eq!(store.vm_get(&ada.id, &made.id).await.unwrap(), Some(made.clone()));
    assert_eq!(store.vm_insert_running(&new_vm(&ada.id), &one, asked()).await.unwrap(), Inserted::Replay(made));
    assert!(matches!(store.vm_insert_running(&new_vm(&ada.id), &one, None).await.unwrap(), Inserted::OverQuota(_)));
}

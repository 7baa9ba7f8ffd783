//! Idempotency keys of creates.

use tiffin_store::{Change, Idempotency, Inserted, Store, Vm};
use tiffin_types::{
    account::Quota,
    id::AccountId,
    time::Timestamp,
    vm::{VmEvent, VmState},
};

use crate::fixtures::{Db, QUOTA, account, new_vm, race};

async fn insert(store: &Store, account: &AccountId, key: &str, request: u8) -> Inserted {
    let idempotency = Idempotency { key, request_sha256: [request; 32] };
    store.vm_insert(&new_vm(account), &QUOTA, Some(idempotency)).await.unwrap()
}

fn made(inserted: Inserted) -> Vm {
    match inserted {
        Inserted::New(vm) => vm,
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn the_same_request_again_gets_the_same_vm(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let vm = made(insert(&store, &ada.id, "k", 1).await);
    assert_eq!(insert(&store, &ada.id, "k", 1).await, Inserted::Replay(vm.clone()));
    let deleted = store.vm_transition(&vm.id, VmState::Created, VmEvent::Delete, Change::default()).await.unwrap();
    assert_eq!(insert(&store, &ada.id, "k", 1).await, Inserted::Replay(deleted.unwrap()));
    assert_eq!(store.vm_list(&ada.id).await.unwrap(), []);
}

pub(crate) async fn a_key_of_another_request_is_refused(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    made(insert(&store, &ada.id, "k", 1).await);
    assert_eq!(insert(&store, &ada.id, "k", 2).await, Inserted::KeyReused);
    made(insert(&store, &ada.id, "K", 2).await);
    assert_eq!(store.vm_list(&ada.id).await.unwrap().len(), 2);
}

pub(crate) async fn a_key_is_its_accounts_own(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    made(insert(&store, &ada.id, "k", 1).await);
    assert_eq!(made(insert(&store, &bob.id, "k", 1).await).account_id, bob.id);
}

pub(crate) async fn of_requests_with_one_key_at_once_one_makes_the_vm(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    let ada = account(&one, "ada").await;
    let results = race([&one, &other], 16, |store, _| {
        let account = ada.id.clone();
        async move { insert(&store, &account, "k", 1).await }
    })
    .await;
    let vm = one.vm_list(&ada.id).await.unwrap().pop().unwrap();
    assert_eq!(results.iter().filter(|result| **result == Inserted::New(vm.clone())).count(), 1);
    assert_eq!(results.iter().filter(|result| **result == Inserted::Replay(vm.clone())).count(), 15);
}

pub(crate) async fn a_refused_request_leaves_its_key_unused(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let idempotency = Idempotency { key: "k", request_sha256: [1; 32] };
    let none = Quota { vms: 0, ..QUOTA };
    let refused = store.vm_insert(&new_vm(&ada.id), &none, Some(idempotency)).await.unwrap();
    assert!(matches!(refused, Inserted::OverQuota(_)));
    made(insert(&store, &ada.id, "k", 2).await);
}

pub(crate) async fn pruned_keys_are_forgotten(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let vm = made(insert(&store, &ada.id, "k", 1).await);
    assert_eq!(store.idempotency_prune(vm.created_at).await.unwrap(), 0);
    assert_eq!(insert(&store, &ada.id, "k", 2).await, Inserted::KeyReused);
    assert_eq!(store.idempotency_prune(Timestamp::now().plus_millis(1)).await.unwrap(), 1);
    assert_ne!(made(insert(&store, &ada.id, "k", 2).await).id, vm.id);
}

//! Quotas: what counts, and that no race goes over them.

use tiffin_store::{Change, Inserted, QuotaExceeded, Reserve, Store, Vm};
use tiffin_types::{
    account::{Quota, Usage},
    vm::{VmEvent, VmState},
};

use crate::fixtures::{Db, QUOTA, SIZE, account, new_vm, race, vm};

const WIDE: Quota = Quota { vms: 1000, cpus: 1000, mem_mb: 1_000_000, disk_mb: 1_000_000 };

async fn moved(store: &Store, vm: &Vm, events: &[VmEvent]) -> Vm {
    let mut vm = vm.clone();
    for event in events {
        vm = store.vm_transition(&vm.id, vm.state, *event, Change::default()).await.unwrap().unwrap();
    }
    vm
}

const TO_STOPPED: [VmEvent; 4] = [VmEvent::Start, VmEvent::Ready, VmEvent::Stop, VmEvent::Ended];

pub(crate) async fn of_32_inserts_at_once_exactly_the_quota_succeeds(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    let ada = account(&one, "ada").await;
    let quota = Quota { vms: 10, ..WIDE };
    let results = race([&one, &other], 32, |store, _| {
        let new = new_vm(&ada.id);
        async move { store.vm_insert(&new, &quota, None).await.unwrap() }
    })
    .await;
    let made = results.iter().filter(|result| matches!(result, Inserted::New(_))).count();
    let refused = Inserted::OverQuota(QuotaExceeded { what: "vms", limit: 10, used: 10, asked: 1 });
    assert_eq!(made, 10);
    assert_eq!(results.iter().filter(|result| **result == refused).count(), 22);
    assert_eq!(one.vm_list(&ada.id).await.unwrap().len(), 10);
}

pub(crate) async fn a_vm_that_is_down_counts_for_disk_and_number_only(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    assert_eq!(store.vm_usage(&ada.id).await.unwrap(), Usage::default());
    let up = Usage { vms: 1, cpus: 1, mem_mb: 1024, disk_mb: 1024 };
    let down = Usage { cpus: 0, mem_mb: 0, ..up };
    let mut vm = vm(&store, &ada.id).await;
    assert_eq!(store.vm_usage(&ada.id).await.unwrap(), up);
    let life = [
        (VmEvent::Start, up),
        (VmEvent::Ready, up),
        (VmEvent::Pause, up),
        (VmEvent::Stop, up),
        (VmEvent::Ended, down),
        (VmEvent::Start, up),
        (VmEvent::Fail, down),
        (VmEvent::Delete, Usage::default()),
    ];
    for (event, expected) in life {
        vm = moved(&store, &vm, &[event]).await;
        assert_eq!(store.vm_usage(&ada.id).await.unwrap(), expected, "after {event:?}");
    }
}

pub(crate) async fn each_part_of_the_quota_is_enforced_by_name(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    vm(&store, &ada.id).await;
    let tight = [
        (Quota { vms: 1, ..WIDE }, QuotaExceeded { what: "vms", limit: 1, used: 1, asked: 1 }),
        (Quota { cpus: 1, ..WIDE }, QuotaExceeded { what: "cpus", limit: 1, used: 1, asked: 1 }),
        (Quota { mem_mb: 2047, ..WIDE }, QuotaExceeded { what: "memMb", limit: 2047, used: 1024, asked: 1024 }),
        (Quota { disk_mb: 2047, ..WIDE }, QuotaExceeded { what: "diskMb", limit: 2047, used: 1024, asked: 1024 }),
    ];
    for (quota, exceeded) in tight {
        let refused = store.vm_insert(&new_vm(&ada.id), &quota, None).await.unwrap();
        assert_eq!(refused, Inserted::OverQuota(exceeded));
    }
    let exact = Quota { vms: 2, cpus: 2, mem_mb: 2048, disk_mb: 2048 };
    assert!(matches!(store.vm_insert(&new_vm(&ada.id), &exact, None).await.unwrap(), Inserted::New(_)));
}

pub(crate) async fn a_start_over_the_quota_changes_nothing(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let stopped = moved(&store, &vm(&store, &ada.id).await, &TO_STOPPED).await;
    vm(&store, &ada.id).await;
    let one_up = Quota { mem_mb: 1024, ..WIDE };
    let refused = store.vm_start_reserve(&stopped.id, VmState::Stopped, &one_up).await.unwrap();
    let exceeded = QuotaExceeded { what: "memMb", limit: 1024, used: 1024, asked: SIZE.mem_mb.into() };
    assert_eq!(refused, Reserve::OverQuota(exceeded));
    assert_eq!(store.vm_get(&ada.id, &stopped.id).await.unwrap(), Some(stopped.clone()));
    // Fewer VMs and less disk allowed than there are: no reason against a start.
    let crowded = Quota { vms: 0, disk_mb: 0, ..WIDE };
    let reserved = store.vm_start_reserve(&stopped.id, VmState::Stopped, &crowded).await.unwrap();
    assert!(matches!(reserved, Reserve::Reserved(vm) if vm.state == VmState::Starting));
    let late = store.vm_start_reserve(&stopped.id, VmState::Stopped, &WIDE).await.unwrap();
    assert_eq!(late, Reserve::Lost);
}

pub(crate) async fn of_starts_at_once_only_what_fits_succeeds(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    let ada = account(&one, "ada").await;
    let three_up = Quota { cpus: 3, ..WIDE };
    // Rounds, because a broken lock may get away with one.
    for _ in 0..5 {
        let mut ids = Vec::new();
        for _ in 0..8 {
            ids.push(moved(&one, &vm(&one, &ada.id).await, &TO_STOPPED).await.id);
        }
        let results = race([&one, &other], 8, |store, number| {
            let id = ids[number].clone();
            async move { store.vm_start_reserve(&id, VmState::Stopped, &three_up).await.unwrap() }
        })
        .await;
        assert_eq!(results.iter().filter(|result| matches!(result, Reserve::Reserved(_))).count(), 3);
        assert_eq!(results.iter().filter(|result| matches!(result, Reserve::OverQuota(_))).count(), 5);
        assert_eq!(one.vm_usage(&ada.id).await.unwrap().cpus, 3);
        for left in one.vm_list(&ada.id).await.unwrap() {
            moved(&one, &left, &[VmEvent::Delete]).await;
        }
    }
}

pub(crate) async fn a_new_vm_does_not_count_twice_when_it_starts(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let just_one = Quota { vms: 1, cpus: 1, mem_mb: 1024, disk_mb: 1024 };
    let Inserted::New(vm) = store.vm_insert(&new_vm(&ada.id), &just_one, None).await.unwrap() else { panic!() };
    let reserved = store.vm_start_reserve(&vm.id, VmState::Created, &just_one).await.unwrap();
    assert!(matches!(reserved, Reserve::Reserved(_)));
}

pub(crate) async fn accounts_do_not_share_a_quota(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    for _ in 0..10 {
        vm(&store, &ada.id).await;
    }
    assert!(matches!(store.vm_insert(&new_vm(&ada.id), &QUOTA, None).await.unwrap(), Inserted::OverQuota(_)));
    assert!(matches!(store.vm_insert(&new_vm(&bob.id), &QUOTA, None).await.unwrap(), Inserted::New(_)));
}

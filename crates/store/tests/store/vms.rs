//! VMs: their records and transitions.

use tiffin_store::{Change, Desired, Inserted, NewVm, Reserve, Store, StoreError, Vm, VmCursor, VmFilter};
use tiffin_types::{
    id::{AccountId, ImageId, VmId},
    vm::{EndReason, EndReport, Lifetime, ProvisionMode, Service, VmEvent, VmSize, VmState},
};

use crate::fixtures::{Db, QUOTA, account, new_vm, race, tamper, vm};

async fn moved(store: &Store, vm: &Vm, event: VmEvent, change: Change) -> Vm {
    store.vm_transition(&vm.id, vm.state, event, change).await.unwrap().expect("nobody else moves it")
}

fn oom() -> EndReport {
    EndReport { reason: EndReason::Oom, message: "used over 1024 MiB\0".to_owned(), exit_code: Some(137) }
}

pub(crate) async fn a_new_vm_reads_back_to_its_own_account_alone(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    let made = vm(&store, &ada.id).await;
    assert_eq!((made.state, made.desired), (VmState::Created, Desired::Running));
    assert_eq!(made.egress, new_vm(&ada.id).egress);
    assert_eq!(made.created_at, made.updated_at);
    assert_eq!(store.vm_get(&ada.id, &made.id).await.unwrap(), Some(made.clone()));
    assert_eq!(store.vm_get(&bob.id, &made.id).await.unwrap(), None);
    assert_eq!(store.vm_list(&ada.id).await.unwrap(), [made]);
    assert_eq!(store.vm_list(&bob.id).await.unwrap(), []);
}

pub(crate) async fn a_vm_goes_through_its_life_with_times_and_end(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let made = vm(&store, &ada.id).await;
    let Reserve::Reserved(starting) = store.vm_start_reserve(&made.id, made.state, &QUOTA).await.unwrap() else {
        panic!()
    };
    assert_eq!((starting.state, starting.started_at), (VmState::Starting, None));
    let snapshot = Change { provision_mode: Some(ProvisionMode::Snapshot), ..Change::default() };
    let running = moved(&store, &starting, VmEvent::Ready, snapshot).await;
    assert_eq!((running.state, running.provision_mode), (VmState::Running, ProvisionMode::Snapshot));
    assert!(running.started_at.is_some_and(|at| at >= made.created_at && at == running.updated_at));
    let failed = moved(&store, &running, VmEvent::Fail, Change { end: Some(Some(oom())), ..Change::default() }).await;
    assert_eq!((failed.state, failed.end), (VmState::Error, Some(oom())));
    assert_eq!((failed.started_at, failed.provision_mode), (running.started_at, ProvisionMode::Snapshot));
    let Reserve::Reserved(again) = store.vm_start_reserve(&made.id, VmState::Error, &QUOTA).await.unwrap() else {
        panic!()
    };
    assert_eq!(again.end, None);
    let deleted = moved(&store, &again, VmEvent::Delete, Change::default()).await;
    assert_eq!((deleted.state, deleted.desired), (VmState::Deleted, Desired::Deleted));
    assert!(deleted.deleted_at.is_some());
    assert_eq!(store.vm_get(&ada.id, &made.id).await.unwrap(), Some(deleted));
}

pub(crate) async fn of_two_that_move_a_vm_one_wins(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    let ada = account(&one, "ada").await;
    for _ in 0..5 {
        let made = vm(&one, &ada.id).await;
        let results = race([&one, &other], 2, |store, number| {
            let id = made.id.clone();
            let event = [VmEvent::Start, VmEvent::Delete][number];
            async move { store.vm_transition(&id, VmState::Created, event, Change::default()).await.unwrap() }
        })
        .await;
        let won: Vec<Vm> = results.into_iter().flatten().collect();
        assert_eq!(won.len(), 1);
        assert_eq!(one.vm_get(&ada.id, &made.id).await.unwrap().as_ref(), won.first());
    }
    let unknown =
        one.vm_transition(&VmId::random(), VmState::Created, VmEvent::Start, Change::default()).await.unwrap();
    assert_eq!(unknown, None);
}

pub(crate) async fn a_transition_that_the_table_refuses_is_a_conflict(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let made = vm(&store, &ada.id).await;
    let refused = store.vm_transition(&made.id, VmState::Created, VmEvent::Pause, Change::default()).await;
    assert!(matches!(refused, Err(StoreError::Conflict(why)) if why.contains(made.id.as_str())));
    let refused = store.vm_start_reserve(&made.id, VmState::Running, &QUOTA).await;
    assert!(matches!(refused, Err(StoreError::Conflict(_))));
    assert_eq!(store.vm_get(&ada.id, &made.id).await.unwrap(), Some(made));
}

pub(crate) async fn a_vm_to_be_deleted_stays_so_and_does_not_start(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let created = vm(&store, &ada.id).await;
    let starting = moved(&store, &created, VmEvent::Start, Change::default()).await;
    let stopped = store.vm_set_desired(&created.id, Desired::Stopped).await.unwrap().unwrap();
    assert_eq!((stopped.state, stopped.desired), (VmState::Starting, Desired::Stopped));
    store.vm_set_desired(&created.id, Desired::Deleted).await.unwrap().unwrap();
    assert!(store.vm_set_desired(&created.id, Desired::Deleted).await.unwrap().is_some());
    assert_eq!(store.vm_set_desired(&created.id, Desired::Running).await.unwrap(), None);
    let wants_running = Change { desired: Some(Desired::Running), ..Change::default() };
    let failed = moved(&store, &starting, VmEvent::Fail, wants_running.clone()).await;
    assert_eq!((failed.state, failed.desired), (VmState::Error, Desired::Deleted));
    assert_eq!(store.vm_start_reserve(&created.id, VmState::Error, &QUOTA).await.unwrap(), Reserve::Lost);
    let started = store.vm_transition(&created.id, VmState::Error, VmEvent::Start, wants_running).await.unwrap();
    assert_eq!(started, None);
    moved(&store, &failed, VmEvent::Delete, Change::default()).await;
    assert_eq!(store.vm_set_desired(&created.id, Desired::Deleted).await.unwrap(), None);
}

pub(crate) async fn deleted_vms_are_kept_but_not_listed(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    let gone = vm(&store, &ada.id).await;
    let stays = vm(&store, &ada.id).await;
    let bobs = vm(&store, &bob.id).await;
    let gone = moved(&store, &gone, VmEvent::Delete, Change::default()).await;
    assert_eq!(store.vm_list(&ada.id).await.unwrap(), std::slice::from_ref(&stays));
    let everybodys: Vec<VmId> = store.vm_not_deleted().await.unwrap().into_iter().map(|vm| vm.id).collect();
    assert_eq!(everybodys.len(), 2);
    assert!(everybodys.contains(&stays.id) && everybodys.contains(&bobs.id));
    assert_eq!(store.vm_get(&ada.id, &gone.id).await.unwrap(), Some(gone));
}

pub(crate) async fn vms_are_counted_by_state(db: Db) {
    let store = db.open().await;
    assert_eq!(store.vm_counts().await.unwrap(), []);
    let ada = account(&store, "ada").await;
    for _ in 0..3 {
        vm(&store, &ada.id).await;
    }
    let gone = vm(&store, &ada.id).await;
    moved(&store, &gone, VmEvent::Delete, Change::default()).await;
    assert_eq!(store.vm_counts().await.unwrap(), [(VmState::Created, 3), (VmState::Deleted, 1)]);
}

pub(crate) async fn a_corrupt_vm_is_an_error_that_names_it(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let made = vm(&store, &ada.id).await;
    let corruptions = [
        ("vms.isolation", "UPDATE vms SET isolation = 'wishful'", "UPDATE vms SET isolation = 'none'"),
        ("vms.end_report", "UPDATE vms SET end_report = '{}'", "UPDATE vms SET end_report = NULL"),
        ("vms.image_digest", "UPDATE vms SET image_digest = '../../etc'", "UPDATE vms SET image_digest = 'x'"),
    ];
    for (column, corrupt, repair) in corruptions {
        tamper(&store, corrupt).await;
        for result in [store.vm_get(&ada.id, &made.id).await.map(drop), store.vm_not_deleted().await.map(drop)] {
            let StoreError::Corrupt(why) = result.unwrap_err() else { panic!() };
            assert!(why.contains(column) && why.contains(made.id.as_str()), "{why}");
        }
        tamper(&store, repair).await;
    }
    let refused = sqlx::query("UPDATE vms SET state = 'LIMBO'").execute(store.pool()).await;
    assert!(refused.is_err(), "the database itself refuses an unknown state");
}

pub(crate) async fn a_vm_needs_an_account_and_a_free_id(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let made = vm(&store, &ada.id).await;
    let taken = NewVm { id: made.id.clone(), ..new_vm(&ada.id) };
    let nobodys = new_vm(&AccountId::random());
    let empty = NewVm { size: VmSize { cpus: 0, mem_mb: 1, disk_mb: 1 }, ..new_vm(&ada.id) };
    for refused in [taken, nobodys, empty] {
        assert!(matches!(store.vm_insert(&refused, &QUOTA, None).await, Err(StoreError::Conflict(_))));
    }
    assert_eq!(store.vm_list(&ada.id).await.unwrap(), [made]);
}

pub(crate) async fn what_a_vm_serves_reads_back_and_a_cached_one_is_made_to_be_down(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let sandbox = vm(&store, &ada.id).await;
    assert_eq!(sandbox.service, None);
    for (service, desired) in [
        (Service { lifetime: Lifetime::OneTime, port: Some(8080), volume_gb: None }, Desired::Running),
        (Service { lifetime: Lifetime::Cached, port: None, volume_gb: Some(3) }, Desired::Stopped),
    ] {
        let new = NewVm { service: Some(service), ..new_vm(&ada.id) };
        let Inserted::New(made) = store.vm_insert(&new, &QUOTA, None).await.unwrap() else { panic!() };
        assert_eq!((made.service, made.desired), (Some(service), desired));
        assert!(made.host_label.is_some() && made.host_label != sandbox.host_label);
        let prepared = moved(&store, &made, VmEvent::Prepared, Change::default()).await;
        assert_eq!((prepared.state, prepared.started_at), (VmState::Stopped, None));
        assert_eq!(store.vm_get(&ada.id, &made.id).await.unwrap(), Some(prepared));
    }
}

pub(crate) async fn pages_tell_every_vm_once_whatever_is_made_meanwhile(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    vm(&store, &bob.id).await;
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(vm(&store, &ada.id).await);
    }
    let gone = moved(&store, &made[2], VmEvent::Delete, Change::default()).await;
    let filter = VmFilter { image_id: None, states: VmState::ALL.to_vec() };
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = store.vm_page(&ada.id, &filter, after.as_ref(), 2).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(VmCursor { created_at: last.created_at, id: last.id.clone() });
        seen.extend(page);
        vm(&store, &ada.id).await;
    }
    let mut expected: Vec<Vm> =
        made.iter().map(|vm| if vm.id == gone.id { gone.clone() } else { vm.clone() }).collect();
    expected.sort_by(|one, other| (other.created_at, &other.id).cmp(&(one.created_at, &one.id)));
    assert_eq!(seen, expected);

    let deleted = VmFilter { states: vec![VmState::Deleted], ..filter.clone() };
    assert_eq!(store.vm_page(&ada.id, &deleted, None, 10).await.unwrap(), [gone]);
    let of_image = VmFilter { image_id: Some(made[0].image_id.clone()), ..filter.clone() };
    assert_eq!(store.vm_page(&ada.id, &of_image, None, 10).await.unwrap(), [made[0].clone()]);
    let of_none = VmFilter { image_id: Some(ImageId::random()), ..filter };
    assert_eq!(store.vm_page(&ada.id, &of_none, None, 10).await.unwrap(), []);
}

//! The audit trail, and what was run.

use std::sync::{Arc, Mutex};

use tiffin_store::{Activity, Change, ExecKind, ExecLog, ExecOutcome, Performer, PerformerKind};
use tiffin_types::{
    id::{AccountId, VmId},
    time::Timestamp,
    vm::{VmEvent, VmState},
};

use crate::fixtures::{Db, account, vm};

fn key() -> Performer {
    Performer { kind: PerformerKind::Key, id: Some("key-1".into()), name: Some("ci".into()) }
}

fn entry(number: u32) -> Activity {
    Activity {
        id: format!("{number:026}"),
        at: Timestamp::from_millis(i64::from(number) * 1000),
        event: "vm_create".into(),
        actor: key(),
        account_id: Some(AccountId::random()),
        target: Some("vm-0123456789abcd".into()),
        status: Some(201),
        request_id: Some("req-1".into()),
        peer: Some("192.0.2.1".into()),
        details: Some(serde_json::json!({ "state": "RUNNING" })),
        is_lasting: false,
    }
}

fn bare(number: u32) -> Activity {
    let nobody = Performer { kind: PerformerKind::Anonymous, id: None, name: None };
    let whole = entry(number);
    Activity {
        actor: nobody,
        account_id: None,
        target: None,
        status: None,
        request_id: None,
        peer: None,
        details: None,
        ..whole
    }
}

fn run(number: u32, vm: &VmId, kind: ExecKind) -> ExecLog {
    ExecLog {
        id: format!("{number:026}"),
        vm_id: vm.clone(),
        at: Timestamp::from_millis(i64::from(number) * 1000),
        kind,
        outcome: ExecOutcome::Exited,
        exit_code: Some(-1),
        duration_ms: 12,
        truncated: true,
        actor: key(),
        request_id: None,
        command: None,
    }
}

fn ids(list: &[Activity]) -> Vec<u32> {
    list.iter().map(|entry| entry.id.parse().unwrap()).collect()
}

pub(crate) async fn entries_read_back_newest_first_and_in_pages(db: Db) {
    let store = db.open().await;
    let all: Vec<Activity> = (1..=5).map(|number| if number == 3 { bare(3) } else { entry(number) }).collect();
    store.journal_write(&all, &[], 10).await.unwrap();
    store.journal_write(&all[..2], &[], 10).await.unwrap();
    let listed = store.activity_list(10, None).await.unwrap();
    assert_eq!(listed.iter().rev().cloned().collect::<Vec<_>>(), all);
    let page = store.activity_list(2, None).await.unwrap();
    assert_eq!(ids(&page), [5, 4]);
    assert_eq!(ids(&store.activity_list(2, Some(&page[1].id)).await.unwrap()), [3, 2]);
    assert_eq!(ids(&store.activity_after(&page[1].id, 10).await.unwrap()), [5]);
    assert_eq!(ids(&store.activity_after("", 2).await.unwrap()), [1, 2]);
}

pub(crate) async fn old_entries_are_forgotten_by_age_and_by_number(db: Db) {
    let store = db.open().await;
    let (all, vm) = ((1..=9).map(entry).collect::<Vec<_>>(), VmId::random());
    store.journal_write(&all, &[run(1, &vm, ExecKind::Exec), run(5, &vm, ExecKind::Exec)], 10).await.unwrap();
    assert_eq!(store.journal_prune(Timestamp::from_millis(3000), 100).await.unwrap(), 3);
    assert_eq!(ids(&store.activity_list(100, None).await.unwrap()), [9, 8, 7, 6, 5, 4, 3]);
    assert_eq!(store.journal_prune(Timestamp::from_millis(0), 2).await.unwrap(), 5);
    assert_eq!(ids(&store.activity_list(100, None).await.unwrap()), [9, 8]);
    assert_eq!(store.exec_log_list(&vm, 10, None).await.unwrap().len(), 1);
}

pub(crate) async fn lasting_entries_are_forgotten_by_age_alone_and_crowd_nobody_out(db: Db) {
    let store = db.open().await;
    let all: Vec<Activity> = (1..=9).map(|number| Activity { is_lasting: number <= 4, ..entry(number) }).collect();
    store.journal_write(&all, &[], 10).await.unwrap();
    assert_eq!(store.activity_list(100, None).await.unwrap().last(), Some(&all[0]));
    assert_eq!(store.journal_prune(Timestamp::from_millis(0), 5).await.unwrap(), 0);
    assert_eq!(store.journal_prune(Timestamp::from_millis(0), 2).await.unwrap(), 3);
    assert_eq!(ids(&store.activity_list(100, None).await.unwrap()), [9, 8, 4, 3, 2, 1]);
    assert_eq!(store.journal_prune(Timestamp::from_millis(3000), 2).await.unwrap(), 2);
    assert_eq!(ids(&store.activity_list(100, None).await.unwrap()), [9, 8, 4, 3]);
}

pub(crate) async fn runs_are_kept_by_vm_the_newest_of_them(db: Db) {
    let store = db.open().await;
    let (one, other) = (VmId::random(), VmId::random());
    let mut runs: Vec<ExecLog> = (1..=5).map(|number| run(number, &one, ExecKind::Exec)).collect();
    runs[3] = ExecLog { kind: ExecKind::RunTs, exit_code: None, command: Some("x".into()), ..runs[3].clone() };
    runs.push(run(6, &other, ExecKind::RunJs));
    store.journal_write(&[], &runs, 3).await.unwrap();
    let kept = store.exec_log_list(&one, 10, None).await.unwrap();
    assert_eq!(kept, [runs[4].clone(), runs[3].clone(), runs[2].clone()]);
    assert_eq!(store.exec_log_list(&one, 1, None).await.unwrap(), kept[..1]);
    assert_eq!(store.exec_log_list(&one, 10, Some(ExecKind::RunTs)).await.unwrap(), kept[1..2]);
    assert_eq!(store.exec_log_list(&other, 10, None).await.unwrap().len(), 1);
}

pub(crate) async fn every_change_of_a_vm_is_told_and_the_figures_count_it(db: Db) {
    let store = db.open().await;
    let owner = account(&store, "ada").await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&seen);
    store.watch_vms(move |vm| told.lock().unwrap().push(vm.state));
    let vm = vm(&store, &owner.id).await;
    store.clone().vm_start_reserve(&vm.id, VmState::Created, &owner.quota).await.unwrap();
    let ready = |from| store.vm_transition(&vm.id, from, VmEvent::Ready, Change::default());
    assert!(ready(VmState::Starting).await.unwrap().is_some());
    assert!(ready(VmState::Starting).await.unwrap().is_none());
    assert_eq!(*seen.lock().unwrap(), [VmState::Starting, VmState::Running]);
    let figures = store.figures().await.unwrap();
    assert_eq!((figures.accounts, figures.cpus, figures.mem_mb, figures.disk_mb), (1, 1, 1024, 1024));
    store.vm_transition(&vm.id, VmState::Running, VmEvent::Delete, Change::default()).await.unwrap();
    let figures = store.figures().await.unwrap();
    assert_eq!((figures.cpus, figures.disk_mb, figures.images, figures.snapshots, figures.api_keys), (0, 0, 0, 0, 0));
}

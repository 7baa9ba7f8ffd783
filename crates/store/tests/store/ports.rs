//! Ports that are reached from outside.

use tiffin_store::{Change, Port, PortInserted, Store};
use tiffin_types::{id::VmId, vm::VmEvent};

use crate::fixtures::{Db, account, race, tamper, vm};

async fn insert(store: &Store, vm: &VmId, port: u16) -> Option<Port> {
    match store.port_insert(vm, port, 2).await.unwrap() {
        PortInserted::Done(port) => Some(port),
        PortInserted::Refused => None,
    }
}

pub(crate) async fn a_port_has_one_name_however_often_it_is_asked_for(db: Db) {
    let (store, other) = (db.open().await, db.open().await);
    let ada = account(&store, "ada").await;
    let (first, second) = (vm(&store, &ada.id).await, vm(&store, &ada.id).await);
    let id = first.id.clone();
    let made = race([&store, &other], 8, |store, _| {
        let id = id.clone();
        async move { insert(&store, &id, 8080).await.unwrap() }
    })
    .await;
    assert!(made.iter().all(|port| *port == made[0]), "{made:?}");
    assert_eq!((made[0].port, &made[0].vm_id), (8080, &first.id));
    let its_own = insert(&store, &second.id, 8080).await.unwrap();
    assert_ne!(its_own.label, made[0].label);
    let low = insert(&store, &first.id, 1).await.unwrap();
    assert_eq!(store.port_list(&first.id).await.unwrap(), [low, made[0].clone()]);
    assert_eq!(store.port_list_all().await.unwrap().len(), 3);
}

pub(crate) async fn a_vm_has_so_many_ports_and_a_deleted_one_none(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let vm = vm(&store, &ada.id).await;
    let first = insert(&store, &vm.id, 80).await.unwrap();
    insert(&store, &vm.id, 65535).await.unwrap();
    assert_eq!(insert(&store, &vm.id, 81).await, None);
    assert_eq!(insert(&store, &vm.id, 80).await, Some(first.clone()), "one that is there is there");
    assert!(store.port_delete(&vm.id, 80).await.unwrap());
    assert!(!store.port_delete(&vm.id, 80).await.unwrap());
    let again = insert(&store, &vm.id, 80).await.unwrap();
    assert_ne!(again.label, first.label, "a name is never given twice");
    assert_eq!(store.port_prune().await.unwrap(), 0);
    store.vm_transition(&vm.id, vm.state, VmEvent::Delete, Change::default()).await.unwrap().unwrap();
    assert_eq!(store.port_list_all().await.unwrap(), []);
    assert_eq!(store.port_prune().await.unwrap(), 2);
    assert_eq!(insert(&store, &vm.id, 80).await, None);
    assert_eq!(insert(&store, &VmId::random(), 80).await, None);
}

pub(crate) async fn a_corrupt_port_is_an_error(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let vm = vm(&store, &ada.id).await;
    insert(&store, &vm.id, 80).await.unwrap();
    tamper(&store, "UPDATE ports SET label = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'").await;
    let said = store.port_list(&vm.id).await.unwrap_err().to_string();
    assert!(said.contains("ports.label"), "{said}");
}

//! Images and the default one.

use tiffin_store::{Image, StoreError};
use tiffin_types::{
    id::{AccountId, ImageId},
    vm::{VmEvent, VmState},
};

use crate::fixtures::{Db, account, digest, new_image, race, vm};

pub(crate) async fn an_account_sees_its_own_images_and_the_shared_ones(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    let shared = store.image_insert(new_image(None, 1)).await.unwrap();
    let own = store.image_insert(new_image(Some(&ada.id), 2)).await.unwrap();
    assert_eq!(store.image_get(&ada.id, &shared.id).await.unwrap(), Some(shared.clone()));
    assert_eq!(store.image_get(&ada.id, &own.id).await.unwrap(), Some(own.clone()));
    assert_eq!(store.image_get(&bob.id, &own.id).await.unwrap(), None);
    assert_eq!(store.image_list(&bob.id).await.unwrap(), std::slice::from_ref(&shared));
    let mut listed = store.image_list(&ada.id).await.unwrap();
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(listed, [shared, own]);
}

pub(crate) async fn only_a_shared_image_becomes_the_default(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let own = store.image_insert(new_image(Some(&ada.id), 1)).await.unwrap();
    assert!(!store.image_set_default(&own.id).await.unwrap());
    assert!(!store.image_set_default(&ImageId::random()).await.unwrap());
    assert_eq!(store.image_default().await.unwrap(), None);
    for number in [2, 3] {
        let shared = store.image_insert(new_image(None, number)).await.unwrap();
        assert!(store.image_set_default(&shared.id).await.unwrap());
        assert_eq!(store.image_default().await.unwrap(), Some(Image { is_default: true, ..shared }));
    }
    assert!(!store.image_set_default(&own.id).await.unwrap());
    let defaults: Vec<_> =
        store.image_list(&ada.id).await.unwrap().into_iter().filter(|image| image.is_default).collect();
    assert_eq!(defaults.len(), 1);
    assert_eq!(defaults[0].name, "image 3");
}

pub(crate) async fn there_is_exactly_one_default_however_many_race(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    let mut ids = Vec::new();
    for number in 0..4 {
        ids.push(one.image_insert(new_image(None, number)).await.unwrap().id);
    }
    let done = race([&one, &other], 16, |store, number| {
        let id = ids[number % ids.len()].clone();
        async move { store.image_set_default(&id).await.unwrap() }
    })
    .await;
    assert_eq!(done, [true; 16]);
    let images = one.image_list(&AccountId::random()).await.unwrap();
    assert_eq!(images.iter().filter(|image| image.is_default).count(), 1);
}

pub(crate) async fn an_image_is_found_by_digest_shared_ones_first(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let own = store.image_insert(new_image(Some(&ada.id), 1)).await.unwrap();
    assert_eq!(store.image_by_digest(&digest(1)).await.unwrap(), Some(own));
    let shared = store.image_insert(new_image(None, 1)).await.unwrap();
    assert_eq!(store.image_by_digest(&digest(1)).await.unwrap(), Some(shared));
    assert_eq!(store.image_by_digest(&digest(2)).await.unwrap(), None);
}

pub(crate) async fn digests_of_images_and_of_vms_that_exist_are_in_use(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    assert_eq!(store.digests_in_use().await.unwrap(), []);
    let made = vm(&store, &ada.id).await;
    for number in [2, 2, 3] {
        store.image_insert(new_image(None, number)).await.unwrap();
    }
    let without_blob = tiffin_store::NewImage { digest: None, ..new_image(None, 4) };
    store.image_insert(without_blob).await.unwrap();
    let mut used = store.digests_in_use().await.unwrap();
    used.sort();
    assert_eq!(used, [digest(1), digest(2), digest(3)]);
    store.vm_transition(&made.id, VmState::Created, VmEvent::Delete, Default::default()).await.unwrap().unwrap();
    let mut used = store.digests_in_use().await.unwrap();
    used.sort();
    assert_eq!(used, [digest(2), digest(3)]);
}

pub(crate) async fn an_image_of_no_account_is_refused(db: Db) {
    let store = db.open().await;
    let refused = store.image_insert(new_image(Some(&AccountId::random()), 1)).await;
    assert!(matches!(refused, Err(StoreError::Conflict(_))));
}

//! Images and the default one.

use tiffin_store::{
    Image, ImageDeleted, ImageQuota, NewImage, Partial, QuotaExceeded, Store, StoreError, Upload, Uploaded,
};
use tiffin_types::{
    id::{AccountId, ImageId},
    time::Timestamp,
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

pub(crate) async fn a_kernel_stays_as_long_as_an_image_a_vm_or_a_snapshot_has_it(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let image = store.image_insert(new_image(Some(&ada.id), 1)).await.unwrap();
    assert!(store.image_upload_begin(&image.id, Upload::Kernel).await.unwrap());
    let kernel = Uploaded::Kernel { digest: digest(7), size_bytes: 1 };
    let room = ImageQuota { images: 9, bytes: u64::MAX };
    store.image_upload_finish(&image.id, Some(&ada.id), &room, &kernel).await.unwrap().unwrap();
    for (blob, has) in [(1, true), (7, true), (8, false)] {
        assert_eq!(store.image_has_blob(&digest(blob)).await.unwrap(), has, "{blob}");
    }
    let new = tiffin_store::NewVm { kernel_digest: Some(digest(8)), ..crate::fixtures::new_vm(&ada.id) };
    store.vm_insert(&new, &crate::fixtures::QUOTA, None).await.unwrap();
    let made = store.vm_get(&ada.id, &new.id).await.unwrap().unwrap();
    assert_eq!(made.kernel_digest, Some(digest(8)));
    let saved = tiffin_store::NewSnapshot { kernel_digest: Some(digest(9)), ..super::snapshots::new_snapshot(&made) };
    store.snapshot_insert(&saved, &crate::fixtures::QUOTA, 9).await.unwrap();
    assert_eq!(store.snapshot_get(&ada.id, &saved.id).await.unwrap().unwrap().kernel_digest, Some(digest(9)));
    let used = async || {
        let mut used = store.digests_in_use().await.unwrap();
        used.sort();
        used
    };
    assert_eq!(used().await, [digest(1), digest(7), digest(8), digest(9)]);
    store.vm_transition(&new.id, VmState::Created, VmEvent::Delete, Default::default()).await.unwrap().unwrap();
    assert_eq!(used().await, [digest(1), digest(7), digest(9)]);
}

pub(crate) async fn an_image_of_no_account_is_refused(db: Db) {
    let store = db.open().await;
    let refused = store.image_insert(new_image(Some(&AccountId::random()), 1)).await;
    assert!(matches!(refused, Err(StoreError::Conflict(_))));
}

const ROOM: ImageQuota = ImageQuota { images: 2, bytes: 10_000 };

/// An image of an account with nothing in it.
async fn empty(store: &Store, account: &AccountId) -> Result<Image, QuotaExceeded> {
    let new = NewImage { digest: None, size_bytes: 0, rootfs_bytes: 0, ..new_image(Some(account), 1) };
    store.image_insert_within(new, account, &ROOM).await.unwrap()
}

fn rootfs(number: u8, size_bytes: u64) -> Uploaded {
    Uploaded::Rootfs { digest: digest(number), size_bytes, rootfs_bytes: size_bytes * 2 }
}

pub(crate) async fn an_upload_begins_and_ends_and_gives_up_the_blob_that_it_replaces(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let image = empty(&store, &ada.id).await.unwrap();
    let now = async || store.image_get(&ada.id, &image.id).await.unwrap().unwrap();
    assert!(store.image_upload_begin(&image.id, Upload::Rootfs).await.unwrap());
    assert_eq!(now().await.upload, Some(Upload::Rootfs));
    assert_eq!(store.image_uploads_unfinished().await.unwrap(), std::slice::from_ref(&image.id));
    store.image_upload_failed(&image.id, "it was cut\0short").await.unwrap();
    assert_eq!((now().await.upload, now().await.upload_error.as_deref()), (None, Some("it was cut?short")));

    assert!(store.image_upload_begin(&image.id, Upload::Rootfs).await.unwrap());
    assert_eq!(now().await.upload_error, None);
    let finish = async |uploaded| store.image_upload_finish(&image.id, Some(&ada.id), &ROOM, &uploaded).await.unwrap();
    assert_eq!(finish(rootfs(2, 4000)).await, Ok(None));
    assert_eq!(finish(rootfs(3, 5000)).await, Ok(Some(digest(2))));
    let kernel = Uploaded::Kernel { digest: digest(4), size_bytes: 1000 };
    assert_eq!(finish(kernel).await, Ok(None));
    let whole = now().await;
    assert_eq!((whole.upload, whole.digest, whole.kernel_digest), (None, Some(digest(3)), Some(digest(4))));
    assert_eq!((whole.size_bytes, whole.rootfs_bytes, whole.kernel_bytes), (5000, 10_000, 1000));
    let mut used = store.digests_in_use().await.unwrap();
    used.sort();
    assert_eq!(used, [digest(3), digest(4)]);

    let gone = ImageId::random();
    assert!(!store.image_upload_begin(&gone, Upload::Kernel).await.unwrap());
    let refused = store.image_upload_finish(&gone, Some(&ada.id), &ROOM, &rootfs(5, 1)).await;
    assert!(matches!(refused, Err(StoreError::Conflict(_))));
}

pub(crate) async fn an_accounts_images_are_bounded_in_number_and_bytes(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    let (one, two) = (empty(&store, &ada.id).await.unwrap(), empty(&store, &ada.id).await.unwrap());
    let refused = empty(&store, &ada.id).await.unwrap_err();
    assert_eq!(refused, QuotaExceeded { what: "images", limit: 2, used: 2, asked: 1 });
    empty(&store, &bob.id).await.unwrap();

    let finish = async |image: &Image, uploaded| {
        store.image_upload_finish(&image.id, Some(&ada.id), &ROOM, &uploaded).await.unwrap()
    };
    finish(&one, rootfs(1, 6000)).await.unwrap();
    let refused = finish(&two, rootfs(2, 5000)).await.unwrap_err();
    assert_eq!(refused, QuotaExceeded { what: "imageBytes", limit: 10_000, used: 6000, asked: 5000 });
    assert_eq!(store.image_get(&ada.id, &two.id).await.unwrap().unwrap().digest, None);
    // What it replaces doesn't count beside it; its own kernel does.
    finish(&one, rootfs(3, 9000)).await.unwrap();
    let refused = finish(&one, Uploaded::Kernel { digest: digest(4), size_bytes: 2000 }).await.unwrap_err();
    assert_eq!((refused.used, refused.asked), (9000, 2000));
    assert_eq!(store.image_usage(&ada.id).await.unwrap(), ImageQuota { images: 2, bytes: 9000 });
}

pub(crate) async fn an_accounts_own_default_goes_before_everybodys(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    let shared = store.image_insert(new_image(None, 1)).await.unwrap();
    let own = store.image_insert(new_image(Some(&ada.id), 2)).await.unwrap();
    assert!(store.image_set_default(&shared.id).await.unwrap());
    assert!(!store.image_set_default_of(&bob.id, &own.id).await.unwrap());
    assert!(!store.image_set_default_of(&bob.id, &ImageId::random()).await.unwrap());
    assert!(store.image_set_default_of(&ada.id, &own.id).await.unwrap());
    let default_of = async |account| store.image_default_of(account).await.unwrap().unwrap().id;
    assert_eq!((default_of(&ada.id).await, default_of(&bob.id).await), (own.id.clone(), shared.id.clone()));
    let marked: Vec<ImageId> =
        store.image_list(&ada.id).await.unwrap().into_iter().filter(|i| i.is_default).map(|i| i.id).collect();
    assert_eq!(marked, std::slice::from_ref(&own.id));
    assert!(store.image_set_default_of(&ada.id, &shared.id).await.unwrap());
    assert_eq!(default_of(&ada.id).await, shared.id);
    store.image_clear_default_of(&ada.id).await.unwrap();
    assert_eq!(default_of(&ada.id).await, shared.id);
}

pub(crate) async fn an_image_that_is_used_a_default_or_uploaded_to_is_not_deleted(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let image = store.image_insert(new_image(Some(&ada.id), 1)).await.unwrap();
    let delete = async || store.image_delete(&image.id).await.unwrap();
    let new = tiffin_store::NewVm { image_id: image.id.clone(), ..crate::fixtures::new_vm(&ada.id) };
    store.vm_insert(&new, &crate::fixtures::QUOTA, None).await.unwrap();
    assert_eq!(delete().await, ImageDeleted::InUse { vms: 1, snapshots: 0 });
    store.vm_transition(&new.id, VmState::Created, VmEvent::Delete, Default::default()).await.unwrap().unwrap();
    store.image_set_default_of(&ada.id, &image.id).await.unwrap();
    assert_eq!(delete().await, ImageDeleted::IsDefault);
    store.image_clear_default_of(&ada.id).await.unwrap();
    store.image_upload_begin(&image.id, Upload::Kernel).await.unwrap();
    assert_eq!(delete().await, ImageDeleted::Uploading);
    let kernel = Uploaded::Kernel { digest: digest(9), size_bytes: 1 };
    let room = ImageQuota { images: 9, bytes: u64::MAX };
    store.image_upload_finish(&image.id, Some(&ada.id), &room, &kernel).await.unwrap().unwrap();
    assert_eq!(delete().await, ImageDeleted::Deleted(vec![digest(1), digest(9)]));
    assert_eq!(delete().await, ImageDeleted::Absent);
    assert_eq!(store.digests_in_use().await.unwrap(), []);
}

pub(crate) async fn a_shared_image_goes_whoever_chose_it_and_an_own_default_does_not(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let (everybodys, chosen) =
        (store.image_insert(new_image(None, 1)).await.unwrap(), store.image_insert(new_image(None, 2)).await.unwrap());
    store.image_set_default(&everybodys.id).await.unwrap();
    assert!(store.image_set_default_of(&ada.id, &chosen.id).await.unwrap());
    assert_eq!(store.image_delete(&chosen.id).await.unwrap(), ImageDeleted::Deleted(vec![digest(2)]));
    assert_eq!(store.image_default_of(&ada.id).await.unwrap().unwrap().id, everybodys.id);
    assert_eq!(store.image_delete(&everybodys.id).await.unwrap(), ImageDeleted::IsDefault);
}

pub(crate) async fn choosing_an_image_that_is_being_deleted_is_no_failure(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    let ada = account(&one, "ada").await;
    for number in 0..8 {
        let image = one.image_insert(new_image(None, number)).await.unwrap();
        race([&one, &other], 4, |store, number| {
            let (id, account) = (image.id.clone(), ada.id.clone());
            async move {
                if number % 2 == 0 {
                    store.image_delete(&id).await.unwrap();
                } else {
                    store.image_set_default_of(&account, &id).await.unwrap();
                }
            }
        })
        .await;
        assert_eq!(one.image_get(&ada.id, &image.id).await.unwrap(), None);
        assert_eq!(one.image_default_of(&ada.id).await.unwrap(), None);
    }
}

pub(crate) async fn an_upload_that_has_ended_well_does_not_fail_later(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let image = empty(&store, &ada.id).await.unwrap();
    store.image_upload_begin(&image.id, Upload::Rootfs).await.unwrap();
    store.image_upload_finish(&image.id, Some(&ada.id), &ROOM, &rootfs(2, 1)).await.unwrap().unwrap();
    store.image_upload_failed(&image.id, "nobody works on it").await.unwrap();
    assert_eq!(store.image_get(&ada.id, &image.id).await.unwrap().unwrap().upload_error, None);
}

pub(crate) async fn what_is_kept_of_uploads_counts_against_the_quota_and_goes_with_the_image(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    let quota = ImageQuota { images: 9, bytes: 100 };
    let new = |digest| NewImage { size_bytes: 0, digest, ..new_image(Some(&ada.id), 1) };
    let (one, other) = (store.image_insert(new(None)).await.unwrap(), store.image_insert(new(None)).await.unwrap());
    let partial = |image: &Image, part| Partial {
        image_id: image.id.clone(),
        part,
        received_bytes: 0,
        total_bytes: Some(1000),
        digest: Some(digest(7)),
        updated_at: Timestamp::now(),
    };
    for (image, part) in [(&one, Upload::Rootfs), (&one, Upload::Kernel), (&other, Upload::Kernel)] {
        store.image_partial_begin(&partial(image, part)).await.unwrap();
    }
    let keep = async |image: &Image, part, bytes| {
        store.image_partial_keep(&image.id, part, Some(&ada.id), &quota, bytes).await.unwrap()
    };
    assert!(keep(&one, Upload::Rootfs, 60).await);
    assert!(keep(&one, Upload::Rootfs, 70).await, "its own former bytes don't count");
    assert!(!keep(&one, Upload::Kernel, 31).await);
    assert!(keep(&other, Upload::Kernel, 30).await);
    assert_eq!(store.image_usage(&ada.id).await.unwrap().bytes, 100);
    let kept = store.image_partials_of(&ada.id).await.unwrap();
    let mut bytes: Vec<_> = kept.iter().map(|partial| partial.received_bytes).collect();
    bytes.sort_unstable();
    assert_eq!((bytes, kept[0].total_bytes, &kept[0].digest), (vec![30, 70], Some(1000), &Some(digest(7))));
    assert_eq!(store.image_partials_of(&bob.id).await.unwrap(), []);

    // What becomes whole counts as what it is then, beside what is kept of others.
    let uploaded = |size_bytes| Uploaded::Rootfs { digest: digest(3), size_bytes, rootfs_bytes: 1 };
    let over = store.image_upload_finish(&one.id, Some(&ada.id), &quota, &uploaded(71)).await.unwrap().unwrap_err();
    assert_eq!((over.used, over.asked), (30, 71));
    assert_eq!(store.image_upload_finish(&one.id, Some(&ada.id), &quota, &uploaded(70)).await.unwrap(), Ok(None));
    assert_eq!(store.image_partial_get(&one.id, Upload::Rootfs).await.unwrap(), None);
    let old = store.image_partials_before(Timestamp::now()).await.unwrap();
    assert_eq!(
        old.iter().map(|(partial, account)| (&partial.image_id, account.as_ref())).collect::<Vec<_>>(),
        [(&other.id, Some(&ada.id))]
    );
    assert!(matches!(store.image_delete(&other.id).await.unwrap(), ImageDeleted::Deleted(_)));
    assert_eq!(store.image_usage(&ada.id).await.unwrap().bytes, 70);
    let gone = store.image_partial_begin(&partial(&other, Upload::Rootfs)).await;
    assert!(matches!(gone, Err(StoreError::Conflict(_))), "{gone:?}");
}

pub(crate) async fn what_a_manifest_was_made_is_found_until_nobody_has_it_or_another_upload_replaced_it(db: Db) {
    let store = db.open().await;
    let (ada, bob) = (account(&store, "ada").await, account(&store, "bob").await);
    let quota = ImageQuota { images: 2, bytes: 2500 };
    let from = "registry.example.com/app@sha256:00";
    assert_eq!(store.image_imported(from).await.unwrap(), None);
    let new = |account: &AccountId| NewImage { size_bytes: 1000, ..new_image(Some(account), 1) };
    let one = store.image_insert_imported(new(&ada.id), &ada.id, &quota, from).await.unwrap().unwrap();
    let known = store.image_imported(from).await.unwrap().unwrap();
    assert_eq!((Some(&known.digest), known.size_bytes), (one.digest.as_ref(), 1000));
    let two = store.image_insert_imported(new(&bob.id), &bob.id, &quota, from).await.unwrap().unwrap();
    // Replaced by an upload, it is no import any more; the other one still is.
    let uploaded = Uploaded::Rootfs { digest: digest(9), size_bytes: 10, rootfs_bytes: 10 };
    store.image_upload_begin(&one.id, Upload::Rootfs).await.unwrap();
    store.image_upload_finish(&one.id, Some(&ada.id), &quota, &uploaded).await.unwrap().unwrap();
    assert_eq!(store.image_imported(from).await.unwrap(), Some(known));
    assert!(matches!(store.image_delete(&two.id).await.unwrap(), ImageDeleted::Deleted(_)));
    assert_eq!(store.image_imported(from).await.unwrap(), None);
}

pub(crate) async fn an_import_keeps_to_both_parts_of_the_quota(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let new = |bytes| NewImage { size_bytes: bytes, ..new_image(Some(&ada.id), 1) };
    let insert =
        async |quota: ImageQuota, bytes| store.image_insert_imported(new(bytes), &ada.id, &quota, "x").await.unwrap();
    let quota = ImageQuota { images: 2, bytes: 2500 };
    insert(quota, 1000).await.unwrap();
    let over = insert(quota, 1501).await.unwrap_err();
    assert_eq!(over, QuotaExceeded { what: "imageBytes", limit: 2500, used: 1000, asked: 1501 });
    insert(quota, 1500).await.unwrap();
    assert_eq!(insert(quota, 0).await.unwrap_err().what, "images");
}

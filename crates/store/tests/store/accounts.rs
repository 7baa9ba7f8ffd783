//! Accounts and the first start.

use tiffin_store::{NewAdminKey, StoreError};
use tiffin_types::{
    account::{Quota, Scope},
    id::AccountId,
};

use crate::fixtures::{Db, QUOTA, account, race, tamper};

fn admin_key() -> NewAdminKey<'static> {
    NewAdminKey {
        name: "first key",
        prefix: "tfn_admin",
        secret_sha256: [7; 32],
        scopes: &[Scope::Admin],
        expires_at: None,
    }
}

pub(crate) async fn an_account_reads_back_and_its_name_is_taken(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let bob = account(&store, "bob").await;
    assert_eq!(store.account_get(&ada.id).await.unwrap(), Some(ada.clone()));
    assert_eq!(store.account_get(&AccountId::random()).await.unwrap(), None);
    let mut listed = store.account_list().await.unwrap();
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(listed, [ada, bob]);
    assert!(matches!(store.account_create("ada", QUOTA).await, Err(StoreError::Conflict(why)) if why.contains("ada")));
}

pub(crate) async fn a_quota_can_be_changed(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    let quota = Quota { vms: 0, cpus: u32::MAX, mem_mb: 1 << 40, disk_mb: u64::MAX };
    assert!(store.account_set_quota(&ada.id, quota).await.unwrap());
    let read = store.account_get(&ada.id).await.unwrap().unwrap().quota;
    assert_eq!(read, Quota { disk_mb: i64::MAX.try_into().unwrap(), ..quota });
    assert!(!store.account_set_quota(&AccountId::random(), quota).await.unwrap());
}

pub(crate) async fn the_first_start_happens_once_however_many_race(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    let results =
        race(
            [&one, &other],
            8,
            |store, _| async move { store.setup_admin("admin", QUOTA, admin_key()).await.unwrap() },
        )
        .await;
    let made: Vec<_> = results.into_iter().flatten().collect();
    let [(admin, key)] = &made[..] else { panic!("{} admins", made.len()) };
    assert_eq!(one.account_list().await.unwrap(), std::slice::from_ref(admin));
    assert_eq!(one.api_key_by_prefix("tfn_admin").await.unwrap(), Some((key.clone(), [7; 32])));
    assert_eq!((&key.account_id, &key.scopes[..]), (&admin.id, &[Scope::Admin][..]));
}

pub(crate) async fn there_is_no_first_start_once_there_is_an_account(db: Db) {
    let store = db.open().await;
    account(&store, "ada").await;
    assert_eq!(store.setup_admin("admin", QUOTA, admin_key()).await.unwrap(), None);
    assert_eq!(store.account_list().await.unwrap().len(), 1);
}

pub(crate) async fn a_first_start_that_fails_can_be_tried_again(db: Db) {
    let store = db.open().await;
    let no_scope = NewAdminKey { scopes: &[], ..admin_key() };
    assert!(matches!(store.setup_admin("admin", QUOTA, no_scope).await, Err(StoreError::Conflict(_))));
    assert_eq!(store.account_list().await.unwrap(), []);
    assert!(store.setup_admin("admin", QUOTA, admin_key()).await.unwrap().is_some());
}

pub(crate) async fn a_corrupt_account_is_an_error_that_names_it(db: Db) {
    let store = db.open().await;
    let ada = account(&store, "ada").await;
    tamper(&store, "UPDATE accounts SET quota_cpus = 99999999999").await;
    let StoreError::Corrupt(why) = store.account_get(&ada.id).await.unwrap_err() else { panic!() };
    assert!(why.contains("accounts.quota_cpus") && why.contains(ada.id.as_str()), "{why}");
}

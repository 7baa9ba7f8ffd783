//! API keys.

use tiffin_store::{ApiKey, NewApiKey, Store, StoreError};
use tiffin_types::{
    account::Scope,
    id::{AccountId, ApiKeyId},
    time::Timestamp,
};

use crate::fixtures::{Db, account, tamper};

fn new_key<'a>(account_id: &'a AccountId, prefix: &'a str) -> NewApiKey<'a> {
    NewApiKey {
        account_id,
        name: "ci",
        prefix,
        secret_sha256: [0xab; 32],
        scopes: &[Scope::Read, Scope::Write],
        expires_at: Some(Timestamp::from_millis(2_000_000_000_000)),
    }
}

async fn key(store: &Store) -> ApiKey {
    let owner = account(store, "ada").await;
    store.api_key_create(new_key(&owner.id, "tfn_1")).await.unwrap()
}

pub(crate) async fn a_key_is_found_by_its_prefix_with_its_hash(db: Db) {
    let store = db.open().await;
    let made = key(&store).await;
    assert_eq!(made.scopes, [Scope::Read, Scope::Write]);
    assert_eq!(made.expires_at, Some(Timestamp::from_millis(2_000_000_000_000)));
    assert_eq!((made.revoked_at, made.last_used_at), (None, None));
    assert_eq!(store.api_key_by_prefix("tfn_1").await.unwrap(), Some((made.clone(), [0xab; 32])));
    assert_eq!(store.api_key_by_prefix("tfn_").await.unwrap(), None);
    assert_eq!(store.api_key_by_prefix("TFN_1").await.unwrap(), None);
    assert_eq!(store.api_key_get(&made.id).await.unwrap(), Some(made));
    assert_eq!(store.api_key_get(&ApiKeyId::random()).await.unwrap(), None);
}

pub(crate) async fn a_key_needs_a_free_prefix_an_account_and_a_scope(db: Db) {
    let store = db.open().await;
    let owner = key(&store).await.account_id;
    let stranger = AccountId::random();
    let no_scope = NewApiKey { scopes: &[], ..new_key(&owner, "tfn_2") };
    for refused in [new_key(&owner, "tfn_1"), new_key(&stranger, "tfn_2"), no_scope] {
        assert!(matches!(store.api_key_create(refused).await, Err(StoreError::Conflict(_))));
    }
    assert_eq!(store.api_key_list(None).await.unwrap().len(), 1);
}

pub(crate) async fn a_key_is_revoked_once_and_for_good(db: Db) {
    let store = db.open().await;
    let made = key(&store).await;
    let (first, later) = (Timestamp::from_millis(1_000), Timestamp::from_millis(2_000));
    assert!(store.api_key_revoke(&made.id, first).await.unwrap());
    assert!(!store.api_key_revoke(&made.id, later).await.unwrap());
    assert!(!store.api_key_revoke(&ApiKeyId::random(), later).await.unwrap());
    let (read, _) = store.api_key_by_prefix("tfn_1").await.unwrap().unwrap();
    assert_eq!(read, ApiKey { revoked_at: Some(first), ..made });
}

pub(crate) async fn last_use_only_moves_forward(db: Db) {
    let store = db.open().await;
    let made = key(&store).await;
    for (used, expected) in [(2_000, 2_000), (1_000, 2_000), (3_000, 3_000)] {
        store.api_key_used(&made.id, Timestamp::from_millis(used)).await.unwrap();
        let read = store.api_key_get(&made.id).await.unwrap().unwrap();
        assert_eq!(read.last_used_at, Some(Timestamp::from_millis(expected)));
    }
    store.api_key_used(&ApiKeyId::random(), Timestamp::now()).await.unwrap();
}

pub(crate) async fn keys_are_listed_by_account(db: Db) {
    let store = db.open().await;
    let ada_key = key(&store).await;
    let bob = account(&store, "bob").await;
    let bob_key = store.api_key_create(new_key(&bob.id, "tfn_2")).await.unwrap();
    assert_eq!(store.api_key_list(Some(&ada_key.account_id)).await.unwrap(), [ada_key]);
    assert_eq!(store.api_key_list(Some(&bob.id)).await.unwrap(), [bob_key]);
    assert_eq!(store.api_key_list(Some(&AccountId::random())).await.unwrap(), []);
    assert_eq!(store.api_key_list(None).await.unwrap().len(), 2);
}

pub(crate) async fn a_corrupt_key_is_an_error_that_does_not_show_the_hash(db: Db) {
    let store = db.open().await;
    let made = key(&store).await;
    tamper(&store, "UPDATE api_keys SET secret_sha256 = replace(secret_sha256, 'ab', 'xy')").await;
    let StoreError::Corrupt(why) = store.api_key_by_prefix("tfn_1").await.unwrap_err() else { panic!() };
    assert!(why.contains("api_keys.secret_sha256") && why.contains(made.id.as_str()), "{why}");
    assert!(!why.contains("xyxy"), "{why}");
    tamper(&store, "UPDATE api_keys SET scopes = 'read,everything'").await;
    assert!(
        matches!(store.api_key_get(&made.id).await, Err(StoreError::Corrupt(why)) if why.contains("api_keys.scopes"))
    );
}

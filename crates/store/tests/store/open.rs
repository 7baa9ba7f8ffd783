//! Opening, migrating, closing.

use tiffin_store::{Store, StoreError};

use crate::fixtures::{Db, account};

pub(crate) async fn opening_again_keeps_the_data_and_runs_no_migration_twice(db: Db) {
    let first = db.open().await;
    let made = account(&first, "ada").await;
    first.close().await;
    let second = db.open().await;
    assert_eq!(second.account_list().await.unwrap(), [made]);
    let distinct: (i64, i64) = sqlx::query_as("SELECT COUNT(*), COUNT(DISTINCT version) FROM _sqlx_migrations")
        .fetch_one(second.pool())
        .await
        .unwrap();
    assert!(distinct.0 >= 1 && distinct.0 == distinct.1);
}

pub(crate) async fn servers_that_open_an_empty_database_at_once_all_succeed(db: Db) {
    let mut servers = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let url = db.url().to_owned();
        servers.spawn(async move { Store::open(&url).await });
    }
    for server in servers.join_all().await {
        server.unwrap().ping().await.unwrap();
    }
}

pub(crate) async fn a_database_of_a_newer_version_is_refused(db: Db) {
    let store = db.open().await;
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (999999, 'from the future', TRUE, $1, 0)",
    )
    .bind(vec![0_u8])
    .execute(store.pool())
    .await
    .unwrap();
    assert!(matches!(Store::open(db.url()).await, Err(StoreError::Unavailable { .. })));
}

pub(crate) async fn ping_answers_until_the_store_is_closed(db: Db) {
    let store = db.open().await;
    store.ping().await.unwrap();
    store.clone().close().await;
    assert!(matches!(store.ping().await, Err(StoreError::Unavailable { .. })));
}

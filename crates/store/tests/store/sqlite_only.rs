//! What holds for SQLite files alone.

use sqlx::AnyConnection;
use tiffin_store::{Inserted, Store, StoreError};
use tiffin_types::account::Quota;

use crate::fixtures::{Db, account, new_vm, race};

async fn setting(connection: &mut AnyConnection, pragma: &'static str) -> String {
    let row = sqlx::query(pragma).fetch_one(connection).await.unwrap();
    let value: Result<String, _> = sqlx::Row::try_get(&row, 0);
    value.unwrap_or_else(|_| sqlx::Row::get::<i64, _>(&row, 0).to_string())
}

#[tokio::test]
async fn every_connection_is_durable_waits_for_locks_and_checks_foreign_keys() {
    let folder = tempfile::tempdir().unwrap();
    let store = Db::sqlite(folder.path()).open().await;
    let mut held = Vec::new();
    for _ in 0..store.pool().options().get_max_connections() {
        let mut connection = store.pool().acquire().await.unwrap();
        assert_eq!(setting(&mut connection, "PRAGMA journal_mode").await, "wal");
        assert_eq!(setting(&mut connection, "PRAGMA synchronous").await, "2");
        assert_eq!(setting(&mut connection, "PRAGMA foreign_keys").await, "1");
        assert_eq!(setting(&mut connection, "PRAGMA busy_timeout").await, "10000");
        held.push(connection);
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_made_is_unavailable() {
    let folder = tempfile::tempdir().unwrap();
    let opened = Store::open(&format!("sqlite://{}/missing/tiffin.db", folder.path().display())).await;
    assert!(matches!(opened, Err(StoreError::Unavailable { .. })));
}

#[tokio::test]
async fn a_file_that_is_no_database_is_unavailable() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tiffin.db"), "not a database, but long enough to have a header".repeat(100))
        .unwrap();
    let Err(StoreError::Unavailable { source }) = Store::open(Db::sqlite(folder.path()).url()).await else { panic!() };
    assert!(source.to_string().contains("not a database"), "{source}");
}

/// More writers than connections, on two servers' pools: the waiting ones must not give up.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_writers_is_served_without_a_lock_error() {
    let folder = tempfile::tempdir().unwrap();
    let db = Db::sqlite(folder.path());
    let (one, other) = (db.open().await, db.open().await);
    let ada = account(&one, "ada").await;
    let wide = Quota { vms: 1000, cpus: 1000, mem_mb: 1_000_000, disk_mb: 1_000_000 };
    let results = race([&one, &other], 200, |store, _| {
        let new = new_vm(&ada.id);
        async move { store.vm_insert(&new, &wide, None).await }
    })
    .await;
    for result in results {
        assert!(matches!(result, Ok(Inserted::New(_))), "{result:?}");
    }
}

#[tokio::test]
async fn the_log_has_room_of_its_own_and_keeps_it() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let db = Db::sqlite(folder.path());
    for turn in 0..2 {
        let store = db.open().await;
        account(&store, &format!("somebody {turn}")).await;
        let log = std::fs::read_dir(folder.path())
            .unwrap()
            .find_map(|entry| Some(entry.ok()?.path()).filter(|path| path.to_str().unwrap().ends_with("-wal")))
            .unwrap()
            .metadata()
            .unwrap();
        assert!(log.blocks() * 512 >= 8 << 20 && log.len() < 4 << 20, "{log:?}");
        store.close().await;
    }
}

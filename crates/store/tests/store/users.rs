//! Users and their sessions.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use tiffin_store::{NewAdminKey, Store, User};
use tiffin_types::{account::Scope, time::Timestamp};

use crate::fixtures::{Db, QUOTA, account, race, tamper};

async fn user(store: &Store) -> User {
    account(store, "ada").await;
    store.setup_user("ada@example.org", "hash", &[Scope::Admin]).await.unwrap().unwrap()
}

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

pub(crate) async fn the_first_user_is_the_oldest_accounts_and_made_once_however_many_race(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    assert_eq!(one.setup_user("a@example.org", "hash", &[Scope::Admin]).await.unwrap(), None, "there is no account");
    assert!(!one.user_exists().await.unwrap());
    let key = NewAdminKey { name: "k", prefix: "p", secret_sha256: [1; 32], scopes: &[Scope::Admin], expires_at: None };
    let (admin, _) = one.setup_admin("admin", QUOTA, key).await.unwrap().unwrap();
    let made = race([&one, &other], 8, |store, number| async move {
        // Whoever comes second may also find the email taken.
        store.setup_user("a@example.org", &format!("hash {number}"), &[Scope::Admin]).await.unwrap()
    })
    .await;
    let made: Vec<_> = made.into_iter().flatten().collect();
    let [user] = &made[..] else { panic!("{} users", made.len()) };
    assert_eq!((&user.account_id, user.email.as_str()), (&admin.id, "a@example.org"));
    assert_eq!(one.user_by_email("a@example.org").await.unwrap().unwrap().0, *user);
    assert_eq!(one.user_by_email("A@example.org").await.unwrap(), None);
    assert!(one.user_exists().await.unwrap());
}

pub(crate) async fn a_session_reads_back_is_used_and_ends(db: Db) {
    let store = db.open().await;
    let ada = user(&store).await;
    assert!(store.session_create([1; 32], &ada, at(1_000), at(9_000)).await.unwrap());
    let session = store.session_get([1; 32]).await.unwrap().unwrap();
    assert_eq!((&session.user, session.last_used_at, session.expires_at), (&ada, at(1_000), at(9_000)));
    for (used, expected) in [(3_000, 3_000), (2_000, 3_000)] {
        store.session_used([1; 32], at(used)).await.unwrap();
        assert_eq!(store.session_get([1; 32]).await.unwrap().unwrap().last_used_at, at(expected));
    }
    assert_eq!(store.session_get([2; 32]).await.unwrap(), None);
    assert!(store.session_delete([1; 32]).await.unwrap());
    assert!(!store.session_delete([1; 32]).await.unwrap());
    assert_eq!(store.session_get([1; 32]).await.unwrap(), None);
}

pub(crate) async fn a_new_password_ends_every_session_and_those_that_the_old_one_would_begin(db: Db) {
    let store = db.open().await;
    let ada = user(&store).await;
    assert!(store.session_create([1; 32], &ada, at(1), at(9)).await.unwrap());
    tamper(&store, "UPDATE users SET password_set_at = password_set_at - 5000").await;
    let before = store.user_by_email("ada@example.org").await.unwrap().unwrap().0;
    assert!(store.user_set_password("ada@example.org", "new").await.unwrap());
    assert!(!store.user_set_password("bob@example.org", "new").await.unwrap());
    assert_eq!(store.session_get([1; 32]).await.unwrap(), None);
    assert!(!store.session_create([2; 32], &before, at(1), at(9)).await.unwrap());
    let (now, hash) = store.user_by_email("ada@example.org").await.unwrap().unwrap();
    assert_eq!(hash, "new");
    assert!(store.session_create([2; 32], &now, at(1), at(9)).await.unwrap());
}

pub(crate) async fn a_session_waits_for_a_change_of_the_password_that_is_under_way(db: Db) {
    let (one, other) = (db.open().await, db.open().await);
    let ada = user(&one).await;
    let mut change = one.pool().begin().await.unwrap();
    for statement in ["UPDATE users SET password_set_at = password_set_at + 1", "DELETE FROM sessions"] {
        sqlx::query(statement).execute(&mut *change).await.unwrap();
    }
    let has_ended = AtomicBool::new(false);
    let login = async {
        let is_begun = other.session_create([1; 32], &ada, at(1), at(9)).await.unwrap();
        has_ended.store(true, Ordering::Relaxed);
        is_begun
    };
    let change = async {
        let deadline = Instant::now() + Duration::from_secs(60);
        // SQLite doesn't tell who waits; there the two come in either order.
        while db.url().starts_with("postgres") && !has_ended.load(Ordering::Relaxed) && !is_anybody_waiting(&one).await
        {
            assert!(Instant::now() < deadline, "the login neither waits nor ends");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        change.commit().await.unwrap();
    };
    let (is_begun, ()) = tokio::join!(login, change);
    assert!(!is_begun, "it was the old password");
    assert_eq!(one.session_get([1; 32]).await.unwrap(), None);
}

async fn is_anybody_waiting(store: &Store) -> bool {
    let waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    sqlx::query(waiting).fetch_optional(store.pool()).await.unwrap().is_some()
}

pub(crate) async fn old_and_idle_sessions_are_pruned_and_the_oldest_make_room(db: Db) {
    let store = db.open().await;
    let ada = user(&store).await;
    for (number, created, expires) in [(1, 100, 500), (2, 300, 900), (3, 400, 900)] {
        assert!(store.session_create([number; 32], &ada, at(created), at(expires)).await.unwrap());
    }
    assert_eq!(store.session_prune(at(500), at(300)).await.unwrap(), 2);
    assert!(store.session_get([3; 32]).await.unwrap().is_some());
    for number in 4..=104_u8 {
        assert!(store.session_create([number; 32], &ada, at(1_000 + i64::from(number)), at(9_000)).await.unwrap());
    }
    assert_eq!(store.session_get([4; 32]).await.unwrap(), None);
    assert!(store.session_get([5; 32]).await.unwrap().is_some());
}

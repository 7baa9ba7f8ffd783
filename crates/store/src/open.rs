//! Opening the database, and what holds for each connection to it.
//!
//! SQLite runs in WAL mode with `synchronous = FULL`. `NORMAL` keeps the file consistent too, but may lose the last
//! commits with the power: a revoked key would be good again, an acknowledged VM unknown, an intent that was written
//! down before its side effect forgotten. The price is one flush for each commit.
//!
//! The log of an SQLite database has room of its own on the disk: when VMs have filled it, deleting one still has to be
//! written down before it frees anything.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::fcntl::{FallocateFlags, fallocate};
use sqlx::{
    AnyConnection, AnyPool, ConnectOptions, Connection, Executor,
    any::{AnyConnectOptions, AnyPoolOptions},
    migrate::Migrator,
};

use crate::{Store, StoreError};

/// How long an operation waits for a free connection, and a ping for its answer.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the first connection may take, and how long to wait for another process that does it to the same file.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// SQLite has one writer at a time; more connections would only contend for its lock.
const SQLITE_CONNECTIONS: u32 = 4;
const POSTGRES_CONNECTIONS: u32 = 16;
/// Room for SQLite's log: twice what it grows to before it is used anew, about a thousand changes.
const LOG_BYTES: i64 = 8 << 20;

static MIGRATIONS: Migrator = sqlx::migrate!();

impl Store {
    /// Opens the database and brings its tables up to date.
    ///
    /// `url` is `sqlite:///absolute/path` (made if missing; the folder must exist, and be private, as the file gets the
    /// process's default mode) or `postgres://...`. Any number of servers may do this at the same time.
    /// A database that a newer version has migrated is refused.
    pub async fn open(url: &str) -> Result<Store, StoreError> {
        sqlx::any::install_default_drivers();
        match sqlite_path(url)? {
            Some(path) => {
                // SQLite has no lock for migrations, and changing a file to WAL doesn't wait for other openers.
                let _opening = lock_beside(&path).await?;
                // Never closed for their age: with the last one the log would go, and its room with it.
                let pool = AnyPoolOptions::new().max_connections(SQLITE_CONNECTIONS);
                let pool = pool.min_connections(1).idle_timeout(None).max_lifetime(None);
                // There is no other end that could have hung up, and to ask costs as much as most questions.
                let pool = pool.test_before_acquire(false);
                let store = Self::connect(&format!("{url}?mode=rwc"), pool).await?;
                tokio::task::spawn_blocking(move || reserve_log(&path)).await.map_err(StoreError::unavailable)?;
                Ok(store)
            }
            None => Self::connect(url, AnyPoolOptions::new().max_connections(POSTGRES_CONNECTIONS)).await,
        }
    }

    async fn connect(url: &str, pool: AnyPoolOptions) -> Result<Store, StoreError> {
        let options: AnyConnectOptions = url.parse()?;
        // A statement's text is of no use without its values, and those belong to users.
        let options = options.disable_statement_logging();
        // One connection outside the pool first: the pool would try again what is refused, and in the end know of nothing
        // but its own timeout.
        tokio::time::timeout(OPEN_TIMEOUT, try_out(&options)).await.map_err(StoreError::unavailable)??;
        let pool = pool
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .after_connect(|connection, _| Box::pin(prepare(connection)))
            .connect_with(options)
            .await?;
        MIGRATIONS.run(&pool).await.map_err(StoreError::unavailable)?;
        Ok(Store { pool, watch: crate::watch::Watch::default(), outbox: Default::default() })
    }

    /// Whether the database answers, within 10 s.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let answer = sqlx::query("SELECT 1").fetch_one(&self.pool);
        tokio::time::timeout(ACQUIRE_TIMEOUT, answer).await.map_err(StoreError::unavailable)??;
        Ok(())
    }

    /// Waits for operations under way and closes every connection. All clones of the store are closed with it.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// The pool itself, for tests that look behind the store's back.
    #[doc(hidden)]
    pub fn pool(&self) -> &AnyPool {
        &self.pool
    }
}

/// Connects once and says why if that fails.
async fn try_out(options: &AnyConnectOptions) -> Result<(), sqlx::Error> {
    let mut connection = AnyConnection::connect_with(options).await?;
    prepare(&mut connection).await?;
    connection.close().await
}

/// Sets up a new connection.
async fn prepare(connection: &mut AnyConnection) -> Result<(), sqlx::Error> {
    let settings = match connection.backend_name() {
        "SQLite" => {
            "PRAGMA busy_timeout = 10000; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;"
        }
        _ => "SET statement_timeout = '10s'; SET idle_in_transaction_session_timeout = '10s'",
    };
    connection.execute(sqlx::raw_sql(settings)).await?;
    Ok(())
}

/// The file of an SQLite URL, `None` for Postgres. An in-memory database or options in the URL are refused: each
/// connection would see a database of its own, or not what `prepare` relies on.
fn sqlite_path(url: &str) -> Result<Option<PathBuf>, StoreError> {
    let refuse = |why: &str| Err(StoreError::unavailable(why));
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        return Ok(None);
    }
    match url.strip_prefix("sqlite://") {
        Some(path) if path.contains(['?', '#', '%']) => refuse("the path of a sqlite URL can't have any of ? # %"),
        Some(path) if path.starts_with('/') => Ok(Some(PathBuf::from(path))),
        Some(_) => refuse("a sqlite URL needs an absolute path: sqlite:///path/to/file"),
        None => refuse("a database URL begins with sqlite:/// or postgres://"),
    }
}

/// Gives the log of an open database its room. What can't (a filesystem that doesn't know how, a disk that is full
/// already) has none, and works as long as there is space. No lock of SQLite's is on the log, so closing it is fine.
fn reserve_log(database: &Path) {
    let mut path = database.as_os_str().to_owned();
    path.push("-wal");
    if let Ok(log) = std::fs::File::options().write(true).open(path) {
        let _ = fallocate(log, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, LOG_BYTES);
    }
}

/// An exclusive lock on `<file>.lock`, until it is dropped or the process ends. Not on the file itself: closing any
/// handle of that would drop SQLite's own locks.
async fn lock_beside(file: &Path) -> Result<std::fs::File, StoreError> {
    let mut path = file.as_os_str().to_owned();
    path.push(".lock");
    let lock = tokio::fs::OpenOptions::new().create(true).write(true).truncate(false).open(&path).await;
    let lock = lock.map_err(StoreError::unavailable)?.into_std().await;
    let deadline = Instant::now() + OPEN_TIMEOUT;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(std::fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => return Err(StoreError::unavailable(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_sqlite_files_and_postgres_are_taken() {
        assert_eq!(sqlite_path("sqlite:///var/lib/t.db").unwrap(), Some(PathBuf::from("/var/lib/t.db")));
        assert_eq!(sqlite_path("postgres://u@h/db?sslmode=disable").unwrap(), None);
        for bad in
            ["", "t.db", "sqlite:t.db", "sqlite://t.db", "sqlite::memory:", "sqlite:///a?mode=memory", "mysql://h/d"]
        {
            assert!(sqlite_path(bad).is_err(), "{bad}");
        }
    }
}

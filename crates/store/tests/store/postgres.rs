//! A Postgres server for the tests: a cluster in a temporary folder, on a Unix socket only, gone when the test is.
//!
//! It is stopped when the [`Cluster`] is dropped, also by a panic; if the test process is killed, the kernel sends the
//! server the same signal (`setpriv --pdeathsig`). Postgres refuses to run as root, so root runs it as `postgres`.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};
use sqlx::{AnyConnection, Connection, Executor};

use crate::fixtures::Db;

const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Cluster {
    server: Child,
    folder: tempfile::TempDir,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let programs = programs();
        let folder = tempfile::Builder::new().prefix("tiffin-pg-").tempdir().unwrap();
        if Uid::effective().is_root() {
            let owned = Command::new("chown").arg("postgres:").arg(folder.path()).status().unwrap();
            assert!(owned.success(), "no user postgres: install the Debian package postgresql");
        }
        let data = folder.path().join("data");
        let made = unprivileged(&programs.join("initdb"), folder.path())
            .args(["--auth=trust", "--username=tiffin", "--encoding=UTF8", "--locale=C", "--no-sync", "--pgdata"])
            .arg(&data)
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let server = unprivileged(&programs.join("postgres"), folder.path())
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(folder.path())
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=200"])
            .stderr(log)
            .spawn()
            .unwrap();
        let mut cluster = Self { server, folder };
        cluster.wait_until_ready().await;
        cluster
    }

    /// A new, empty database.
    pub(crate) async fn database(&self, number: usize) -> Db {
        let name = format!("case_{number}");
        let mut connection = AnyConnection::connect(&self.url("postgres")).await.unwrap();
        let statement = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
        connection.execute(sqlx::raw_sql(statement)).await.unwrap();
        connection.close().await.unwrap();
        Db::at(self.url(&name))
    }

    fn url(&self, database: &str) -> String {
        format!("postgres:///{database}?host={}&user=tiffin", self.folder.path().display())
    }

    async fn wait_until_ready(&mut self) {
        sqlx::any::install_default_drivers();
        let deadline = Instant::now() + DEADLINE;
        while let Err(error) = AnyConnection::connect(&self.url("postgres")).await {
            let ended = self.server.try_wait().unwrap();
            let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(ended.is_none() && Instant::now() < deadline, "postgres: {ended:?}, {error}\n{}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Fast shutdown: sessions are cut off, shared memory is given back.
        let pid = Pid::from_raw(self.server.id().try_into().expect("a pid fits"));
        let asked = kill(pid, Signal::SIGINT);
        let deadline = Instant::now() + DEADLINE;
        while asked.is_ok() && Instant::now() < deadline {
            if !matches!(self.server.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // Its other processes end by themselves when it does.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

pub(crate) async fn no_statement_or_idle_transaction_lasts_for_ever(db: Db) {
    let store = db.open().await;
    for setting in ["statement_timeout", "idle_in_transaction_session_timeout"] {
        let query = sqlx::query_scalar("SELECT current_setting($1)").bind(setting);
        let value: String = query.fetch_one(store.pool()).await.unwrap();
        assert_eq!(value, "10s", "{setting}");
    }
}

/// `program` as a user that Postgres accepts, in `folder`, ending with this process. The signal comes when the thread
/// that starts it ends: start it from the test's own thread.
fn unprivileged(program: &Path, folder: &Path) -> Command {
    let mut command = Command::new("setpriv");
    if Uid::effective().is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
    }
    command.args(["--pdeathsig", "INT", "--"]).arg(program);
    command.current_dir(folder).env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// The folder with `initdb` and `postgres`: Debian's newest, else the first in `PATH`.
fn programs() -> PathBuf {
    let has_both = |folder: &PathBuf| ["initdb", "postgres"].iter().all(|name| folder.join(name).is_file());
    let version = |folder: &PathBuf| -> Option<u32> { folder.parent()?.file_name()?.to_str()?.parse().ok() };
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = debian.map(|entry| entry.path().join("bin")).filter(has_both).max_by_key(version);
    let path = std::env::var_os("PATH").unwrap_or_default();
    newest.or_else(|| std::env::split_paths(&path).find(has_both)).expect(
        "the store's tests need a PostgreSQL server (initdb and postgres in /usr/lib/postgresql/*/bin or in PATH): \
         install the Debian package postgresql",
    )
}

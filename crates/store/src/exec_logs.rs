//! What was run in VMs: when, by whom and how it ended. Not what, unless the configuration wants that.

use std::collections::BTreeSet;

use sqlx::{AnyConnection, any::AnyRow};
use tiffin_types::{id::VmId, time::Timestamp};

use crate::{
    Performer, Store, StoreError,
    activity::performer_from,
    row::{Fields, column},
};

/// A run of a command or a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecLog {
    /// A ULID; runs that ended later have greater ones.
    pub id: String,
    /// Where.
    pub vm_id: VmId,
    /// When it began.
    pub at: Timestamp,
    /// What kind.
    pub kind: ExecKind,
    /// How it ended.
    pub outcome: ExecOutcome,
    /// Its exit code, if it had one.
    pub exit_code: Option<i32>,
    /// From the request to the end.
    pub duration_ms: u64,
    /// Whether output was cut.
    pub truncated: bool,
    /// Who ran it.
    pub actor: Performer,
    /// The request's id.
    pub request_id: Option<String>,
    /// The beginning of the command, where the configuration wants it.
    pub command: Option<String>,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Its name in the API and in the store.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl std::str::FromStr for $name {
            type Err = &'static str;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::ALL.iter().copied().find(|one| one.as_str() == text).ok_or("not a known word")
            }
        }
    };
}

words! {
    /// What kind of run.
    ExecKind {
        /// A shell command.
        Exec = "exec",
        /// TypeScript.
        RunTs = "run-ts",
        /// JavaScript.
        RunJs = "run-js",
    }
}

words! {
    /// How a run ended.
    ExecOutcome {
        /// By itself or by a signal; there is an exit code.
        Exited = "exited",
        /// At its time limit.
        TimedOut = "timed_out",
        /// The client hung up, which killed it.
        Abandoned = "abandoned",
        /// It could not be run to its end: the VM ended, or its agent failed.
        Failed = "failed",
    }
}

macro_rules! columns {
    () => {
        "id, vm_id, at, kind, outcome, exit_code, duration_ms, truncated, actor_kind, actor_id, actor_name, request_id, command"
    };
}

impl Store {
    /// A VM's newest runs, newest first; those of one kind when that is given.
    pub async fn exec_log_list(
        &self,
        vm: &VmId,
        limit: u32,
        kind: Option<ExecKind>,
    ) -> Result<Vec<ExecLog>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM exec_logs WHERE vm_id = $1 AND ($2 = '' OR kind = $2) ORDER BY id DESC LIMIT $3"
        ))
        .bind(vm.as_str())
        .bind(kind.map_or("", ExecKind::as_str))
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(exec_log_from).collect()
    }
}

pub(crate) async fn insert_all(runs: &[ExecLog], kept: u32, tx: &mut AnyConnection) -> Result<(), StoreError> {
    for run in runs {
        sqlx::query(concat!(
            "INSERT INTO exec_logs (",
            columns!(),
            ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) ON CONFLICT DO NOTHING"
        ))
        .bind(run.id.as_str())
        .bind(run.vm_id.as_str())
        .bind(run.at.as_millis())
        .bind(run.kind.as_str())
        .bind(run.outcome.as_str())
        .bind(run.exit_code.map(i64::from))
        .bind(column(run.duration_ms))
        .bind(i64::from(run.truncated))
        .bind(run.actor.kind.as_str())
        .bind(run.actor.id.as_deref())
        .bind(run.actor.name.as_deref())
        .bind(run.request_id.as_deref())
        .bind(run.command.as_deref())
        .execute(&mut *tx)
        .await?;
    }
    let vms: BTreeSet<&VmId> = runs.iter().map(|run| &run.vm_id).collect();
    for vm in vms {
        sqlx::query(
            "DELETE FROM exec_logs WHERE vm_id = $1 AND id <=
             (SELECT id FROM exec_logs WHERE vm_id = $1 ORDER BY id DESC LIMIT 1 OFFSET $2)",
        )
        .bind(vm.as_str())
        .bind(i64::from(kept))
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

fn exec_log_from(row: &AnyRow) -> Result<ExecLog, StoreError> {
    let fields = Fields::new("exec_logs", row);
    Ok(ExecLog {
        id: fields.text("id")?,
        vm_id: fields.parsed("vm_id")?,
        at: fields.time("at")?,
        kind: fields.parsed("kind")?,
        outcome: fields.parsed("outcome")?,
        exit_code: fields.number_if_any("exit_code")?,
        duration_ms: fields.number("duration_ms")?,
        truncated: fields.number::<i64>("truncated")? == 1,
        actor: performer_from(&fields)?,
        request_id: fields.text_if_any("request_id")?,
        command: fields.text_if_any("command")?,
    })
}

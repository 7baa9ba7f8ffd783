//! Terminals in VMs: a program with a terminal, both ways at once.
//!
//! Invariant: dropping a [`Terminal`] ends its program; it lasts no longer than the configured session.

use std::{sync::Arc, time::Duration};

use tiffin_engine::agent::{self, AgentError, ExecOutput, Input};
use tiffin_protocol::{Command, Exec, TerminalSize};
use tiffin_types::{account::Scope, id::VmId, path::WORKSPACE};
use tokio::time::Instant;

use super::{
    App,
    auth::Caller,
    guest::{GUEST_USER, Guest, SLACK, reach},
};
use crate::error::AppError;

/// The shell that runs the line, as a login shell: bash, or sh where the image has no bash.
const LOGIN_SHELL: &str = "exec \"$0\" -l";
/// The same behind the login shell that runs the line, so that no profile is read again and takes the image's `PATH` away.
const SHELL: &str = "exec \"$0\"";

/// A terminal that is open.
pub(crate) struct Terminal {
    pub(crate) input: Input,
    pub(crate) output: ExecOutput,
    pub(crate) session: Session,
}

/// What a terminal's end means, and when it comes at the latest.
pub(crate) struct Session {
    guest: Guest,
    /// When the terminal is given up: the agent should have ended it before.
    pub(crate) deadline: Instant,
}

/// Opens a terminal with a shell line in it, or with the login shell.
pub(crate) async fn terminal_open(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    cmd: Option<String>,
    size: TerminalSize,
) -> Result<Terminal, AppError> {
    caller.require(Scope::Write)?;
    let (guest, connection, token) = reach(app, caller, id).await?;
    let timeout_ms = app.config.terminal.max_session_ms;
    let image_env = guest.image_env().await?;
    let shell = if image_env.contains_key("PATH") { SHELL } else { LOGIN_SHELL };
    let exec = Exec {
        command: Command::Shell(cmd.unwrap_or_else(|| shell.to_owned())),
        cwd: WORKSPACE.to_owned(),
        env: Default::default(),
        image_env,
        uid: GUEST_USER,
        gid: GUEST_USER,
        timeout_ms,
        // A terminal writes for as long as somebody looks; nothing of it is kept.
        stdout_cap: u64::MAX,
        stderr_cap: 0,
        stdin: true,
        terminal: Some(size),
    };
    let (input, output) = guest.begin(agent::exec(connection, &token, exec)).await?.split();
    let deadline = Instant::now() + Duration::from_millis(timeout_ms) + SLACK;
    Ok(Terminal { input, output, session: Session { guest, deadline } })
}

impl Session {
    /// What a failure of the terminal means.
    pub(crate) async fn failure(&self, error: AgentError) -> AppError {
        self.guest.failure(error).await
    }
}

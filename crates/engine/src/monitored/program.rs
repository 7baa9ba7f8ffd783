//! Starting a VM's program, from the server's side: the monitor knows the program, and asks the guest.

use std::{io, time::Duration};

use tiffin_types::id::VmId;

use super::{MONITOR_MARGIN, Monitored, talk};
use crate::{
    EngineError,
    monitor::launch::{Ask, Reply},
};

/// The agent has 10 s for it, and a pause or a save that is under way comes first.
const START: Duration = Duration::from_secs(30);

impl Monitored {
    /// See [`crate::Engine::program_start`].
    pub(super) async fn start_program(&self, id: &VmId) -> Result<(), EngineError> {
        if self.spec(id)?.program.is_none() {
            return Err(EngineError::Invalid("the VM has no program".into()));
        }
        let watch = self.watch_or_follow(id).ok_or(EngineError::WrongState("stopped"))?;
        watch.claim();
        let asked = talk::ask(&self.folder(id), &Ask::Program, START).await;
        if let Ok(Reply::ProgramFailed) = asked
            && let Some(report) = self.taken_end(&watch, MONITOR_MARGIN).await
        {
            return Err(EngineError::Ended(report));
        }
        watch.release();
        match asked {
            Ok(Reply::Done) => Ok(()),
            Ok(Reply::NotRunning) => Err(EngineError::WrongState("not running")),
            Ok(Reply::Busy) => Err(EngineError::WrongState(talk::BUSY)),
            Ok(Reply::Refused { message, .. }) => {
                Err(EngineError::host(format!("starting the program of {id}"), io::Error::other(message)))
            }
            Ok(_) => Err(EngineError::WrongState("not answering")),
            Err(_) => Err(self.silent(id)),
        }
    }
}

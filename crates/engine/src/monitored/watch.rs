//! Following a monitor: one connection that tells when the guest is up and when it is down.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tiffin_types::{
    id::VmId,
    vm::{EndReason, EndReport},
};
use tokio::{
    io::BufReader,
    sync::{mpsc, watch},
};

use tokio_util::sync::CancellationToken;

use super::{folder, talk};
use crate::{
    Ended,
    host::process::ProcessId,
    monitor::launch::{Ask, Reply},
};

/// How long a monitor may live on after it has told of the end.
const LAST_STEPS: Duration = Duration::from_secs(10);

/// What is known of a run.
#[derive(Debug, Clone, Default)]
struct Known {
    ready: bool,
    ended: Option<EndReport>,
}

#[derive(Debug, Default)]
struct Delivery {
    /// A call waits for the end and will return it itself.
    claimed: bool,
    /// The end came and nobody has it yet.
    pending: Option<Ended>,
}

/// One run of a VM. Clones are the same run.
#[derive(Debug, Clone)]
pub(super) struct Watch {
    known: Arc<watch::Sender<Known>>,
    delivery: Arc<Mutex<Delivery>>,
    ends: mpsc::Sender<Ended>,
    over: CancellationToken,
}

impl Watch {
    pub(super) fn new(ends: mpsc::Sender<Ended>) -> Self {
        Self {
            known: Arc::new(watch::Sender::new(Known::default())),
            delivery: Arc::default(),
            ends,
            over: CancellationToken::new(),
        }
    }

    /// The caller will return the end itself.
    pub(super) fn claim(&self) {
        self.delivery.lock().unwrap_or_else(PoisonError::into_inner).claimed = true;
    }

    /// The caller won't, after all: an end that came meanwhile is delivered now.
    pub(super) fn release(&self) {
        let mut delivery = self.delivery.lock().unwrap_or_else(PoisonError::into_inner);
        delivery.claimed = false;
        if let Some(ended) = delivery.pending.take() {
            self.deliver(ended);
        }
    }

    /// Waits until the guest is up, or down.
    pub(super) async fn ready(&self) {
        self.until(|known| known.ready || known.ended.is_some()).await;
    }

    pub(super) fn is_ready(&self) -> bool {
        self.known.borrow().ready
    }

    /// Waits for the end.
    pub(super) async fn ended(&self) -> EndReport {
        let known = self.until(|known| known.ended.is_some()).await;
        known.ended.unwrap_or_else(|| monitor_lost("the VM's monitor is gone"))
    }

    pub(super) fn ended_now(&self) -> Option<EndReport> {
        self.known.borrow().ended.clone()
    }

    async fn until(&self, done: impl FnMut(&Known) -> bool) -> Known {
        let mut receiver = self.known.subscribe();
        // This handle holds the sender, so the channel can't be closed.
        receiver.wait_for(done).await.map(|known| known.clone()).unwrap_or_default()
    }

    fn deliver(&self, ended: Ended) {
        if let Err(error) = self.ends.try_send(ended) {
            // Whoever reconciles will find the VM down.
            tracing::warn!("an end could not be delivered: {error}");
        }
    }

    fn publish_end(&self, id: &VmId, report: EndReport) {
        {
            let mut delivery = self.delivery.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = Ended { id: id.clone(), report: report.clone() };
            if delivery.claimed { delivery.pending = Some(ended) } else { self.deliver(ended) }
        }
        self.known.send_modify(|known| known.ended = Some(report));
        self.over.cancel();
    }

    /// Cancelled when the run is over.
    pub(super) fn over(&self) -> &CancellationToken {
        &self.over
    }
}

/// Follows the monitor of the VM in `dir` to its end; `clear` then removes what is left of the run.
pub(super) async fn follow<F: Future<Output = ()>>(watch: Watch, id: VmId, dir: PathBuf, clear: impl FnOnce() -> F) {
    // Once: a later run in the same folder has another monitor, which is not this one's to judge.
    let monitor = folder::monitor(&dir).ok().flatten();
    let told = listen_while(&watch, &dir, monitor).await;
    wait_gone(monitor).await;
    let report = told
        .or_else(|| folder::end(&dir))
        .unwrap_or_else(|| monitor_lost("the VM's monitor was killed, and the VM with it"));
    clear().await;
    watch.publish_end(&id, report);
}

fn monitor_lost(message: &str) -> EndReport {
    EndReport { reason: EndReason::MonitorLost, message: message.into(), exit_code: None }
}

/// The end as the monitor tells it; `None` when the monitor is gone. A connection that breaks says nothing about the
/// monitor, whose process does.
async fn listen_while(watch: &Watch, dir: &Path, monitor: Option<ProcessId>) -> Option<EndReport> {
    let mut pause = Duration::from_millis(5);
    loop {
        match listen(watch, dir).await {
            Ok(report) => return Some(report),
            Err(_) if !monitor.is_some_and(ProcessId::is_alive) => return None,
            Err(error) => tracing::debug!("asking the monitor in {} again: {error}", dir.display()),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

async fn listen(watch: &Watch, dir: &Path) -> io::Result<EndReport> {
    let mut answers = BufReader::new(talk::say(dir, &Ask::Watch).await?);
    loop {
        match talk::next(&mut answers).await? {
            Reply::Ready => watch.known.send_modify(|known| known.ready = true),
            Reply::Ended { report } => return Ok(report),
            other => return Err(io::Error::other(format!("an unexpected answer: {other:?}"))),
        }
    }
}

/// Waits until the monitor's process is gone, and with it all of its VM; helps it after a while. It has told of the end,
/// or is gone already.
async fn wait_gone(monitor: Option<ProcessId>) {
    let deadline = Instant::now() + LAST_STEPS;
    while let Some(process) = monitor.filter(|process| process.is_alive()) {
        if Instant::now() >= deadline {
            process.kill();
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

//! What dead VMs leave outside their folders, and its removal.

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use tiffin_types::id::VmId;

use super::{ANSWER, blocking, uplinks::Uplinks};
use crate::{
    host::{
        cgroup::{Cgroups, Group},
        filter,
        mount::wait_detached,
        network::host_link,
    },
    monitor::launch::{self, DISK, END, LAUNCH, Launch},
};

/// A control group without processes and without a VM here is swept when it is older than this: it may be the young
/// group of another installation on the same host.
const ORPHAN_AGE: Duration = Duration::from_secs(60);
/// What a dead VM may have left outside its folder.
pub(super) struct Leftovers {
    pub(super) id: VmId,
    pub(super) group: Group,
    pub(super) folder: PathBuf,
    pub(super) uplinks: Uplinks,
}

impl Leftovers {
    /// Kills what is still in the control group, removes it and waits until the kernel has let go of the disk.
    pub(super) async fn clear(self) -> io::Result<()> {
        self.uplinks.free(&self.id);
        blocking(move || {
            let deadline = Instant::now() + ANSWER;
            self.group.kill();
            while let Err(error) = self.group.remove() {
                if Instant::now() >= deadline {
                    return Err(error);
                }
                self.group.kill();
                std::thread::sleep(Duration::from_millis(5));
            }
            self.leave_the_host(deadline);
            wait_detached(&self.folder.join(DISK), ANSWER)
        })
        .await
    }
}

impl Leftovers {
    /// A monitor that was killed has left its openings in the host's filter. And its link vanishes a moment after its last
    /// process: the VM's next run makes one of the same name.
    fn leave_the_host(&self, deadline: Instant) {
        let had_uplink = matches!(launch::read(&self.folder, LAUNCH), Ok(Some(Launch { uplink: Some(_), .. })));
        if !had_uplink {
            return;
        }
        let link = Path::new("/sys/class/net").join(host_link(&self.id));
        while link.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        if self.folder.join(END).exists() {
            return;
        }
        if let Err(error) = filter::close_host_wholly(&self.id) {
            tracing::warn!(vm_id = %self.id, "what {} could reach of this host stays in its filter: {error}", self.id);
        }
    }
}

/// Removes empty control groups that belong to no VM in `vms`. Other installations may share the host, so what is young
/// or holds a process is theirs.
pub(super) fn sweep_orphans(cgroups: &Cgroups, vms: &Path) {
    for id in cgroups.all() {
        let group = cgroups.group(&id);
        let is_old = |at| SystemTime::now().duration_since(at).is_ok_and(|age| age >= ORPHAN_AGE);
        if !vms.join(id.as_str()).exists() && group.created().is_some_and(is_old) {
            // A process in it makes this fail, which is as it should be.
            let _ = group.remove();
        }
    }
}

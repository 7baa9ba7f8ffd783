//! `runsc` saving a container and going on from what was saved.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use tokio::{process::Command, time::timeout};

use super::{CALL_LIMIT, Network, Raw, quiet};

impl Raw {
    /// `runsc checkpoint` of a container, which goes on: where it was saved, and the time that took.
    pub(in crate::bench) async fn checkpoint(&self, id: &str) -> anyhow::Result<(PathBuf, Duration)> {
        let image = self.folder.path().join(format!("saved-{}", self.new_name()));
        std::fs::create_dir(&image)?;
        let mut checkpoint = Command::new(&self.runsc);
        checkpoint
            .args(self.options(Network::Own))
            .args(["checkpoint", "--leave-running", "--compression=none", "--image-path"])
            .arg(&image)
            .arg(id);
        let start = Instant::now();
        let status = timeout(CALL_LIMIT, quiet(&mut checkpoint).status()).await.context("runsc checkpoint hangs")??;
        ensure!(status.success(), "runsc checkpoint: {status}");
        Ok((image, start.elapsed()))
    }

    /// `runsc restore` of what was saved, and then a first `runsc exec` of `bash -lc 'echo hi'`: the time of both. The
    /// container is gone when this returns.
    pub(in crate::bench) async fn restore(&self, image: &Path) -> anyhow::Result<Duration> {
        let id = self.new_id();
        let image = image.to_str().context("a folder's name is no UTF-8")?;
        let start = Instant::now();
        let mut restore = self.start("restore", Network::Own, "idle", &id, &["--detach", "--image-path", image]);
        let status = timeout(CALL_LIMIT, restore.status()).await.context("runsc restore hangs")??;
        ensure!(status.success(), "runsc restore: {status}");
        let first = self.exec(&id, &["/bin/bash", "-lc", "echo hi"]).await;
        let time = start.elapsed();
        self.delete(&id).await;
        first.map(|_| time)
    }
}

//! What programs printed: forgotten when it is old or too much, whether or not its VM is there.

use std::{collections::BTreeSet, fs, io, path::Path};

use tiffin_logs::{Limits, sweep, sweep_gone};
use tiffin_types::time::Timestamp;

use crate::{
    app::{App, logs::FOLDER},
    error::{AppError, chain},
};

/// Forgets what the configuration doesn't keep.
pub(super) async fn sweep_logs(app: &App) -> Result<(), AppError> {
    let living = app.store.vm_not_deleted().await?.into_iter().map(|vm| vm.id.to_string()).collect();
    let (folder, limits) = (app.config.data_dir.join(FOLDER), app.config.logs);
    let swept =
        tokio::task::spawn_blocking(move || sweep_all(folder.as_std_path(), &living, &limits, Timestamp::now()));
    let failed = |error| AppError::internal("sweeping logs", error);
    let gone = swept.await.map_err(|panicked| failed(io::Error::other(panicked)))?.map_err(failed)?;
    if gone > 0 {
        tracing::debug!(logs = gone, "logs of VMs that are gone were forgotten");
    }
    Ok(())
}

/// Sweeps every log below `folder`; says how many have gone. One that can't be swept keeps none of the others.
fn sweep_all(folder: &Path, living: &BTreeSet<String>, limits: &Limits, now: Timestamp) -> io::Result<usize> {
    let logs = match fs::read_dir(folder) {
        Ok(logs) => logs,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut gone = 0;
    for log in logs {
        let log = log?;
        if !log.file_type()?.is_dir() {
            continue;
        }
        let is_living = log.file_name().to_str().is_some_and(|name| living.contains(name));
        let swept = if is_living {
            sweep(&log.path(), limits, now).map(|()| false)
        } else {
            sweep_gone(&log.path(), limits, now)
        };
        match swept {
            Ok(is_gone) => gone += usize::from(is_gone),
            Err(error) => tracing::warn!(log = ?log.file_name(), error = chain(&error), "a log can't be swept now"),
        }
    }
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tiffin_logs::{Order, Query, Reader, Stream, Writer};

    use super::*;

    #[test]
    fn old_lines_go_and_with_them_the_folders_of_vms_that_are_gone() {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits::new(1 << 30, Duration::from_secs(3600), 1000);
        let now = Timestamp::now();
        for (name, age_s) in [("living-old", 7200), ("gone-old", 7200), ("gone-young", 60)] {
            let mut writer = Writer::open(folder.path().join(name), limits);
            writer.push(Stream::Stdout, b"line\n", now.plus_millis(-1000 * age_s));
        }
        fs::write(folder.path().join("a file"), "is left alone").unwrap();
        let living = BTreeSet::from(["living-old".to_owned()]);
        assert_eq!(sweep_all(folder.path(), &living, &limits, now).unwrap(), 1);
        let lines = |name| {
            Reader::open(folder.path().join(name)).page(&Query::new(Order::OldestFirst, 10)).unwrap().lines.len()
        };
        assert_eq!([lines("living-old"), lines("gone-young")], [0, 1]);
        assert!(folder.path().join("living-old").exists() && !folder.path().join("gone-old").exists());
        assert!(folder.path().join("a file").exists());
        assert_eq!(sweep_all(&folder.path().join("missing"), &living, &limits, now).unwrap(), 0);
    }
}

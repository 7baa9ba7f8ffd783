//! A folder of 10 MiB into a VM and out of it by the API, against `tar` in the same VM with the archive in a pipe: `runsc exec`
//! of it, and the same bytes on the same disk.

use std::{io::Read, time::Instant};

use anyhow::{Context, ensure};
use flate2::{Compression, read::GzDecoder, write::GzEncoder};

use super::{
    Bench, SCENARIO_LIMIT,
    raw::Tar,
    report::{Figure, Scenario},
    stats::{Samples, ratio},
};

const WARM_UP: usize = 2;
const GOAL: f64 = 1.5;
const FILES: usize = 40;
const FILE_BYTES: usize = 256 * 1024;
/// Where the API puts it, and `tar`.
const OWN: &str = "/workspace/own";
const BESIDE: &str = "/workspace/beside";

struct Found {
    up: Samples,
    down: Samples,
    tar_up: Samples,
    tar_down: Samples,
}

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let mut found = Found {
        up: Samples::new("tiffin: upload"),
        down: Samples::new("tiffin: download"),
        tar_up: Samples::new("runsc exec tar -xz"),
        tar_down: Samples::new("runsc exec tar -cz"),
    };
    let id = bench.api.create(bench.cpus(), 512).await?;
    let tar = match &bench.raw {
        Ok(raw) => Some(raw.tar_in(&id)?),
        Err(_) => None,
    };
    let archive = archive()?;
    let deadline = Instant::now() + SCENARIO_LIMIT;
    for round in 0..WARM_UP + bench.count(20, 3) {
        if Instant::now() > deadline {
            break;
        }
        bench.api.exec(&id, &format!("rm -rf {OWN} {BESIDE}; mkdir {BESIDE}; sync")).await?;
        let counts = round >= WARM_UP;
        bench.settle().await;
        found.own(bench, &id, &archive, counts).await;
        bench.settle().await;
        if let Some(tar) = &tar {
            found.beside(tar, &archive, counts).await;
        }
    }
    Ok(found.scenario(tar.is_some(), archive.len()))
}

impl Found {
    async fn own(&mut self, bench: &Bench, id: &tiffin_types::id::VmId, archive: &[u8], counts: bool) {
        let up = bench.api.upload(id, OWN, archive.to_vec()).await;
        bench.settle().await;
        let down = match bench.api.download(id, OWN).await {
            Ok((time, packed)) => whole(&packed).map(|()| time),
            Err(error) => Err(error),
        };
        if counts {
            self.up.note(up);
            self.down.note(down);
        }
    }

    async fn beside(&mut self, tar: &Tar<'_>, archive: &[u8], counts: bool) {
        let up = tar.unpack(BESIDE, archive).await;
        let down = match tar.pack(BESIDE).await {
            Ok((time, packed)) => whole(&packed).map(|()| time),
            Err(error) => Err(error),
        };
        if counts {
            self.tar_up.note(up);
            self.tar_down.note(down);
        }
    }

    fn scenario(&self, with_tar: bool, archive_bytes: usize) -> Scenario {
        let mut scenario = Scenario::new("files");
        let over = |own: &Samples, tar: &Samples| ratio(own.p50(), tar.p50());
        scenario.figures = vec![
            Figure::goal("upload p50, over tar through a pipe", "", over(&self.up, &self.tar_up), GOAL),
            Figure::goal("download p50, over tar through a pipe", "", over(&self.down, &self.tar_down), GOAL),
        ];
        let mb = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        let (all, packed) = (mb(FILES * FILE_BYTES), mb(archive_bytes));
        scenario.notes.push(format!("{all:.0} MiB in {FILES} files, {packed:.1} MiB as a tar.gz"));
        if self.up.p50().is_none() || self.down.p50().is_none() {
            scenario.failure = Some("nothing could be moved in and out".to_owned());
        }
        scenario.samples = vec![self.up.summary(), self.down.summary()];
        if with_tar {
            scenario.samples.extend([self.tar_up.summary(), self.tar_down.summary()]);
        }
        scenario
    }
}

/// The folder as a tar.gz. As text does, its bytes pack to about half.
fn archive() -> anyhow::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
    let mut state = 1u64;
    for number in 0..FILES {
        let content: Vec<u8> = std::iter::repeat_with(|| {
            // Knuth's linear congruential generator: the same bytes in every run.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            b"0123456789abcdef"[usize::try_from(state >> 60).unwrap_or_default()]
        })
        .take(FILE_BYTES)
        .collect();
        let mut header = tar::Header::new_gnu();
        header.set_size(FILE_BYTES as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, format!("folder/file-{number:02}"), content.as_slice())?;
    }
    Ok(builder.into_inner()?.finish()?)
}

/// Whether an archive that came back has everything in it.
fn whole(packed: &[u8]) -> anyhow::Result<()> {
    let (mut files, mut bytes) = (0, 0);
    for entry in tar::Archive::new(GzDecoder::new(packed)).entries()? {
        let mut entry = entry.context("the archive that came back")?;
        if entry.header().entry_type().is_file() {
            files += 1;
            bytes += std::io::copy(&mut entry.by_ref().take(FILE_BYTES as u64 + 1), &mut std::io::sink())?;
        }
    }
    ensure!(files == FILES && bytes == (FILES * FILE_BYTES) as u64, "{files} files of {bytes} bytes came back");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_one_that_may_be_uploaded_and_what_is_missing_of_it_is_noticed() {
        let archive = archive().unwrap();
        assert!((4 << 20..8 << 20).contains(&archive.len()), "{}", archive.len());
        whole(&archive).unwrap();
        assert!(whole(&archive[..archive.len() / 2]).is_err());
        let empty = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        assert!(whole(&empty.into_inner().unwrap().finish().unwrap()).is_err());
    }
}

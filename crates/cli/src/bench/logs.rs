//! The store of what programs print, against `grep` of the same lines: on this machine's disk, without a VM.
//!
//! `grep` runs in the C locale, in which it is fastest, and reads one file; what it takes to start is counted.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use tiffin_logs::{Budget, Limits, Needle, Order, Query, Reader, Stream, Writer};
use tiffin_types::time::Timestamp;

use super::{
    Bench,
    report::{Figure, Scenario},
    stats::{Samples, ratio},
};

/// What programs' output arrives in: a pipe's worth.
const PIECE_BYTES: usize = 64 * 1024;
/// Lines a second that must go in.
const LINES_A_SECOND: f64 = 300_000.0;
const PAGE: usize = 100;
/// Texts: in no line, in one of ten thousand, in many.
const TEXTS: [(&str, &str); 3] =
    [("in no line", "No Such Thing"), ("in few lines", "NEEDLE"), ("in many lines", "session")];

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let (lines, rounds) = (bench.count(1_000_000, 50_000), bench.count(15, 3));
    let folder = tempfile::tempdir_in(&bench.data_dir).or_else(|_| tempfile::tempdir())?;
    tokio::task::spawn_blocking(move || measure(folder.path(), lines, rounds)).await?
}

fn measure(folder: &Path, lines: usize, rounds: usize) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("logs");
    let (log, plain) = (folder.join("log"), folder.join("plain"));
    let text = text(0..lines);
    fs::write(&plain, &text).context("writing the lines for grep")?;
    let limits = Limits { total_bytes: u64::MAX, ..Limits::default() };
    let mut writer = Writer::open(&log, Limits { segment_bytes: 16 << 20, ..limits });
    let begun = Instant::now();
    write(&mut writer, &text)?;
    let a_second = lines as f64 / begun.elapsed().as_secs_f64();
    let share = Some(LINES_A_SECOND / a_second);
    scenario.figures.push(Figure::plain("lines in, a second", "", Some(a_second.round())));
    scenario.figures.push(Figure::goal("time to write 300,000 lines", "s", share, 1.0));

    let reader = Reader::open(&log);
    for (name, text) in TEXTS {
        let (mut own, mut grep) = (Samples::new("tiffin: a page of a search"), Samples::new("grep -iF -m 100"));
        for _ in 0..rounds {
            own.note(page(&reader, Some(text)));
            grep.note(grep_for(&plain, text));
        }
        let name = format!("a search for a text {name}, p50, over grep's");
        scenario.figures.push(Figure::goal(name, "", ratio(own.p50(), grep.p50()), 1.0));
        scenario.samples.extend([own.summary(), grep.summary()]);
    }
    let mut newest = Samples::new("the newest page");
    (0..rounds).for_each(|_| newest.note(page(&reader, None)));
    scenario.figures.push(Figure::goal("the newest page, p50", "ms", newest.p50(), 10.0));
    for part in 1..10 {
        write(&mut writer, &self::text(part * lines..(part + 1) * lines))?;
    }
    let mut tenfold = Samples::new("the newest page of ten times the lines");
    (0..rounds).for_each(|_| tenfold.note(page(&reader, None)));
    scenario.figures.push(Figure::goal("the same of ten times the lines", "ms", tenfold.p50(), 10.0));
    scenario.samples.extend([newest.summary(), tenfold.summary()]);
    scenario.notes.push(format!("{lines} lines, about 90 bytes each"));
    Ok(scenario)
}

/// Lines as programs print them.
fn text(numbers: std::ops::Range<usize>) -> Vec<u8> {
    const WORDS: [&str; 8] = ["request", "served", "Session", "GET", "/index.html", "user", "timeout", "latency"];
    let mut text = String::new();
    for number in numbers {
        text.push_str(&format!("{number:08}"));
        for nth in 0..10 {
            text.push(' ');
            text.push_str(WORDS[(number * 31 + nth * nth * 7 + number / 7) % WORDS.len()]);
        }
        text.push_str(if number % 10_007 == 10_006 { " Needle\n" } else { "\n" });
    }
    text.into_bytes()
}

fn write(writer: &mut Writer, text: &[u8]) -> anyhow::Result<()> {
    text.chunks(PIECE_BYTES).for_each(|piece| writer.push(Stream::Stdout, piece, Timestamp::now()));
    ensure!(writer.trouble().is_none() && writer.lost() == 0, "lines were lost: {:?}", writer.trouble());
    Ok(())
}

fn page(reader: &Reader, text: Option<&str>) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let order = if text.is_some() { Order::OldestFirst } else { Order::NewestFirst };
    let budget = Budget { time: Duration::from_secs(60), ..Budget::default() };
    let text = text.map(Needle::new).transpose()?;
    reader.page(&Query { text, budget, ..Query::new(order, PAGE) })?;
    Ok(begun.elapsed())
}

fn grep_for(plain: &Path, text: &str) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let mut grep = Command::new("grep");
    grep.args(["-iF", "-m", &PAGE.to_string(), "--", text]).arg(plain).env("LC_ALL", "C");
    let found = grep.stdin(Stdio::null()).output().context("running grep")?;
    ensure!(found.status.code().is_some_and(|code| code <= 1), "grep: {}", String::from_utf8_lossy(&found.stderr));
    Ok(begun.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_measured() {
        let folder = tempfile::tempdir().unwrap();
        let scenario = measure(folder.path(), 20_000, 1).unwrap();
        assert!(scenario.samples.iter().all(|sample| sample.count == 1 && sample.failed == 0));
        assert_eq!(scenario.figures.len(), 7);
    }
}

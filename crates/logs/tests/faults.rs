//! Writers that are killed, and disks that are full.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tiffin_logs::{Limits, Order, Query, Reader, Stream, Writer};
use tiffin_types::time::Timestamp;

const FOLDER: &str = "TIFFIN_TEST_LOG_FOLDER";

fn limits() -> Limits {
    Limits { segment_bytes: 20_000, ..Limits::default() }
}

/// A line that shows its number, of a length that varies.
fn line(number: u64) -> String {
    format!("{number} {}", "x".repeat(usize::try_from(number * 7919 % 300).unwrap()))
}

fn check(folder: &Path) -> u64 {
    let reader = Reader::open(folder);
    let mut query = Query::new(Order::OldestFirst, 1000);
    let mut next = 0;
    loop {
        let page = reader.page(&query).unwrap();
        for found in &page.lines {
            assert_eq!((found.number, &found.message), (next, &line(next)));
            next += 1;
        }
        query.after = page.next();
        if query.after.is_none() {
            return next;
        }
    }
}

/// Not a test: what the next one starts as a process of its own, and kills.
#[test]
#[ignore = "a part of the next test"]
fn writes_until_it_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let mut number = Reader::open(&folder).end().unwrap().0;
    let mut writer = Writer::open(folder, limits());
    assert!(writer.trouble().is_none(), "{:?}", writer.trouble());
    let mut stdout = std::io::stdout();
    loop {
        let lines: String = (number..number + 1 + number % 5).map(|number| line(number) + "\n").collect();
        // Cut anywhere.
        let (begin, rest) = lines.as_bytes().split_at(lines.len() / 3);
        writer.push(Stream::Stdout, begin, Timestamp::now());
        writer.push(Stream::Stdout, rest, Timestamp::now());
        number += 1 + number % 5;
        writeln!(stdout, "\nwritten {number}").unwrap();
    }
}

#[test]
fn a_writer_that_is_killed_loses_nothing_that_it_had_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writes_until_it_is_killed", "--ignored", "--nocapture"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut says = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut written = last;
        for _ in 0..10 + round * 11 {
            let said = says.by_ref().map(Result::unwrap).find(|said| said.starts_with("written ")).unwrap();
            written = said["written ".len()..].parse().unwrap();
        }
        // While it goes on.
        check(folder.path());
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it was killed.
        for said in says.map_while(Result::ok).filter(|said| said.starts_with("written ")) {
            written = said["written ".len()..].parse().unwrap_or(written);
        }
        last = check(folder.path());
        assert!(last >= written && written > 0, "{last} of {written}");
    }
}

/// A filesystem of so many bytes.
struct Small(tempfile::TempDir);

impl Small {
    fn new(bytes: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={bytes}");
        mount(Some("none"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .expect("it takes root to mount a filesystem");
        Self(folder)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_loses_lines_that_are_counted_and_the_log_says_so_once_there_is_room() {
    let disk = Small::new(512 * 1024);
    let folder = disk.0.path().join("log");
    let mut writer = Writer::open(&folder, Limits { segment_bytes: 50_000, ..Limits::default() });
    let ballast = disk.0.path().join("ballast");
    fs::write(&ballast, vec![1; 300 * 1024]).unwrap();
    let mut printed = 0;
    while writer.lost() < 1000 {
        let lines: String = (0..10).map(|more| format!("{} and so on\n", printed + more)).collect();
        writer.push(Stream::Stdout, lines.as_bytes(), Timestamp::now());
        printed += 10;
        assert!(printed < 100_000, "it never gets full");
    }
    assert!(writer.trouble().is_some());
    let kept = printed - i64::try_from(writer.lost()).unwrap();
    fs::remove_file(&ballast).unwrap();
    writer.push(Stream::Stdout, b"again\n", Timestamp::now());
    assert!(writer.trouble().is_none() && writer.lost() == 0);
    let page = Reader::open(&folder).page(&Query::new(Order::OldestFirst, 1_000_000)).unwrap();
    let mut missing = 0;
    let mut numbers = Vec::new();
    for line in &page.lines {
        match line.message.strip_prefix("[lines missing: ") {
            Some(count) => missing += count.split(';').next().unwrap().parse::<i64>().unwrap(),
            None if line.message == "again" => {}
            None => numbers.push(line.message.split(' ').next().unwrap().parse::<i64>().unwrap()),
        }
    }
    assert!(numbers.is_sorted() && i64::try_from(numbers.len()).unwrap() + missing == printed, "{missing} {printed}");
    assert!(missing >= 1000 && kept > 0);
    assert_eq!(page.lines.last().unwrap().message, "again");
}

#[test]
fn a_disk_that_is_full_from_the_start_does_not_stop_the_program() {
    let disk = Small::new(64 * 1024);
    let ballast = disk.0.path().join("ballast");
    let _ = fs::write(&ballast, vec![1; 64 * 1024]);
    let folder = disk.0.path().join("log");
    let mut writer = Writer::open(&folder, Limits::default());
    writer.push(Stream::Stderr, b"a\nb\n", Timestamp::now());
    assert_eq!(writer.lost(), 2);
    assert!(writer.trouble().is_some());
    fs::remove_file(&ballast).unwrap();
    writer.tick(Timestamp::now());
    let page = Reader::open(&folder).page(&Query::new(Order::OldestFirst, 10)).unwrap();
    assert!(page.lines[0].message.starts_with("[lines missing: 2;"), "{page:?}");
}

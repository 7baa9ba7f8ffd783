//! What a log keeps, shows and forgets.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tiffin_logs::{Cursor, Limits, Line, Needle, Order, Query, Reader, Stream, Writer, sweep, sweep_gone};
use tiffin_types::time::Timestamp;

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(1_700_000_000_000 + millis)
}

fn small() -> Limits {
    Limits { segment_bytes: 1000, ..Limits::default() }
}

fn all(folder: &Path) -> Vec<Line> {
    let page = Reader::open(folder).page(&Query::new(Order::OldestFirst, 1_000_000)).unwrap();
    assert!(page.is_end);
    page.lines
}

fn messages(folder: &Path) -> Vec<String> {
    all(folder).into_iter().map(|line| line.message).collect()
}

fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = paths.filter(|path| path.extension().is_some_and(|found| found == ending)).collect();
    paths.sort();
    paths
}

#[test]
fn lines_have_their_time_stream_and_level() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(folder.path(), Limits::default());
    writer.push(Stream::Stdout, b"out\n", at(1));
    writer.push(Stream::Stderr, b"err\n", at(2));
    writer.push(Stream::Stdout, b"{\"level\":\"Warning\",\"msg\":\"x\"}\n{\"level\":60}\n{\"a\":1}\n", at(3));
    writer.push(Stream::Stderr, b"{\"severity\":\"NOTICE\"}\n{\"level\":[]}\n", at(4));
    let lines = all(folder.path());
    let seen: Vec<_> = lines.iter().map(|line| (line.number, line.time_ms, line.level.as_str())).collect();
    let base = at(0).as_millis();
    assert_eq!(
        seen,
        [
            (0, base + 1, "info"),
            (1, base + 2, "error"),
            (2, base + 3, "Warning"),
            (3, base + 3, "fatal"),
            (4, base + 3, "info"),
            (5, base + 4, "NOTICE"),
            (6, base + 4, "error"),
        ]
    );
    assert_eq!(lines[2].message, "{\"level\":\"Warning\",\"msg\":\"x\"}");
    assert_eq!((lines[0].stream, lines[5].stream), (Some(Stream::Stdout), Some(Stream::Stderr)));
}

#[test]
fn binary_output_in_single_bytes_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(folder.path(), Limits::default());
    let printed: Vec<u8> = (0..=255u8).cycle().take(3000).collect();
    for byte in &printed {
        writer.push(Stream::Stdout, &[*byte], at(0));
    }
    writer.finish(at(1));
    let want: Vec<String> =
        printed.split(|byte| *byte == b'\n').map(|line| String::from_utf8_lossy(line).into_owned()).collect();
    assert_eq!(messages(folder.path()), want);
}

#[test]
fn a_line_without_end_is_cut_and_held_in_bounded_memory() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(folder.path(), Limits { line_bytes: 1000, ..Limits::default() });
    let piece = vec![b'z'; 1 << 20];
    for _ in 0..50 {
        writer.push(Stream::Stdout, &piece, at(0));
    }
    assert_eq!(messages(folder.path()), [""; 0]);
    writer.push(Stream::Stdout, b"\nnext\n", at(0));
    let cut = format!("{} [cut: {} bytes more]", "z".repeat(1000), 50 * (1 << 20) - 1000);
    assert_eq!(messages(folder.path()), [cut, "next".to_owned()]);
}

#[test]
fn a_second_writer_is_kept_out_until_the_first_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = Writer::open(folder.path(), Limits::default());
    first.push(Stream::Stdout, b"first\n", at(0));
    let mut second = Writer::open(folder.path(), Limits::default());
    assert!(second.trouble().is_some());
    second.push(Stream::Stdout, b"unheard\n", at(1));
    assert_eq!((second.lost(), messages(folder.path()).len()), (1, 1));
    drop(first);
    second.push(Stream::Stdout, b"second\n", at(2));
    assert!(second.trouble().is_none() && second.lost() == 0);
    let lines = all(folder.path());
    assert_eq!((lines[0].message.as_str(), lines[2].message.as_str()), ("first", "second"));
    assert!(lines[1].message.starts_with("[lines missing: 1;") && lines[1].level == "warn", "{:?}", lines[1]);
    assert_eq!(lines[1].stream, None);
}

#[test]
fn a_clock_that_is_set_back_keeps_the_order_and_both_times() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(folder.path(), Limits::default());
    for (millis, line) in [(7_200_000, "a\n"), (7_199_000, "b\n"), (0, "c\n"), (1, "d\n")] {
        writer.push(Stream::Stdout, line.as_bytes(), at(millis));
    }
    drop(writer);
    let mut writer = Writer::open(folder.path(), Limits::default());
    writer.push(Stream::Stdout, b"e\n", at(-3_600_000));
    let times: Vec<i64> = all(folder.path()).iter().map(|line| line.time_ms - at(0).as_millis()).collect();
    assert_eq!(times, [7_200_000, 7_200_000, 0, 1, -3_600_000]);
    assert_eq!(messages(folder.path()), ["a", "b", "c", "d", "e"]);
    let early = Query { to: Some(at(60_000)), ..Query::new(Order::NewestFirst, 10) };
    let lines = Reader::open(folder.path()).page(&early).unwrap().lines;
    assert_eq!(lines.iter().map(|line| line.message.as_str()).collect::<Vec<_>>(), ["e", "d", "c"]);
}

#[test]
fn old_lines_go_by_size_and_a_place_among_them_goes_on_with_the_oldest() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { total_bytes: 100 * 1024, segment_bytes: 10_000, ..Limits::default() };
    let mut writer = Writer::open(folder.path(), limits);
    for number in 0..5000 {
        writer.push(Stream::Stdout, format!("line {number} with some more to it\n").as_bytes(), at(number));
    }
    let bytes: u64 = fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= limits.total_bytes, "{bytes}");
    let lines = all(folder.path());
    assert!(lines.len() > 500 && lines.last().unwrap().number == 4999, "{}", lines.len());
    let reader = Reader::open(folder.path());
    let page = reader.page(&Query { after: Some(Cursor(3)), ..Query::new(Order::OldestFirst, 10) }).unwrap();
    assert_eq!(page.lines[..], lines[..10]);
    let page = reader.page(&Query { after: Some(Cursor(3)), ..Query::new(Order::NewestFirst, 10) }).unwrap();
    assert!(page.lines.is_empty() && page.is_end);
}

#[test]
fn a_place_beyond_the_end_waits_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(folder.path(), small());
    writer.push(Stream::Stdout, b"a\nb\n", at(0));
    let reader = Reader::open(folder.path());
    let query = Query { after: Some(Cursor(u64::MAX)), ..Query::new(Order::OldestFirst, 10) };
    let page = reader.page(&query).unwrap();
    assert_eq!((page.lines.len(), page.position, page.is_end), (0, Cursor(2), true));
    let query = Query { after: Some(Cursor(u64::MAX)), ..Query::new(Order::NewestFirst, 10) };
    assert_eq!(reader.page(&query).unwrap().lines.len(), 2);
}

#[test]
fn old_lines_go_by_age_also_when_nothing_is_printed() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits::new(1 << 30, Duration::from_secs(3600), 1000);
    let mut writer = Writer::open(folder.path(), limits);
    writer.push(Stream::Stdout, b"old\n", at(0));
    writer.tick(at(3_000_000));
    writer.push(Stream::Stdout, b"young\n", at(3_000_000));
    writer.tick(at(4_000_000));
    assert_eq!(messages(folder.path()), ["young"]);
    writer.tick(at(9_000_000));
    assert_eq!(messages(folder.path()), [""; 0]);
    writer.push(Stream::Stdout, b"new\n", at(9_000_000));
    assert_eq!(all(folder.path())[0].number, 2);
}

#[test]
fn what_no_writer_looks_after_is_swept_and_numbers_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("log");
    let limits = Limits::new(1 << 30, Duration::from_secs(60), 1000);
    let mut writer = Writer::open(&folder, limits);
    writer.push(Stream::Stdout, b"a\nb\n", at(0));
    sweep(&folder, &limits, at(100_000)).unwrap();
    assert_eq!(messages(&folder), ["a", "b"], "its writer will");
    drop(writer);
    sweep(&folder, &limits, at(30_000)).unwrap();
    assert!(!sweep_gone(&folder, &limits, at(30_000)).unwrap());
    assert_eq!(messages(&folder), ["a", "b"]);
    sweep(&folder, &limits, at(100_000)).unwrap();
    assert_eq!(messages(&folder), [""; 0]);
    let mut writer = Writer::open(&folder, limits);
    writer.push(Stream::Stdout, b"c\n", at(100_000));
    assert_eq!(all(&folder)[0].number, 2);
    drop(writer);
    assert!(sweep_gone(&folder, &limits, at(900_000)).unwrap());
    assert!(!folder.exists());
    assert!(sweep_gone(&folder, &limits, at(900_000)).unwrap(), "gone is gone");
    sweep(&folder, &limits, at(900_000)).unwrap();
}

#[test]
fn a_folder_that_is_not_there_is_an_empty_log() {
    let reader = Reader::open("/nowhere/at/all");
    let page = reader.page(&Query::new(Order::NewestFirst, 10)).unwrap();
    assert!(page.lines.is_empty() && page.is_end);
    assert_eq!((reader.end().unwrap(), reader.times().unwrap()), (Cursor(0), None));
}

#[test]
fn what_a_power_cut_tore_is_cut_off_by_the_writer_and_shown_as_damaged_before() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(folder.path(), Limits::default());
    writer.push(Stream::Stdout, b"one\ntwo\nthree\n", at(0));
    drop(writer);
    // The last line's text never came to the disk, and half a record more did.
    let text = OpenOptions::new().write(true).open(&files(folder.path(), "text")[0]).unwrap();
    text.write_all_at(&[0; 3], 8).unwrap();
    let index = OpenOptions::new().append(true).open(&files(folder.path(), "index")[0]).unwrap();
    std::io::Write::write_all(&mut &index, &[1; 7]).unwrap();
    let lines = messages(folder.path());
    assert_eq!(lines[..2], ["one", "two"]);
    assert!(lines.len() == 3 && lines[2].contains("damaged"), "{lines:?}");
    text.set_len(5).unwrap();
    assert!(messages(folder.path())[1].contains("damaged"));
    let mut writer = Writer::open(folder.path(), Limits::default());
    writer.push(Stream::Stdout, b"four\n", at(1));
    assert_eq!(messages(folder.path()), ["one", "four"]);
}

#[test]
fn nothing_in_a_folder_makes_a_reader_or_a_writer_panic() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(folder.path(), small());
    for number in 0..200 {
        writer.push(Stream::Stdout, format!("line {number}\n").as_bytes(), at(number));
    }
    drop(writer);
    fs::write(folder.path().join("x.index"), b"junk").unwrap();
    fs::write(folder.path().join("00000000000000009999.text"), b"orphan").unwrap();
    let good: Vec<(PathBuf, Vec<u8>)> = [files(folder.path(), "index"), files(folder.path(), "text")]
        .concat()
        .into_iter()
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect();
    let reader = Reader::open(folder.path());
    let mut seed = 1u64;
    let mut random = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap() % below
    };
    for _ in 0..100 {
        let (path, bytes) = &good[random(good.len())];
        let mut bytes = bytes.clone();
        match random(3) {
            0 => bytes.truncate(random(bytes.len() + 1)),
            1 => bytes.extend([0xff; 21]),
            _ => (0..8).for_each(|_| {
                let at = random(bytes.len());
                bytes[at] = u8::try_from(random(256)).unwrap();
            }),
        }
        fs::write(path, bytes).unwrap();
        for order in [Order::OldestFirst, Order::NewestFirst] {
            let mut query = Query { text: Needle::new("LINE").ok(), ..Query::new(order, 50) };
            let mut pages = 0;
            loop {
                query.after = reader.page(&query).unwrap().next();
                pages += 1;
                assert!(pages < 100, "it doesn't come to an end");
                if query.after.is_none() {
                    break;
                }
            }
        }
        reader.times().unwrap();
        let mut writer = Writer::open(folder.path(), small());
        writer.push(Stream::Stdout, b"after\n", at(1000));
        assert!(writer.trouble().is_none(), "{:?}", writer.trouble());
        drop(writer);
        assert_eq!(messages(folder.path()).last().unwrap(), "after");
        fs::remove_dir_all(folder.path()).unwrap();
        fs::create_dir(folder.path()).unwrap();
        for (path, bytes) in &good {
            fs::write(path, bytes).unwrap();
        }
    }
}

#[test]
fn a_reader_beside_the_writer_sees_each_line_once_while_segments_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { total_bytes: 4 << 20, segment_bytes: 5000, ..Limits::default() };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut writer = Writer::open(folder.path(), limits);
            for number in 0..30_000 {
                writer.push(Stream::Stdout, format!("line {number}\n").as_bytes(), at(number));
            }
            assert!(writer.trouble().is_none());
            done.store(true, Ordering::Release);
        });
        scope.spawn(|| {
            let reader = Reader::open(folder.path());
            let mut query = Query::new(Order::OldestFirst, 97);
            let mut next = 0;
            loop {
                let was_done = done.load(Ordering::Acquire);
                let page = reader.page(&query).unwrap();
                for line in &page.lines {
                    // Retention may be faster than this reader.
                    assert!(line.number >= next && line.message == format!("line {}", line.number));
                    next = line.number + 1;
                }
                assert!(page.lines.windows(2).all(|pair| pair[1].number == pair[0].number + 1));
                assert!(page.position.0 >= next);
                query.after = Some(page.position);
                if was_done && page.is_end {
                    break;
                }
            }
            assert_eq!(next, 30_000);
        });
        scope.spawn(|| {
            let reader = Reader::open(folder.path());
            while !done.load(Ordering::Acquire) {
                let mut query = Query::new(Order::NewestFirst, 97);
                loop {
                    let page = reader.page(&query).unwrap();
                    assert!(page.lines.windows(2).all(|pair| pair[1].number + 1 == pair[0].number));
                    if let (Some(after), Some(first)) = (query.after, page.lines.first()) {
                        assert_eq!(first.number + 1, after.0);
                    }
                    query.after = page.next();
                    if query.after.is_none() {
                        break;
                    }
                }
            }
        });
    });
}

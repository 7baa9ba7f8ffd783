//! Queries as clients send them: what is refused, and that pages fit together.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use tiffin_logs::{Answer, Budget, Limits, Parameters, Reader, Request, Stream, Writer};
use tiffin_types::time::Timestamp;

/// 2023-11-14 22:13:20 UTC and a little.
fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(1_700_000_000_000 + millis)
}

fn read(sent: &Parameters<'_>) -> Result<Request, Vec<&'static str>> {
    Request::read("vm1", sent).map_err(|wrong| wrong.into_iter().map(|wrong| wrong.field).collect())
}

struct Log {
    folder: tempfile::TempDir,
    writer: Writer,
}

impl Log {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let writer = Writer::open(folder.path(), Limits { segment_bytes: 2000, ..Limits::default() });
        Self { folder, writer }
    }

    fn print(&mut self, lines: std::ops::Range<i64>) {
        for number in lines {
            self.writer.push(Stream::Stdout, format!("Line {number}\n").as_bytes(), at(number));
        }
    }

    fn ask(&self, sent: &Parameters<'_>, now: Timestamp) -> Answer {
        read(sent).unwrap().answer(&Reader::open(self.folder.path()), now, Budget::default()).unwrap()
    }

    /// All pages, each asked for with what the one before carried.
    fn pages(&self, first: &Parameters<'_>, now: i64) -> Vec<Vec<i64>> {
        let mut answer = self.ask(first, at(now));
        let mut pages = vec![numbers(&answer)];
        while let Some(more) = answer.more {
            let next =
                Parameters { pagination: Some(&more.pagination), from: Some(&more.from), to: Some(&more.to), ..*first };
            answer = self.ask(&next, at(now + 500_000));
            pages.push(numbers(&answer));
        }
        pages
    }
}

fn numbers(answer: &Answer) -> Vec<i64> {
    answer.lines.iter().map(|line| line.message["Line ".len()..].parse().unwrap()).collect()
}

#[test]
fn a_query_without_parameters_gives_the_oldest_hundred() {
    let mut log = Log::new();
    log.print(0..101);
    let answer = log.ask(&Parameters::default(), at(7_000));
    assert_eq!(numbers(&answer), (0..100).collect::<Vec<_>>());
    let more = answer.more.unwrap();
    assert_eq!((more.from.as_str(), more.to.as_str()), ("2023-11-14 22:13:20 UTC", "2023-11-14 22:13:27 UTC"));
    assert!(more.pagination.len() <= 24, "{}", more.pagination);
    assert!(log.ask(&Parameters { batch: Some("101"), ..Parameters::default() }, at(7_000)).more.is_none());
    assert_eq!(log.pages(&Parameters::default(), 7_000), [(0..100).collect::<Vec<_>>(), vec![100]]);
}

#[test]
fn pages_keep_text_order_and_bounds() {
    let mut log = Log::new();
    log.print(0..3000);
    let sent = Parameters {
        query: Some("LINE 1"),
        batch: Some("50"),
        order: Some("newest_first"),
        from: Some("2023-11-14T22:13:20.500 0000"),
        to: Some("2023-11-14T22:13:21.500Z"),
        ..Parameters::default()
    };
    let pages = log.pages(&sent, 9_000);
    let want: Vec<i64> = (500..=1500).rev().filter(|number| number.to_string().starts_with('1')).collect();
    assert_eq!(pages.concat(), want);
    assert!(pages[..pages.len() - 1].iter().all(|page| page.len() == 50));
}

#[test]
fn paging_ends_although_the_program_prints_on() {
    let mut log = Log::new();
    log.print(0..1000);
    let mut answer = log.ask(&Parameters::default(), at(1000));
    let (mut printed, mut seen) = (1000, numbers(&answer));
    while let Some(more) = answer.more {
        log.print(printed..printed + 150);
        printed += 150;
        let next = Parameters { pagination: Some(&more.pagination), ..Parameters::default() };
        answer = log.ask(&next, at(printed));
        seen.extend(numbers(&answer));
        assert!(seen.len() < 5000);
    }
    // All of the second that the query was asked in.
    assert_eq!(seen, (0..=1000).collect::<Vec<_>>());
}

#[test]
fn newest_first_is_not_moved_by_what_is_printed_meanwhile() {
    let mut log = Log::new();
    log.print(0..500);
    let sent = Parameters { order: Some("newest_first"), ..Parameters::default() };
    let first = log.ask(&sent, at(500));
    let more = first.more.clone().unwrap();
    log.print(500..900);
    let next = Parameters { pagination: Some(&more.pagination), from: Some(&more.from), to: Some(&more.to), ..sent };
    let second = log.ask(&next, at(901));
    assert_eq!([numbers(&first), numbers(&second)].concat(), (300..500).rev().collect::<Vec<_>>());
}

#[test]
fn a_token_alone_is_enough_and_one_of_another_query_is_refused() {
    let mut log = Log::new();
    log.print(0..500);
    let more = log.ask(&Parameters { query: Some("line"), ..Parameters::default() }, at(500)).more.unwrap();
    let alone = Parameters { query: Some("Line"), pagination: Some(&more.pagination), ..Parameters::default() };
    assert_eq!(numbers(&log.ask(&alone, at(500)))[0], 100);
    for (sent, field) in [
        (Parameters { query: Some("lines"), ..alone }, "pagination"),
        (Parameters { query: None, ..alone }, "pagination"),
        (Parameters { order: Some("newest_first"), ..alone }, "order"),
        (Parameters { from: Some("2023-11-14 22:13:21 UTC"), ..alone }, "from"),
        (Parameters { to: Some("2023-11-14 22:13:24 UTC"), ..alone }, "to"),
    ] {
        assert_eq!(read(&sent).unwrap_err(), [field]);
    }
    let other = Request::read("vm2", &alone).unwrap_err();
    assert_eq!(other[0].field, "pagination");
}

#[test]
fn what_is_wrong_is_named_all_at_once() {
    let sent = Parameters {
        query: Some("a\nb"),
        batch: Some("49"),
        order: Some("newest"),
        pagination: Some("XlG9SZP"),
        from: Some("yesterday"),
        to: Some("2022-07-19"),
    };
    assert_eq!(read(&sent).unwrap_err(), ["query", "batch", "order", "from", "to", "pagination"]);
    for batch in ["1001", "0", "-1", "", "ten", "50.5", "99999999999999999999"] {
        assert_eq!(
            read(&Parameters { batch: Some(batch), ..Parameters::default() }).unwrap_err(),
            ["batch"],
            "{batch}"
        );
    }
    let wrong = Request::read("vm1", &Parameters { batch: Some("7"), ..Parameters::default() }).unwrap_err();
    assert_eq!(wrong[0].to_string(), "batch must be a whole number from 50 to 1000 (100 when it isn't given)");
    let turned = Parameters {
        from: Some("2023-03-07 06:12:56 UTC"),
        to: Some("2023-03-07 06:12:55 UTC"),
        ..Parameters::default()
    };
    assert_eq!(read(&turned).unwrap_err(), ["from"]);
    assert!(read(&Parameters { query: Some(""), pagination: Some(""), ..Parameters::default() }).is_ok());
}

#[test]
fn a_log_without_lines_answers_with_none() {
    let log = Log::new();
    let answer = log.ask(&Parameters::default(), at(0));
    assert_eq!(answer, Answer { lines: vec![], more: None });
}

#[test]
fn lines_from_before_the_clock_was_set_back_are_not_hidden() {
    let mut log = Log::new();
    log.writer.push(Stream::Stdout, b"Line 1\n", at(7_200_000));
    log.writer.push(Stream::Stdout, b"Line 2\n", at(0));
    assert_eq!(numbers(&log.ask(&Parameters::default(), at(10))), [1, 2]);
}

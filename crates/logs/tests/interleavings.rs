//! Any order of writing, rotating, forgetting, restarting and paging: no line is left out, given twice or changed.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::time::Duration;

use proptest::prelude::*;
use tiffin_logs::{Budget, Cursor, Limits, Needle, Order, Query, Reader, Stream, Writer, sweep};
use tiffin_types::time::Timestamp;

const LIMITS: Limits = Limits {
    // Ten or so of the smallest segments.
    total_bytes: 80 * 1024,
    age: Duration::from_secs(600),
    line_bytes: 64,
    segment_bytes: 400,
    segment_age: Duration::from_secs(60),
};

#[derive(Debug, Clone)]
enum Step {
    Push(Stream, Vec<u8>),
    End(Stream),
    Reopen,
    Pass(i64),
    Tick,
    Sweep,
    Page(usize),
    PageBack(usize),
    RestartBack,
}

fn stream() -> impl Strategy<Value = Stream> {
    prop::sample::select(vec![Stream::Stdout, Stream::Stderr])
}

fn step() -> impl Strategy<Value = Step> {
    let byte = prop::sample::select(b"\n\n\nabX\xff".to_vec());
    prop_oneof![
        8 => (stream(), prop::collection::vec(byte, 0..60)).prop_map(|(stream, bytes)| Step::Push(stream, bytes)),
        1 => stream().prop_map(Step::End),
        1 => Just(Step::Reopen),
        1 => prop::sample::select(vec![1, 30_000, 70_000, 700_000, -5_000, -3_600_000]).prop_map(Step::Pass),
        1 => Just(Step::Tick),
        1 => Just(Step::Sweep),
        3 => (1usize..30).prop_map(Step::Page),
        3 => (1usize..30).prop_map(Step::PageBack),
        1 => Just(Step::RestartBack),
    ]
}

/// What the log should hold, by the simplest means.
#[derive(Default)]
struct Model {
    lines: Vec<String>,
    held: [Vec<u8>; 2],
}

impl Model {
    fn push(&mut self, stream: Stream, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' {
                self.end_line(stream);
            } else {
                self.held[usize::from(stream == Stream::Stderr)].push(*byte);
            }
        }
    }

    fn end_line(&mut self, stream: Stream) {
        let mut line = std::mem::take(&mut self.held[usize::from(stream == Stream::Stderr)]);
        if line.len() > LIMITS.line_bytes {
            let cut = format!(" [cut: {} bytes more]", line.len() - LIMITS.line_bytes);
            line.truncate(LIMITS.line_bytes);
            line.extend_from_slice(cut.as_bytes());
        }
        self.lines.push(String::from_utf8_lossy(&line).into_owned());
    }

    fn end(&mut self, stream: Stream) {
        if !self.held[usize::from(stream == Stream::Stderr)].is_empty() {
            self.end_line(stream);
        }
    }
}

struct Case {
    folder: tempfile::TempDir,
    writer: Option<Writer>,
    reader: Reader,
    model: Model,
    now: Timestamp,
    text: Option<&'static str>,
    forward: Option<Cursor>,
    backward: Option<Cursor>,
}

impl Case {
    fn new(text: Option<&'static str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let writer = Writer::open(folder.path(), LIMITS);
        let reader = Reader::open(folder.path());
        let now = Timestamp::from_millis(1_700_000_000_000);
        let (forward, backward) = (None, None);
        Self { folder, writer: Some(writer), reader, model: Model::default(), now, text, forward, backward }
    }

    fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().unwrap()
    }

    fn step(&mut self, step: Step) {
        let now = self.now;
        match step {
            Step::Push(stream, bytes) => {
                self.writer().push(stream, &bytes, now);
                self.model.push(stream, &bytes);
            }
            Step::End(stream) => {
                self.writer().end(stream, now);
                self.model.end(stream);
            }
            Step::Reopen => {
                for stream in [Stream::Stdout, Stream::Stderr] {
                    self.step(Step::End(stream));
                }
                self.writer = None;
                self.writer = Some(Writer::open(self.folder.path(), LIMITS));
            }
            Step::Pass(millis) => self.now = now.plus_millis(millis),
            Step::Tick => self.writer().tick(now),
            Step::Sweep => sweep(self.folder.path(), &LIMITS, now).unwrap(),
            Step::Page(batch) => self.page(batch),
            Step::PageBack(batch) => self.page_back(batch),
            Step::RestartBack => self.backward = None,
        }
        assert!(self.writer().trouble().is_none(), "{:?}", self.writer().trouble());
        assert_eq!(self.reader.end().unwrap().0, self.model.lines.len() as u64);
    }

    fn query(&self, order: Order, batch: usize, after: Option<Cursor>) -> Query {
        Query { after, text: self.text.map(|text| Needle::new(text).unwrap()), ..Query::new(order, batch) }
    }

    fn is_wanted(&self, number: u64) -> bool {
        let line = &self.model.lines[usize::try_from(number).unwrap()];
        self.text.is_none_or(|text| line.to_lowercase().contains(&text.to_lowercase()))
    }

    fn oldest(&self) -> u64 {
        let page = self.reader.page(&Query::new(Order::OldestFirst, 1)).unwrap();
        page.lines.first().map_or(self.model.lines.len() as u64, |line| line.number)
    }

    fn page(&mut self, batch: usize) {
        let page = self.reader.page(&self.query(Order::OldestFirst, batch, self.forward)).unwrap();
        let from = self.forward.map_or(0, |at| at.0).max(self.oldest());
        let numbers: Vec<u64> = page.lines.iter().map(|line| line.number).collect();
        let all = (from..page.position.0).filter(|number| self.is_wanted(*number));
        assert_eq!(numbers, all.collect::<Vec<_>>());
        assert!(numbers.len() <= batch && (numbers.len() == batch || page.is_end));
        assert!(!page.is_end || page.position.0 == self.model.lines.len() as u64);
        self.check(&page.lines);
        self.forward = Some(page.position);
    }

    fn page_back(&mut self, batch: usize) {
        let until = self.backward.map_or(self.model.lines.len() as u64, |at| at.0);
        let page = self.reader.page(&self.query(Order::NewestFirst, batch, self.backward)).unwrap();
        let numbers: Vec<u64> = page.lines.iter().map(|line| line.number).collect();
        let begin = page.position.0.max(self.oldest());
        let all = (begin..until).rev().filter(|number| self.is_wanted(*number));
        assert_eq!(numbers, all.collect::<Vec<_>>());
        assert!(numbers.len() <= batch && (numbers.len() == batch || page.is_end));
        assert!(!page.is_end || page.position.0 <= self.oldest());
        self.check(&page.lines);
        self.backward = Some(page.position);
    }

    fn check(&self, lines: &[tiffin_logs::Line]) {
        for line in lines {
            assert_eq!(line.message, self.model.lines[usize::try_from(line.number).unwrap()]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pages_have_every_line_once_in_order_and_unchanged(
        steps in prop::collection::vec(step(), 1..120),
        text in prop::sample::select(vec![None, Some("x"), Some("aB")]),
    ) {
        let mut case = Case::new(text);
        for step in steps {
            case.step(step);
        }
    }

    #[test]
    fn times_choose_what_a_filter_over_all_lines_would(
        steps in prop::collection::vec((1i64..40_000, 1usize..20), 1..30),
        from in prop::option::of(0i64..400_000), to in prop::option::of(0i64..400_000),
        batch in 1usize..40, newest_first in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(folder.path(), LIMITS);
        let mut now = Timestamp::from_millis(1_700_000_000_000);
        for (passed, lines) in steps {
            now = now.plus_millis(passed);
            writer.push(Stream::Stdout, &b"line\n".repeat(lines), now);
        }
        let reader = Reader::open(folder.path());
        let everything = reader.page(&Query::new(Order::OldestFirst, 100_000)).unwrap().lines;
        let at = |millis: i64| Timestamp::from_millis(1_700_000_000_000 + millis);
        let (from, to) = (from.map(at), to.map(at));
        let mut wanted: Vec<_> = everything
            .into_iter()
            .filter(|line| from.is_none_or(|from| line.time_ms >= from.as_millis()))
            .filter(|line| to.is_none_or(|to| line.time_ms <= to.as_millis()))
            .collect();
        let order = if newest_first { Order::NewestFirst } else { Order::OldestFirst };
        if newest_first {
            wanted.reverse();
        }
        let mut query = Query { from, to, ..Query::new(order, batch) };
        let mut got = Vec::new();
        loop {
            let page = reader.page(&query).unwrap();
            // A page that isn't the last is full, and the last one isn't empty unless all are.
            prop_assert!(page.is_end || page.lines.len() == batch);
            prop_assert!(!page.lines.is_empty() || wanted.is_empty());
            query.after = page.next();
            got.extend(page.lines);
            if query.after.is_none() {
                break;
            }
        }
        prop_assert_eq!(got, wanted);
    }
}

#[test]
fn pages_that_run_out_of_time_or_memory_go_on_where_they_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(folder.path(), Limits::default());
    let now = Timestamp::from_millis(1_700_000_000_000);
    let printed: String = (0..30_000).map(|number| format!("line {number}\n")).collect();
    writer.push(Stream::Stdout, printed.as_bytes(), now);
    let reader = Reader::open(folder.path());
    for (order, last) in [(Order::OldestFirst, "line 29999"), (Order::NewestFirst, "line 0")] {
        for budget in
            [Budget { time: Duration::ZERO, ..Budget::default() }, Budget { bytes: 5000, ..Budget::default() }]
        {
            let mut query = Query { budget, text: Needle::new("LINE").ok(), ..Query::new(order, 1000) };
            let (mut lines, mut pages) = (Vec::new(), 0);
            loop {
                let page = reader.page(&query).unwrap();
                query.after = page.next();
                pages += 1;
                lines.extend(page.lines);
                if query.after.is_none() {
                    break;
                }
            }
            assert!(pages > 5, "{pages}");
            assert_eq!(lines.len(), 30_000);
            assert_eq!(lines.last().unwrap().message, last);
        }
    }
}

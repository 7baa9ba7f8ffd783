//! Searches of logs larger than what is read at once, held against the simplest search of the same lines.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::time::Duration;

use proptest::prelude::*;
use tiffin_logs::{Limits, Needle, Order, Query, Reader, Stream, Writer};
use tiffin_types::time::Timestamp;

/// Words of which lines are made; some are other cases and forms of others.
const WORDS: [&str; 8] = ["request", "REQUEST", "Task", "ta\u{17F}k", "TAS\u{212A}", "tas", "id=7", "\u{e9}tat"];
const TEXTS: [&str; 7] = ["task", "request id", "sk request", "no such text", "ID", "\u{c9}TAT task", "7 \u{e9}tat id"];

/// Lines from few to many kilobytes long: more in all than a segment has, and at times more in one than is read at once.
fn lines() -> impl Strategy<Value = Vec<String>> {
    let words =
        (0..WORDS.len(), 0..WORDS.len(), 0..WORDS.len()).prop_map(|(a, b, c)| [WORDS[a], WORDS[b], WORDS[c]].join(" "));
    let filling = prop_oneof![6 => 0..200usize, 3 => 0..9_000usize, 1 => 0..300_000usize];
    let line = (words, filling, any::<bool>()).prop_map(|(words, filling, is_plain)| {
        let filling = "x y ".repeat(filling / 4);
        if is_plain { filling } else { format!("{filling}{words}{filling}") }
    });
    prop::collection::vec(line, 1..150)
}

fn fold(text: &str) -> String {
    text.to_lowercase().replace('\u{17F}', "s").replace('\u{212A}', "k")
}

/// All pages of a search, oldest first.
fn found(reader: &Reader, text: &str, order: Order, batch: usize, time: Duration) -> Vec<(u64, String)> {
    let mut query = Query { text: Some(Needle::new(text).unwrap()), ..Query::new(order, batch) };
    query.budget.time = time;
    let mut found = Vec::new();
    loop {
        let page = reader.page(&query).unwrap();
        assert!(page.lines.len() <= batch);
        found.extend(page.lines.iter().map(|line| (line.number, line.message.clone())));
        if page.is_end {
            break;
        }
        assert_ne!(query.after, Some(page.position), "a page got nowhere");
        query.after = Some(page.position);
    }
    if order == Order::NewestFirst {
        found.reverse();
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_search_finds_what_a_naive_one_finds(
        lines in lines(), text in prop::sample::select(&TEXTS[..]), batch in 1usize..60, hurried in any::<bool>(),
        segment_bytes in prop::sample::select(vec![50_000u64, 700_000, 16 << 20]),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits { segment_bytes, line_bytes: 1 << 20, ..Limits::default() };
        let mut writer = Writer::open(folder.path(), limits);
        for line in &lines {
            writer.push(Stream::Stdout, format!("{line}\n").as_bytes(), Timestamp::from_millis(1_700_000_000_000));
        }
        let naive: Vec<(u64, String)> =
            (0..).zip(lines).filter(|(_, line)| fold(line).contains(&fold(text))).collect();
        let reader = Reader::open(folder.path());
        let time = if hurried { Duration::ZERO } else { Duration::from_secs(60) };
        for order in [Order::OldestFirst, Order::NewestFirst] {
            prop_assert!(found(&reader, text, order, batch, time) == naive, "{:?} of {}", order, text);
        }
    }
}

#[test]
fn a_rare_text_is_found_wherever_pieces_of_the_log_meet() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(folder.path(), Limits::default());
    // Lines of lengths that put the text at every place of a piece's border, sooner or later.
    let lines: Vec<String> =
        (0..60_000usize)
            .map(|nth| {
                if nth % 61 == 7 { format!("{} the Needle sought", "-".repeat(nth % 67)) } else { "x".repeat(nth % 31) }
            })
            .collect();
    for part in lines.chunks(500) {
        writer.push(Stream::Stdout, (part.join("\n") + "\n").as_bytes(), Timestamp::from_millis(1_700_000_000_000));
    }
    let reader = Reader::open(folder.path());
    let want: Vec<(u64, String)> = (0..).zip(lines).filter(|(_, line)| line.contains("Needle")).collect();
    for (order, time) in
        [(Order::OldestFirst, 60), (Order::NewestFirst, 60), (Order::OldestFirst, 0), (Order::NewestFirst, 0)]
    {
        let found = found(&reader, "the needle SOUGHT", order, 700, Duration::from_secs(time));
        assert!(found == want, "{order:?}: {} of {}", found.len(), want.len());
    }
}

//! What a machine said last on its console, for whoever asks why it didn't come up.
//!
//! A guest's words: they go into the reason of its own end, cut and without control characters.

use std::{
    io::{self, Read},
    sync::{Mutex, PoisonError},
};

/// Bytes that are kept.
const KEPT: usize = 4096;
/// Characters that are told.
const TOLD: usize = 400;
/// Lines that are told where none of them is known to say why.
const LINES: usize = 3;

/// What a line begins with, or has, that says why: the agent's, then the kernel's.
const AGENT: &str = "tiffin-agent: ";
const PANIC: &str = "Kernel panic - not syncing: ";

/// The end of what the console said.
#[derive(Debug, Default)]
pub(super) struct Words(Mutex<Vec<u8>>);

impl Words {
    /// Passes on what comes from `from`, and keeps the end of it.
    pub(super) fn overhear<R: Read>(&self, from: R) -> Overheard<'_, R> {
        Overheard { words: self, from }
    }

    fn keep(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(bytes);
        let surplus = kept.len().saturating_sub(KEPT);
        kept.drain(..surplus);
    }

    /// `what` happened to the guest, and its last words.
    pub(super) fn explain(&self, what: &str) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match last(&String::from_utf8_lossy(&kept)) {
            Some(words) => format!("{what}; its last words: {words}"),
            None => format!("{what}; it said nothing on its console (ttyS0)"),
        }
    }
}

/// See [`Words::overhear`].
pub(super) struct Overheard<'a, R> {
    words: &'a Words,
    from: R,
}

impl<R: Read> Read for Overheard<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.from.read(buffer)?;
        self.words.keep(&buffer[..length]);
        Ok(length)
    }
}

fn last(console: &str) -> Option<String> {
    let lines: Vec<&str> = console.lines().map(without_time).filter(|line| !line.is_empty()).collect();
    let begins = |word: &str| lines.iter().rev().find_map(|line| line.find(word).map(|at| &line[at..]));
    let told = match begins(AGENT).or_else(|| begins(PANIC)) {
        Some(line) => line.to_owned(),
        None => lines[lines.len().saturating_sub(LINES)..].join(" / "),
    };
    Some(plain(&told)).filter(|told| !told.is_empty())
}

/// The kernel begins a line with its clock: `[    1.234567] `.
fn without_time(line: &str) -> &str {
    match line.trim().strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((time, rest)) if time.trim().bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') => rest.trim(),
        _ => line.trim(),
    }
}

/// As much of a guest's text as is told to others.
pub(super) fn plain(text: &str) -> String {
    let shown = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    shown.take(TOLD).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(console: &[u8]) -> String {
        let words = Words::default();
        let mut heard = Vec::new();
        words.overhear(console).read_to_end(&mut heard).unwrap();
        assert_eq!(heard, console);
        words.explain("it ended")
    }

    #[test]
    fn the_agents_words_come_first_and_then_the_kernels() {
        let panic = "[    1.2] Kernel panic - not syncing: VFS: no root\r\n[    1.3] CPU: 0\r\n";
        assert_eq!(explained(panic.as_bytes()), "it ended; its last words: Kernel panic - not syncing: VFS: no root");
        let both = format!("tiffin-agent: the kernel has no erofs\n{panic}");
        assert_eq!(explained(both.as_bytes()), "it ended; its last words: tiffin-agent: the kernel has no erofs");
    }

    #[test]
    fn what_says_nothing_of_why_is_told_by_its_end() {
        assert_eq!(explained(b"a\nb\n[    0.1] c\n[x] d\n\n"), "it ended; its last words: b / c / [x] d");
        assert_eq!(explained(b" \n\n"), "it ended; it said nothing on its console (ttyS0)");
    }

    #[test]
    fn a_guests_words_are_short_and_plain() {
        let told = explained(&[b"\x1b[2Jx\x07\xff".repeat(3000), b"\n".to_vec()].concat());
        assert!(told.chars().count() < TOLD + 60 && !told.chars().any(char::is_control), "{told}");
    }
}

//! The way to the monitor: the agent's standard output, as the monitor made it.
//!
//! Invariant: a frame is written in one piece, and is small enough ([`CHANNEL_FRAME`]) for a pipe to take it whole or not at
//! all. So frames of two threads don't mix, and a guest that is saved while the pipe is full tears none: the copy's monitor
//! begins with a whole one.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use tiffin_protocol::{CHANNEL_FRAME, Event, HEADER, Kind, encode};

/// What a frame of the channel carries at most.
const MAX_PAYLOAD: usize = CHANNEL_FRAME - HEADER - 1;

/// Characters of a message that is sent.
const MAX_MESSAGE: usize = 500;

/// The framed channel. Whoever writes waits while the monitor doesn't read: that is what holds a program back.
#[derive(Debug)]
pub struct Channel(Mutex<File>);

impl Channel {
    /// Over `file`, a pipe to the monitor.
    pub fn new(file: File) -> Self {
        Channel(Mutex::new(file))
    }

    /// Sends `event`. A monitor that is gone is no reason to stop: the failure becomes a line on standard error.
    pub fn event(&self, event: &Event) {
        let sent =
            serde_json::to_vec(event).map_err(io::Error::from).and_then(|payload| self.send(Kind::Event, &payload));
        if let Err(error) = sent {
            eprintln!("tiffin-agent: event not sent: {error}");
        }
    }

    /// Tells that set-up failed.
    pub fn failed(&self, message: &str) {
        self.event(&Event::Failed { message: message.chars().take(MAX_MESSAGE).collect() });
    }

    /// Sends what the program printed.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn print(&self, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        bytes.chunks(MAX_PAYLOAD).try_for_each(|chunk| self.send(kind, chunk))
    }

    fn send(&self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        if payload.len() > MAX_PAYLOAD {
            return Err(io::Error::other("the frame is too large"));
        }
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(&encode(kind, payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn long_output_is_cut_into_frames_that_a_pipe_takes_whole() {
        let (mut read, write) = std::io::pipe().unwrap();
        let channel = Channel::new(File::from(std::os::fd::OwnedFd::from(write)));
        let bytes: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        channel.print(Kind::Stderr, &bytes).unwrap();
        channel.failed(&"\u{1}".repeat(10_000));
        drop(channel);
        let mut all = Vec::new();
        read.read_to_end(&mut all).unwrap();
        let (mut printed, mut events) = (Vec::new(), 0);
        while let Some(first) = crate::wire::split_first(&mut all).unwrap() {
            assert!(first.payload.len() <= MAX_PAYLOAD);
            match first.kind {
                Kind::Stderr => printed.extend(first.payload),
                Kind::Event => events += 1,
                other => panic!("{other:?}"),
            }
            all = first.rest;
        }
        assert_eq!((printed, events), (bytes, 1));
    }
}

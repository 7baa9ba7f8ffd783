//! What is typed, or comes on standard input otherwise.
//!
//! A thread of its own reads it: nothing else can, that must not keep the program from ending while it waits.

use std::io::{self, IsTerminal, Read};

use tokio::sync::mpsc;

/// Bytes of one message, far below the server's limit.
const CHUNK: usize = 16 * 1024;
/// Messages that wait for the server.
const WAITING: usize = 4;
/// What ends a terminal's input.
const CTRL_D: u8 = 4;

/// Standard input.
pub(super) struct Keyboard(mpsc::Receiver<Vec<u8>>);

impl Keyboard {
    /// Begins to read.
    pub(super) fn start() -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        std::thread::spawn(move || read(&sender));
        Self(receiver)
    }

    /// The next bytes; never after the end.
    pub(super) async fn next(&mut self) -> Vec<u8> {
        match self.0.recv().await {
            Some(bytes) => bytes,
            None => std::future::pending().await,
        }
    }
}

fn read(sender: &mpsc::Sender<Vec<u8>>) {
    let mut input = io::stdin().lock();
    let (mut buffer, mut last) = (vec![0; CHUNK], b'\n');
    loop {
        match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => {
                last = buffer[read - 1];
                if sender.blocking_send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    if !input.is_terminal() {
        // In the middle of a line the first one only hands the line over.
        let end = if last == b'\n' { vec![CTRL_D] } else { vec![CTRL_D; 2] };
        // Nobody may be left to hear it.
        let _ = sender.blocking_send(end);
    }
}

//! `tiffin vm shell` in a real terminal (a pty), with a real VM behind it: keys, sizes and Ctrl-C get there, and however it ends
//! the terminal is as it was before.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/server.rs"]
mod server;

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::{Child, Command},
    sync::{Arc, Mutex},
};

use harness::eventually;
use nix::{
    pty::openpty,
    sys::{
        signal::{Signal, kill},
        termios::{Termios, tcgetattr},
    },
    unistd::Pid,
};
use rustix::termios::{Winsize, tcsetwinsize};
use server::Site;
use tiffin_types::id::VmId;

/// A terminal with `tiffin vm shell` in it.
struct Terminal {
    /// What types and looks at it.
    screen: File,
    /// The terminal itself, kept open to see how it is left.
    line: OwnedFd,
    before: Termios,
    seen: Arc<Mutex<Vec<u8>>>,
    program: Child,
}

impl Terminal {
    fn open(site: &Site, id: &VmId, (cols, rows): (u16, u16)) -> Self {
        let pty = openpty(None, None).unwrap();
        tcsetwinsize(&pty.slave, window(cols, rows)).unwrap();
        let end = || pty.slave.try_clone().unwrap();
        // The terminal that a program controls is the one that tells it of its size and sends it signals.
        let program = Command::new("setsid")
            .args(["--ctty", "--wait", env!("CARGO_BIN_EXE_tiffin"), "vm", "shell", &id.to_string()])
            .env("TIFFIN_URL", site.url())
            .env("TIFFIN_API_KEY", site.key())
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (screen, shown) = (File::from(pty.master), Arc::clone(&seen));
        let mut from = screen.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                shown.lock().unwrap().extend_from_slice(&buffer[..length]);
            }
        });
        Self { screen, before: tcgetattr(&pty.slave).unwrap(), line: pty.slave, seen, program }
    }

    fn types(&mut self, keys: &str) {
        self.screen.write_all(keys.as_bytes()).unwrap();
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    async fn shows(&self, text: &str) {
        eventually(&format!("it shows {text:?}"), async || self.text().contains(text)).await;
    }

    /// Until the program has ended: its exit code. The terminal must be as it was.
    async fn ends(&mut self) -> Option<i32> {
        let mut code = None;
        eventually("the program ends", async || {
            code = self.program.try_wait().unwrap();
            code.is_some()
        })
        .await;
        let after = tcgetattr(&self.line).unwrap();
        assert_eq!(after, self.before, "the terminal is restored");
        code.unwrap().code()
    }

    /// Whether every key is passed on as it is.
    fn is_raw(&self) -> bool {
        use nix::sys::termios::LocalFlags;
        let now = tcgetattr(&self.line).unwrap();
        !now.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

fn window(cols: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_in_a_terminal_takes_keys_sizes_and_interrupts_and_leaves_it_as_it_was() {
    let mut site = Site::start(&[]).await;
    let id = site.create().await;

    let mut terminal = Terminal::open(&site, &id, (100, 30));
    eventually("keys are passed on as they are", async || terminal.is_raw()).await;
    // The answer is not in what is echoed of the question.
    terminal.types("echo size $(stty size); echo a$((1))b\r");
    terminal.shows("size 30 100").await;
    terminal.shows("a1b").await;
    tcsetwinsize(&terminal.line, window(132, 50)).unwrap();
    eventually("the guest knows the new size", async || {
        terminal.types("echo now $(stty size)\r");
        terminal.text().contains("now 50 132")
    })
    .await;
    terminal.types("sleep 1234\r");
    eventually("it sleeps", async || site.exec(&id, "pgrep -f '[s]leep 1234'").await.body["exitCode"] == 0).await;
    terminal.types("\u{3}");
    terminal.types("echo inte$((1))rrupted\r");
    terminal.shows("inte1rrupted").await;
    assert_eq!(site.exec(&id, "pgrep -f '[s]leep 1234'").await.body["exitCode"], 1, "Ctrl-C was the guest's");
    terminal.types("exit 7\r");
    assert_eq!(terminal.ends().await, Some(7));

    let mut killed = Terminal::open(&site, &id, (80, 24));
    killed.types("echo he$((1))re\r");
    killed.shows("he1re").await;
    assert!(killed.is_raw());
    let program = Pid::from_raw(i32::try_from(killed.program.id()).unwrap());
    kill(program, Signal::SIGTERM).unwrap();
    assert_eq!(killed.ends().await, Some(128 + 15));

    let mut left = Terminal::open(&site, &id, (80, 24));
    left.types("echo he$((1))re\r");
    left.shows("he1re").await;
    assert!(left.is_raw());
    site.kill().await;
    assert_eq!(left.ends().await, Some(125), "{}", left.text());
    left.shows("the server").await;
    site.serve(None).await;
    site.delete(&id).await;
}

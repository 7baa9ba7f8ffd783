//! A login shell that has started before it is needed: an ordinary `bash -lc`, spawned as any command, that stands still
//! between its profile and its command line until it is told the line.
//!
//! It is given a line of the agent's own (`wait_line`) and room behind it. Bash runs a string line by line, so it runs
//! the first one, which waits on a descriptor, before it looks at what comes behind. When a command comes, the agent
//! writes the command's line into that room, in the shell's memory, and lets it go on: from there on it is bash itself that
//! runs its `-c` string, with its own messages, its own `exec` of a last command, and all the rest.
//!
//! The text stands in three places: where it is being read, in `BASH_EXECUTION_STRING`, and among the process's
//! arguments. They are told apart by a mark that the waiting line appends to the variable. All three are written, so that
//! none shows anything but the command. If any of them isn't found exactly once, this shell is not used.
//!
//! Before it is given the line it is asked whether it is there, and answers; one that doesn't is ended, and has run nothing.
//!
//! The waiting line leaves what it found: `$?`, `$_` and `PIPESTATUS` are told to the agent, which gives up unless they
//! are what the waiting line itself ends with; the line's number starts again; the descriptor is closed.
//!
//! What can be told from a shell that starts when it is needed:
//! * the process is older than its command (`ps -o lstart`), and has used its time to start before;
//! * `set` and `declare -p` show `LINENO` and `SECONDS` with their values where bash would show them once they were used;
//! * the arguments of a shell that still runs end in NULs, which `ps` may show as blanks.
//!
//! While it waits it can be seen (`ps`), signalled and traced by processes of its own user: that is as it is with every
//! command of that user's, and who ends it only loses time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::patch::{self, Site};
use super::start::Running;
use crate::reaper::Child;

/// The longest line that there is room for, in bytes.
pub const MAX_LINE: usize = 4095;

/// The descriptor that the shell waits on.
pub const DESCRIPTOR: i32 = 9;

/// How long it may take to start.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How long one that waits may take to say that it is there.
const ANSWER_LIMIT: Duration = Duration::from_millis(250);

/// What it says of `$?`, `$_` and `PIPESTATUS`: the same as behind [`FAREWELL`].
const READY: &[u8] = b"0 ] 1\n\n";

/// Leaves what the default profile leaves.
const FAREWELL: &str = r#"if [ -n "" ];then :;fi"#;

/// What the variable has behind the text, and no other place.
const MARK: &str = "M";

/// Bytes that are looked at before anything is written.
const PROOF: usize = 64;

/// The line that waits. `LINENO` is set where bash doesn't put it back: in a redirection of a group.
fn wait_line() -> String {
    format!(
        r#"echo "$? $_ ${{PIPESTATUS[*]}}">&{DESCRIPTOR};BASH_EXECUTION_STRING+={MARK};echo>&{DESCRIPTOR};read -ru{DESCRIPTOR} _||exit;echo>&{DESCRIPTOR};read -ru{DESCRIPTOR} _||exit;exec {DESCRIPTOR}<&-;SECONDS=0;{{ :;}} {DESCRIPTOR}<&$((LINENO=0));{FAREWELL}"#
    )
}

/// What the shell is started with: the line that waits, and room for [`MAX_LINE`] bytes and their end.
pub fn text() -> String {
    format!("{}\n{}", wait_line(), " ".repeat(MAX_LINE))
}

/// Whether there can be a shell that waits for `line`. One that begins with a sign would be read as an option by a shell
/// that is given it as an argument.
pub fn takes(line: &str) -> bool {
    line.len() <= MAX_LINE && !line.starts_with(['-', '+']) && !line.contains('\0')
}

/// A shell that waits.
#[derive(Debug)]
pub struct Parked {
    /// What runs, for nobody yet.
    pub running: Running,
    control: UnixStream,
    places: Places,
}

/// Where the text stands in its memory.
#[derive(Debug, PartialEq, Eq)]
struct Places {
    read: usize,
    variable: usize,
    argument: usize,
}

impl Parked {
    /// Waits until `running`, started with [`text`], waits, and finds the text in it.
    ///
    /// # Errors
    /// When it doesn't come to that; with what runs.
    pub fn settle(running: Running, mut control: UnixStream) -> Result<Self, (io::Error, Running)> {
        match find_places(&running.child, &mut control) {
            Ok(places) => Ok(Parked { running, control, places }),
            Err(error) => Err((error, running)),
        }
    }

    /// Has it run `line`, for which [`takes`] holds.
    ///
    /// # Errors
    /// When it can't; then it is of no use any more, and hasn't run anything.
    pub fn release(&mut self, line: &str) -> io::Result<()> {
        let text = text();
        let mut found = [0; PROOF];
        let pid = self.running.child.pid();
        self.greet()?;
        patch::read(pid, self.places.read, &mut found)?;
        if found != text.as_bytes()[..PROOF] {
            return Err(io::Error::other("it is not where it was"));
        }
        let mut bytes = line.as_bytes().to_vec();
        bytes.push(0);
        patch::write(pid, self.places.read + text.len() - MAX_LINE, &bytes)?;
        patch::write(pid, self.places.variable, &bytes)?;
        bytes.resize(text.len(), 0);
        patch::write(pid, self.places.argument, &bytes)?;
        self.control.write_all(b"\n")
    }

    /// Finds out that it is there and answers: it may have been stopped, or a signal be on its way to it. It has none of
    /// the line yet, so that a shell that doesn't answer has run nothing.
    fn greet(&mut self) -> io::Result<()> {
        self.control.set_read_timeout(Some(ANSWER_LIMIT))?;
        self.control.write_all(b"\n")?;
        self.control.read_exact(&mut [0])
    }
}

/// Reads what the shell says of itself, until it waits, and finds the text in its memory.
fn find_places(child: &Child, control: &mut UnixStream) -> io::Result<Places> {
    control.set_read_timeout(Some(START_LIMIT))?;
    control.set_write_timeout(Some(START_LIMIT))?;
    let mut said = [0; READY.len()];
    control.read_exact(&mut said)?;
    if said != READY {
        return Err(io::Error::other("its profile leaves something behind"));
    }
    let sites = patch::find(child.pid(), text().as_bytes())?;
    places(&sites).ok_or_else(|| io::Error::other("its text isn't found where it should be"))
}

/// Each place, when it is there exactly once.
fn places(sites: &patch::Sites) -> Option<Places> {
    let marked = |site: &&Site| site.behind[0] == MARK.as_bytes()[0] && site.behind[1] == 0;
    let variable: Vec<_> = sites.heap.iter().filter(marked).collect();
    let read: Vec<_> = sites.heap.iter().filter(|site| site.behind[0] == 0).collect();
    match (&read[..], &variable[..], &sites.arguments[..], sites.heap.len()) {
        ([read], [variable], [argument], 2) if argument.behind[0] == 0 => {
            Some(Places { read: read.address, variable: variable.address, argument: argument.address })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(address: usize, behind: &[u8; 2]) -> Site {
        Site { address, behind: *behind }
    }

    #[test]
    fn the_places_are_told_apart_and_one_too_many_is_none() {
        let (read, variable, argument) = (site(1, b"\0x"), site(2, b"M\0"), site(3, b"\0P"));
        let sites =
            |heap: &[Site], arguments: &[Site]| patch::Sites { heap: heap.to_vec(), arguments: arguments.to_vec() };
        let found = places(&sites(&[variable, read], &[argument]));
        assert_eq!(found, Some(Places { read: 1, variable: 2, argument: 3 }));
        for odd in [
            sites(&[read], &[argument]),
            sites(&[read, variable, read], &[argument]),
            sites(&[read, variable, site(9, b"zz")], &[argument]),
            sites(&[read, read], &[argument]),
            sites(&[read, variable], &[]),
            sites(&[read, variable], &[argument, argument]),
        ] {
            assert_eq!(places(&odd), None, "{odd:?}");
        }
    }

    #[test]
    fn there_is_no_room_for_long_lines_options_and_nuls() {
        assert!(takes("") && takes("echo -n hi") && takes(&"x".repeat(MAX_LINE)));
        assert!(!takes(&"x".repeat(MAX_LINE + 1)) && !takes("-x") && !takes("+x") && !takes("a\0"));
    }

    #[test]
    fn the_text_is_one_line_and_room() {
        let text = text();
        let (line, room) = text.split_once('\n').unwrap();
        assert!(line.len() >= PROOF && room.len() == MAX_LINE && room.bytes().all(|byte| byte == b' '));
    }
}

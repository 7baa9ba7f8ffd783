//! Which program a command means, and its arguments.

use std::ffi::CString;
use std::path::Path;

use tiffin_protocol::{Command, Failure, FailureCode};

use crate::request::failure;

/// Shells that may be there, best first. The last one is tried unseen.
const SHELLS: [&str; 3] = ["/bin/bash", "/usr/bin/bash", "/bin/sh"];

/// A program and its arguments.
#[derive(Debug, PartialEq, Eq)]
pub struct Program {
    /// As asked for: with a slash a path, without one a name to look up.
    pub name: String,
    /// `argv`, the first its own name.
    pub arguments: Vec<CString>,
}

impl Program {
    /// What `command` means in a guest whose best shell is `shell`. A shell line is run with the `path` that is given, whatever the
    /// profile before it made of `PATH`.
    ///
    /// # Errors
    /// `BadRequest` for an empty list or a NUL, `BadCommand` for an empty name.
    pub fn of(command: &Command, shell: &str, path: Option<&str>) -> Result<Self, Failure> {
        match command {
            Command::Shell(line) => {
                // On the line's own line, so that a shell's messages name it by the number that it has.
                let line = match path {
                    Some(path) => &format!("export PATH='{}'; {line}", path.replace('\'', r"'\''")),
                    None => line,
                };
                let arguments = [shell.rsplit('/').next().unwrap_or(shell), "-lc", line];
                Ok(Program { name: shell.to_owned(), arguments: c_strings(&arguments, "command")? })
            }
            Command::Argv(arguments) => {
                let Some(name) = arguments.first() else {
                    return Err(failure(FailureCode::BadRequest, "the command is empty"));
                };
                if name.is_empty() {
                    return Err(failure(FailureCode::BadCommand, "the program's name is empty"));
                }
                Ok(Program { name: name.clone(), arguments: c_strings(arguments, "command")? })
            }
        }
    }

    /// Where it may be, in order, given the command's `PATH`.
    ///
    /// # Errors
    /// `BadRequest` for a NUL in `path`.
    pub fn candidates(&self, path: &str) -> Result<Vec<CString>, Failure> {
        if self.name.contains('/') {
            return Ok(vec![c_string(&self.name, "command")?]);
        }
        path.split(':')
            .map(|folder| if folder.is_empty() { "." } else { folder })
            .map(|folder| c_string(&format!("{folder}/{}", self.name), "PATH"))
            .collect()
    }
}

/// The guest's best shell.
pub fn shell() -> &'static str {
    let [best @ .., last] = SHELLS;
    best.into_iter().find(|shell| Path::new(shell).exists()).unwrap_or(last)
}

/// `text` for the kernel.
///
/// # Errors
/// `BadRequest` when it has a NUL inside.
pub fn c_string(text: &str, field: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| failure(FailureCode::BadRequest, &format!("{field} contains a NUL byte")))
}

fn c_strings(texts: &[impl AsRef<str>], field: &str) -> Result<Vec<CString>, Failure> {
    texts.iter().map(|text| c_string(text.as_ref(), field)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(words: &[&str]) -> Result<Program, Failure> {
        Program::of(&Command::Argv(words.iter().map(|word| (*word).to_owned()).collect()), "/bin/sh", Some("/a"))
    }

    #[test]
    fn a_bare_name_is_looked_up_in_every_folder_of_the_path() {
        let found = argv(&["ls", "-l"]).unwrap().candidates("/a::/b").unwrap();
        assert_eq!(found, [c"/a/ls".to_owned(), c"./ls".to_owned(), c"/b/ls".to_owned()]);
    }

    #[test]
    fn a_shell_line_has_the_path_that_was_chosen_whatever_is_in_it() {
        let line = |path| Program::of(&Command::Shell("echo hi".to_owned()), "/bin/bash", path).unwrap().arguments;
        assert_eq!(line(None), [c"bash".to_owned(), c"-lc".to_owned(), c"echo hi".to_owned()]);
        assert_eq!(line(Some("/it's/$(id):/b"))[2], c"export PATH='/it'\\''s/$(id):/b'; echo hi".to_owned());
    }

    #[test]
    fn a_path_is_taken_as_it_is() {
        assert_eq!(argv(&["./run"]).unwrap().candidates("/a").unwrap(), [c"./run".to_owned()]);
    }

    #[test]
    fn an_empty_command_an_empty_name_and_a_nul_are_refused() {
        assert_eq!(argv(&[]).unwrap_err().code, FailureCode::BadRequest);
        assert_eq!(argv(&[""]).unwrap_err().code, FailureCode::BadCommand);
        assert_eq!(argv(&["a", "b\0c"]).unwrap_err().code, FailureCode::BadRequest);
        assert_eq!(
            Program::of(&Command::Shell("a\0".to_owned()), "/bin/sh", None).unwrap_err().code,
            FailureCode::BadRequest
        );
    }
}

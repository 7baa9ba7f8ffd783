//! What the user sees: tables, JSON, the spinner. Results go to stdout, everything else to stderr.
//!
//! Invariant: a reader that goes away (`| head`) is [`Failure::Closed`], never a panic; text from a server or a guest
//! that is shown in a table or an error can't control the terminal.

use std::{
    borrow::Cow,
    io::{self, IsTerminal, Write},
    time::Duration,
};

use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::failure::Failure;

/// Writes text to stdout as it is, at once.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Writes bytes to stderr as they are.
pub(crate) fn print_error(text: &str) -> Result<(), Failure> {
    Ok(io::stderr().lock().write_all(text.as_bytes())?)
}

/// Prints an answer of the API, indented.
pub(crate) fn json(value: &Value) -> Result<(), Failure> {
    print(&format!("{value:#}\n"))
}

/// Prints rows under a header, in columns.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>) -> Result<(), Failure> {
    print(&columns(Some(header), rows))
}

/// Prints one thing's properties, one a line; those without a value are left out.
pub(crate) fn properties(pairs: &[(&str, String)]) -> Result<(), Failure> {
    let rows = pairs
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| vec![(*name).to_owned(), value.clone()])
        .collect();
    print(&columns(None, rows))
}

fn columns(header: Option<&[&str]>, rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if let Some(header) = header {
        table.set_header(header.to_vec());
    }
    for row in rows {
        table.add_row(row.iter().map(|cell| visible(cell).into_owned()));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// The text of one field of a JSON object, for a table: empty where it is absent or null.
pub(crate) fn field(object: &Value, name: &str) -> String {
    match object.get(name) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(yes)) => if *yes { "yes" } else { "no" }.to_owned(),
        Some(Value::Array(list)) => {
            list.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect::<Vec<_>>().join(", ")
        }
        Some(other) => other.to_string(),
    }
}

/// The text with control characters, tabs aside, shown as `\u{..}`: a guest's words can't control the terminal.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    let unsafe_here = |c: char| c.is_control() && c != '\t';
    if !text.contains(unsafe_here) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if unsafe_here(c) { shown.extend(c.escape_unicode()) } else { shown.push(c) }
    }
    Cow::Owned(shown)
}

fn spinning_bar(what: impl Into<Cow<'static, str>>) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// A sign of life on stderr while a slow call runs; nothing where stderr is no terminal. Gone when dropped.
pub(crate) struct Spinner(Option<ProgressBar>);

impl Spinner {
    /// Shows `what` is being done.
    pub(crate) fn start(what: impl Into<Cow<'static, str>>) -> Self {
        if !io::stderr().is_terminal() {
            return Self(None);
        }
        Self(Some(spinning_bar(what)))
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// How far a file is on its way, on stderr; nothing where stderr is no terminal. Gone when dropped.
pub(crate) struct Transfer(Option<ProgressBar>);

impl Transfer {
    /// Shows `what` of so many bytes.
    pub(crate) fn start(what: impl Into<Cow<'static, str>>, bytes: u64) -> Self {
        if !io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::new(bytes).with_message(what);
        let style = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        Self(Some(bar))
    }

    /// What is told the bytes that have gone. When all have, it shows that the server works on them.
    pub(crate) fn counter(&self) -> impl Fn(u64) + Send + Sync + 'static {
        let bar = self.0.clone();
        move |sent| {
            let Some(bar) = &bar else { return };
            bar.set_position(sent);
            if bar.length() == Some(sent) {
                bar.set_message("uploaded; the server makes an image of it");
            }
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// How far something is that the server gets, on stderr; nothing where stderr is no terminal. Gone when dropped.
pub(crate) struct Arriving(Option<ProgressBar>);

impl Arriving {
    /// Shows `what` is being done.
    pub(crate) fn start(what: impl Into<Cow<'static, str>>) -> Self {
        Self(io::stderr().is_terminal().then(|| spinning_bar(what)))
    }

    /// Whether anybody sees it.
    pub(crate) fn is_shown(&self) -> bool {
        self.0.is_some()
    }

    /// So many bytes of so many are here, and so many files of them are unpacked.
    pub(crate) fn show(&self, received: u64, expected: Option<u64>, files: Option<u64>) {
        let (Some(bar), Some(expected)) = (&self.0, expected) else { return };
        if bar.length() != Some(expected) {
            bar.set_length(expected);
            if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {elapsed}") {
                bar.set_style(style);
            }
        }
        bar.set_position(received);
        if let Some(files) = files {
            bar.set_message(format!("making an image of it: {files} entries"));
        }
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// The steps of a long piece of work on stderr: a line for each, and under it, on a terminal, what it is busy with.
/// Usable from several threads at once.
pub(crate) struct Steps(Option<ProgressBar>);

impl Steps {
    /// Nothing is shown yet.
    pub(crate) fn start() -> Self {
        Self(io::stderr().is_terminal().then(|| spinning_bar("")))
    }

    /// A step begins.
    pub(crate) fn doing(&self, what: &str) {
        match &self.0 {
            Some(bar) => bar.set_message(what.to_owned()),
            None => self.line(what),
        }
    }

    /// What the step is busy with; shown on a terminal only.
    pub(crate) fn detail(&self, what: &str) {
        if let Some(bar) = &self.0 {
            bar.set_message(visible(what).chars().take(100).collect::<String>());
        }
    }

    /// A step is over.
    pub(crate) fn done(&self, what: &str) {
        self.line(what);
    }

    fn line(&self, text: &str) {
        match &self.0 {
            Some(bar) => bar.println(format!("    {text}")),
            // Progress that can't be written is no reason to stop the work.
            None => drop(writeln!(io::stderr().lock(), "    {text}")),
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_align_and_have_no_trailing_blanks() {
        let text =
            columns(Some(&["ID", "STATE"]), vec![vec!["a".into(), "RUNNING".into()], vec!["bbbb".into(), "X".into()]]);
        assert_eq!(text, "ID    STATE\na     RUNNING\nbbbb  X\n");
    }

    #[test]
    fn a_field_shows_as_a_person_would_write_it() {
        let vm = json!({"a": null, "b": true, "c": ["x", "y"], "d": 3});
        assert_eq!(["a", "b", "c", "d", "e"].map(|name| field(&vm, name)), ["", "yes", "x, y", "3", ""]);
    }

    #[test]
    fn control_characters_are_shown_not_obeyed() {
        assert_eq!(visible("a\tb"), "a\tb");
        assert_eq!(visible("a\u{1b}[2Jb\u{9b}"), "a\\u{1b}[2Jb\\u{9b}");
    }
}

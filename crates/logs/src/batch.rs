//! Lines on their way to the disk.

use crate::{
    Stream,
    level::{level_of, may_have_level},
    record::Kind,
    split::Lines,
};

/// Lines that are written together; all have the time at which they are.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    text: Vec<u8>,
    /// Of each line: where it ends in the text, before its line feed, and what it is.
    ends: Vec<(usize, Kind)>,
}

impl Batch {
    pub(crate) fn add(&mut self, line: &[u8], kind: Kind) {
        self.text.extend_from_slice(line);
        self.ends.push((self.text.len(), kind));
        self.text.push(b'\n');
    }

    pub(crate) fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }

    /// How many lines there are.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// All lines, each with its line feed.
    pub(crate) fn text(&self) -> &[u8] {
        &self.text
    }

    /// Each line: its bytes, where it ends in the text, what it is.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (&[u8], usize, Kind)> {
        let begins = std::iter::once(0).chain(self.ends.iter().map(|(end, _)| end + 1));
        begins.zip(&self.ends).map(|(begin, (end, kind))| (&self.text[begin..*end], *end, *kind))
    }
}

/// Takes a stream's lines into a batch.
pub(crate) struct Printed<'a> {
    pub(crate) stream: Stream,
    pub(crate) onto: &'a mut Batch,
}

impl Lines for Printed<'_> {
    fn line(&mut self, line: &[u8], is_cut: bool) {
        let has_level = may_have_level(line, is_cut) && level_of(line).is_some();
        self.onto.add(line, if has_level { Kind::Levelled(self.stream) } else { Kind::Printed(self.stream) });
    }
}

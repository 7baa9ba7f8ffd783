//! The states that a snapshot goes through.
//!
//! ```text
//!   SAVING --saved--> READY --lost--> LOST
//!     |                 | ^-found------|
//!     |                 |              |
//!     +------remove-----+----remove----+--> DELETING --> (no record)
//! ```
//!
//! SAVING and DELETING are intents, written down before the engine acts: who finds one after a restart finishes it, for
//! SAVING by removing what there is. LOST is a snapshot whose files weren't found where they should be.

use serde::{Deserialize, Serialize};

/// A snapshot's durable state, by its name in the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum SnapshotState {
    /// The engine is writing it, or was when the server ended.
    Saving,
    /// VMs can be made of it.
    Ready,
    /// Its files are not on the host.
    Lost,
    /// It is to be removed, and is no more to be seen.
    Deleting,
}

/// What moves a snapshot from one state to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SnapshotEvent {
    /// The engine has written it.
    Saved,
    /// Its files are not there.
    Lost,
    /// Its files are there after all.
    Found,
    /// A request to remove it, or what it was saved for is over or failed.
    Remove,
}

impl SnapshotState {
    /// Every state.
    pub const ALL: [SnapshotState; 4] =
        [SnapshotState::Saving, SnapshotState::Ready, SnapshotState::Lost, SnapshotState::Deleting];

    /// The one transition table: where `event` takes a snapshot in this state, or `None` where it is refused.
    pub fn after(self, event: SnapshotEvent) -> Option<SnapshotState> {
        use SnapshotEvent as E;
        use SnapshotState as S;
        match (self, event) {
            (S::Saving, E::Saved) | (S::Lost, E::Found) => Some(S::Ready),
            (S::Ready, E::Lost) => Some(S::Lost),
            (S::Saving | S::Ready | S::Lost, E::Remove) => Some(S::Deleting),
            (S::Saving, E::Lost | E::Found)
            | (S::Ready, E::Saved | E::Found)
            | (S::Lost, E::Saved | E::Lost)
            | (S::Deleting, E::Saved | E::Lost | E::Found | E::Remove) => None,
        }
    }

    /// The state's name in the API and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            SnapshotState::Saving => "SAVING",
            SnapshotState::Ready => "READY",
            SnapshotState::Lost => "LOST",
            SnapshotState::Deleting => "DELETING",
        }
    }
}

impl std::fmt::Display for SnapshotState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for SnapshotState {
    type Err = UnknownState;
    fn from_str(text: &str) -> Result<Self, UnknownState> {
        SnapshotState::ALL.into_iter().find(|state| state.as_str() == text).ok_or(UnknownState)
    }
}

/// The text is no state's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a snapshot state")]
pub struct UnknownState;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for state in SnapshotState::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
    }

    #[test]
    fn everything_can_be_removed_once_and_nothing_comes_back_from_there() {
        for state in SnapshotState::ALL {
            let removed = state.after(SnapshotEvent::Remove);
            assert_eq!(removed, (state != SnapshotState::Deleting).then_some(SnapshotState::Deleting), "{state}");
        }
        for event in [SnapshotEvent::Saved, SnapshotEvent::Lost, SnapshotEvent::Found] {
            assert_eq!(SnapshotState::Deleting.after(event), None);
        }
    }
}

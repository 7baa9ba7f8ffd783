//! The wire between the host and the agent in a guest: frames, requests, answers, events.
//!
//! Pure: bytes in, values out. Both sides treat the other as hostile: a frame has a maximum size that is checked before
//! anything is allocated, an unknown kind is an error and not a guess, and no input can panic.
//!
//! ```text
//! frame   := length:u32be  kind:u8  payload          length = 1 + payload bytes, 1..=MAX_FRAME
//! ```
//!
//! Two uses:
//! * **A connection per operation**, dialled by the host to [`AGENT_PORT`]: the host sends [`Kind::Request`] (JSON
//!   [`Request`], with the VM's token), then [`Kind::Stdin`]/[`Kind::StdinEnd`] as the operation allows; the agent
//!   answers with [`Kind::Stdout`]/[`Kind::Stderr`] and exactly one last frame, [`Kind::Done`] or [`Kind::Failed`].
//!   When the host closes the connection first, the agent kills what the operation started.
//! * **The agent's standard output**: [`Kind::Event`] frames (JSON [`Event`]) to the VM's monitor, which gives it one
//!   [`Boot`] as one line of JSON on standard input; and what the guest's [`Program`] prints, as [`Kind::Stdout`] and
//!   [`Kind::Stderr`] frames. No frame there is larger than [`CHANNEL_FRAME`].

pub mod frame;
pub mod message;

pub use frame::{CHANNEL_FRAME, FrameError, HEADER, Kind, MAX_FRAME, decode_header, encode};
pub use message::*;

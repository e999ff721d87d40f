//! Who computes what when: pipeline-parallel schedules as data.
//!
//! A [`Schedule`] holds the instruction stream of every rank. [`Request::generate`] makes one for
//! any schedule of the field, [`place_transfers`] places what moves between ranks,
//! [`verify`](verify::verify) proves it right.
#![forbid(unsafe_code)]

mod error;
mod generate;
mod op;
mod schedule;
mod text;
mod transfers;
pub mod verify;
mod wires;

pub use error::{Error, Result};
pub use generate::{Method, Request};
pub use op::{Kind, Op};
pub use schedule::{Layout, Schedule};
pub use transfers::place_transfers;

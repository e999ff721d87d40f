//! Who computes what when: pipeline-parallel schedules as data.
//!
//! A [`Schedule`] holds the instruction stream of every rank. [`Request::generate`] makes one for
//! any schedule of the field, [`place_transfers`] places what moves between ranks,
//! [`verify`](verify::verify) proves it right, [`simulate`] predicts its timeline,
//! [`partition`] and [`search`] choose.
#![forbid(unsafe_code)]

mod cost;
mod error;
mod generate;
mod memory;
mod op;
mod partition;
mod schedule;
mod search;
mod simulate;
mod text;
mod torch_csv;
mod transfers;
pub mod verify;
mod wires;

pub use cost::{Costs, Links};
pub use error::{Error, Result};
pub use generate::{Method, Request};
pub use memory::{Peak, Sizes};
pub use op::{Kind, Op};
pub use partition::{Layer, Partition, PartitionOptions, partition, stage_costs};
pub use schedule::{Layout, Schedule};
pub use search::{Candidate, SearchRequest, search};
pub use simulate::{Pairs, Sends, SimulateOptions, Span, Timeline, simulate};
pub use torch_csv::{CsvOptions, Dialect, Form};
pub use transfers::place_transfers;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

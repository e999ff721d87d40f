//! Where experts live: expert-parallel load balancing for mixture-of-experts models.
//!
//! Each GPU of an expert-parallel model holds some experts, and some experts get far more tokens
//! than others. This crate replicates hot experts and places the replicas so that ranks carry
//! equal load. It is pure computation: no Python, no unsafe code, no I/O.
//!
//! ```
//! use eplb::{Load, Planner, Policy, Topology, lower_bound};
//!
//! // One layer of eight experts on two nodes of two GPUs with three slots each.
//! let tokens = [90.0, 132.0, 40.0, 61.0, 104.0, 165.0, 39.0, 4.0];
//! let load = Load::new(&tokens, 1, 8)?;
//! let topology = Topology::new(2, 2, 3)?;
//! let planner = Planner::new(topology, 2, Policy::DeepSeek, 1)?;
//!
//! let placement = planner.plan(&load)?;
//! assert_eq!(placement.phy2log().len(), 12);
//! let heaviest = placement.rank_load(&load)?.into_iter().fold(0.0, f64::max);
//! assert!(heaviest >= lower_bound(&load, planner.topology(), 2)?[0]);
//! # Ok::<(), eplb::Error>(())
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`topology`] | the machines: nodes, GPUs, slots |
//! | [`load`] | how many tokens each expert got |
//! | [`placement`] | which expert each slot holds |
//! | [`planner`] | a topology, a policy and their scratch, for planning in a loop |
//! | [`transfer`] | who sends which expert to whom, in which round |
//! | [`bound`] | how little the heaviest rank can carry, whatever the placement |
//! | [`realtime`] | one layer planned in microseconds, from the load of this micro-batch |
//! | [`forecast`] | what the next window's load will be |
//! | [`scenario`] | plans that are good in several loads at once: for the window to come |
//! | [`split`] | how tokens are split over the replicas of a placement |
//! | [`error`] | what is said when a request cannot be met |
#![forbid(unsafe_code)]

pub mod bound;
pub mod error;
pub mod forecast;
pub mod load;
pub mod placement;
pub mod planner;
pub mod realtime;
pub mod scenario;
pub mod split;
pub mod topology;
pub mod transfer;

mod balance;
mod deepseek;
mod lanes;
mod migrate;
mod order;
mod pack;
mod trivial;

pub use balance::Budget;
pub use bound::{Bound, bounds, lower_bound, tight_lower_bound};
pub use error::{Code, Error, Refusal, Result};
pub use forecast::{Estimator, Forecaster, total_variation};
pub use load::Load;
pub use migrate::{Milestone, Reach};
pub use placement::{Placement, PlacementMut, Replica};
pub use planner::{GroupRule, Planner, Policy};
pub use realtime::{Limits, Step, StepMut, StepPlanner};
pub use scenario::{Aim, Outlook, Scenarios, Split};
pub use split::{SharesMut, Splitter};
pub use topology::Topology;
pub use transfer::{Links, Transfer, TransferLimits, predicted_s, transfers};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

//! Proving a schedule before anyone runs it.
//!
//! One walk over the streams proves completeness, order, pairing and memory; one run of an
//! abstract machine proves that it cannot deadlock. The first rule broken comes back as the
//! smallest counter-example: which rank, which instruction, who waits for whom.

mod deadlock;
mod posts;
mod scan;
mod violation;

pub use violation::{Rule, Violation, Wait};

use crate::error::Error;
use crate::memory::{Peak, Sizes};
use crate::schedule::Schedule;
use crate::wires::Wires;

/// How messages move. A schedule free of deadlock under one may have one under another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// A send returns at once; the transport has room for everything.
    Eager,
    /// A send returns once its receive is posted.
    Rendezvous,
    /// Every pair of ranks has one queue for both directions, as an NCCL communicator has: what
    /// stands at its head must meet its counterpart before anything behind it moves.
    Queue,
}

impl Transport {
    /// Every transport.
    pub const ALL: [Self; 3] = [Self::Eager, Self::Rendezvous, Self::Queue];

    /// The name in words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Rendezvous => "rendezvous",
            Self::Queue => "queue",
        }
    }
}

/// What to hold a schedule to, beyond the rules that always hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyOptions {
    /// The transports to prove it for; all by default.
    pub transports: Vec<Transport>,
    /// Sizes, for peaks in bytes.
    pub sizes: Option<Sizes>,
    /// No rank may hold more activations at once.
    pub max_activations: Option<u32>,
    /// No rank may hold more bytes at once; needs `sizes`.
    pub max_bytes: Option<u64>,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self {
            transports: Transport::ALL.to_vec(),
            sizes: None,
            max_activations: None,
            max_bytes: None,
        }
    }
}

/// What [`verify`] has shown to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The peak of every rank.
    pub peaks: Vec<Peak>,
    /// The transports under which it cannot deadlock.
    pub transports: Vec<Transport>,
    /// Messages between ranks.
    pub num_messages: usize,
}

/// Proves that a schedule is right.
///
/// - complete: every micro-batch has F once on every stage of its copy, and B, or I and W, once
///   (or, in an inference schedule, nothing but F), on the rank that holds the stage;
/// - in order: nothing runs before its inputs are there;
/// - paired: every message that is needed is sent and received once, waited for once, and both
///   ends of a pair of ranks agree on the order;
/// - free of deadlock under each transport asked for;
/// - gradients of a stage's copies are reduced, after the last of them.
///
/// A schedule without transfers is held to completeness, order and freedom from deadlock.
/// O(instructions); 30 to 40 ns each.
///
/// # Errors
///
/// [`Error::Rule`] with the first rule broken, as the smallest counter-example; [`Error::Input`]
/// for sizes that do not fit the schedule.
pub fn verify(schedule: &Schedule, options: &VerifyOptions) -> Result<Proof, Error> {
    if let Some(sizes) = &options.sizes {
        sizes.check(schedule.layout())?;
    }
    Ok(prove(schedule, options)?)
}

fn prove(schedule: &Schedule, options: &VerifyOptions) -> Result<Proof, Violation> {
    let wires = Wires::new(schedule.layout());
    let scan = scan::scan(schedule, &wires, options)?;
    let mut proven = Vec::new();
    let with_transfers = schedule.has_transfers();
    for &transport in &options.transports {
        if transport == Transport::Queue && with_transfers {
            scan.posts.check_mirrored(schedule, &wires)?;
        }
    }
    // Where both ends post in the same order, a rendezvous is the strictest of the three: each
    // thing that waits under another transport waits at least as long under it.
    if scan.posts.mirrored(&wires) || !with_transfers {
        let strictest = Transport::Rendezvous;
        if options.transports.contains(&strictest)
            && deadlock::run(schedule, &wires, strictest).is_ok()
        {
            proven.clone_from(&options.transports);
        }
    }
    if proven.is_empty() {
        for &transport in &options.transports {
            deadlock::run(schedule, &wires, transport)?;
            proven.push(transport);
        }
    }
    Ok(Proof {
        peaks: scan.peaks,
        transports: proven,
        num_messages: scan.num_messages,
    })
}

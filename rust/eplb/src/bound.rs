//! How little the heaviest rank can carry, whatever the placement.

mod pairs;
mod room;

use std::collections::BinaryHeap;

use crate::balance::Assignment;
use crate::error::{Code, Error, Result};
use crate::load::Load;
use crate::planner::{check_groups, check_slots};
use crate::topology::Topology;
use room::Room;

/// Lower bounds on the largest rank load of a layer, for any placement of its experts in the slots
/// there are whose replicas share their expert's tokens evenly; by what they come from.
///
/// Where ranks differ in speed, these bound the time of the slowest: loads are divided by speeds,
/// of which the mean counts as 1. Dead GPUs count for nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Bound {
    /// All ranks carry the same.
    pub mean: f64,
    /// The least largest share: an expert of load `w` with `c` replicas on `D` ranks puts at least
    /// `w / min(c, D)` on some rank, and giving each spare slot to the largest share in turn makes
    /// the largest of these as small as it can be.
    pub share: f64,
    /// What slow ranks, or ranks with few slots, can carry; 0 where all are alike.
    pub ranks: f64,
    /// The best assignment of groups to nodes, if each group stays on one; 0 without that rule.
    pub groups: f64,
}

impl Bound {
    /// The highest of them.
    #[must_use]
    pub fn level(&self) -> f64 {
        self.mean.max(self.share).max(self.ranks).max(self.groups)
    }
}

/// Lower bounds on the largest rank load of each layer. With more than one group, each group stays
/// on one node.
///
/// O(layers x slots x log experts): 0.1 ms for 58 x 256 on 288 slots without groups.
///
/// # Errors
/// [`Code::TooSmall`] if there are fewer slots than experts; [`Code::NotDivisor`] if experts do not
/// divide into groups.
pub fn bounds(load: &Load<'_>, topology: &Topology, num_groups: usize) -> Result<Vec<Bound>> {
    check_slots(load.num_experts(), topology)?;
    check_groups(num_groups, load.num_experts())?;
    let mut heap = BinaryHeap::with_capacity(load.num_experts());
    let num_ranks = topology.num_live_gpus();
    let num_slots = topology.num_live_slots();
    let speeds = || topology.live_gpus().map(|(.., speed)| speed);
    let mean_speed = speeds().sum::<f64>() / num_ranks as f64;
    let fastest = speeds().fold(0.0, f64::max) / mean_speed;
    let ranks = topology.live_gpus();
    let mut room = Room::new(ranks.map(|(_, slots, speed)| (slots, speed / mean_speed)));
    let mut groups = Assignment::default();
    let bounds = load.layers().map(|row| {
        let total: f64 = row.iter().map(|&load| f64::from(load)).sum();
        let mean = total / num_ranks as f64;
        let share = least_largest_share(row, num_slots, num_ranks, &mut heap) / fastest;
        let ranks = if room.is_even() {
            0.0
        } else {
            room.raise(row, mean.max(share))
        };
        let groups = if num_groups == 1 {
            0.0
        } else {
            groups.assign(topology, num_groups, row);
            groups.bound() * mean_speed
        };
        Bound {
            mean,
            share,
            ranks,
            groups,
        }
    });
    Ok(bounds.collect())
}

/// The highest of the [`bounds`] of each layer, `[num_layers]`.
///
/// # Errors
/// As [`bounds`].
pub fn lower_bound(load: &Load<'_>, topology: &Topology, num_groups: usize) -> Result<Vec<f64>> {
    let bounds = bounds(load, topology, num_groups)?;
    Ok(bounds.iter().map(Bound::level).collect())
}

/// A tighter bound than [`lower_bound`], which costs more. It looks for a proof that no placement
/// has a largest rank load below a level, for levels between that bound and `upper`: what a
/// placement at hand reaches.
///
/// It is tighter where all live ranks are equally fast and have one slot or two, some of them two.
/// There a level `T` needs, for every size `v` above `T / 2`, as many replicas of at most `T - v`
/// as there are of at least `v`; prices on these conditions that no choice of counts can pay prove
/// that `T` is too low. Elsewhere the cheap bound is returned.
///
/// About 0.2 to 2.7 ms a layer of 256 experts on 288 slots, by the load.
///
/// # Errors
/// As [`lower_bound`]; [`Code::WrongShape`] unless `upper` has a value for each layer.
pub fn tight_lower_bound(
    load: &Load<'_>,
    topology: &Topology,
    num_groups: usize,
    upper: &[f64],
) -> Result<Vec<f64>> {
    let mut bounds = lower_bound(load, topology, num_groups)?;
    if upper.len() != load.num_layers() {
        return Err(Error::invalid(
            Code::WrongShape,
            "upper",
            format!("{} values", upper.len()),
            format!("{}, one for each layer", load.num_layers()),
            "",
        ));
    }
    if let Some(ranks) = ranks_of_pairs(topology, load.num_experts()) {
        let mut scratch = pairs::Scratch::default();
        for ((row, bound), &upper) in load.layers().zip(&mut bounds).zip(upper) {
            *bound = pairs::raise(row, ranks, *bound, upper, &mut scratch);
        }
    }
    Ok(bounds)
}

/// The live ranks, if the bound of pairs applies to them.
fn ranks_of_pairs(topology: &Topology, num_experts: usize) -> Option<pairs::Ranks> {
    let ranks = pairs::Ranks {
        num_ranks: topology.num_live_gpus(),
        num_slots: topology.num_live_slots(),
    };
    let (.., speed) = topology.live_gpus().next()?;
    let alike = |(_, slots, other): (usize, usize, f64)| slots <= 2 && other == speed;
    let apply = topology.live_gpus().all(alike) && ranks.num_slots > ranks.num_ranks;
    (apply && ranks.num_slots >= num_experts).then_some(ranks)
}

/// The smallest possible maximum of `load / min(count, ranks)` over counts that fill the slots.
pub(crate) fn least_largest_share(
    row: &[f32],
    num_slots: usize,
    num_ranks: usize,
    heap: &mut BinaryHeap<(u64, u32, usize)>,
) -> f64 {
    // The bits of floats that are not negative are in their order.
    heap.clear();
    heap.extend(
        row.iter()
            .enumerate()
            .map(|(expert, &load)| (f64::from(load.abs()).to_bits(), 1, expert)),
    );
    for _ in row.len()..num_slots {
        let Some(mut top) = heap.peek_mut() else {
            break;
        };
        let (_, count, expert) = *top;
        if count as usize == num_ranks {
            break;
        }
        let share = f64::from(row[expert].abs()) / f64::from(count + 1);
        *top = (share.to_bits(), count + 1, expert);
    }
    heap.peek()
        .map_or(0.0, |&(bits, _, _)| f64::from_bits(bits))
}

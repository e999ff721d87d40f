//! The first placement: heaviest replica first, each to the rank that it makes least heavy.

use std::cmp::Reverse;

use super::counts::share;
use super::part::Part;
use super::ranks::Ranks;

/// Scratch of [`fill`].
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// The [key](Keys) of each rank that has room, else the largest integer.
    open: Vec<i32>,
    /// Ranks with room that have the expert already.
    closed: Vec<usize>,
    /// Counts, shares and experts, most replicas first.
    by_count: Vec<(u32, i32, u32)>,
    /// Ranks, most room first.
    order: Vec<(u32, u32)>,
}

impl Scratch {
    /// Has room for all that filling the ranks of a part may need.
    pub(crate) fn reserve(&mut self, part: &Part) {
        let Self {
            open,
            closed,
            by_count,
            order,
        } = self;
        open.clear();
        open.reserve(part.num_ranks().next_multiple_of(16));
        closed.clear();
        closed.reserve(part.num_ranks());
        by_count.clear();
        by_count.reserve(part.weight.len());
        order.clear();
        order.reserve(part.num_ranks());
    }
}

/// Places `count[expert]` replicas of each expert, in the order of `items`: shares and experts,
/// heaviest first. No rank gets an expert twice if `count` is at most the number of ranks that
/// have a slot and the ranks have equally many.
pub(crate) fn fill(
    ranks: &mut Ranks,
    part: &Part,
    items: &[(i32, u32)],
    count: &[u32],
    scratch: &mut Scratch,
) {
    scratch.reserve(part);
    ranks.reset(part, count.len());
    if place_by_load(ranks, part, items, count, scratch) {
        return;
    }
    ranks.reset(part, count.len());
    place_by_count(ranks, part, items, count, scratch);
    place_others(ranks, part);
}

/// Returns whether every replica found a place.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
fn place_by_load(
    ranks: &mut Ranks,
    part: &Part,
    items: &[(i32, u32)],
    count: &[u32],
    scratch: &mut Scratch,
) -> bool {
    let Scratch { open, closed, .. } = scratch;
    let keys = Keys::new(part.num_ranks());
    open.resize(part.num_ranks().next_multiple_of(16), i32::MAX);
    for (rank, (open, &slots)) in open.iter_mut().zip(&part.slots_of).enumerate() {
        *open = if slots > 0 {
            keys.of(0, rank)
        } else {
            i32::MAX
        };
    }
    for &(share, expert) in items {
        let expert = expert as usize;
        closed.clear();
        for _ in 0..count[expert] {
            let rank = if part.is_even() {
                let least = open.iter().fold(i32::MAX, |least, &key| least.min(key));
                (least < i32::MAX).then(|| keys.rank(least))
            } else {
                lightest_after(ranks, part, open, share)
            };
            let Some(rank) = rank else {
                if !make_room(ranks, expert, share, closed) {
                    return false;
                }
                continue;
            };
            ranks.push(rank, expert, share);
            let mut key = i32::MAX;
            if ranks.has_room(rank) {
                if count[expert] == 1 {
                    key = keys.of(ranks.load(rank), rank);
                } else {
                    closed.push(rank);
                }
            }
            // A pass over whole vectors: what is read next was not written piecemeal.
            for (lane, open) in open.iter_mut().enumerate() {
                *open = if lane == rank { key } else { *open };
            }
        }
        for &rank in &*closed {
            open[rank] = keys.of(ranks.load(rank), rank);
        }
    }
    true
}

/// A load with the number of its rank in the low bits: the least of them names the lightest rank,
/// ties to the lowest number.
#[derive(Debug, Clone, Copy)]
struct Keys {
    low: i32,
}

impl Keys {
    fn new(num_ranks: usize) -> Self {
        Self {
            low: num_ranks.next_power_of_two() as i32 - 1,
        }
    }

    fn of(self, load: i32, rank: usize) -> i32 {
        (load & !self.low) | rank as i32
    }

    fn rank(self, key: i32) -> usize {
        (key & self.low) as usize
    }
}

/// The rank with room that a share makes least heavy for its speed.
fn lightest_after(ranks: &Ranks, part: &Part, open: &[i32], share: i32) -> Option<usize> {
    (0..part.num_ranks())
        .filter(|&rank| open[rank] < i32::MAX)
        .min_by_key(|&rank| part.time(rank, ranks.load(rank) + share))
}

/// Puts an expert on a full rank that lacks it, and one replica of that rank on a rank that has
/// room and, by then, the expert. Where ranks have equally many slots there is always one.
fn make_room(ranks: &mut Ranks, expert: usize, share: i32, closed: &mut Vec<usize>) -> bool {
    for index in 0..closed.len() {
        let roomy = closed[index];
        for full in 0..ranks.num_ranks() {
            if ranks.has_room(full) || ranks.holds(full, expert) {
                continue;
            }
            let Some(slot) = ranks.slot_that_fits(full, roomy) else {
                continue;
            };
            let (moved, share) = ranks.replace(full, slot, expert, share);
            ranks.push(roomy, moved, share);
            if !ranks.has_room(roomy) {
                closed.swap_remove(index);
            }
            return true;
        }
    }
    false
}

/// Places the experts with most replicas first, each on the ranks with most room: if there is a
/// placement without an expert twice on a rank, this is one.
///
/// Source: D. Gale, "A theorem on flows in networks", 1957.
fn place_by_count(
    ranks: &mut Ranks,
    part: &Part,
    items: &[(i32, u32)],
    count: &[u32],
    scratch: &mut Scratch,
) {
    let Scratch {
        order, by_count, ..
    } = scratch;
    by_count.clear();
    by_count.extend(
        items
            .iter()
            .map(|&(share, expert)| (count[expert as usize], share, expert)),
    );
    by_count
        .sort_unstable_by_key(|&(count, share, expert)| (Reverse(count), Reverse(share), expert));
    for &(count, share, expert) in &*by_count {
        order.clear();
        let roomy = (0..part.num_ranks()).filter(|&rank| ranks.has_room(rank));
        order.extend(roomy.map(|rank| {
            let room = part.slots_of[rank] - ranks.filled(rank) as u32;
            (u32::MAX - room, rank as u32)
        }));
        order.sort_unstable();
        for &(_, rank) in order.iter().take(count as usize) {
            ranks.push(rank as usize, expert as usize, share);
        }
    }
}

/// Where ranks have unequally many slots, not all counts can be had: replicas that found no place
/// without an expert twice on a rank give way to those of experts that the rank lacks, hottest first.
fn place_others(ranks: &mut Ranks, part: &Part) {
    let share_of = |expert: usize, count: u32| share(part.weight[expert], count.max(1));
    for expert in 0..ranks.num_experts() {
        ranks.reshare(expert, share_of(expert, ranks.count(expert)));
    }
    for rank in 0..ranks.num_ranks() {
        while ranks.has_room(rank) {
            let lacking = (0..ranks.num_experts()).filter(|&expert| !ranks.holds(rank, expert));
            let hottest = lacking.max_by_key(|&expert| {
                let share = share_of(expert, ranks.count(expert));
                (share, Reverse(expert))
            });
            let Some(expert) = hottest else { break };
            ranks.push(rank, expert, 0);
            ranks.reshare(expert, share_of(expert, ranks.count(expert)));
        }
    }
}

//! Two slots a rank: the best packing is known, so only the counts are searched.
//!
//! With two replicas to a rank, the heaviest goes with the lightest, the next heaviest with the
//! next lightest, and so on: no other pairing has a lighter heaviest pair. So a level `T` can be
//! reached if and only if, for every size `v` above `T / 2`, the replicas of at least `v` are no
//! more than those of at most `T - v`, which are all they can be paired with. Greedy counts split
//! the largest experts; what is short is often small replicas, and those come from splitting
//! experts that are small already.
//!
//! The search keeps, for [`BINS`] sizes, how many partners are to spare, and moves replicas from
//! expert to expert until none is short; then it aims lower.

use super::counts::share;
use super::fuel::Fuel;
use super::random::Random;

/// Sizes between `T / 2` and `T` that are told apart.
const BINS: usize = 128;

/// Fewer ranks than these are left to the general search: there, that the best pairing may part two
/// replicas of one expert weighs more.
pub(crate) const FEWEST: usize = 4;

/// By how much the next level is below the last.
const STEP: f64 = 0.003;

/// How many experts are tried as the one to lose a replica, and as the one to gain it.
const GIVERS: usize = 3;
const TAKERS: usize = 4;

/// Scratch of [`improve`].
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    spare: Spare,
    tried: Spare,
    sorted: Vec<i32>,
    /// Experts with more than one replica.
    givers: Vec<u32>,
    best: Vec<u32>,
}

/// How many more partners than replicas there are, of each size and above.
#[derive(Debug, Clone, Copy)]
struct Spare([i16; BINS]);

impl Default for Spare {
    fn default() -> Self {
        Self([0; BINS])
    }
}

impl Spare {
    /// By how much partners are short, over all sizes.
    #[inline(always)]
    fn shortage(&self) -> i32 {
        let mut short = 0;
        for &spare in &self.0 {
            short += i32::from((-spare).max(0));
        }
        short
    }
}

/// A level that is aimed at.
#[derive(Debug, Clone, Copy)]
struct Aim {
    level: i32,
    bins_per_unit: f64,
}

impl Aim {
    fn new(level: f64) -> Self {
        let level = level as i32;
        let bins_per_unit = 2.0 * BINS as f64 / f64::from(level.max(1));
        Self {
            level,
            bins_per_unit,
        }
    }

    /// Adds `times` replicas of a share: those above half of the level need a partner, the others
    /// are one.
    #[inline(always)]
    fn add(self, spare: &mut Spare, share: i32, times: i16) {
        let rest = self.level - share;
        let (size, sign) = if share > rest {
            (share, -times)
        } else {
            (rest, times)
        };
        let above_half = (f64::from(size) - f64::from(self.level) * 0.5) * self.bins_per_unit;
        let bin = (above_half as usize).min(BINS - 1);
        for spare in &mut spare.0[..=bin] {
            *spare += sign;
        }
    }

    /// Changes the count of an expert.
    #[inline(always)]
    fn recount(self, spare: &mut Spare, weight: i32, from: u32, to: u32) {
        self.add(spare, share(weight, from), -(from as i16));
        self.add(spare, share(weight, to), to as i16);
    }

    /// The largest share of which there can be a partner for the largest that lacks one.
    #[inline(always)]
    fn partner_size(self, spare: &Spare) -> f64 {
        let top = spare.0.iter().rposition(|&spare| spare < 0).unwrap_or(0);
        f64::from(self.level) * 0.5 * (1.0 - (top + 1) as f64 / BINS as f64)
    }
}

/// The load of the heaviest rank that counts lead to.
#[inline(always)]
fn level_of(weight: &[i32], count: &[u32], sorted: &mut Vec<i32>) -> i32 {
    sorted.clear();
    for (&weight, &count) in weight.iter().zip(count) {
        let share = share(weight, count);
        for _ in 0..count {
            sorted.push(share);
        }
    }
    sorted.sort_unstable();
    let (small, large) = sorted.split_at(sorted.len() / 2);
    let pairs = small.iter().zip(large.iter().rev());
    pairs.map(|(a, b)| a + b).max().unwrap_or(0)
}

/// Improves counts, none beyond `most`, for weights in descending order, until the heaviest rank
/// carries no more than `target`; returns what it carries then, if no pair has to be parted because
/// it is one expert's.
#[inline(always)]
pub(crate) fn improve(
    weight: &[i32],
    count: &mut [u32],
    most: u32,
    target: i32,
    fuel: &mut Fuel,
    scratch: &mut Scratch,
) -> i32 {
    let Scratch {
        spare,
        tried,
        sorted,
        givers,
        best,
    } = scratch;
    if count.iter().any(|&count| count > i16::MAX as u32) {
        return i32::MAX;
    }
    let mut random = Random::new();
    let mut level = level_of(weight, count, sorted);
    best.clear();
    best.extend_from_slice(count);
    let mut aim = Aim::new(f64::from(level) * (1.0 - STEP));
    let mut short = restart(aim, weight, count, spare, givers);
    while level > target && !givers.is_empty() && fuel.step() {
        if short == 0 {
            let new = level_of(weight, count, sorted);
            if new < level {
                level = new;
                best.copy_from_slice(count);
            }
            aim = Aim::new(f64::from(aim.level.min(level)) * (1.0 - STEP));
            short = restart(aim, weight, count, spare, givers);
            continue;
        }
        let mut giver = (i32::MAX, 0);
        for _ in 0..GIVERS {
            let place = random.below(givers.len());
            let from = givers[place] as usize;
            *tried = *spare;
            aim.recount(tried, weight[from], count[from], count[from] - 1);
            giver = giver.min((tried.shortage(), place));
        }
        let place = giver.1;
        let from = givers[place] as usize;
        aim.recount(spare, weight[from], count[from], count[from] - 1);
        // The largest experts that make two partners where they are short; the largest of all;
        // any that make two partners; any.
        let size = 2.0 * aim.partner_size(spare);
        let fit = weight.partition_point(|&weight| f64::from(weight) > size);
        let mut taker = (i32::MAX, 0);
        for pick in 0..TAKERS {
            let to = match pick % 4 {
                0 => fit + random.below(4),
                1 => random.below(givers.len() + 8),
                2 => fit + random.below(weight.len() - fit),
                _ => random.below(weight.len()),
            };
            if to == from || to >= weight.len() || count[to] >= most {
                continue;
            }
            *tried = *spare;
            aim.recount(tried, weight[to], count[to], count[to] + 1);
            taker = taker.min((tried.shortage(), to));
        }
        let (new, to) = taker;
        if new > short {
            aim.recount(spare, weight[from], count[from] - 1, count[from]);
            continue;
        }
        short = new;
        aim.recount(spare, weight[to], count[to], count[to] + 1);
        count[from] -= 1;
        if count[from] == 1 {
            givers.swap_remove(place);
        }
        count[to] += 1;
        if count[to] == 2 {
            givers.push(to as u32);
        }
    }
    count.copy_from_slice(best);
    level
}

/// Counts anew for another aim; returns the shortage.
#[inline(always)]
fn restart(
    aim: Aim,
    weight: &[i32],
    count: &[u32],
    spare: &mut Spare,
    givers: &mut Vec<u32>,
) -> i32 {
    *spare = Spare::default();
    givers.clear();
    for (expert, (&weight, &count)) in weight.iter().zip(count).enumerate() {
        aim.add(spare, share(weight, count), count as i16);
        if count > 1 {
            givers.push(expert as u32);
        }
    }
    spare.shortage()
}

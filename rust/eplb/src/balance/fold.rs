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

use super::counts::{self, share};
use super::fuel::Fuel;
use super::part::Part;
use super::random::Random;
use super::ranks::Ranks;

/// Sizes between `T / 2` and `T` that are told apart.
const BINS: usize = 128;

/// Fewer ranks than these are left to the general search: there, that the best pairing may part two
/// replicas of one expert weighs more.
pub(crate) const FEWEST: usize = 4;

/// By how much the next level is below the last.
const STEP: f64 = 0.003;

/// How many steps one level is aimed at; then one half as far.
const TRIES: u32 = 12;

/// At which of these steps all changes that are likely to help are tried: where many levels are easily
/// reached, that would take longer than it saves.
const THOROUGH: u32 = 5;

/// Of how many experts one loses a replica then, at most: those that were replicated first.
const MOST_GIVERS: usize = 64;

/// How many experts are tried as the one to lose a replica, and as the one to gain it.
const GIVERS: usize = 3;
const TAKERS: usize = 4;

/// How far above what no counts can beat the heaviest rank may be for the search to stop, times the
/// steps it may take.
const PATIENCE: f64 = 0.02;

/// Scratch of [`improve`] and [`place`].
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    spare: Spare,
    tried: Spare,
    replicated: Vec<(i32, u32)>,
    /// Shares and experts, largest share first.
    items: Vec<(i32, u32)>,
    /// Experts with more than one replica.
    givers: Vec<u32>,
    best: Vec<u32>,
    /// All replicas, largest first.
    order: Vec<(i32, u32)>,
}

impl Scratch {
    /// Has room for all that counts of so many experts in so many slots may need.
    pub(crate) fn reserve(&mut self, num_experts: usize, num_slots: usize) {
        for list in [&mut self.replicated, &mut self.items] {
            list.clear();
            list.reserve(num_experts);
        }
        self.givers.clear();
        self.givers.reserve(num_experts);
        self.order.clear();
        self.order.reserve(num_slots);
    }
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

    /// The last size that replicas of a share have to do with, and by how much they change what is
    /// to spare: those above half of the level need a partner, the others are one.
    #[inline(always)]
    fn place(self, share: i32, times: i16) -> (usize, i16) {
        let rest = self.level - share;
        let (size, sign) = if share > rest {
            (share, -times)
        } else {
            (rest, times)
        };
        let above_half = (f64::from(size) - f64::from(self.level) * 0.5) * self.bins_per_unit;
        ((above_half as usize).min(BINS - 1), sign)
    }

    /// Adds `times` replicas of a share.
    #[inline(always)]
    fn add(self, spare: &mut Spare, share: i32, times: i16) {
        let (last, more) = self.place(share, times);
        for spare in &mut spare.0[..=last] {
            *spare += more;
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

/// The load of the heaviest rank that counts lead to, heaviest with lightest.
#[inline(always)]
fn level_of(
    weight: &[i32],
    count: &[u32],
    replicated: &mut Vec<(i32, u32)>,
    items: &mut Vec<(i32, u32)>,
) -> i32 {
    counts::list(weight, count, replicated, items);
    let count_of = |item: usize| count[items[item].1 as usize];
    let (mut first, mut last) = (0, items.len() - 1);
    let (mut large, mut small) = (count_of(first), count_of(last));
    let mut level = 0;
    while first < last {
        level = level.max(items[first].0 + items[last].0);
        let pairs = large.min(small);
        (large, small) = (large - pairs, small - pairs);
        if large == 0 {
            first += 1;
            large = count_of(first);
        }
        if small == 0 && last > 0 {
            last -= 1;
            small = count_of(last);
        }
    }
    if first == last && large.min(small) > 1 {
        level = level.max(2 * items[first].0);
    }
    level
}

/// Improves [greedy](counts::greedy) counts, none beyond `most`, for weights in descending order,
/// until the heaviest rank carries little more than the mean or the least largest share; returns
/// what it carries then, if no pair has to be parted because it is one expert's.
#[inline(always)]
pub(crate) fn improve(
    weight: &[i32],
    count: &mut [u32],
    most: u32,
    mean: i32,
    fuel: &mut Fuel,
    scratch: &mut Scratch,
) -> i32 {
    let Scratch {
        spare,
        tried,
        replicated,
        items,
        givers,
        best,
        ..
    } = scratch;
    if count.iter().any(|&count| count > i16::MAX as u32) {
        return i32::MAX;
    }
    let mut random = Random::new();
    let mut level = level_of(weight, count, replicated, items);
    let largest = items.first().map_or(0, |&(share, _)| share);
    let loose = PATIENCE / f64::from(fuel.capacity.max(1));
    let target = (f64::from(mean.max(largest)) * (1.0 + loose)) as i32;
    best.clear();
    best.extend_from_slice(count);
    let mut reach = STEP;
    let mut tries = 0;
    let mut aim = Aim::new(f64::from(level) * (1.0 - reach));
    let mut short = restart(aim, weight, count, spare, givers);
    while level > target && !givers.is_empty() && fuel.step() {
        tries += 1;
        if short == 0 || tries > TRIES {
            if short == 0 {
                let new = level_of(weight, count, replicated, items);
                if new < level {
                    level = new;
                    best.copy_from_slice(count);
                }
                reach = STEP.min(2.0 * reach);
                aim = Aim::new(f64::from(aim.level.min(level)) * (1.0 - reach));
            } else {
                reach *= 0.5;
                aim = Aim::new(f64::from(level) * (1.0 - reach));
            }
            tries = 0;
            short = restart(aim, weight, count, spare, givers);
            continue;
        }
        let layer = Layer {
            weight,
            count,
            most,
            givers,
        };
        let change = if tries == THOROUGH {
            layer.best_change(aim, spare, tried)
        } else {
            layer.some_change(aim, spare, tried, &mut random)
        };
        let (new, place, to) = change;
        if new > short {
            continue;
        }
        let from = givers[place] as usize;
        aim.recount(spare, weight[from], count[from], count[from] - 1);
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

/// The counts of a layer, between changes.
struct Layer<'a> {
    weight: &'a [i32],
    count: &'a [u32],
    most: u32,
    /// Experts with more than one replica.
    givers: &'a [u32],
}

/// The shortage after a change, the place of the expert among the givers that loses a replica, and
/// the expert that gains it.
type Change = (i32, usize, usize);

impl Layer<'_> {
    fn giver(&self, place: usize) -> usize {
        self.givers[place] as usize
    }

    /// The first expert of which two replicas are partners where they are short.
    #[inline(always)]
    fn first_fit(&self, aim: Aim, spare: &Spare) -> usize {
        let size = 2.0 * aim.partner_size(spare);
        self.weight
            .partition_point(|&weight| f64::from(weight) > size)
    }

    /// What is short after an expert has lost a replica; `lost` is what is to spare then.
    #[inline(always)]
    fn lose(&self, aim: Aim, spare: &Spare, from: usize, lost: &mut Spare) -> i32 {
        *lost = *spare;
        let count = self.count[from];
        aim.recount(lost, self.weight[from], count, count - 1);
        lost.shortage()
    }

    /// What is short after an expert has gained a replica, where that is possible.
    #[inline(always)]
    fn gain(&self, aim: Aim, lost: &Spare, from: usize, to: usize) -> i32 {
        if to == from || to >= self.weight.len() || self.count[to] >= self.most {
            return i32::MAX;
        }
        let mut gained = *lost;
        let count = self.count[to];
        aim.recount(&mut gained, self.weight[to], count, count + 1);
        gained.shortage()
    }

    /// The best of all experts to lose a replica; it goes to the largest share, or to one of the
    /// largest experts that make two partners where they are short.
    #[inline(always)]
    fn best_change(&self, aim: Aim, spare: &Spare, lost: &mut Spare) -> Change {
        let share_of = |expert: usize| (share(self.weight[expert], self.count[expert]), expert);
        let single = self.count.iter().position(|&count| count == 1);
        let givers = self.givers.iter().map(|&giver| giver as usize);
        let largest = givers.chain(single).map(share_of).max();
        let largest = largest.map_or(0, |(_, expert)| expert);
        let mut best = (i32::MAX, 0, 0);
        for place in 0..self.givers.len().min(MOST_GIVERS) {
            let from = self.giver(place);
            self.lose(aim, spare, from, lost);
            let fit = self.first_fit(aim, lost);
            for to in [largest, fit, fit + 1] {
                best = best.min((self.gain(aim, lost, from, to), place, to));
            }
        }
        best
    }

    /// The best of a few experts to lose a replica, and then of a few to gain it.
    #[inline(always)]
    fn some_change(
        &self,
        aim: Aim,
        spare: &Spare,
        lost: &mut Spare,
        random: &mut Random,
    ) -> Change {
        let mut giver = (i32::MAX, 0);
        for _ in 0..GIVERS {
            let place = random.below(self.givers.len());
            giver = giver.min((self.lose(aim, spare, self.giver(place), lost), place));
        }
        let place = giver.1;
        let from = self.giver(place);
        self.lose(aim, spare, from, lost);
        // The largest experts that make two partners where they are short; the largest of all;
        // any that make two partners; any.
        let fit = self.first_fit(aim, lost);
        let mut taker = (i32::MAX, 0);
        for pick in 0..TAKERS {
            let to = match pick % 4 {
                0 => fit + random.below(4),
                1 => random.below(self.givers.len() + 8),
                2 => fit + random.below(self.weight.len() - fit),
                _ => random.below(self.weight.len()),
            };
            taker = taker.min((self.gain(aim, lost, from, to), to));
        }
        (taker.0, place, taker.1)
    }
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
        let (last, more) = aim.place(share(weight, count), count as i16);
        spare.0[last] += more;
        if count > 1 {
            givers.push(expert as u32);
        }
    }
    let mut sum = 0;
    for spare in spare.0.iter_mut().rev() {
        sum += *spare;
        *spare = sum;
    }
    spare.shortage()
}

/// Places the replicas, heaviest with lightest; false if a pair of one expert's cannot be parted
/// without a rank carrying more than the level, and then the ranks are as they may be.
#[inline(always)]
pub(crate) fn place(
    ranks: &mut Ranks,
    part: &Part,
    count: &[u32],
    level: i32,
    scratch: &mut Scratch,
) -> bool {
    let Scratch {
        replicated,
        items,
        order,
        ..
    } = scratch;
    counts::list(&part.weight, count, replicated, items);
    order.clear();
    for &(share, expert) in &*items {
        let replicas = count[expert as usize] as usize;
        order.extend(std::iter::repeat_n((share, expert), replicas));
    }
    let num_ranks = part.num_ranks();
    if order.len() != 2 * num_ranks {
        return false;
    }
    let (large, small) = order.split_at_mut(num_ranks);
    small.reverse();
    // Replicas of one expert are next to each other, so that only the last pairs can be of one.
    let mut other = num_ranks;
    for pair in (0..num_ranks).rev() {
        let (share, expert) = large[pair];
        if small[pair].1 != expert {
            break;
        }
        other = other.min(pair);
        loop {
            let Some(next) = other.checked_sub(1) else {
                return false;
            };
            other = next;
            if large[other].0 + share > level {
                return false;
            }
            if large[other].1 != expert && small[other].1 != expert {
                break;
            }
        }
        (small[pair], small[other]) = (small[other], small[pair]);
    }
    ranks.reset(part, count.len());
    for (rank, (&(large, first), &(small, second))) in large.iter().zip(&*small).enumerate() {
        ranks.push(rank, first as usize, large);
        ranks.push(rank, second as usize, small);
    }
    true
}

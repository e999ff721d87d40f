//! Relieving hot ranks of tokens until none is above a level, and finding the least level.
//!
//! At a given level, the rank furthest above it sheds tokens of its largest expert to a copy on
//! the rank below the level whose gap they fit best: the smallest gap that takes them all, else
//! the largest. So few copies suffice, one for most hot ranks. Where no rank that lies below the
//! level has a spare slot left, a *relay* helps: a rank with a spare slot whose own expert has a
//! copy on a rank below the level takes the copy instead, and hands as many of its own tokens on.
//!
//! The level starts at the mean, or the target if that is higher. A round that leaves ranks above
//! it still is a plan; what it left over says how much higher to try next.

use multiversion::multiversion;

use super::{FAR_ROUNDS, Limits, ROUNDS};

/// How many bits of a key hold a rank.
pub(super) const RANK_BITS: u32 = 10;
const RANK_MASK: i64 = (1 << RANK_BITS) - 1;

/// How many keys are compared side by side.
const WIDTH: usize = 8;

/// A copy of an expert in a spare slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copy {
    pub(super) expert: u32,
    /// The rank that the expert is at home on.
    home: u32,
    /// The spare slot: `rank * spare_slots + number`.
    pub(super) slot: u32,
    pub(super) rank: u32,
    pub(super) tokens: i64,
}

/// The best plan so far, and the round under way.
#[derive(Debug, Clone)]
pub(super) struct Relief {
    num_ranks: usize,
    home_slots: usize,
    spare_slots: usize,
    best: Vec<Copy>,
    copies: Vec<Copy>,
    /// Tokens that each expert has at home.
    left: Vec<i64>,
    /// How far each rank is below the level.
    below: Vec<i64>,
    /// Of ranks above the level, how far, and the rank counted down; else 0. Padded with 0.
    hot: Vec<i64>,
    /// Of ranks that can take a copy, how far below the level, and the rank; else 0. Padded.
    cold: Vec<i64>,
    /// How many copies each rank can still take, and its experts can still have.
    room: Vec<u32>,
    leave: Vec<u32>,
    /// How many copies each rank can take at first.
    most_in: u32,
}

impl Relief {
    pub(super) fn with_capacity(num_ranks: usize, home_slots: usize, spare_slots: usize) -> Self {
        let padded = num_ranks.next_multiple_of(WIDTH);
        Self {
            num_ranks,
            home_slots,
            spare_slots,
            best: Vec::with_capacity(num_ranks * spare_slots),
            copies: Vec::with_capacity(num_ranks * spare_slots),
            left: vec![0; num_ranks * home_slots],
            below: vec![0; num_ranks],
            hot: vec![0; padded],
            cold: vec![0; padded],
            room: vec![0; num_ranks],
            leave: vec![0; num_ranks],
            most_in: 0,
        }
    }

    /// The plan that was found.
    pub(super) fn plan(&self) -> &[Copy] {
        &self.best
    }

    /// Finds a plan and returns the largest rank load it leaves.
    pub(super) fn search(
        &mut self,
        base: &[i64],
        totals: &[i64],
        total: i64,
        limits: &Limits,
    ) -> i64 {
        search(self, base, totals, total, limits)
    }

    #[inline(always)]
    fn search_here(&mut self, base: &[i64], totals: &[i64], total: i64, limits: &Limits) -> i64 {
        let ranks = self.num_ranks as i64;
        let mean = (total + ranks - 1) / ranks;
        // Below 2^53 a product with a target is as exact as the target itself.
        let wanted = (total as f64 / ranks as f64 * limits.target_imbalance) as i64;
        let hottest = base.iter().fold(0, |a, &b| a.max(b));
        let mut floor = wanted.min(hottest).max(mean);
        let mut level = floor;
        let mut best = i64::MAX;
        let mut reached = false;
        for round in 1..FAR_ROUNDS {
            let left_over = self.round(base, totals, level, limits);
            let lowest = self.below.iter().fold(i64::MAX, |a, &b| a.min(b));
            if level - lowest < best {
                best = level - lowest;
                reached = left_over == 0;
                std::mem::swap(&mut self.best, &mut self.copies);
            }
            if left_over > 0 {
                floor = level;
                level += left_over * 2 / ranks + (mean >> 12) + 1;
            }
            // What is between the floor and the best may not be worth a round.
            let close = if round < ROUNDS {
                mean >> 11
            } else {
                mean >> 5
            };
            if best - floor <= close {
                break;
            }
            if level >= best {
                level = floor + (best - floor) / 2;
            }
        }
        // A round that aimed lower than it got made copies that the level it got may not need.
        if !reached {
            let copies = self.best.len();
            if self.round(base, totals, best, limits) == 0 && self.copies.len() < copies {
                std::mem::swap(&mut self.best, &mut self.copies);
            }
        }
        best
    }

    /// Relieves ranks down to a level as far as it can. Returns how many tokens are left over:
    /// above the level, without a place.
    #[inline(always)]
    fn round(&mut self, base: &[i64], totals: &[i64], level: i64, limits: &Limits) -> i64 {
        self.begin(base, totals, level, limits);
        let mut left_over = 0;
        loop {
            let hottest = largest(&self.hot);
            let excess = hottest >> RANK_BITS;
            if excess == 0 {
                return left_over;
            }
            let rank = (RANK_MASK - (hottest & RANK_MASK)) as usize;
            let home = rank * self.home_slots..(rank + 1) * self.home_slots;
            let first = home.start;
            let (expert, most) = largest_of(&self.left[home]);
            let wanted = most.min(excess);
            let shed = if self.leave[rank] > 0
                && wanted >= limits.min_tokens
                && self.copies.len() < limits.max_copies
            {
                self.place(rank, first + expert, wanted, limits)
            } else {
                0
            };
            self.below[rank] += shed;
            if shed == 0 {
                left_over += excess;
                self.hot[rank] = 0;
            } else if shed == excess {
                self.hot[rank] = 0;
            } else {
                self.hot[rank] -= shed << RANK_BITS;
            }
        }
    }

    /// Sets a round up.
    #[inline(always)]
    fn begin(&mut self, base: &[i64], totals: &[i64], level: i64, limits: &Limits) {
        self.copies.clear();
        self.left.copy_from_slice(totals);
        let clip = |limit: usize| u32::try_from(limit).unwrap_or(u32::MAX);
        self.leave.fill(clip(limits.max_out));
        self.most_in = clip(limits.max_in.min(self.spare_slots));
        self.room.fill(self.most_in);
        let may_take = limits.max_in > 0;
        let ranks = self.below.iter_mut().zip(&mut self.hot);
        for (rank, ((&base, (below, hot)), cold)) in
            (0..).zip(base.iter().zip(ranks).zip(&mut self.cold))
        {
            *below = level - base;
            let above = -*below << RANK_BITS | (RANK_MASK - rank);
            *hot = if base > level { above } else { 0 };
            let gap = *below << RANK_BITS | rank;
            let takes = *below >= limits.min_tokens && may_take;
            *cold = if takes { gap } else { 0 };
        }
    }

    /// Finds a place for up to so many tokens of an expert; returns for how many.
    #[inline(always)]
    fn place(&mut self, from: usize, expert: usize, wanted: i64, limits: &Limits) -> i64 {
        let gap = best_gap(&self.cold, wanted << RANK_BITS);
        if gap > 0 {
            let to = (gap & RANK_MASK) as usize;
            let tokens = wanted.min(gap >> RANK_BITS);
            self.copy(from, expert, to, tokens);
            self.below[to] -= tokens;
            let takes = self.room[to] > 0 && self.below[to] >= limits.min_tokens;
            self.cold[to] = if takes {
                self.below[to] << RANK_BITS | to as i64
            } else {
                0
            };
            return tokens;
        }
        // No rank below the level has a slot: look for a relay.
        let mut best = 0;
        let mut relay = 0;
        for (index, copy) in self.copies.iter().enumerate() {
            let through = copy.home as usize;
            let gap = self.below[copy.rank as usize].min(self.left[copy.expert as usize]);
            let fits = if best >= wanted {
                gap >= wanted && gap < best
            } else {
                gap > best
            };
            if fits && through != from && self.room[through] > 0 {
                (best, relay) = (gap, index);
            }
        }
        let tokens = wanted.min(best);
        if tokens < limits.min_tokens {
            return 0;
        }
        let copy = &mut self.copies[relay];
        copy.tokens += tokens;
        self.left[copy.expert as usize] -= tokens;
        self.below[copy.rank as usize] -= tokens;
        let through = copy.home as usize;
        let is_there =
            |copy: &&mut Copy| copy.expert as usize == expert && copy.rank as usize == through;
        match self.copies.iter_mut().find(is_there) {
            Some(copy) => {
                copy.tokens += tokens;
                self.left[expert] -= tokens;
            }
            None => self.copy(from, expert, through, tokens),
        }
        tokens
    }

    #[inline(always)]
    fn copy(&mut self, from: usize, expert: usize, to: usize, tokens: i64) {
        self.leave[from] -= 1;
        self.left[expert] -= tokens;
        let number = self.most_in - self.room[to];
        self.room[to] -= 1;
        self.copies.push(Copy {
            expert: expert as u32,
            home: from as u32,
            slot: (to * self.spare_slots) as u32 + number,
            rank: to as u32,
            tokens,
        });
    }
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt"
))]
fn search(relief: &mut Relief, base: &[i64], totals: &[i64], total: i64, limits: &Limits) -> i64 {
    relief.search_here(base, totals, total, limits)
}

/// The largest of keys that are not negative, in whole vectors.
#[inline(always)]
fn largest(keys: &[i64]) -> i64 {
    let mut lanes = [0i64; WIDTH];
    for chunk in keys.as_chunks::<WIDTH>().0 {
        for lane in 0..WIDTH {
            lanes[lane] = lanes[lane].max(chunk[lane]);
        }
    }
    lanes.iter().fold(0, |a, &b| a.max(b))
}

/// The smallest of the keys that are at least `needed`, else the largest; in either case the
/// lowest rank of several.
#[inline(always)]
fn best_gap(keys: &[i64], needed: i64) -> i64 {
    let mut fits = [i64::MAX; WIDTH];
    let mut large = [0i64; WIDTH];
    for chunk in keys.as_chunks::<WIDTH>().0 {
        for lane in 0..WIDTH {
            let key = chunk[lane];
            let fit = if key >= needed { key } else { i64::MAX };
            fits[lane] = fits[lane].min(fit);
            large[lane] = large[lane].max(key ^ RANK_MASK);
        }
    }
    let fit = fits.iter().fold(i64::MAX, |a, &b| a.min(b));
    if fit < i64::MAX {
        return fit;
    }
    let key = large.iter().fold(0, |a, &b| a.max(b)) ^ RANK_MASK;
    if key > RANK_MASK { key } else { 0 }
}

/// Which is largest, the first of several, and how large.
#[inline(always)]
fn largest_of(values: &[i64]) -> (usize, i64) {
    let mut best = (0, 0);
    for (index, &value) in values.iter().enumerate() {
        if value > best.1 {
            best = (index, value);
        }
    }
    best
}

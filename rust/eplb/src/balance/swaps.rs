//! Which replicas to exchange so that the heaviest rank gets lighter.
//!
//! Moving a share of `x` from a rank of load `H` for one of `y` from a rank of load `P` leaves at
//! most `(H + P) / 2 + |x - y - (H - P) / 2|`, rounded up. So partners are tried from the lightest,
//! until the two together are too heavy for any exchange to beat the best so far.

use multiversion::multiversion;

use super::ranks::{BARRED, Ranks, Swap};
use super::rows::{self, LANES};

/// How many partners are tried between two looks at the best of them.
const TURNS: usize = 4;

/// Scratch of the searches.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub(crate) order: Order,
    /// Bits of the ranks that hold an expert of the heavy rank.
    crowd: Vec<u64>,
    /// For each slot of a partner, the best exchange so far, and with whom.
    best: Vec<i32>,
    who: Vec<u32>,
    /// Replicas of the heavy and of a light rank: shares, slots, and the shares of each two.
    ours: Vec<i32>,
    our_slots: Vec<u32>,
    our_pairs: Vec<i32>,
    theirs: Vec<i32>,
    their_slots: Vec<u32>,
    their_pairs: Vec<i32>,
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
fn best_partner(
    ranks: &Ranks,
    heavy: usize,
    partners: usize,
    scratch: &mut Scratch,
) -> Option<i32> {
    match ranks.filled(heavy) {
        0..=4 => ranks.best_partner_of::<4>(heavy, partners, scratch),
        5 => ranks.best_partner_of::<5>(heavy, partners, scratch),
        6..=8 => ranks.best_partner_of::<8>(heavy, partners, scratch),
        9 => ranks.best_partner_of::<9>(heavy, partners, scratch),
        _ => ranks.best_partner_of::<12>(heavy, partners, scratch),
    }
}

/// At most so many shares, and what no share comes near to.
#[inline(always)]
fn padded<const N: usize>(shares: &[i32]) -> [i32; N] {
    let mut padded = [-BARRED; N];
    for (padded, &share) in padded.iter_mut().zip(shares) {
        *padded = share;
    }
    padded
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
fn nearest(ours: &[i32], theirs: &[i32], goal: i32) -> i32 {
    rows::nearest(ours, theirs, goal)
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
fn find(ours: &[i32], theirs: &[i32], goal: i32, near: i32) -> Option<(usize, usize)> {
    rows::find(ours, theirs, goal, near)
}

/// With more slots a rank, two are not exchanged for two: all pairs would be too many, and so many
/// replicas leave one for one enough to choose from.
const DOUBLE_WIDTH: usize = 64;

/// The ranks in the order of how long they take, ties by number.
#[derive(Debug, Default)]
pub(crate) struct Order {
    /// Times above, numbers below.
    keys: Vec<u64>,
}

impl Scratch {
    /// Has room for all that ranks may need, so that no search allocates.
    pub(crate) fn reserve(&mut self, ranks: &Ranks) {
        let width = ranks.width();
        let pairs = if width <= DOUBLE_WIDTH {
            width * width / 2
        } else {
            0
        };
        for list in [&mut self.ours, &mut self.theirs, &mut self.best] {
            reserve(list, width);
        }
        for list in [&mut self.our_slots, &mut self.their_slots, &mut self.who] {
            reserve(list, width);
        }
        reserve(&mut self.order.keys, ranks.num_ranks());
        reserve(&mut self.crowd, ranks.num_words());
        reserve(&mut self.our_pairs, pairs);
        reserve(&mut self.their_pairs, pairs + LANES);
    }
}

/// Has room for so many in all.
fn reserve<T>(list: &mut Vec<T>, most: usize) {
    list.reserve(most.saturating_sub(list.len()));
}

impl Order {
    fn key(ranks: &Ranks, rank: usize) -> u64 {
        (ranks.time(rank, ranks.load(rank)) as u64) << 32 | rank as u64
    }

    /// Sorts all ranks.
    #[inline(always)]
    pub(crate) fn sort(&mut self, ranks: &Ranks) {
        self.keys.clear();
        self.keys
            .extend((0..ranks.num_ranks()).map(|rank| Self::key(ranks, rank)));
        self.keys.sort_unstable();
    }

    /// Sorts again after few ranks have changed.
    #[inline(always)]
    pub(crate) fn mend(&mut self, ranks: &Ranks) {
        for place in 0..self.keys.len() {
            let key = Self::key(ranks, self.keys[place] as u32 as usize);
            let mut hole = place;
            while hole > 0 && self.keys[hole - 1] > key {
                self.keys[hole] = self.keys[hole - 1];
                hole -= 1;
            }
            self.keys[hole] = key;
        }
    }

    /// Sorts again after the last rank has become lighter, and another heavier but not heavier
    /// than that was.
    #[inline(always)]
    fn mend_after(&mut self, ranks: &Ranks, light: usize) {
        let last = self.keys.len() - 1;
        let heavy = self.keys[last] as u32 as usize;
        let mut place = 0;
        while self.keys[place] as u32 as usize != light {
            place += 1;
        }
        let key = Self::key(ranks, light);
        while place + 1 < last && self.keys[place + 1] < key {
            self.keys[place] = self.keys[place + 1];
            place += 1;
        }
        self.keys[place] = key;
        let key = Self::key(ranks, heavy);
        let mut place = last;
        while place > 0 && self.keys[place - 1] > key {
            self.keys[place] = self.keys[place - 1];
            place -= 1;
        }
        self.keys[place] = key;
    }

    /// The rank that takes longest, and how long.
    #[inline(always)]
    pub(crate) fn heaviest(&self) -> (usize, i32) {
        let key = self.keys.last().copied().unwrap_or(0);
        (key as u32 as usize, (key >> 32) as i32)
    }

    /// The ranks, that which takes least first.
    #[inline(always)]
    pub(crate) fn lightest_first(&self) -> impl Iterator<Item = usize> + '_ {
        self.keys.iter().map(|&key| key as u32 as usize)
    }
}

impl Ranks {
    /// Exchanges replicas of the heaviest rank for another's, and keeps the order.
    #[inline(always)]
    pub(crate) fn apply_in_order(&mut self, swaps: &[Swap], order: &mut Order) {
        for swap in swaps {
            self.apply(swap);
        }
        if let Some(swap) = swaps.first() {
            order.mend_after(self, swap.light.0);
        }
    }

    /// The exchange of one replica of the heaviest rank for one of another that leaves the
    /// heavier of the two lightest, if that is lighter than the rank is now; among so many of the
    /// ranks that take least.
    #[inline(always)]
    pub(crate) fn best_swap(
        &self,
        heavy: usize,
        partners: usize,
        scratch: &mut Scratch,
    ) -> Option<Swap> {
        self.list_crowd(heavy, &mut scratch.crowd);
        if !self.is_even() {
            return self.best_swap_by_time(heavy, partners, scratch);
        }
        // Each slot of a partner has a lane, which keeps the best exchange for it, and with whom.
        let after = best_partner(self, heavy, partners, scratch)?;
        let slot = scratch.best.iter().position(|&best| best == after)?;
        let light = scratch.who[slot] as usize;
        let half = self.half(heavy, light);
        let near = after - (self.load(heavy) - half);
        self.swap_for(heavy, light, slot, half, near)
    }

    /// What the heavier of two ranks carries after the best exchange. All ranks are equally fast.
    #[inline(always)]
    fn best_partner_of<const N: usize>(
        &self,
        heavy: usize,
        partners: usize,
        scratch: &mut Scratch,
    ) -> Option<i32> {
        let Scratch {
            order,
            crowd,
            best,
            who,
            ours: allowed,
            theirs: masked,
            ..
        } = scratch;
        let level = self.load(heavy);
        let mut bound = level;
        best.clear();
        best.resize(self.width(), level);
        who.resize(self.width(), 0);
        let ours = self.shares_of(heavy);
        let first = padded::<N>(&ours[..ours.len().min(N)]);
        let more = &ours[ours.len().min(N)..];
        for (turn, &key) in order.keys.iter().take(partners).enumerate() {
            let light = key as u32 as usize;
            let half = (level - (key >> 32) as i32) >> 1;
            let even = level - half;
            if even >= bound {
                break;
            }
            if light == heavy {
                continue;
            }
            if crowd[light / 64] >> (light % 64) & 1 == 0 {
                let theirs = self.row(light);
                rows::lower(&first, theirs, half, even, light as u32, best, who);
                for ours in more.chunks(N) {
                    let ours = padded::<N>(ours);
                    rows::lower(&ours, theirs, half, even, light as u32, best, who);
                }
            } else {
                // Where both hold an expert, its replicas stay where they are.
                self.mask(heavy, light, allowed, masked);
                for ours in allowed.chunks(N) {
                    let ours = padded::<N>(ours);
                    rows::lower(&ours, masked, half, even, light as u32, best, who);
                }
            }
            if turn % TURNS == TURNS - 1 {
                bound = best.iter().fold(level, |least, &after| least.min(after));
            }
        }
        let bound = best.iter().fold(level, |least, &after| least.min(after));
        (bound < level).then_some(bound)
    }

    /// Lists the shares of a rank, and those of another, that may be exchanged for one another.
    #[inline(always)]
    fn mask(&self, heavy: usize, light: usize, ours: &mut Vec<i32>, theirs: &mut Vec<i32>) {
        ours.clear();
        theirs.clear();
        theirs.extend_from_slice(self.row(light));
        for (slot, &share) in self.shares_of(heavy).iter().enumerate() {
            if self.may_move(slot, heavy, light) {
                ours.push(share);
            } else {
                let expert = self.expert_in(heavy, slot) as u32;
                for (other, share) in self.experts_in_row(light).iter().zip(&mut *theirs) {
                    *share = if *other == expert { BARRED } else { *share };
                }
            }
        }
    }

    /// The same for ranks of any speed.
    fn best_swap_by_time(
        &self,
        heavy: usize,
        partners: usize,
        scratch: &mut Scratch,
    ) -> Option<Swap> {
        let Scratch {
            order,
            ours,
            theirs,
            ..
        } = scratch;
        let mut best = self.time(heavy, self.load(heavy));
        let mut found = None;
        for light in order.lightest_first().take(partners) {
            let half = self.half(heavy, light);
            if light == heavy || self.level(heavy, light, half, 0) >= best {
                continue;
            }
            self.mask(heavy, light, ours, theirs);
            let near = nearest(ours, theirs, half);
            let after = self.level(heavy, light, half, near);
            if after < best {
                best = after;
                found = Some((light, half, near));
            }
        }
        let (light, half, near) = found?;
        (0..self.filled(light)).find_map(|slot| self.swap_for(heavy, light, slot, half, near))
    }

    /// The exchange for the replica in a slot of another rank that comes as near to handing over
    /// `half`.
    #[inline(always)]
    fn swap_for(
        &self,
        heavy: usize,
        light: usize,
        slot: usize,
        half: i32,
        near: i32,
    ) -> Option<Swap> {
        let other = self.share_in(light, slot);
        let mut shares = self.shares_of(heavy).iter().enumerate();
        let (ours, _) = shares.find(|&(ours, &share)| {
            (share - other - half).abs() == near && self.may_move(ours, heavy, light)
        })?;
        self.may_move(slot, light, heavy).then_some(Swap {
            heavy: (heavy, ours),
            light: (light, slot),
        })
    }

    /// Marks the ranks that hold an expert of a rank.
    #[inline(always)]
    fn list_crowd(&self, rank: usize, crowd: &mut Vec<u64>) {
        crowd.clear();
        crowd.resize(self.num_words(), 0);
        for expert in self.experts_of(rank) {
            if (expert as usize) < self.num_experts() {
                for (crowd, hosts) in crowd.iter_mut().zip(self.hosts_of(expert as usize)) {
                    *crowd |= hosts;
                }
            }
        }
    }

    /// An exchange of two replicas of the heaviest rank for two of a light one that leaves the
    /// heavier of the two lighter than the rank is now; of the first of the lightest ranks that
    /// has one, the best. Follows [`best_swap`](Self::best_swap) for the same rank.
    pub(crate) fn best_double_swap(
        &self,
        heavy: usize,
        partners: usize,
        scratch: &mut Scratch,
    ) -> Option<[Swap; 2]> {
        if self.width() > DOUBLE_WIDTH {
            return None;
        }
        let level = self.time(heavy, self.load(heavy));
        let Scratch {
            order,
            crowd,
            ours,
            our_slots,
            our_pairs,
            theirs,
            their_slots,
            their_pairs,
            ..
        } = scratch;
        let mut all_listed = false;
        for light in order.lightest_first().take(partners) {
            let half = self.half(heavy, light);
            if self.level(heavy, light, half, 0) >= level {
                return None;
            }
            if light == heavy {
                continue;
            }
            let crowded = crowd[light / 64] >> (light % 64) & 1 != 0;
            if crowded || !all_listed {
                self.list_allowed(heavy, light, crowded, ours, our_slots);
                list_pairs(ours, our_pairs);
                all_listed = !crowded;
            }
            self.list_allowed(light, heavy, crowded, theirs, their_slots);
            list_pairs(theirs, their_pairs);
            their_pairs.resize(their_pairs.len().next_multiple_of(LANES), BARRED);
            let near = nearest(our_pairs, their_pairs, half);
            if self.level(heavy, light, half, near) >= level {
                continue;
            }
            let (first, second) = find(our_pairs, their_pairs, half, near)?;
            let (ours, theirs) = (pair(first, our_slots)?, pair(second, their_slots)?);
            let swap = |ours: u32, theirs: u32| Swap {
                heavy: (heavy, ours as usize),
                light: (light, theirs as usize),
            };
            return Some([swap(ours.0, theirs.0), swap(ours.1, theirs.1)]);
        }
        None
    }

    /// Lists the replicas of a rank that another may take: their shares and slots.
    fn list_allowed(
        &self,
        rank: usize,
        other: usize,
        crowded: bool,
        shares: &mut Vec<i32>,
        slots: &mut Vec<u32>,
    ) {
        shares.clear();
        slots.clear();
        if !crowded {
            shares.extend_from_slice(self.shares_of(rank));
            slots.extend(0..shares.len() as u32);
            return;
        }
        for (slot, &share) in self.shares_of(rank).iter().enumerate() {
            if self.may_move(slot, rank, other) {
                shares.push(share);
                slots.push(slot as u32);
            }
        }
    }
}

/// Lists what each two shares come to: those with the first, then those with the second, ...
fn list_pairs(shares: &[i32], pairs: &mut Vec<i32>) {
    pairs.clear();
    let mut rest = shares;
    while let [first, others @ ..] = rest {
        pairs.extend(others.iter().map(|other| first + other));
        rest = others;
    }
}

/// The two that a place in such a list stands for.
fn pair(place: usize, slots: &[u32]) -> Option<(u32, u32)> {
    let mut place = place;
    let mut rest = slots;
    while let [first, others @ ..] = rest {
        if let Some(&second) = others.get(place) {
            return Some((*first, second));
        }
        place -= others.len();
        rest = others;
    }
    None
}

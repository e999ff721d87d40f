//! A placement of one layer while it is being improved: what each rank holds, slot by slot.

use super::part::{self, Part};
use super::rows::{self, LANES};

/// All loads of a layer together come to at most this.
pub(crate) const WHOLE: i32 = 1 << 29;

/// The share of a site that no search picks: one without a replica, or one that may not be
/// exchanged. It is further from any sum of shares than half of what any two ranks differ by, so
/// that an exchange for it never pays; and it and that half still fit an `i32`.
const BARRED: i32 = WHOLE + WHOLE / 2;

/// The load of lanes beyond the last rank.
const NO_RANK: i32 = -1;

/// Stands in a site that holds no replica.
const NOBODY: u32 = u32::MAX;

/// Which experts each rank holds, and how much that makes it carry.
///
/// Loads are integers, at most [`WHOLE`] in all, so that sums are exact and order does not matter.
/// A *site* is one slot of one rank; the first slots of all ranks come first, then the second.
#[derive(Debug, Default, Clone)]
pub(crate) struct Ranks {
    num_ranks: usize,
    /// From one slot of a rank to its next.
    stride: usize,
    /// The most slots of any rank.
    num_slots: usize,
    /// How many slots each rank has.
    slots_of: Vec<u32>,
    /// How many of them are filled, from the first.
    filled: Vec<u32>,
    /// The share of its expert's load that each site carries.
    share: Vec<i32>,
    /// The expert of each site.
    expert: Vec<u32>,
    /// The load of each rank.
    load: Vec<i32>,
    /// Bits of the ranks that hold each expert, `[num_experts][num_words]`.
    hosts: Vec<u64>,
    num_words: usize,
    /// Replicas of each expert.
    count: Vec<u32>,
    /// How much slower than the mean each rank is; empty if none is.
    slowness: Vec<i64>,
}

/// The exchange of two replicas: ranks and slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Swap {
    pub(crate) heavy: (usize, usize),
    pub(crate) light: (usize, usize),
}

/// Scratch of the searches.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Half of what the heavy rank carries more than each.
    half: Vec<i32>,
    /// One slot's shares, and that half.
    goal: Vec<i32>,
    /// How far the best exchange with each rank is from evening out.
    miss: Vec<i32>,
    /// Replicas, or pairs of them, of the heavy and the light rank: their shares and slots.
    ours: Vec<i32>,
    our_slots: Vec<(u32, u32)>,
    theirs: Vec<i32>,
    their_slots: Vec<(u32, u32)>,
}

impl Ranks {
    /// Empties the table, for the ranks of a part.
    #[inline(always)]
    pub(crate) fn reset(&mut self, part: &Part, num_experts: usize) {
        let slots_of = &part.slots_of;
        self.num_ranks = slots_of.len();
        self.stride = self.num_ranks.next_multiple_of(LANES);
        self.num_slots = slots_of.iter().copied().max().unwrap_or(0) as usize;
        self.num_words = self.num_ranks.div_ceil(64);
        self.slots_of.clear();
        self.slots_of.extend_from_slice(slots_of);
        renew(&mut self.filled, self.num_ranks, 0);
        renew(&mut self.share, self.num_slots * self.stride, BARRED);
        renew(&mut self.expert, self.num_slots * self.stride, NOBODY);
        renew(&mut self.load, self.stride, NO_RANK);
        self.load[..self.num_ranks].fill(0);
        renew(&mut self.hosts, num_experts * self.num_words, 0);
        renew(&mut self.count, num_experts, 0);
        self.slowness.clear();
        self.slowness.extend_from_slice(part.slowness());
    }

    /// Becomes a copy of another table, in the memory that is there.
    #[inline(always)]
    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.num_ranks = other.num_ranks;
        self.stride = other.stride;
        self.num_slots = other.num_slots;
        self.num_words = other.num_words;
        self.slots_of.clone_from(&other.slots_of);
        self.filled.clone_from(&other.filled);
        self.share.clone_from(&other.share);
        self.expert.clone_from(&other.expert);
        self.load.clone_from(&other.load);
        self.hosts.clone_from(&other.hosts);
        self.count.clone_from(&other.count);
        self.slowness.clone_from(&other.slowness);
    }

    pub(crate) fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    /// The experts of a rank, by slot.
    pub(crate) fn experts_of(&self, rank: usize) -> impl Iterator<Item = u32> + Clone + '_ {
        let filled = self.filled[rank] as usize;
        (0..filled).map(move |slot| self.expert[self.site(slot, rank)])
    }

    /// What a rank carries.
    #[inline(always)]
    pub(crate) fn load(&self, rank: usize) -> i32 {
        self.load[rank]
    }

    /// Whether a rank holds an expert.
    #[inline(always)]
    pub(crate) fn holds(&self, rank: usize, expert: usize) -> bool {
        self.hosts[expert * self.num_words + rank / 64] >> (rank % 64) & 1 != 0
    }

    /// Whether a rank has a free slot.
    #[inline(always)]
    pub(crate) fn has_room(&self, rank: usize) -> bool {
        self.filled[rank] < self.slots_of[rank]
    }

    /// The rank that takes longest, and how long: its load, where all are equally fast.
    #[inline(always)]
    pub(crate) fn heaviest(&self) -> (usize, i32) {
        if self.slowness.is_empty() {
            return rows::argmax(&self.load);
        }
        (0..self.num_ranks)
            .map(|rank| (rank, self.time(rank, self.load[rank])))
            .max_by_key(|&(rank, time)| (time, std::cmp::Reverse(rank)))
            .unwrap_or_default()
    }

    /// How long a rank takes for a load.
    #[inline(always)]
    pub(crate) fn time(&self, rank: usize, load: i32) -> i32 {
        self.slowness
            .get(rank)
            .map_or(load, |&slowness| part::scaled(load, slowness))
    }

    /// The load that a rank should hand to another for both to take equally long.
    #[inline(always)]
    fn half(&self, heavy: usize, light: usize) -> i32 {
        let (heavy_load, light_load) = (self.load[heavy], self.load[light]);
        match (self.slowness.get(heavy), self.slowness.get(light)) {
            (Some(&of_heavy), Some(&of_light)) => {
                let more = i64::from(heavy_load) * of_heavy - i64::from(light_load) * of_light;
                (more / (of_heavy + of_light).max(1)) as i32
            }
            _ => (heavy_load - light_load) >> 1,
        }
    }

    /// At most what the slower of two ranks takes after an exchange that misses `half` by so much.
    #[inline(always)]
    fn level(&self, heavy: usize, light: usize, half: i32, miss: i32) -> i32 {
        let even = self.load[heavy] - half;
        match (self.slowness.get(heavy), self.slowness.get(light)) {
            (Some(&of_heavy), Some(&of_light)) => part::scaled(even, of_heavy)
                .saturating_add(part::scaled(miss, of_heavy.max(of_light)))
                .saturating_add(1),
            _ => even + miss,
        }
    }

    #[inline(always)]
    fn site(&self, slot: usize, rank: usize) -> usize {
        slot * self.stride + rank
    }

    #[inline(always)]
    fn flip(&mut self, rank: usize, expert: usize) {
        self.hosts[expert * self.num_words + rank / 64] ^= 1 << (rank % 64);
    }

    #[inline(always)]
    fn each_host(&self, expert: usize, mut visit: impl FnMut(usize)) {
        let words = &self.hosts[expert * self.num_words..(expert + 1) * self.num_words];
        for (index, &word) in words.iter().enumerate() {
            let mut word = word;
            while word != 0 {
                visit(index * 64 + word.trailing_zeros() as usize);
                word &= word - 1;
            }
        }
    }

    /// The first slot of a rank whose expert another rank lacks.
    pub(crate) fn slot_that_fits(&self, from: usize, to: usize) -> Option<usize> {
        (0..self.filled[from] as usize)
            .find(|&slot| !self.holds(to, self.expert[self.site(slot, from)] as usize))
    }

    /// Makes all replicas of an expert carry a share.
    #[inline(always)]
    fn reshare(&mut self, expert: usize, share: i32) {
        for word in 0..self.num_words {
            let mut hosts = self.hosts[expert * self.num_words + word];
            while hosts != 0 {
                let host = word * 64 + hosts.trailing_zeros() as usize;
                hosts &= hosts - 1;
                if let Some(slot) = self.slot_of(host, expert) {
                    let site = self.site(slot, host);
                    self.load[host] += share - self.share[site];
                    self.share[site] = share;
                }
            }
        }
    }

    /// Puts a replica on a rank with a free slot.
    #[inline(always)]
    pub(crate) fn push(&mut self, rank: usize, expert: usize, share: i32) {
        let site = self.site(self.filled[rank] as usize, rank);
        self.filled[rank] += 1;
        self.share[site] = share;
        self.expert[site] = expert as u32;
        self.load[rank] += share;
        self.flip(rank, expert);
        self.count[expert] += 1;
    }

    /// Puts another replica in a slot; returns the expert and the share that were there.
    pub(crate) fn replace(
        &mut self,
        rank: usize,
        slot: usize,
        expert: usize,
        share: i32,
    ) -> (usize, i32) {
        let site = self.site(slot, rank);
        let old = (self.expert[site] as usize, self.share[site]);
        self.share[site] = share;
        self.expert[site] = expert as u32;
        self.load[rank] += share - old.1;
        self.flip(rank, old.0);
        self.flip(rank, expert);
        self.count[old.0] -= 1;
        self.count[expert] += 1;
        old
    }

    /// Gives the slot of one expert to another that the rank lacks; the other replicas of both
    /// then carry what `share` says.
    #[inline(always)]
    pub(crate) fn recount(
        &mut self,
        rank: usize,
        slot: usize,
        expert: usize,
        share: impl Fn(usize, u32) -> i32,
    ) {
        let (old, _) = self.replace(rank, slot, expert, 0);
        for expert in [old, expert] {
            self.reshare(expert, share(expert, self.count[expert]));
        }
    }

    /// The longest that any rank takes whose load [`recount`](Self::recount) adds to.
    #[inline(always)]
    pub(crate) fn level_after_recount(
        &self,
        rank: usize,
        slot: usize,
        expert: usize,
        share: impl Fn(usize, u32) -> i32,
    ) -> i32 {
        let site = self.site(slot, rank);
        let old = self.expert[site] as usize;
        let more = share(old, self.count[old] - 1) - self.share[site];
        let taken = share(expert, self.count[expert] + 1);
        let mut level = self.time(rank, self.load[rank] - self.share[site] + taken);
        self.each_host(old, |host| {
            if host != rank {
                level = level.max(self.time(host, self.load[host] + more));
            }
        });
        level
    }

    /// The slot of a rank that holds an expert.
    #[inline(always)]
    pub(crate) fn slot_of(&self, rank: usize, expert: usize) -> Option<usize> {
        (0..self.filled[rank] as usize)
            .find(|&slot| self.expert[self.site(slot, rank)] == expert as u32)
    }

    /// The expert in a slot that is filled.
    #[inline(always)]
    pub(crate) fn expert_in(&self, rank: usize, slot: usize) -> usize {
        self.expert[self.site(slot, rank)] as usize
    }

    /// How many slots of a rank are filled.
    #[inline(always)]
    pub(crate) fn filled(&self, rank: usize) -> usize {
        self.filled[rank] as usize
    }

    /// How many replicas an expert has.
    #[inline(always)]
    pub(crate) fn count(&self, expert: usize) -> u32 {
        self.count[expert]
    }

    /// Exchanges two replicas.
    #[inline(always)]
    pub(crate) fn apply(&mut self, swap: &Swap) {
        let (heavy, light) = (swap.heavy.0, swap.light.0);
        let a = self.site(swap.heavy.1, heavy);
        let b = self.site(swap.light.1, light);
        let difference = self.share[a] - self.share[b];
        self.share.swap(a, b);
        self.expert.swap(a, b);
        self.load[heavy] -= difference;
        self.load[light] += difference;
        for expert in [self.expert[a] as usize, self.expert[b] as usize] {
            self.flip(heavy, expert);
            self.flip(light, expert);
        }
    }

    /// The exchange of one replica of the heaviest rank for one of another that leaves the
    /// heavier of the two lightest, if that is lighter than the rank is now.
    ///
    /// Moving a share of `x` from a rank of load `H` for one of `y` from a rank of load `P` leaves
    /// at most `(H + P) / 2 + |x - y - (H - P) / 2|`, rounded up.
    #[inline(always)]
    pub(crate) fn best_swap(&self, heavy: usize, scratch: &mut Scratch) -> Option<Swap> {
        let level = self.time(heavy, self.load[heavy]);
        let even = self.slowness.is_empty();
        scratch.ours.clear();
        for slot in 0..self.filled[heavy] as usize {
            scratch.ours.push(self.share[self.site(slot, heavy)]);
        }
        scratch.half.resize(self.stride, 0);
        if even {
            for (half, &load) in scratch.half.iter_mut().zip(&self.load) {
                *half = (level - load) >> 1;
            }
        } else {
            for (light, half) in scratch.half[..self.num_ranks].iter_mut().enumerate() {
                *half = self.half(heavy, light);
            }
        }
        renew(&mut scratch.miss, self.stride, BARRED);
        scratch.goal.resize(self.stride, 0);
        for row in self.share.chunks_exact(self.stride) {
            for ((goal, &share), &half) in scratch.goal.iter_mut().zip(row).zip(&scratch.half) {
                *goal = share + half;
            }
            rows::nearest(&scratch.ours, &scratch.goal, &mut scratch.miss);
        }
        // What the heavier of the two would carry.
        if even {
            for (miss, &half) in scratch.miss.iter_mut().zip(&scratch.half) {
                *miss += level - half;
            }
        } else {
            for light in 0..self.num_ranks {
                let miss = scratch.miss[light];
                scratch.miss[light] = self.level(heavy, light, scratch.half[light], miss);
            }
        }
        scratch.miss[self.num_ranks..].fill(i32::MAX);
        scratch.miss[heavy] = i32::MAX;
        loop {
            let (light, after) = rows::argmin(&scratch.miss);
            if after >= level {
                return None;
            }
            // Where both hold an expert, its replicas stay where they are.
            self.list_singles(heavy, light, &mut scratch.ours, &mut scratch.our_slots);
            self.list_singles(light, heavy, &mut scratch.theirs, &mut scratch.their_slots);
            let half = scratch.half[light];
            let (near, ours, theirs) = nearest_listed(half, scratch);
            let exact = self.level(heavy, light, half, near);
            if exact == after {
                return Some(Swap {
                    heavy: (heavy, ours.0 as usize),
                    light: (light, theirs.0 as usize),
                });
            }
            scratch.miss[light] = exact;
        }
    }

    /// An exchange of two replicas of the heaviest rank for two of a light one that leaves the
    /// heavier of the two lighter than the rank is now; of the first of the lightest ranks that
    /// has one, the best.
    #[inline(always)]
    pub(crate) fn best_double_swap(
        &self,
        heavy: usize,
        partners: usize,
        scratch: &mut Scratch,
    ) -> Option<[Swap; 2]> {
        let level = self.time(heavy, self.load[heavy]);
        scratch.miss.clear();
        let loads = self.load.iter().enumerate().take(self.num_ranks);
        scratch
            .miss
            .extend(loads.map(|(rank, &load)| self.time(rank, load)));
        for _ in 0..partners {
            let (light, light_level) = rows::argmin(&scratch.miss);
            if light_level >= level {
                return None;
            }
            scratch.miss[light] = i32::MAX;
            let half = self.half(heavy, light);
            self.list_pairs(heavy, light, &mut scratch.ours, &mut scratch.our_slots);
            self.list_pairs(light, heavy, &mut scratch.theirs, &mut scratch.their_slots);
            let (near, ours, theirs) = nearest_listed(half, scratch);
            if near >= BARRED || self.level(heavy, light, half, near) >= level {
                continue;
            }
            let swap = |ours: u32, theirs: u32| Swap {
                heavy: (heavy, ours as usize),
                light: (light, theirs as usize),
            };
            return Some([swap(ours.0, theirs.0), swap(ours.1, theirs.1)]);
        }
        None
    }

    /// Lists the replicas of a rank that another may take: their shares and slots.
    #[inline(always)]
    fn list_singles(
        &self,
        rank: usize,
        other: usize,
        shares: &mut Vec<i32>,
        slots: &mut Vec<(u32, u32)>,
    ) {
        shares.clear();
        slots.clear();
        for slot in 0..self.filled[rank] as usize {
            if self.may_move(slot, rank, other) {
                shares.push(self.share[self.site(slot, rank)]);
                slots.push((slot as u32, 0));
            }
        }
    }

    /// Lists all pairs of replicas of a rank that another may take: their shares and slots.
    #[inline(always)]
    fn list_pairs(
        &self,
        rank: usize,
        other: usize,
        shares: &mut Vec<i32>,
        slots: &mut Vec<(u32, u32)>,
    ) {
        shares.clear();
        slots.clear();
        let filled = self.filled[rank] as usize;
        for first in (0..filled).filter(|&slot| self.may_move(slot, rank, other)) {
            let share = self.share[self.site(first, rank)];
            for second in (first + 1..filled).filter(|&slot| self.may_move(slot, rank, other)) {
                shares.push(share + self.share[self.site(second, rank)]);
                slots.push((first as u32, second as u32));
            }
        }
    }

    /// Whether a rank lacks the expert in a slot of another.
    #[inline(always)]
    fn may_move(&self, slot: usize, from: usize, to: usize) -> bool {
        let expert = self.expert[self.site(slot, from)] as usize;
        self.count[expert] == 1 || !self.holds(to, expert)
    }
}

/// Of what is listed, what comes nearest to differing by `half`, and how near.
#[inline(always)]
fn nearest_listed(half: i32, scratch: &mut Scratch) -> (i32, (u32, u32), (u32, u32)) {
    let Scratch {
        goal,
        ours,
        our_slots,
        theirs,
        their_slots,
        ..
    } = scratch;
    for share in &mut *theirs {
        *share += half;
    }
    renew(goal, theirs.len(), BARRED);
    rows::nearest(ours, theirs, goal);
    let (pair, near) = rows::argmin(goal);
    let found = ours.iter().position(|&share| {
        theirs
            .get(pair)
            .is_some_and(|goal| (share - goal).abs() == near)
    });
    match found {
        Some(index) => (near, our_slots[index], their_slots[pair]),
        None => (BARRED, (0, 0), (0, 0)),
    }
}

/// Makes a vector that many copies of a value.
#[inline(always)]
fn renew<T: Copy>(vector: &mut Vec<T>, length: usize, value: T) {
    vector.clear();
    vector.resize(length, value);
}

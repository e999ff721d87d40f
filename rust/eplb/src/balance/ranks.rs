//! A placement of one layer while it is being improved: what each rank holds, slot by slot.

use super::part::{self, Part};
use super::rows::LANES;

/// All loads of a layer together come to at most this.
pub(crate) const WHOLE: i32 = 1 << 29;

/// The share of a site that no search picks: one without a replica, or one that may not be
/// exchanged. It is further from any sum of shares than half of what any two ranks differ by, so
/// that an exchange for it never pays; and it and that half still fit an `i32`.
pub(crate) const BARRED: i32 = WHOLE + WHOLE / 2;

/// Stands in a site that holds no replica.
const NOBODY: u32 = u32::MAX;

/// Which experts each rank holds, and how much that makes it carry.
///
/// Loads are integers, at most [`WHOLE`] in all, so that sums are exact and order does not matter.
/// A *site* is one slot of one rank; the slots of a rank are a row of whole vectors.
#[derive(Debug, Default, Clone)]
pub(crate) struct Ranks {
    num_ranks: usize,
    /// How many sites the row of a rank has: the most slots of any, and padding.
    width: usize,
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

impl Ranks {
    /// Empties the table, for the ranks of a part.
    #[inline(always)]
    pub(crate) fn reset(&mut self, part: &Part, num_experts: usize) {
        let slots_of = &part.slots_of;
        self.num_ranks = slots_of.len();
        let most = slots_of.iter().copied().max().unwrap_or(0) as usize;
        self.width = most.next_multiple_of(LANES);
        self.num_words = self.num_ranks.div_ceil(64);
        self.slots_of.clear();
        self.slots_of.extend_from_slice(slots_of);
        renew(&mut self.filled, self.num_ranks, 0);
        renew(&mut self.share, self.num_ranks * self.width, BARRED);
        renew(&mut self.expert, self.num_ranks * self.width, NOBODY);
        renew(&mut self.load, self.num_ranks, 0);
        renew(&mut self.hosts, num_experts * self.num_words, 0);
        renew(&mut self.count, num_experts, 0);
        self.slowness.clear();
        self.slowness.extend_from_slice(part.slowness());
    }

    /// Has room for a copy of another table.
    pub(crate) fn reserve_for(&mut self, other: &Self) {
        let missing = other.share.len().saturating_sub(self.share.len());
        if missing > 0 || self.hosts.len() < other.hosts.len() {
            self.copy_from(other);
        }
    }

    /// Becomes a copy of another table, in the memory that is there.
    #[inline(always)]
    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.num_ranks = other.num_ranks;
        self.width = other.width;
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

    pub(crate) fn num_experts(&self) -> usize {
        self.count.len()
    }

    /// How many words of bits the ranks take.
    pub(crate) fn num_words(&self) -> usize {
        self.num_words
    }

    /// How many sites the row of a rank has.
    #[inline(always)]
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// The experts of a rank, and what pads them.
    #[inline(always)]
    pub(crate) fn experts_in_row(&self, rank: usize) -> &[u32] {
        &self.expert[rank * self.width..][..self.width]
    }

    /// Bits of the ranks that hold an expert.
    #[inline(always)]
    pub(crate) fn hosts_of(&self, expert: usize) -> &[u64] {
        &self.hosts[expert * self.num_words..][..self.num_words]
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
        (0..self.num_ranks)
            .map(|rank| (rank, self.time(rank, self.load[rank])))
            .max_by_key(|&(rank, time)| (time, std::cmp::Reverse(rank)))
            .unwrap_or_default()
    }

    /// Whether all ranks are equally fast.
    #[inline(always)]
    pub(crate) fn is_even(&self) -> bool {
        self.slowness.is_empty()
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
    pub(crate) fn half(&self, heavy: usize, light: usize) -> i32 {
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
    pub(crate) fn level(&self, heavy: usize, light: usize, half: i32, miss: i32) -> i32 {
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
        rank * self.width + slot
    }

    /// The shares of a rank, by slot.
    #[inline(always)]
    pub(crate) fn shares_of(&self, rank: usize) -> &[i32] {
        &self.share[rank * self.width..][..self.filled[rank] as usize]
    }

    /// The shares of a rank, and what pads them.
    #[inline(always)]
    pub(crate) fn row(&self, rank: usize) -> &[i32] {
        &self.share[rank * self.width..][..self.width]
    }

    #[inline(always)]
    fn flip(&mut self, rank: usize, expert: usize) {
        self.hosts[expert * self.num_words + rank / 64] ^= 1 << (rank % 64);
    }

    #[inline(always)]
    pub(crate) fn each_host(&self, expert: usize, mut visit: impl FnMut(usize)) {
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
    pub(crate) fn reshare(&mut self, expert: usize, share: i32) {
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

    /// The share in a slot that is filled.
    #[inline(always)]
    pub(crate) fn share_in(&self, rank: usize, slot: usize) -> i32 {
        self.share[self.site(slot, rank)]
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

    /// Whether a rank lacks the expert in a slot of another.
    #[inline(always)]
    pub(crate) fn may_move(&self, slot: usize, from: usize, to: usize) -> bool {
        let expert = self.expert[self.site(slot, from)] as usize;
        match self.count.get(expert) {
            Some(&count) => count == 1 || !self.holds(to, expert),
            None => false,
        }
    }
}

/// Makes a vector that many copies of a value.
#[inline(always)]
fn renew<T: Copy>(vector: &mut Vec<T>, length: usize, value: T) {
    vector.clear();
    vector.resize(length, value);
}

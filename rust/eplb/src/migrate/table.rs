//! Who holds what in one layer while experts move: slot by slot, repeats included.
//!
//! A rank may hold an expert more than once. That takes no weight to be sent, and an expert's
//! tokens go to its slots in equal parts: so a slot given to an expert that the rank holds already
//! shifts load between ranks at no move, as does a slot taken from one.

use std::ops::Range;

use super::price::Price;
use super::rows::ROW;
use crate::balance::{WHOLE, share};
use crate::topology::Topology;

/// The share of a site that no exchange picks: further from any sum of shares than half of what
/// any two ranks differ by.
pub(crate) const BARRED: i32 = WHOLE + WHOLE / 2;

/// Stands in a site that holds no replica.
pub(crate) const NOBODY: u32 = u32::MAX;

/// The load of lanes beyond the last rank.
const NO_RANK: i32 = -1;

/// What loads are scaled to: a little less than [`WHOLE`], for what rounding adds.
const TOTAL: f64 = (WHOLE - (1 << 21)) as f64;

/// Binary digits of [`Ranks::slowness`] after the point.
const SLOWNESS_BITS: u32 = 20;

/// The ranks that are not dead, which all layers have in common.
#[derive(Debug, Default)]
pub(crate) struct Ranks {
    /// Their numbers in the topology.
    pub(crate) gpus: Vec<u32>,
    slots_of: Vec<u32>,
    /// How many times slower than the mean each is, fixed point.
    slowness: Vec<i64>,
    /// Experts move within an island: a node, where groups stay on theirs, else all there is.
    island_of: Vec<u32>,
    num_islands: usize,
    /// How many experts are in a group, where groups stay on their node.
    group_size: Option<usize>,
    /// What is paid for tokens that cross between nodes, if anything.
    price: Option<Price>,
    stride: usize,
    num_slots: usize,
    num_words: usize,
}

impl Ranks {
    /// Takes the ranks; experts of a group stay on their node where a size of groups is given.
    pub(crate) fn set(&mut self, topology: &Topology, group_size: Option<usize>) {
        self.price = None;
        self.gpus.clear();
        self.slots_of.clear();
        self.slowness.clear();
        self.island_of.clear();
        let speeds = topology.live_gpus().map(|(.., speed)| speed);
        let mean = speeds.sum::<f64>() / topology.num_live_gpus().max(1) as f64;
        for (gpu, slots, speed) in topology.live_gpus() {
            self.gpus.push(gpu as u32);
            self.slots_of.push(slots as u32);
            let one = f64::from(1u32 << SLOWNESS_BITS);
            self.slowness.push((mean / speed * one).round() as i64);
            let node = topology.node_of(gpu) as u32;
            let island = group_size.map_or(0, |_| node);
            self.island_of.push(island);
        }
        self.group_size = group_size;
        self.num_islands = group_size.map_or(1, |_| topology.num_nodes());
        self.stride = self.gpus.len().next_multiple_of(ROW);
        self.num_slots = self.slots_of.iter().copied().max().unwrap_or(0) as usize;
        self.num_words = self.gpus.len().div_ceil(64);
    }

    /// Lets groups of so many experts leave their node at a cost for each token that crosses.
    pub(crate) fn set_price(&mut self, topology: &Topology, group_size: usize, cost: f64) {
        let nodes = self.gpus.iter().map(|&gpu| topology.node_of(gpu as usize));
        self.price = Some(Price {
            cost: cost / self.len().max(1) as f64,
            group_size,
            num_nodes: topology.num_nodes(),
            node_of: nodes.map(|node| node as u32).collect(),
        });
    }

    /// What is paid for tokens that cross between nodes, if anything.
    pub(crate) fn price(&self) -> Option<&Price> {
        self.price.as_ref()
    }

    /// Lets no rank give experts to one of another node.
    pub(crate) fn confine(&mut self, topology: &Topology) {
        let nodes = self
            .gpus
            .iter()
            .map(|&gpu| topology.node_of(gpu as usize) as u32);
        self.island_of.clear();
        self.island_of.extend(nodes);
        self.num_islands = topology.num_nodes();
    }

    pub(crate) fn len(&self) -> usize {
        self.gpus.len()
    }

    /// How many slots all ranks have.
    pub(crate) fn num_slots(&self) -> usize {
        self.slots_of.iter().sum::<u32>() as usize
    }

    /// How many slots a rank has.
    #[inline(always)]
    pub(crate) fn slots(&self, rank: usize) -> Range<usize> {
        0..self.slots_of[rank] as usize
    }

    /// How long a rank takes for a load, in units of load of a rank of mean speed.
    #[inline(always)]
    pub(crate) fn time(&self, rank: usize, load: i32) -> i32 {
        let time = (i64::from(load) * self.slowness[rank]) >> SLOWNESS_BITS;
        time.min(i64::from(i32::MAX / 2)) as i32
    }

    /// The load for which a rank takes no longer than a time.
    #[inline(always)]
    pub(crate) fn load_in(&self, rank: usize, time: i32) -> i32 {
        let load = (i64::from(time) << SLOWNESS_BITS) / self.slowness[rank].max(1);
        load.min(i64::from(WHOLE)) as i32
    }

    /// How much a rank serves while one of mean speed serves 1.
    pub(crate) fn speed(&self, rank: usize) -> f64 {
        f64::from(1u32 << SLOWNESS_BITS) / self.slowness[rank].max(1) as f64
    }

    /// Whether experts may go from one rank to another.
    #[inline(always)]
    pub(crate) fn joined(&self, a: usize, b: usize) -> bool {
        self.island_of[a] == self.island_of[b]
    }

    /// Whether two ranks have as many slots and are as fast, so that either can do what the other does.
    pub(crate) fn are_alike(&self, a: usize, b: usize) -> bool {
        self.slots_of[a] == self.slots_of[b] && self.slowness[a] == self.slowness[b]
    }

    /// Whether each rank of an island has its like on another. Ranks of an island follow one another.
    pub(crate) fn islands_are_alike(&self, a: usize, b: usize) -> bool {
        let of =
            |island: usize| (0..self.len()).filter(move |&rank| self.island_of(rank) == island);
        let likes = |rank: usize, island: usize| {
            of(island)
                .filter(move |&other| self.are_alike(rank, other))
                .count()
        };
        of(a).count() == of(b).count() && of(a).all(|rank| likes(rank, a) == likes(rank, b))
    }

    /// How many words of bits the ranks take.
    pub(crate) fn num_words(&self) -> usize {
        self.num_words
    }

    pub(crate) fn num_islands(&self) -> usize {
        self.num_islands
    }

    pub(crate) fn group_size(&self) -> Option<usize> {
        self.group_size
    }

    pub(crate) fn island_of(&self, rank: usize) -> usize {
        self.island_of[rank] as usize
    }

    /// The mean load of a rank, in the units of a [`Table`].
    pub(crate) fn mean(&self) -> f64 {
        TOTAL / self.len().max(1) as f64
    }
}

/// The loads of experts in the integer units of a [`Table`]; returns how much load a unit is.
pub(crate) fn scale(load: &[f32], weight: &mut Vec<i32>) -> f64 {
    let total: f64 = load.iter().map(|&load| f64::from(load)).sum();
    let scale = if total > 0.0 { TOTAL / total } else { 0.0 };
    weight.clear();
    weight.extend(
        load.iter()
            .map(|&load| (f64::from(load) * scale).round() as i32),
    );
    total / TOTAL
}

/// One slot of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Site {
    pub(crate) rank: u32,
    pub(crate) slot: u32,
}

impl Site {
    #[inline(always)]
    pub(crate) fn new(rank: usize, slot: usize) -> Self {
        Self {
            rank: rank as u32,
            slot: slot as u32,
        }
    }

    #[inline(always)]
    pub(crate) fn rank(self) -> usize {
        self.rank as usize
    }
}

/// Which experts each rank holds, and how much that makes it carry. The first slots of all ranks
/// come first, then the second.
#[derive(Debug, Default)]
pub(crate) struct Table {
    stride: usize,
    num_slots: usize,
    num_words: usize,
    /// What a replica carries that may be exchanged; [`BARRED`] for any other site.
    pub(crate) share: Vec<i32>,
    expert: Vec<u32>,
    /// The load of each rank.
    pub(crate) load: Vec<i32>,
    /// Bits of the ranks that hold each expert.
    hosts: Vec<u64>,
    /// How many slots each expert has.
    count: Vec<u32>,
    /// Whether a rank holds the expert more than once.
    repeated: Vec<bool>,
    /// The sites whose expert has others, in order.
    shared: Vec<Site>,
}

impl Table {
    /// Takes over what a row of slots holds. Slots of nobody stay empty, as do, unless `repeats`
    /// are wanted, those that repeat an expert of their rank.
    pub(crate) fn take(
        &mut self,
        ranks: &Ranks,
        weight: &[i32],
        topology: &Topology,
        row: &[i64],
        repeats: bool,
    ) {
        self.stride = ranks.stride;
        self.num_slots = ranks.num_slots;
        self.num_words = ranks.num_words;
        let sites = self.num_slots * self.stride;
        renew(&mut self.share, sites, BARRED);
        renew(&mut self.expert, sites, NOBODY);
        renew(&mut self.load, self.stride, NO_RANK);
        self.load[..ranks.len()].fill(0);
        renew(&mut self.hosts, weight.len() * self.num_words, 0);
        renew(&mut self.count, weight.len(), 0);
        renew(&mut self.repeated, weight.len(), false);
        for (rank, &gpu) in ranks.gpus.iter().enumerate() {
            for (slot, &expert) in row[topology.slots_of(gpu as usize)].iter().enumerate() {
                let Ok(expert) = usize::try_from(expert) else {
                    continue;
                };
                if self.holds(rank, expert) {
                    if !repeats {
                        continue;
                    }
                    self.repeated[expert] = true;
                } else {
                    self.flip(rank, expert);
                }
                let index = self.index(Site::new(rank, slot));
                self.expert[index] = expert as u32;
                self.count[expert] += 1;
            }
        }
        self.shared.clear();
        for rank in 0..ranks.len() {
            for slot in ranks.slots(rank) {
                let site = Site::new(rank, slot);
                let index = self.index(site);
                if let Some(expert) = self.expert_at(index) {
                    if self.count[expert] > 1 {
                        self.shared.push(site);
                    }
                    let share = share(weight[expert], self.count[expert]);
                    self.load[rank] += share;
                    if self.times(rank, expert) == 1 {
                        self.share[index] = share;
                    }
                }
            }
        }
    }

    /// Becomes a copy of another table, in the memory that is there.
    #[inline(always)]
    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.stride = other.stride;
        self.num_slots = other.num_slots;
        self.num_words = other.num_words;
        self.share.clone_from(&other.share);
        self.expert.clone_from(&other.expert);
        self.load.clone_from(&other.load);
        self.hosts.clone_from(&other.hosts);
        self.count.clone_from(&other.count);
        self.repeated.clone_from(&other.repeated);
        self.shared.clone_from(&other.shared);
    }

    /// The sites whose expert has others, in order.
    #[inline(always)]
    pub(crate) fn shared(&self) -> &[Site] {
        &self.shared
    }

    /// Bits of the ranks that hold each expert.
    pub(crate) fn hosts(&self) -> &[u64] {
        &self.hosts
    }

    /// Whether a rank is among such bits of an expert.
    #[inline(always)]
    pub(crate) fn is_host(&self, hosts: &[u64], rank: usize, expert: usize) -> bool {
        hosts[expert * self.num_words + rank / 64] >> (rank % 64) & 1 != 0
    }

    /// Whether a rank holds an expert.
    #[inline(always)]
    pub(crate) fn holds(&self, rank: usize, expert: usize) -> bool {
        self.is_host(&self.hosts, rank, expert)
    }

    /// How often a rank holds an expert.
    #[inline(always)]
    pub(crate) fn times(&self, rank: usize, expert: usize) -> i32 {
        if !self.repeated[expert] {
            return i32::from(self.holds(rank, expert));
        }
        let sites = self.expert.iter().skip(rank).step_by(self.stride);
        sites.filter(|&&other| other == expert as u32).count() as i32
    }

    /// How many slots an expert has.
    #[inline(always)]
    pub(crate) fn count(&self, expert: usize) -> u32 {
        self.count[expert]
    }

    /// The expert in a site, if there is one.
    #[inline(always)]
    pub(crate) fn expert_in(&self, site: Site) -> Option<usize> {
        self.expert_at(self.index(site))
    }

    /// What a replica carries that may be exchanged; [`BARRED`] for any other site.
    #[inline(always)]
    pub(crate) fn share_in(&self, site: Site) -> i32 {
        self.share[self.index(site)]
    }

    /// What a replica of an expert carries, whether it may be exchanged or not.
    #[inline(always)]
    pub(crate) fn carried_in(&self, site: Site, weight: &[i32], expert: usize) -> i32 {
        match self.share_in(site) {
            BARRED => share(weight[expert], self.count[expert]),
            carried => carried,
        }
    }

    #[inline(always)]
    fn expert_at(&self, index: usize) -> Option<usize> {
        let expert = self.expert[index];
        (expert != NOBODY).then_some(expert as usize)
    }

    #[inline(always)]
    fn index(&self, site: Site) -> usize {
        site.slot as usize * self.stride + site.rank as usize
    }

    #[inline(always)]
    fn flip(&mut self, rank: usize, expert: usize) {
        self.hosts[expert * self.num_words + rank / 64] ^= 1 << (rank % 64);
    }

    /// Visits the ranks that hold an expert, with how often each does.
    #[inline(always)]
    pub(crate) fn each_host(&self, expert: usize, mut visit: impl FnMut(usize, i32)) {
        // No closure within: those are compiled without the vectors that this is compiled for.
        for word in 0..self.num_words {
            let mut hosts = self.hosts[expert * self.num_words + word];
            while hosts != 0 {
                let rank = word * 64 + hosts.trailing_zeros() as usize;
                hosts &= hosts - 1;
                visit(rank, self.times(rank, expert));
            }
        }
    }

    /// The longest that any rank takes.
    #[inline(always)]
    pub(crate) fn level(&self, ranks: &Ranks) -> i32 {
        let times = (0..ranks.len()).map(|rank| ranks.time(rank, self.load[rank]));
        times.max().unwrap_or(0)
    }

    /// Exchanges two replicas, of experts that the other's rank lacks.
    #[inline(always)]
    pub(crate) fn exchange(&mut self, a: Site, b: Site) {
        let (at, bt) = (self.index(a), self.index(b));
        let difference = self.share[at] - self.share[bt];
        self.share.swap(at, bt);
        self.expert.swap(at, bt);
        self.load[a.rank()] -= difference;
        self.load[b.rank()] += difference;
        for (site, index) in [(a, at), (b, bt)] {
            if let Some(expert) = self.expert_at(index) {
                self.flip(a.rank(), expert);
                self.flip(b.rank(), expert);
                self.list(site, self.count[expert] > 1);
            }
        }
    }

    /// Lists a site among those whose expert has others, or does no longer.
    #[inline(always)]
    fn list(&mut self, site: Site, shared: bool) {
        match (self.shared.binary_search(&site), shared) {
            (Err(place), true) => self.shared.insert(place, site),
            (Ok(place), false) => drop(self.shared.remove(place)),
            _ => {}
        }
    }

    /// Gives a slot to an expert; what shares with it, or with the one that was there, then carries
    /// less, or more.
    #[inline(always)]
    pub(crate) fn give(&mut self, weight: &[i32], site: Site, expert: usize) {
        let (index, rank) = (self.index(site), site.rank());
        if let Some(old) = self.expert_at(index) {
            let before = share(weight[old], self.count[old]);
            self.load[rank] -= before;
            if self.times(rank, old) == 1 {
                self.flip(rank, old);
            }
            self.expert[index] = NOBODY;
            self.share[index] = BARRED;
            self.count[old] -= 1;
            if self.count[old] > 0 {
                self.reshare(old, before, share(weight[old], self.count[old]));
            }
        }
        let before = share(weight[expert], self.count[expert].max(1));
        self.load[rank] += before;
        if !self.holds(rank, expert) {
            self.flip(rank, expert);
        }
        self.expert[index] = expert as u32;
        self.count[expert] += 1;
        self.reshare(expert, before, share(weight[expert], self.count[expert]));
    }

    /// Makes all replicas of an expert carry another share.
    #[inline(always)]
    fn reshare(&mut self, expert: usize, before: i32, after: i32) {
        self.repeated[expert] = false;
        for word in 0..self.num_words {
            let mut hosts = self.hosts[expert * self.num_words + word];
            while hosts != 0 {
                let rank = word * 64 + hosts.trailing_zeros() as usize;
                hosts &= hosts - 1;
                let mut times = 0;
                for slot in 0..self.num_slots {
                    let index = slot * self.stride + rank;
                    if self.expert[index] == expert as u32 {
                        times += 1;
                        self.share[index] = after;
                        self.list(Site::new(rank, slot), self.count[expert] > 1);
                    }
                }
                self.load[rank] += times * (after - before);
                if times > 1 {
                    self.repeated[expert] = true;
                    for slot in 0..self.num_slots {
                        let index = slot * self.stride + rank;
                        if self.expert[index] == expert as u32 {
                            self.share[index] = BARRED;
                        }
                    }
                }
            }
        }
    }
}

/// Visits the bits that are set, lowest first.
#[inline(always)]
pub(crate) fn each_bit(words: &[u64], mut visit: impl FnMut(usize)) {
    for (index, &word) in words.iter().enumerate() {
        let mut word = word;
        while word != 0 {
            visit(index * 64 + word.trailing_zeros() as usize);
            word &= word - 1;
        }
    }
}

/// Makes a vector that many copies of a value.
#[inline(always)]
pub(crate) fn renew<T: Copy>(vector: &mut Vec<T>, length: usize, value: T) {
    vector.clear();
    vector.resize(length, value);
}

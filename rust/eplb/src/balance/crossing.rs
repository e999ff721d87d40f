//! Groups that may leave their node at a price.
//!
//! From the placement that keeps every group on one node, its home, ranks exchange replicas until
//! the slowest takes no more than a level, and the level is lowered step by step. Each exchange is
//! the one that makes fewest tokens cross for the time it saves. What is kept is the placement, of
//! those on the way and the one that ignores groups, for which the time of the slowest rank and the
//! price of what crosses are least together.

use crate::placement::Replica;
use crate::topology::Topology;

/// In how many steps the level goes from that of the placement that keeps groups to the mean.
const LEVELS: u32 = 32;

/// How many exchanges a layer may take.
const MOST_SWAPS: u32 = 4096;

/// Stands for the home of a slot that holds nothing.
const NOWHERE: u32 = u32::MAX;

/// What a layer's placement is judged by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Price<'a> {
    pub(crate) topology: &'a Topology,
    pub(crate) load: &'a [f32],
    /// How many experts a group has.
    pub(crate) group_size: usize,
    /// What a token that crosses costs, in tokens of the rank it comes from.
    pub(crate) cost: f64,
}

/// Scratch of [`settle`].
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    count: Vec<u32>,
    /// The time of each rank; those of dead ones are 0.
    time: Vec<f64>,
    /// Time per load of each rank.
    slowness: Vec<f64>,
    /// What each slot carries, and the node where its expert is at home.
    share: Vec<f64>,
    home: Vec<u32>,
    /// The node of each rank.
    node_of: Vec<u32>,
    served: Vec<f64>,
    home_of_group: Vec<u32>,
    best: Vec<Replica>,
}

/// An exchange of the replicas in two slots, and what it does.
#[derive(Debug, Clone, Copy)]
struct Swap {
    ours: usize,
    theirs: usize,
    rank: usize,
    /// The load that leaves the heavy rank.
    moved: f64,
    /// By how many tokens more cross.
    crossing: f64,
}

/// Turns a placement in which groups stay into the best there is at a price, `free` among them.
pub(crate) fn settle(
    price: &Price<'_>,
    slots: &mut [Replica],
    free: &[Replica],
    scratch: &mut Scratch,
) {
    let free_value = scratch.take(price, free);
    let mut best = scratch.take(price, slots);
    scratch.best.clear();
    scratch.best.extend_from_slice(slots);
    let live = price.topology.num_live_gpus() as f64;
    let start = scratch.time.iter().copied().fold(0.0, f64::max);
    let mean = price.mean();
    let mut crossing = 0.0;
    let mut swaps = 0;
    'levels: for step in 1..=LEVELS {
        let level = start - (start - mean) * f64::from(step) / f64::from(LEVELS);
        loop {
            let (heavy, time) = scratch.slowest();
            if time <= level {
                break;
            }
            let Some(swap) = scratch.best_swap(price, slots, heavy, level) else {
                break 'levels;
            };
            if swaps == MOST_SWAPS {
                break 'levels;
            }
            swaps += 1;
            slots.swap(swap.ours, swap.theirs);
            scratch.share.swap(swap.ours, swap.theirs);
            scratch.home.swap(swap.ours, swap.theirs);
            scratch.time[heavy] -= swap.moved * scratch.slowness[heavy];
            scratch.time[swap.rank] += swap.moved * scratch.slowness[swap.rank];
            crossing += swap.crossing;
        }
        let value = scratch.slowest().1 + price.cost * crossing / live;
        if value < best {
            best = value;
            scratch.best.copy_from_slice(slots);
        }
        if price.cost * crossing / live + mean > best {
            break;
        }
    }
    slots.copy_from_slice(if free_value < best {
        free
    } else {
        &scratch.best
    });
    scratch.number(slots);
}

impl Price<'_> {
    /// The mean time of a rank.
    fn mean(&self) -> f64 {
        let total: f64 = self.load.iter().map(|&load| f64::from(load)).sum();
        total / self.topology.num_live_gpus() as f64
    }
}

impl Scratch {
    /// Takes a placement: times, counts and the home of each group. Returns what it is worth.
    fn take(&mut self, price: &Price<'_>, slots: &[Replica]) -> f64 {
        let topology = price.topology;
        let live = topology.num_live_gpus() as f64;
        let mean_speed = topology.live_gpus().map(|(.., speed)| speed).sum::<f64>() / live;
        self.count.clear();
        self.count.resize(price.load.len(), 0);
        for replica in slots.iter().filter(|&&replica| replica != Replica::NONE) {
            self.count[replica.expert as usize] += 1;
        }
        self.slowness.clear();
        self.time.clear();
        self.node_of.clear();
        self.share.clear();
        self.served.clear();
        let num_groups = price.load.len() / price.group_size;
        self.served.resize(num_groups * topology.num_nodes(), 0.0);
        for gpu in 0..topology.num_gpus() {
            let node = topology.node_of(gpu);
            let mut load = 0.0;
            for &replica in &slots[topology.slots_of(gpu)] {
                let share = self.share_of(price, replica);
                load += share;
                self.share.push(share);
                if replica != Replica::NONE {
                    let group = replica.expert as usize / price.group_size;
                    self.served[group * topology.num_nodes() + node] += share;
                }
            }
            let slowness = mean_speed / topology.speed(gpu);
            self.slowness.push(slowness);
            self.time.push(load * slowness);
            self.node_of.push(node as u32);
        }
        self.home_of_group.clear();
        let mut crossing = 0.0;
        for served in self.served.chunks_exact(topology.num_nodes()) {
            let most = served.iter().copied().fold(0.0, f64::max);
            let home = served.iter().position(|&served| served == most);
            crossing += served.iter().sum::<f64>() - most;
            self.home_of_group.push(home.unwrap_or(0) as u32);
        }
        self.home.clear();
        self.home.extend(slots.iter().map(|replica| {
            let group = replica.expert as usize / price.group_size;
            let home = self.home_of_group.get(group);
            home.copied().unwrap_or(NOWHERE)
        }));
        self.slowest().1 + price.cost * crossing / live
    }

    fn share_of(&self, price: &Price<'_>, replica: Replica) -> f64 {
        match price.load.get(replica.expert as usize) {
            Some(&load) => f64::from(load) / f64::from(self.count[replica.expert as usize]),
            None => 0.0,
        }
    }

    fn slowest(&self) -> (usize, f64) {
        let mut slowest = (0, 0.0);
        for (rank, &time) in self.time.iter().enumerate() {
            if time > slowest.1 {
                slowest = (rank, time);
            }
        }
        slowest
    }

    /// The exchange that brings the heavy rank nearer to a level, leaves the other at most at it,
    /// and makes fewest tokens cross for what it brings; ties to what brings most.
    fn best_swap(
        &self,
        price: &Price<'_>,
        slots: &[Replica],
        heavy: usize,
        level: f64,
    ) -> Option<Swap> {
        let topology = price.topology;
        let wanted = (self.time[heavy] - level) / self.slowness[heavy];
        let crosses = |slot: usize, rank: usize| {
            if self.home[slot] == self.node_of[rank] {
                0.0
            } else {
                self.share[slot]
            }
        };
        let mut best: Option<(f64, Swap)> = None;
        for ours in topology.slots_of(heavy) {
            let staying = crosses(ours, heavy);
            for rank in (0..topology.num_gpus()).filter(|&rank| rank != heavy) {
                let room = (level - self.time[rank]) / self.slowness[rank];
                if topology.is_dead(rank) || room <= 0.0 {
                    continue;
                }
                let leaving = crosses(ours, rank) - staying;
                for theirs in topology.slots_of(rank) {
                    let moved = self.share[ours] - self.share[theirs];
                    if moved <= 0.0 || moved > room {
                        continue;
                    }
                    let crossing = leaving + crosses(theirs, heavy) - crosses(theirs, rank);
                    let brought = moved.min(wanted);
                    let better = |best: &(f64, Swap)| {
                        let (cost, of_best) = (crossing * best.0, best.1.crossing * brought);
                        cost < of_best || cost == of_best && brought > best.0
                    };
                    if best.as_ref().is_none_or(better)
                        && !holds(&slots[topology.slots_of(rank)], slots[ours])
                        && !holds(&slots[topology.slots_of(heavy)], slots[theirs])
                    {
                        let swap = Swap {
                            ours,
                            theirs,
                            rank,
                            moved,
                            crossing,
                        };
                        best = Some((brought, swap));
                    }
                }
            }
        }
        best.map(|(_, swap)| swap)
    }

    /// Numbers the replicas of each expert by slot.
    fn number(&mut self, slots: &mut [Replica]) {
        self.count.fill(0);
        for replica in slots
            .iter_mut()
            .filter(|replica| **replica != Replica::NONE)
        {
            let count = &mut self.count[replica.expert as usize];
            replica.number = *count;
            *count += 1;
        }
    }
}

fn holds(slots: &[Replica], replica: Replica) -> bool {
    slots.iter().any(|other| other.expert == replica.expert)
}

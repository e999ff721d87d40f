//! Which node each group of experts goes to, where groups stay on one node.
//!
//! What a node takes at least is known before its ranks are filled: its load over the speed of its
//! ranks, and the least largest share that its slots allow, since an expert may be too hot for the
//! copies there is room for. At a level, each group so needs load and slots, and each node offers
//! some of both. Branch and bound looks for an assignment below the level of the best so far until
//! there is none: the best is then exactly that. Where it would take too many steps, the best found
//! stays, and the bound is a simpler one.

use std::collections::BinaryHeap;

use crate::bound::least_largest_share;
use crate::topology::Topology;

/// How many groups are put on nodes, over all assignments looked at. Eight groups on four nodes take
/// a few hundred.
const MOST_STEPS: u32 = 5_000;

/// With more groups than this, those that fit no better are not put elsewhere.
const MOST_GROUPS: usize = 256;

/// By how much, in parts of the level, an assignment has to be better.
const BETTER: f64 = 1e-9;

/// What a node offers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Node {
    num_ranks: usize,
    slots: usize,
    /// How much load its ranks serve together, and the fastest of them, in the same time.
    speed: f64,
    fastest: f64,
}

impl Node {
    fn of(topology: &Topology, node: usize) -> Self {
        let mut offers = Self::default();
        for gpu in topology.gpus_of(node) {
            if !topology.is_dead(gpu) {
                offers.num_ranks += 1;
                offers.slots += topology.slots_of(gpu).len();
                offers.speed += topology.speed(gpu);
                offers.fastest = offers.fastest.max(topology.speed(gpu));
            }
        }
        offers
    }

    /// How many slots a group takes at a level; `None` if one of its experts is too hot for all
    /// ranks of the node together.
    fn slots_for(&self, group: &[f32], level: f64) -> Option<usize> {
        let most = level * self.fastest;
        let mut slots = group.len();
        for &load in group {
            let load = f64::from(load);
            if load > most {
                let count = (load / most).ceil();
                if count > self.num_ranks as f64 {
                    return None;
                }
                slots += count as usize - 1;
            }
        }
        Some(slots)
    }
}

/// The node of each group of a layer, and its scratch.
#[derive(Debug, Default)]
pub(crate) struct Assignment {
    nodes: Vec<Node>,
    /// How many experts a group has.
    size: usize,
    group_load: Vec<f64>,
    /// Groups, heaviest first.
    order: Vec<u32>,
    /// Slots that each group takes on each node at the level in force, `[groups, nodes]`; the
    /// largest integer where it cannot be there.
    need: Vec<usize>,
    load: Vec<f64>,
    slots: Vec<usize>,
    trial: Vec<u32>,
    best: Vec<u32>,
    level: f64,
    steps: u32,
    proved: bool,
    floor: f64,
    experts: Vec<f32>,
    heap: BinaryHeap<(u64, u32, usize)>,
}

impl Assignment {
    /// Assigns the groups of a layer so that the slowest node is as fast as can be; ties to the
    /// first assignment found. There is one if the nodes have room for all groups.
    pub(crate) fn assign(&mut self, topology: &Topology, num_groups: usize, load: &[f32]) {
        let size = load.len() / num_groups;
        self.size = size;
        self.nodes.clear();
        let nodes = (0..topology.num_nodes()).map(|node| Node::of(topology, node));
        self.nodes.extend(nodes);
        self.group_load.clear();
        let sum = |group: &[f32]| group.iter().map(|&load| f64::from(load)).sum::<f64>();
        self.group_load.extend(load.chunks_exact(size).map(sum));
        self.order.clear();
        self.order.extend(0..num_groups as u32);
        let group_load = &self.group_load;
        self.order.sort_unstable_by(|&a, &b| {
            let by_load = group_load[b as usize].total_cmp(&group_load[a as usize]);
            by_load.then(a.cmp(&b))
        });
        self.best.clear();
        self.best.resize(num_groups, 0);
        self.trial.clear();
        self.trial.resize(num_groups, 0);
        self.level = f64::INFINITY;
        self.steps = 0;
        self.floor = self.floor(load, size);
        self.proved = false;
        loop {
            self.start(load, size);
            if !self.place(0) {
                self.proved = self.steps < MOST_STEPS && num_groups <= MOST_GROUPS;
                return;
            }
            self.best.copy_from_slice(&self.trial);
            self.level = self.level_of_best(load, size);
            if self.level <= self.floor * (1.0 + BETTER) || self.steps >= MOST_STEPS {
                return;
            }
        }
    }

    /// The node of each group.
    pub(crate) fn node_of(&self) -> &[u32] {
        &self.best
    }

    /// How far above its mean a node's ranks may be and still take less than the slowest node.
    pub(crate) fn slack_of(&self, node: usize) -> f64 {
        let groups = self.group_load.iter().zip(&self.best);
        let here = groups.filter(|&(_, &home)| home as usize == node);
        let time = here.map(|(load, _)| load).sum::<f64>() / self.nodes[node].speed;
        if time > 0.0 {
            (self.level / time - 1.0).max(0.0)
        } else {
            0.0
        }
    }

    /// What the slowest node takes at least, whatever the assignment.
    pub(crate) fn bound(&self) -> f64 {
        if self.proved {
            self.floor.max(self.level * (1.0 - BETTER))
        } else {
            self.floor
        }
    }

    /// What groups need at a level just below the best; no group is anywhere yet.
    fn start(&mut self, load: &[f32], size: usize) {
        let level = self.level * (1.0 - BETTER);
        self.need.clear();
        for group in load.chunks_exact(size) {
            for (index, node) in self.nodes.iter().enumerate() {
                let need = match self.nodes[..index].iter().rposition(|twin| twin == node) {
                    Some(twin) => self.need[self.need.len() - index + twin],
                    None => node.slots_for(group, level).unwrap_or(usize::MAX),
                };
                self.need.push(need);
            }
        }
        self.load.clear();
        self.load.resize(self.nodes.len(), 0.0);
        self.slots.clear();
        self.slots.extend(self.nodes.iter().map(|node| node.slots));
    }

    /// Places the groups from the `depth`th on, so that all nodes stay below the best level; false
    /// if that is impossible or takes too many steps. Deep as there are groups, at most.
    fn place(&mut self, depth: usize) -> bool {
        let Some(&group) = self.order.get(depth) else {
            return true;
        };
        let group = group as usize;
        let more = self.group_load[group];
        let most = self.level * (1.0 - BETTER);
        // No node stays empty that need not.
        let size = self.size;
        let empty = |slots: usize, node: &Node| slots == node.slots && slots >= size;
        let nodes = self.slots.iter().zip(&self.nodes);
        let empties = nodes.filter(|&(&slots, node)| empty(slots, node)).count();
        let only_empty = empties == self.order.len() - depth;
        // Nodes by what they would take, lightest first: the first descent is the greedy one.
        let mut last = (f64::NEG_INFINITY, 0);
        loop {
            let mut next: Option<(f64, usize)> = None;
            for (index, node) in self.nodes.iter().enumerate() {
                let after = ((self.load[index] + more) / node.speed, index);
                let slots = self.slots[index];
                let fits = self.need[group * self.nodes.len() + index] <= slots
                    && (!only_empty || empty(slots, node));
                if fits && after > last && next.is_none_or(|next| after < next) {
                    next = Some(after);
                }
            }
            let Some((time, node)) = next else {
                return false;
            };
            if time > most {
                return false;
            }
            last = (time, node);
            if self.has_twin(node) {
                continue;
            }
            self.steps += 1;
            let need = self.need[group * self.nodes.len() + node];
            let before = self.load[node];
            self.load[node] = before + more;
            self.slots[node] -= need;
            self.trial[group] = node as u32;
            if self.place(depth + 1) {
                return true;
            }
            self.load[node] = before;
            self.slots[node] += need;
            let patient = self.steps < MOST_STEPS && self.order.len() <= MOST_GROUPS;
            if !patient && self.level < f64::INFINITY {
                return false;
            }
        }
    }

    /// Whether an earlier node is just like this one, so that what it leads to has been seen.
    fn has_twin(&self, node: usize) -> bool {
        (0..node).any(|other| {
            self.slots[other] == self.slots[node]
                && self.load[other] == self.load[node]
                && self.nodes[other] == self.nodes[node]
        })
    }

    /// What the slowest node takes with the best assignment.
    fn level_of_best(&mut self, load: &[f32], size: usize) -> f64 {
        let mut level: f64 = 0.0;
        for (index, node) in self.nodes.iter().enumerate() {
            self.experts.clear();
            let mut total = 0.0;
            for (group, experts) in load.chunks_exact(size).enumerate() {
                if self.best[group] == index as u32 {
                    self.experts.extend_from_slice(experts);
                    total += self.group_load[group];
                }
            }
            if !self.experts.is_empty() {
                let (slots, ranks) = (node.slots, node.num_ranks);
                let share = least_largest_share(&self.experts, slots, ranks, &mut self.heap);
                level = level.max(total / node.speed).max(share / node.fastest);
            }
        }
        level
    }

    /// What the slowest node takes whatever the assignment, without looking for one: the mean of
    /// all; each group is somewhere; of the heaviest `k n + 1` groups some `k + 1` share one of `n`
    /// nodes.
    fn floor(&mut self, load: &[f32], size: usize) -> f64 {
        let total: f64 = self.group_load.iter().sum();
        let mut floor = total / self.nodes.iter().map(|node| node.speed).sum::<f64>();
        for (group, experts) in load.chunks_exact(size).enumerate() {
            let mut least = f64::INFINITY;
            for (index, node) in self.nodes.iter().enumerate() {
                if node.slots < size || self.nodes[..index].contains(node) {
                    continue;
                }
                let (slots, ranks) = (node.slots, node.num_ranks);
                let share = least_largest_share(experts, slots, ranks, &mut self.heap);
                least = least.min((self.group_load[group] / node.speed).max(share / node.fastest));
            }
            if least.is_finite() {
                floor = floor.max(least);
            }
        }
        let fastest = self
            .nodes
            .iter()
            .fold(0.0, |speed: f64, node| speed.max(node.speed));
        let open = self.nodes.iter().filter(|node| node.slots >= size).count();
        let open = open.max(1);
        for others in 1..=(self.order.len() - 1) / open {
            let together = &self.order[others * (open - 1)..=others * open];
            let total: f64 = together
                .iter()
                .map(|&group| self.group_load[group as usize])
                .sum();
            floor = floor.max(total / fastest);
        }
        floor
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may fail")]
    use super::*;

    fn assigned(loads: &[f32], groups: usize, topology: &Topology) -> Assignment {
        let mut assignment = Assignment::default();
        assignment.assign(topology, groups, loads);
        assignment
    }

    /// What the slowest node takes, by hand.
    fn level(loads: &[f32], node_of: &[u32], topology: &Topology) -> f64 {
        let size = loads.len() / node_of.len();
        let mut level: f64 = 0.0;
        for node in 0..topology.num_nodes() {
            let here = |(expert, _): &(usize, &f32)| node_of[expert / size] as usize == node;
            let experts: Vec<f32> = loads
                .iter()
                .enumerate()
                .filter(here)
                .map(|(_, &w)| w)
                .collect();
            let ranks = topology.gpus_per_node();
            let slots = ranks * topology.slots_per_gpu();
            let mut count = vec![1; experts.len()];
            let share =
                |expert: usize, count: &[usize]| f64::from(experts[expert]) / count[expert] as f64;
            for _ in experts.len()..slots {
                let hottest = (0..experts.len())
                    .max_by(|&a, &b| share(a, &count).total_cmp(&share(b, &count)));
                if let Some(hottest) = hottest
                    && count[hottest] < ranks
                {
                    count[hottest] += 1;
                }
            }
            let shares = (0..experts.len()).map(|expert| share(expert, &count));
            let total: f64 = experts.iter().map(|&load| f64::from(load)).sum();
            level = shares.fold(level.max(total / ranks as f64), f64::max);
        }
        level
    }

    #[test]
    fn the_assignment_is_the_best_of_all() {
        let topology = Topology::new(3, 2, 4).unwrap();
        let mut state = 1u64;
        for _ in 0..300 {
            let loads: Vec<f32> = (0..18)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let draw = (state >> 40) as f32 / 16_777_216.0;
                    (draw * draw * draw * 1000.0).round()
                })
                .collect();
            let found = assigned(&loads, 6, &topology);
            let mut best = f64::INFINITY;
            for code in 0..729u32 {
                let node_of: Vec<u32> = (0..6).map(|group| code / 3u32.pow(group) % 3).collect();
                if (0..3).all(|node| node_of.iter().filter(|&&of| of == node).count() <= 2) {
                    best = best.min(level(&loads, &node_of, &topology));
                }
            }
            let got = level(&loads, found.node_of(), &topology);
            assert!(got <= best * (1.0 + 1e-8), "{got} {best} {loads:?}");
            assert!(found.bound() <= best && found.bound() >= best * (1.0 - 1e-8));
        }
    }

    #[test]
    fn many_groups_are_spread_and_the_bound_holds() {
        let topology = Topology::new(4, 2, 100).unwrap();
        let loads: Vec<f32> = (0..600).map(|group| (group * 7919 % 997) as f32).collect();
        for groups in [60, 300] {
            let found = assigned(&loads, groups, &topology);
            let got = level(&loads, found.node_of(), &topology);
            assert!(found.bound() <= got && got <= found.bound() * 1.05);
        }
    }
}

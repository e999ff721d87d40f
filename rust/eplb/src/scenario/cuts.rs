//! Tokens are split anew as the load arrives: what a placement is worth then.

use super::layer::{Exchange, Layer};
use super::rows::{Change, Futures, LANES, Table, WHOLE, add};
use super::search::Judge;
use crate::split::{Flow, LayerGraph};

/// How many sets of ranks are kept, one bit each.
const MOST: usize = u128::BITS as usize;

/// How far a level may be above the largest mean of the sets kept.
const EXACT: f32 = 1e-5;

/// Judges a placement by the largest rank load of the best split, in the mean over scenarios.
///
/// The least possible largest rank load is the largest mean, over all sets of ranks, of the load
/// of experts that these ranks hold alone. Each set gives a bound that holds for any placement,
/// and an exchange changes its mean by the loads of two experts at most. So the sets that were
/// largest once are kept, and tell most exchanges that do not help in a few vector operations;
/// a flow decides on the others, and finds the sets that were missing.
#[derive(Debug)]
pub(super) struct Cuts {
    /// The mean of each set.
    means: Table,
    /// The inverse of each set's size.
    inverse: Vec<f32>,
    /// The sets that each rank is in, and those that hold each expert alone.
    within: Vec<u128>,
    alone: Vec<u128>,
    /// The sets whose mean is the largest in some scenario.
    tight: u128,
    /// When each set was tight last.
    stamp: Vec<u32>,
    clock: u32,
    graph: LayerGraph,
    flow: Flow,
    /// The scenario to solve first: the one that refused an exchange last.
    first: usize,
}

impl Cuts {
    pub(super) fn new(layer: &Layer, futures: &Futures) -> Self {
        let (num_ranks, num_experts) = (layer.num_ranks(), layer.num_experts());
        let mut cuts = Self {
            means: Table::new(futures.num_blocks(), MOST),
            inverse: vec![0.0; MOST],
            within: vec![0; num_ranks],
            alone: vec![0; num_experts],
            tight: 0,
            stamp: vec![0; MOST],
            clock: 0,
            graph: LayerGraph::new(num_experts, layer.ranks()),
            flow: Flow::with_capacity(num_ranks, num_experts, layer.ranks().len()),
            first: 0,
        };
        for rank in 0..num_ranks.min(MOST / 2) as u32 {
            cuts.keep(layer, futures, &[rank]);
        }
        cuts.settle(layer, futures, f32::INFINITY);
        cuts
    }

    /// Keeps a set of ranks, in the place of one that has not been tight for longest.
    fn keep(&mut self, layer: &Layer, futures: &Futures, ranks: &[u32]) {
        let set = if self.means.len < MOST {
            self.means.len += 1;
            self.means.len - 1
        } else {
            let oldest = (layer.num_ranks().min(MOST / 2)..MOST).min_by_key(|&set| self.stamp[set]);
            oldest.unwrap_or(MOST - 1)
        };
        let bit = 1 << set;
        for sets in &mut self.within {
            *sets &= !bit;
        }
        for &rank in ranks {
            self.within[rank as usize] |= bit;
        }
        self.inverse[set] = 1.0 / ranks.len() as f32;
        self.stamp[set] = self.clock;
        for expert in 0..layer.num_experts() {
            self.alone[expert] &= !bit;
            self.alone[expert] |= self.holding(layer, expert, None) & bit;
        }
        self.sum(layer, futures, bit);
    }

    /// Whether a set of ranks is kept.
    fn keeps(&self, ranks: &[u32]) -> bool {
        let mut same = self.used();
        let mut ranks = ranks.to_vec();
        ranks.sort_unstable();
        for (rank, sets) in (0..).zip(&self.within) {
            same &= if ranks.binary_search(&rank).is_ok() {
                *sets
            } else {
                !sets
            };
        }
        same != 0
    }

    /// Sums the means of some sets anew.
    #[inline(always)]
    fn sum(&mut self, layer: &Layer, futures: &Futures, sets: u128) {
        for block in 0..futures.num_blocks() {
            for set in bits(sets) {
                *self.means.row_mut(block, set) = [0.0; LANES];
            }
            for expert in 0..layer.num_experts() {
                for set in bits(self.alone[expert] & sets) {
                    let row = self.means.row_mut(block, set);
                    add(row, self.inverse[set], futures.load(block, expert));
                }
            }
        }
    }

    /// The sets that hold an expert alone if it leaves a slot.
    #[inline(always)]
    fn holding(&self, layer: &Layer, expert: usize, left: Option<u32>) -> u128 {
        let mut sets = self.used();
        for &place in layer.places(expert) {
            if Some(place) != left {
                sets &= self.within[layer.rank(place as usize)];
            }
        }
        sets
    }

    fn used(&self) -> u128 {
        u128::MAX >> (MOST - self.means.len)
    }

    #[inline(always)]
    fn shift(&self, change: &mut Change, which: usize, before: u128, after: u128) {
        for set in bits(after & !before) {
            change.gain(which, set, self.inverse[set]);
        }
        for set in bits(before & !after) {
            change.gain(which, set, -self.inverse[set]);
        }
    }
}

impl Judge for Cuts {
    fn capacity(&self) -> usize {
        MOST
    }

    #[inline(always)]
    fn value(&self, futures: &Futures, change: &Change) -> f32 {
        let [first, second] = change.experts;
        let mut value = 0.0;
        for (block, weights) in futures.weights.iter().enumerate() {
            let loads = (futures.load(block, first), futures.load(block, second));
            let mut largest = [0.0f32; LANES];
            let gains = change.gains[0].iter().zip(&change.gains[1]);
            for (row, (a, b)) in self.means.block(block).iter().zip(gains) {
                for lane in 0..LANES {
                    let mean = row[lane] + a * loads.0[lane] + b * loads.1[lane];
                    largest[lane] = if mean > largest[lane] {
                        mean
                    } else {
                        largest[lane]
                    };
                }
            }
            for lane in 0..LANES {
                value += weights[lane] * largest[lane];
            }
        }
        value
    }

    fn look(&mut self, layer: &Layer, futures: &Futures) {
        // What exchanges have added and taken away has left rounding behind.
        self.sum(layer, futures, self.used());
        let mut tight = 0;
        self.means.for_largest(futures, |set| tight |= 1 << set);
        self.tight = tight;
        self.clock += 1;
        for set in bits(tight) {
            self.stamp[set] = self.clock;
        }
    }

    #[inline(always)]
    fn may_help(&self, layer: &Layer, exchange: Exchange) -> bool {
        match exchange {
            Exchange::Replace { slot, expert } => {
                let here = self.within[layer.rank(slot as usize)];
                self.alone[expert as usize] & !here & self.tight != 0
            }
            Exchange::Swap { a, b } => {
                let within = |slot: u32| self.within[layer.rank(slot as usize)];
                let leaves = |from: u32, to: u32| self.alone[layer.expert(from)] & !within(to);
                (leaves(a, b) | leaves(b, a)) & self.tight != 0
            }
        }
    }

    #[inline(always)]
    fn change(&self, layer: &Layer, exchange: Exchange, change: &mut Change) {
        match exchange {
            Exchange::Replace { slot, expert } => {
                let (old, new) = (layer.expert(slot), expert as usize);
                change.experts = [old, new];
                let after = self.holding(layer, old, Some(slot));
                self.shift(change, 0, self.alone[old], after);
                let after = self.alone[new] & self.within[layer.rank(slot as usize)];
                self.shift(change, 1, self.alone[new], after);
            }
            Exchange::Swap { a, b } => {
                change.experts = [layer.expert(a), layer.expert(b)];
                for (which, (from, to)) in [(a, b), (b, a)].into_iter().enumerate() {
                    let expert = layer.expert(from);
                    let there = self.within[layer.rank(to as usize)];
                    let after = self.holding(layer, expert, Some(from)) & there;
                    self.shift(change, which, self.alone[expert], after);
                }
            }
        }
    }

    #[inline(always)]
    fn made(&mut self, layer: &Layer, futures: &Futures, experts: [usize; 2]) {
        for expert in experts {
            let before = self.alone[expert];
            let after = self.holding(layer, expert, None);
            self.alone[expert] = after;
            for block in 0..futures.num_blocks() {
                let load = futures.load(block, expert);
                for set in bits(after & !before) {
                    add(self.means.row_mut(block, set), self.inverse[set], load);
                }
                for set in bits(before & !after) {
                    add(self.means.row_mut(block, set), -self.inverse[set], load);
                }
            }
        }
    }

    fn settle(&mut self, layer: &Layer, futures: &Futures, limit: f32) -> bool {
        self.graph.take(layer.experts(), layer.counts());
        let nothing = Change::with_capacity(MOST);
        let mut added = false;
        for turn in 0..futures.num_scenarios {
            let scenario = (self.first + turn) % futures.num_scenarios;
            let level = self
                .flow
                .solve(&self.graph.graph(), futures.tokens(scenario));
            let (block, lane) = (scenario / LANES, scenario % LANES);
            let known = self.means.block(block).iter().map(|row| row[lane]);
            let known = known.fold(0.0f32, f32::max);
            if (level as f64 / WHOLE) as f32 <= known + EXACT || self.keeps(&self.flow.tight) {
                continue;
            }
            let ranks = self.flow.tight.clone();
            self.keep(layer, futures, &ranks);
            added = true;
            if self.value(futures, &nothing) > limit {
                self.first = scenario;
                break;
            }
        }
        added
    }
}

/// The bits that are set, from the lowest.
#[inline(always)]
fn bits(mut set: u128) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = set.trailing_zeros() as usize;
        set &= set.wrapping_sub(1);
        (lowest < MOST).then_some(lowest)
    })
}

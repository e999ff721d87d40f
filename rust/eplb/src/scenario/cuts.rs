//! Tokens are split anew as the load arrives: what a placement is worth then.

use super::layer::{Exchange, Layer};
use super::rows::{Change, Futures, LANES, Row, Table, WHOLE, add, total};
use super::search::Judge;
use crate::split::{Flow, LayerGraph};

/// How many sets of ranks are kept, one bit each.
const MOST: usize = u128::BITS as usize;

/// How far a level may be above the largest mean of the sets kept.
const EXACT: f32 = 1e-5;

/// Sets further below the largest mean than this are left out where exchanges are compared: none
/// takes so much off at once, as a rule, and a flow decides in the end.
const REACH: f32 = 0.1;

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
    /// What the placement is worth by these.
    value: f32,
    /// The sets that each rank is in, and those that hold each expert alone.
    within: Vec<u128>,
    alone: Vec<u128>,
    /// The sets whose mean is the largest in some scenario.
    tight: u128,
    /// The sets whose mean is near the largest in some scenario.
    high: Vec<u32>,
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
            value: 0.0,
            within: vec![0; num_ranks],
            alone: vec![0; num_experts],
            tight: 0,
            high: Vec::with_capacity(MOST),
            stamp: vec![0; MOST],
            clock: 0,
            graph: LayerGraph::new(num_experts, layer.ranks()),
            flow: Flow::with_capacity(num_ranks, num_experts, layer.ranks().len()),
            first: 0,
        };
        for rank in 0..num_ranks.min(MOST / 2) as u32 {
            cuts.keep(layer, futures, &[rank]);
        }
        cuts.value = cuts.worth(futures);
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

    /// What the placement is worth by the sets kept.
    #[inline(always)]
    fn worth(&self, futures: &Futures) -> f32 {
        let mut value = 0.0;
        for (block, weights) in futures.weights.iter().enumerate() {
            let mut largest = [0.0f32; LANES];
            for row in self.means.block(block) {
                raise(&mut largest, row);
            }
            for lane in 0..LANES {
                largest[lane] *= weights[lane];
            }
            value += total(&largest);
        }
        value
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

    fn ideal(&self) -> f32 {
        1.0
    }

    fn value(&self, _futures: &Futures) -> f32 {
        self.value
    }

    #[inline(always)]
    fn bound(&self, futures: &Futures, change: &Change) -> f32 {
        let mut value = 0.0;
        for (block, weights) in futures.weights.iter().enumerate() {
            let means = self.means.block(block);
            let loads = change.experts.map(|expert| futures.load(block, expert));
            let mut largest = [0.0f32; LANES];
            for &set in &self.high {
                if !change.changes(set) {
                    raise(&mut largest, &means[set as usize]);
                }
            }
            for &set in &change.rows {
                let mut row = means[set as usize];
                let gains = change.of(set);
                add(&mut row, gains[0], loads[0]);
                add(&mut row, gains[1], loads[1]);
                raise(&mut largest, &row);
            }
            for lane in 0..LANES {
                largest[lane] *= weights[lane];
            }
            value += total(&largest);
        }
        value
    }

    fn look(&mut self, layer: &Layer, futures: &Futures) {
        // What exchanges have added and taken away has left rounding behind.
        self.sum(layer, futures, self.used());
        self.value = self.worth(futures);
        let mut tight = 0;
        self.means.for_largest(futures, |set| tight |= 1 << set);
        self.tight = tight;
        self.clock += 1;
        for set in bits(tight) {
            self.stamp[set] = self.clock;
        }
        let mut high = 0u128;
        for block in 0..futures.num_blocks() {
            let means = self.means.block(block);
            let mut largest = [0.0f32; LANES];
            for row in means {
                raise(&mut largest, row);
            }
            for (set, row) in means.iter().enumerate() {
                let mut lanes = 0..LANES;
                let near = lanes.any(|lane| row[lane] > largest[lane] - REACH);
                high |= u128::from(near) << set;
            }
        }
        self.high.clear();
        self.high.extend(bits(high).map(|set| set as u32));
    }

    #[inline(always)]
    fn suspects(&self, _layer: &Layer, expert: usize) -> bool {
        self.alone[expert] & self.tight != 0
    }

    fn sheds(&self, _layer: &Layer, _slot: u32) -> bool {
        false
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
        self.value = self.worth(futures);
    }

    fn settle(&mut self, layer: &Layer, futures: &Futures, limit: f32) {
        if self.value > limit {
            return;
        }
        self.graph.take(layer.experts(), layer.counts());
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
            self.value = self.worth(futures);
            if self.value > limit {
                self.first = scenario;
                break;
            }
        }
    }
}

/// `largest = max(largest, row)`, lane by lane.
#[inline(always)]
fn raise(largest: &mut Row, row: &Row) {
    for lane in 0..LANES {
        largest[lane] = if row[lane] > largest[lane] {
            row[lane]
        } else {
            largest[lane]
        };
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

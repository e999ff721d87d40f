//! What a layer is worth when tokens are split anew for the load that has come.
//!
//! The least possible largest rank load is the largest mean, over all sets of ranks, of the load of
//! experts that these ranks hold alone. Each set gives a bound that holds for any placement, and an
//! exchange changes its mean by the loads of the experts it concerns. So the sets that were largest
//! once are kept, and tell most exchanges that do not help; a flow decides on the others, and finds
//! the sets that were missing.

use super::layer::Layer;
use super::rows::WHOLE;
use crate::split::{Flow, LayerGraph};

/// How many sets of ranks are kept for each load, one bit each.
pub(super) const MOST: usize = u64::BITS as usize;

/// A number for each set.
pub(super) type Row = [f32; MOST];

/// Rows are worked on in parts of so many sets, up to the last that is in use.
const LANES: usize = 16;

/// The largest rank load of the best split of a layer, in units of the mean one, in the mean over
/// several loads.
#[derive(Debug)]
pub(super) struct Worth {
    pub(super) cases: Vec<Case>,
    graph: LayerGraph,
    flow: Flow,
    /// The load to solve first: the one that refused an exchange last.
    first: usize,
    /// Sets that flows found and that are not kept yet: the load, and where its ranks end.
    found: Vec<(usize, usize)>,
    found_ranks: Vec<u32>,
}

/// One of the loads.
#[derive(Debug)]
pub(super) struct Case {
    /// How much it counts; all add up to 1.
    pub(super) weight: f32,
    /// The load of each expert, `[E]`, in units of the mean load of a rank; and in whole numbers.
    pub(super) loads: Vec<f32>,
    tokens: Vec<i64>,
    /// What the layer is worth under this load, and the layer that was looked at last.
    level: f32,
    next: f32,
    pub(super) sets: Sets,
}

impl Worth {
    /// Solves a layer for some loads, `[E]` each, with weights that add up to 1.
    pub(super) fn new<'a>(layer: &Layer, loads: impl Iterator<Item = (&'a [f32], f64)>) -> Self {
        let (num_ranks, num_experts) = (layer.num_ranks(), layer.num_experts());
        let case = |(row, weight): (&[f32], f64)| {
            let total: f64 = row.iter().map(|&load| f64::from(load)).sum();
            let scale = match total > 0.0 {
                true => num_ranks as f64 / total,
                false => 0.0,
            };
            let scaled = row.iter().map(|&load| f64::from(load) * scale);
            Case {
                weight: weight as f32,
                loads: scaled.clone().map(|load| load as f32).collect(),
                tokens: scaled.map(|load| (load * WHOLE) as i64).collect(),
                level: 1.0,
                next: 1.0,
                sets: Sets::new(num_ranks, num_experts),
            }
        };
        let mut worth = Self {
            cases: loads.map(case).collect(),
            graph: LayerGraph::new(num_experts, layer.ranks()),
            flow: Flow::with_capacity(num_ranks, num_experts, layer.ranks().len()),
            first: 0,
            found: Vec::new(),
            found_ranks: Vec::new(),
        };
        worth.solve(layer);
        worth
    }

    /// What the layer is worth; 1 is the least there is.
    pub(super) fn value(&self) -> f32 {
        let levels = self.cases.iter().map(|case| case.weight * case.level);
        levels.sum()
    }

    /// Solves the layer as it is, and keeps the sets that show it.
    pub(super) fn solve(&mut self, layer: &Layer) {
        self.graph.take(layer.experts(), layer.counts());
        for index in 0..self.cases.len() {
            let level = self.level(index, i64::MAX);
            self.cases[index].level = level;
        }
        self.keep_found(layer, |_, _, _| ());
    }

    /// A bound for what a layer is worth in which some experts are elsewhere; with the bounds for
    /// each load.
    #[inline(always)]
    pub(super) fn bound(&self, layer: &Layer, experts: &[usize], bounds: &mut Vec<f32>) -> f32 {
        bounds.clear();
        let mut value = 0.0;
        for case in &self.cases {
            let bound = case.sets.bound(layer, &case.loads, experts);
            bounds.push(bound);
            value += case.weight * bound;
        }
        value
    }

    /// Takes the layer that was solved last by [`after`](Self::after), below its limit.
    pub(super) fn take(&mut self, layer: &Layer, experts: &[usize]) {
        for case in &mut self.cases {
            case.sets.moved(layer, &case.loads, experts);
            case.level = case.next;
        }
        self.keep_found(layer, |_, _, _| ());
    }

    /// What a layer is worth that differs from the one solved last, or something that is not below
    /// `limit`. `bounds` are lower bounds for each load. The layer that was solved has to be
    /// restored before [`keep_found`](Self::keep_found).
    pub(super) fn after(&mut self, layer: &Layer, bounds: &[f32], limit: f32) -> f32 {
        self.graph.take(layer.experts(), layer.counts());
        let pairs = self.cases.iter().zip(bounds);
        let mut value: f32 = pairs.map(|(case, bound)| case.weight * bound).sum();
        let num_cases = self.cases.len();
        for turn in 0..num_cases {
            let index = (self.first + turn) % num_cases;
            let (weight, bound) = (self.cases[index].weight, bounds[index]);
            let room = f64::from(bound) + f64::from((limit - value) / weight);
            let level = self.level(index, (room * WHOLE) as i64);
            self.cases[index].next = level;
            value += weight * (level - bound).max(0.0);
            if value >= limit {
                self.first = index;
                break;
            }
        }
        value
    }

    /// The level of the graph under one load, or a bound for it above `limit`.
    fn level(&mut self, index: usize, limit: i64) -> f32 {
        let case = &self.cases[index];
        let level = self
            .flow
            .solve_below(&self.graph.graph(), &case.tokens, limit);
        self.found_ranks.extend_from_slice(&self.flow.tight);
        self.found.push((index, self.found_ranks.len()));
        ((level as f64 / WHOLE) as f32).max(1.0)
    }

    /// Keeps the sets that flows have found, and calls `mark` with the load and the number of each
    /// that is new.
    #[inline(always)]
    pub(super) fn keep_found(&mut self, layer: &Layer, mut mark: impl FnMut(&Case, usize, usize)) {
        let mut begin = 0;
        for &(index, end) in &self.found {
            let case = &mut self.cases[index];
            let ranks = &self.found_ranks[begin..end];
            if case.sets.keep(layer, &case.loads, ranks) {
                mark(case, index, case.sets.tight);
            }
            begin = end;
        }
        self.found.clear();
        self.found_ranks.clear();
    }
}

/// Sets of ranks and what they hold alone.
#[derive(Debug)]
pub(super) struct Sets {
    len: usize,
    /// The sets that each rank is in, `[D]`, and those that hold each expert alone, `[E]`.
    within: Vec<u64>,
    alone: Vec<u64>,
    /// The inverse of each set's size, what it holds alone, and both multiplied.
    pub(super) inverse: Row,
    sums: [f64; MOST],
    pub(super) means: Row,
    /// The set that was tight last, and when each was.
    pub(super) tight: usize,
    stamps: [u32; MOST],
    clock: u32,
}

impl Sets {
    fn new(num_ranks: usize, num_experts: usize) -> Self {
        Self {
            len: 0,
            within: vec![0; num_ranks],
            alone: vec![0; num_experts],
            inverse: [0.0; MOST],
            sums: [0.0; MOST],
            means: [0.0; MOST],
            tight: 0,
            stamps: [0; MOST],
            clock: 0,
        }
    }

    /// Keeps a set, in the place of the one that has not been tight for longest; whether it is new.
    fn keep(&mut self, layer: &Layer, loads: &[f32], ranks: &[u32]) -> bool {
        self.clock += 1;
        if let Some(known) = self.find(ranks) {
            self.tight = known;
            self.stamps[known] = self.clock;
            return false;
        }
        let set = if self.len < MOST {
            self.len += 1;
            self.len - 1
        } else {
            let oldest = (0..MOST).min_by_key(|&set| self.stamps[set]);
            oldest.unwrap_or(0)
        };
        let bit = 1 << set;
        for sets in &mut self.within {
            *sets &= !bit;
        }
        for &rank in ranks {
            self.within[rank as usize] |= bit;
        }
        self.inverse[set] = 1.0 / ranks.len() as f32;
        self.stamps[set] = self.clock;
        self.tight = set;
        self.sums[set] = 0.0;
        for (expert, &load) in loads.iter().enumerate() {
            let holds = self.holding(layer, expert, None) & bit;
            self.alone[expert] = self.alone[expert] & !bit | holds;
            if holds != 0 {
                self.sums[set] += f64::from(load);
            }
        }
        self.means[set] = (self.sums[set] / ranks.len() as f64) as f32;
        true
    }

    /// Which of the sets has these ranks.
    fn find(&self, ranks: &[u32]) -> Option<usize> {
        let mut same = match self.len {
            0 => 0,
            len => u64::MAX >> (MOST - len),
        };
        for &rank in ranks {
            same &= self.within[rank as usize];
        }
        // Those that are no larger have no other ranks.
        bits(same).find(|&set| self.inverse[set] == 1.0 / ranks.len() as f32)
    }

    /// Whether what is tight is relieved if an expert can go elsewhere, too.
    #[inline(always)]
    pub(super) fn suspects(&self, expert: usize) -> bool {
        self.alone[expert] >> self.tight & 1 != 0
    }

    /// Whether a rank is outside of what is tight.
    #[inline(always)]
    pub(super) fn is_outside(&self, rank: usize) -> bool {
        self.within[rank] >> self.tight & 1 == 0
    }

    /// The sets that hold an expert alone.
    #[inline(always)]
    pub(super) fn alone(&self, expert: usize) -> u64 {
        self.alone[expert]
    }

    /// The sets that a rank is outside of.
    #[inline(always)]
    pub(super) fn outside(&self, rank: usize) -> u64 {
        !self.within[rank]
    }

    /// The sets that come to hold an expert alone if it leaves a slot.
    #[inline(always)]
    pub(super) fn gaining(&self, layer: &Layer, slot: u32) -> u64 {
        let expert = layer.expert(slot);
        self.holding(layer, expert, Some(slot)) & !self.alone[expert]
    }

    /// What each set's mean loses if an expert of this load has a replica outside of it, too.
    #[inline(always)]
    pub(super) fn losses(&self, expert: usize, load: f32) -> Row {
        spread(self.alone[expert], &self.inverse, load)
    }

    /// The largest of the means, each less what it loses and with what it gains; 1 if that is
    /// larger.
    #[inline(always)]
    pub(super) fn largest(&self, change: impl Fn(usize) -> f32) -> f32 {
        let mut largest = [1.0f32; LANES];
        for begin in (0..self.len).step_by(LANES) {
            for lane in 0..LANES {
                let mean = self.means[begin + lane] + change(begin + lane);
                largest[lane] = larger(largest[lane], mean);
            }
        }
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                largest[lane] = larger(largest[lane], largest[lane + width]);
            }
            width /= 2;
        }
        largest[0]
    }

    /// A bound for the level after experts have come to be elsewhere.
    #[inline(always)]
    fn bound(&self, layer: &Layer, loads: &[f32], experts: &[usize]) -> f32 {
        let mut change = [0.0; MOST];
        for &expert in experts {
            let (before, after) = (self.alone[expert], self.holding(layer, expert, None));
            for set in bits(after & !before) {
                change[set] += self.inverse[set] * loads[expert];
            }
            for set in bits(before & !after) {
                change[set] -= self.inverse[set] * loads[expert];
            }
        }
        self.largest(|set| change[set])
    }

    /// Takes note that experts are elsewhere.
    pub(super) fn moved(&mut self, layer: &Layer, loads: &[f32], experts: &[usize]) {
        for &expert in experts {
            let (before, after) = (self.alone[expert], self.holding(layer, expert, None));
            self.alone[expert] = after;
            for set in bits(before ^ after) {
                let gained = after >> set & 1 != 0;
                let load = f64::from(loads[expert]);
                self.sums[set] += if gained { load } else { -load };
                self.means[set] = (self.sums[set] * f64::from(self.inverse[set])) as f32;
            }
        }
    }

    /// The sets that hold an expert alone if it leaves a slot.
    #[inline(always)]
    fn holding(&self, layer: &Layer, expert: usize, left: Option<u32>) -> u64 {
        let mut sets = u64::MAX >> (MOST - self.len.max(1));
        for &place in layer.places(expert) {
            if Some(place) != left {
                sets &= self.within[layer.rank(place as usize)];
            }
        }
        sets
    }
}

/// `factor * row` where a bit is set, else 0.
#[inline(always)]
pub(super) fn spread(set: u64, row: &Row, factor: f32) -> Row {
    let mut spread = [0.0; MOST];
    for lane in 0..MOST {
        let there = set >> lane & 1 != 0;
        spread[lane] = if there { row[lane] * factor } else { 0.0 };
    }
    spread
}

/// One instruction, where `f32::max` would be three for the sake of NaN.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The bits that are set, from the lowest.
#[inline(always)]
fn bits(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = set.trailing_zeros() as usize;
        set &= set.wrapping_sub(1);
        (lowest < MOST).then_some(lowest)
    })
}

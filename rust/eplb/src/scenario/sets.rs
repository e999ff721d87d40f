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
const MOST: usize = u64::BITS as usize;

/// A number for each set.
type Row = [f32; MOST];

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
        self.keep_found(layer);
        for case in &mut self.cases {
            case.sets.tight = case.sets.latest;
        }
    }

    /// A bound for what a layer is worth in which some experts, 4 at most, are elsewhere; with the
    /// bounds for each load.
    #[inline(always)]
    pub(super) fn bound(&self, layer: &Layer, experts: &[usize], bounds: &mut Vec<f32>) -> f32 {
        bounds.clear();
        let mut value = 0.0;
        for case in &self.cases {
            let mut shifts = [Shift::default(); 4];
            for (shift, &expert) in shifts.iter_mut().zip(experts) {
                let (before, after) = (
                    case.sets.alone[expert],
                    case.sets.holding(layer, expert, None),
                );
                *shift = Shift::new(case.loads[expert], before, after);
            }
            let bound = case.sets.largest(&shifts[..experts.len()]);
            bounds.push(bound);
            value += case.weight * bound;
        }
        value
    }

    /// Takes note that some experts are elsewhere.
    pub(super) fn moved(&mut self, layer: &Layer, experts: &[usize]) {
        for case in &mut self.cases {
            case.sets.moved(layer, &case.loads, experts);
        }
    }

    /// The same for a layer that was solved last by [`after`](Self::after), below its limit.
    pub(super) fn take(&mut self, layer: &Layer, experts: &[usize]) {
        self.moved(layer, experts);
        for case in &mut self.cases {
            case.level = case.next;
        }
        self.keep_found(layer);
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

    /// Keeps the sets that flows have found.
    #[inline(always)]
    pub(super) fn keep_found(&mut self, layer: &Layer) {
        let mut begin = 0;
        for &(index, end) in &self.found {
            let case = &mut self.cases[index];
            let ranks = &self.found_ranks[begin..end];
            case.sets.keep(layer, &case.loads, ranks);
            begin = end;
        }
        self.found.clear();
        self.found_ranks.clear();
    }
}

/// What it does to sets that an expert is elsewhere.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Shift {
    load: f32,
    /// The sets that come to hold it alone, and those that do no longer.
    gained: u64,
    lost: u64,
}

impl Shift {
    /// Of an expert of this load, by the sets that hold it alone before and after.
    #[inline(always)]
    pub(super) fn new(load: f32, before: u64, after: u64) -> Self {
        Self {
            load,
            gained: after & !before,
            lost: before & !after,
        }
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
    inverse: Row,
    sums: [f64; MOST],
    means: Row,
    /// The set that is tight, the one that was found last, and when each was.
    tight: usize,
    latest: usize,
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
            latest: 0,
            stamps: [0; MOST],
            clock: 0,
        }
    }

    /// Keeps a set, in the place of the one that has not been tight for longest.
    fn keep(&mut self, layer: &Layer, loads: &[f32], ranks: &[u32]) {
        self.clock += 1;
        if let Some(known) = self.find(ranks) {
            self.latest = known;
            self.stamps[known] = self.clock;
            return;
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
        self.latest = set;
        self.sums[set] = 0.0;
        for (expert, &load) in loads.iter().enumerate() {
            let holds = self.holding(layer, expert, None) & bit;
            self.alone[expert] = self.alone[expert] & !bit | holds;
            if holds != 0 {
                self.sums[set] += f64::from(load);
            }
        }
        self.means[set] = (self.sums[set] / ranks.len() as f64) as f32;
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

    /// The sets that a rank is in.
    #[inline(always)]
    pub(super) fn within(&self, rank: usize) -> u64 {
        self.within[rank]
    }

    /// The sets that hold a slot's expert alone if it leaves.
    #[inline(always)]
    pub(super) fn leaving(&self, layer: &Layer, slot: u32) -> u64 {
        self.holding(layer, layer.expert(slot), Some(slot))
    }

    /// The mean of a set after some shifts.
    #[inline(always)]
    pub(super) fn mean(&self, set: usize, shifts: &[Shift]) -> f32 {
        let mut change = 0.0;
        for shift in shifts {
            let (gained, lost) = (shift.gained >> set & 1, shift.lost >> set & 1);
            change += (gained as f32 - lost as f32) * shift.load;
        }
        self.means[set] + change * self.inverse[set]
    }

    /// The mean of the set that was tight last, after some shifts.
    #[inline(always)]
    pub(super) fn tight_mean(&self, shifts: &[Shift]) -> f32 {
        self.mean(self.tight, shifts)
    }

    /// The largest mean after some shifts; 1 if that is larger.
    #[inline(always)]
    pub(super) fn largest(&self, shifts: &[Shift]) -> f32 {
        let mut largest = [1.0f32; LANES];
        for begin in (0..self.len).step_by(LANES) {
            let mut change = [0.0f32; LANES];
            for shift in shifts {
                for (sets, load) in [(shift.gained, shift.load), (shift.lost, -shift.load)] {
                    let sets = (sets >> begin) as u32;
                    if sets == 0 {
                        continue;
                    }
                    for lane in 0..LANES {
                        change[lane] += if sets & 1 << lane != 0 { load } else { 0.0 };
                    }
                }
            }
            for lane in 0..LANES {
                let set = begin + lane;
                let mean = self.means[set] + change[lane] * self.inverse[set];
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

    /// Takes note that experts are elsewhere.
    fn moved(&mut self, layer: &Layer, loads: &[f32], experts: &[usize]) {
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
        let mut sets = u64::MAX;
        for &place in layer.places(expert) {
            if Some(place) != left {
                sets &= self.within[layer.rank(place as usize)];
            }
        }
        sets
    }
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

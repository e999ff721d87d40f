//! What a layer is worth when tokens are split anew for the load that has come.
//!
//! The least possible largest rank load is the largest mean, over all sets of ranks, of the load of
//! experts that these ranks hold alone. The [sets](Sets) that were largest once are kept, and tell
//! most exchanges that do not help; a flow decides on the others, and finds the sets that were
//! missing.

use super::layer::Layer;
use super::rows::WHOLE;
use super::sets::{Sets, Shift};
use crate::split::{Flow, LayerGraph};

/// The largest rank load of the best split of a layer, in units of the mean one, in the mean over
/// several loads.
#[derive(Debug)]
pub(super) struct Worth {
    pub(super) cases: Vec<Case>,
    /// The rank of each expert that has one slot, or `NONE`, `[E]`; and the experts that have
    /// several.
    single: Vec<u32>,
    shared: Vec<u32>,
    graph: LayerGraph,
    flow: Flow,
    /// The load to solve first: the one that refused an exchange last.
    first: usize,
    /// Sets that flows found and that are not kept yet: the load, and where its ranks end.
    found: Vec<(usize, usize)>,
    found_ranks: Vec<u32>,
}

/// The rank of an expert that has several.
const NONE: u32 = u32::MAX;

/// One of the loads.
#[derive(Debug)]
pub(super) struct Case {
    /// How much it counts; all add up to 1.
    pub(super) weight: f32,
    /// The load of each expert, `[E]`, in units of the mean load of a rank; and in whole numbers.
    pub(super) loads: Vec<f32>,
    tokens: Vec<i64>,
    /// What each rank carries of experts that have one slot, `[D]`.
    fixed: Vec<i64>,
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
                fixed: vec![0; num_ranks],
                level: 1.0,
                next: 1.0,
                sets: Sets::new(num_ranks, num_experts),
            }
        };
        let mut worth = Self {
            cases: loads.map(case).collect(),
            single: vec![NONE; num_experts],
            shared: (0..num_experts as u32).collect(),
            graph: LayerGraph::new(num_ranks),
            flow: Flow::with_capacity(num_ranks, num_experts, layer.ranks().len()),
            first: 0,
            found: Vec::new(),
            found_ranks: Vec::new(),
        };
        let experts: Vec<_> = (0..num_experts).collect();
        worth.settle(layer, &experts);
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
        self.draw(layer, &[]);
        for index in 0..self.cases.len() {
            let level = self.level(index, layer, &[], i64::MAX);
            self.cases[index].level = level;
        }
        self.keep_found(layer);
        for case in &mut self.cases {
            case.sets.hold_tight();
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
                *shift = case.sets.shift(layer, expert, case.loads[expert]);
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
        self.settle(layer, experts);
    }

    /// The same for a layer that was solved last by [`after`](Self::after), below its limit.
    pub(super) fn take(&mut self, layer: &Layer, experts: &[usize]) {
        self.moved(layer, experts);
        for case in &mut self.cases {
            case.level = case.next;
        }
        self.keep_found(layer);
    }

    /// What a layer is worth in which some experts are elsewhere, or something that is not below
    /// `limit`. `bounds` are lower bounds for each load. The layer that was solved has to be
    /// restored before [`keep_found`](Self::keep_found).
    pub(super) fn after(
        &mut self,
        layer: &Layer,
        experts: &[usize],
        bounds: &[f32],
        limit: f32,
    ) -> f32 {
        self.draw(layer, experts);
        let pairs = self.cases.iter().zip(bounds);
        let mut value: f32 = pairs.map(|(case, bound)| case.weight * bound).sum();
        let num_cases = self.cases.len();
        for turn in 0..num_cases {
            let index = (self.first + turn) % num_cases;
            let (weight, bound) = (self.cases[index].weight, bounds[index]);
            let room = f64::from(bound) + f64::from((limit - value) / weight);
            let level = self.level(index, layer, experts, (room * WHOLE) as i64);
            self.cases[index].next = level;
            value += weight * (level - bound).max(0.0);
            if value >= limit {
                self.first = index;
                break;
            }
        }
        value
    }

    /// Draws the graph of a layer in which some experts are elsewhere.
    fn draw(&mut self, layer: &Layer, moved: &[usize]) {
        let single = &self.single;
        let no_longer = |&expert: &usize| single[expert] != NONE;
        let more = moved.iter().copied().filter(no_longer);
        let shared = self.shared.iter().map(|&expert| expert as usize);
        let items = shared.chain(more).filter(|&expert| layer.count(expert) > 1);
        let ranks = |expert: usize| {
            let places = layer.places(expert).iter();
            places.map(|&slot| layer.rank(slot as usize) as u32)
        };
        self.graph
            .take(items.map(|expert| (expert as u32, ranks(expert))));
    }

    /// The level of the graph under one load, or a bound for it above `limit`.
    fn level(&mut self, index: usize, layer: &Layer, moved: &[usize], limit: i64) -> f32 {
        let case = &self.cases[index];
        let carried = &mut self.flow.rank_load;
        carried.copy_from_slice(&case.fixed);
        for &expert in moved {
            if self.single[expert] != NONE {
                carried[self.single[expert] as usize] -= case.tokens[expert];
            }
            if let Some(rank) = layer.only_rank(expert) {
                carried[rank] += case.tokens[expert];
            }
        }
        let graph = self.graph.graph();
        let level = self.flow.pour(&graph, &case.tokens, 0, limit);
        self.found_ranks.extend_from_slice(&self.flow.tight);
        self.found.push((index, self.found_ranks.len()));
        ((level as f64 / WHOLE) as f32).max(1.0)
    }

    /// Takes note of how many slots experts have, and of what ranks hold that is nowhere else.
    fn settle(&mut self, layer: &Layer, experts: &[usize]) {
        for &expert in experts {
            let (before, after) = (self.single[expert], layer.only_rank(expert));
            for case in &mut self.cases {
                let tokens = case.tokens[expert];
                if before != NONE {
                    case.fixed[before as usize] -= tokens;
                }
                if let Some(rank) = after {
                    case.fixed[rank] += tokens;
                }
            }
            if before != NONE && after.is_none() {
                self.shared.push(expert as u32);
            }
            self.single[expert] = after.map_or(NONE, |rank| rank as u32);
        }
        self.shared
            .retain(|&expert| layer.count(expert as usize) > 1);
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

//! The best exchange of a layer where tokens are split anew, found exactly.
//!
//! The sets of ranks that were tight so far bound what each exchange could reach. The best by these
//! bounds is solved by a flow, which may find a set that was missing and so raises the bounds. It
//! ends when no bound is below the best found.

use multiversion::multiversion;

use super::layer::{Exchange, Layer};
use super::sets::{Case, Shift, Worth};
use crate::balance::Fuel;

/// What an exchange must gain in any case, in parts of the mean rank load.
const LEAST_GAIN: f32 = 1e-5;

/// Looking at so many exchanges costs about as much as solving one.
const LOOKS_PER_STEP: u32 = 64;

/// Which exchanges are compared. Both relieve what is tight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An expert of the tight ranks gets a slot outside of them, too, in the place of one that
    /// keeps others: one move.
    Replace,
    /// It trades its slot for one outside of them: two moves.
    Swap,
}

impl Kind {
    pub(super) fn moves(self) -> usize {
        match self {
            Self::Replace => 1,
            Self::Swap => 2,
        }
    }
}

/// What finding an exchange takes, kept for the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// How many loads there are (K).
    num_cases: usize,
    /// The slots whose expert has others.
    shared: Vec<u32>,
    /// The sets that hold a slot's expert alone if it leaves, `[R, K]`.
    leaving: Vec<u64>,
    candidates: Vec<Candidate>,
    /// The least that each candidate could be worth under each load, `[candidates, K]`.
    bounds: Vec<f32>,
    /// How many exchanges were looked at since a step was last taken for it.
    looks: u32,
}

/// An exchange that may help.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    exchange: Exchange,
    /// The least that the layer could be worth then; infinite once that was found to be too much.
    bound: f32,
}

/// The exchange after which a layer is worth least, among those that gain more than `least_gain` and
/// with which no more than `max_moves` are made.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
pub(super) fn find(
    kind: Kind,
    layer: &mut Layer,
    worth: &mut Worth,
    max_moves: usize,
    least_gain: f32,
    fuel: &mut Fuel,
    scratch: &mut Scratch,
) -> Option<Exchange> {
    let mut least = worth.value() - least_gain.max(LEAST_GAIN);
    let mut found = None;
    scratch.begin(layer, worth);
    let mut collect = Collect {
        layer,
        worth,
        scratch,
        fuel,
        max_moves,
        limit: least,
    };
    match kind {
        Kind::Replace => collect.replacements(),
        Kind::Swap => collect.swaps(),
    }
    while let Some(best) = scratch.best(least)
        && fuel.step()
    {
        let bounds = &scratch.bounds[best * scratch.num_cases..][..scratch.num_cases];
        let exchange = scratch.candidates[best].exchange;
        let back = layer.make(exchange);
        let value = worth.after(layer, bounds, least);
        layer.make(back);
        scratch.candidates[best].bound = f32::INFINITY;
        worth.keep_found(layer, |case, index, set| {
            scratch.raise(layer, case, index, set);
        });
        if value < least {
            found = Some(exchange);
            least = value - LEAST_GAIN;
        }
    }
    found
}

/// Collects the exchanges whose bound is below a limit.
struct Collect<'a> {
    layer: &'a Layer,
    worth: &'a Worth,
    scratch: &'a mut Scratch,
    fuel: &'a mut Fuel,
    max_moves: usize,
    limit: f32,
}

impl Collect<'_> {
    #[inline(always)]
    fn replacements(&mut self) {
        for expert in 0..self.layer.num_experts() {
            if !self.suspects(expert) {
                continue;
            }
            for place in 0..self.scratch.shared.len() {
                let (slot, expert) = (self.scratch.shared[place], expert as u32);
                self.consider(expert, slot, Exchange::Replace { slot, expert });
            }
        }
    }

    #[inline(always)]
    fn swaps(&mut self) {
        for expert in 0..self.layer.num_experts() {
            if !self.suspects(expert) {
                continue;
            }
            for &a in self.layer.places(expert) {
                for b in 0..self.layer.ranks().len() as u32 {
                    // Of a swap of two such experts, once.
                    let exchange = Exchange::Swap { a, b };
                    let once = a < b || !self.suspects(self.layer.expert(b));
                    if once && self.relieves(exchange) {
                        self.consider(expert as u32, b, exchange);
                    }
                }
            }
        }
    }

    /// Whether the tight ranks of some load hold an expert alone.
    #[inline(always)]
    fn suspects(&self, expert: usize) -> bool {
        let mut cases = self.worth.cases.iter();
        cases.any(|case| case.sets.suspects(expert))
    }

    /// Whether the tight sets leave an exchange a chance, which most swaps do not have.
    #[inline(always)]
    fn relieves(&self, exchange: Exchange) -> bool {
        let mut bound = 0.0;
        for (index, case) in self.worth.cases.iter().enumerate() {
            let shifts = self.scratch.shifts(self.layer, case, index, exchange);
            bound += case.weight * case.sets.tight_mean(&shifts).max(1.0);
        }
        bound < self.limit
    }

    /// Notes an exchange by which an expert comes to a slot, if it may help.
    #[inline(always)]
    fn consider(&mut self, expert: u32, slot: u32, exchange: Exchange) {
        if !self.layer.allows(exchange) || self.fuel.is_empty() {
            return;
        }
        let rank = self.layer.rank(slot as usize);
        let relieves =
            |case: &Case| case.sets.suspects(expert as usize) && case.sets.is_outside(rank);
        let moves = self.layer.num_moves() as i32 + self.layer.more_moves(exchange);
        if moves > self.max_moves as i32 || !self.worth.cases.iter().any(relieves) {
            return;
        }
        self.scratch.looks += 1;
        if self.scratch.looks == LOOKS_PER_STEP {
            self.scratch.looks = 0;
            self.fuel.step();
        }
        let mut bound = 0.0;
        for (index, case) in self.worth.cases.iter().enumerate() {
            let shifts = self.scratch.shifts(self.layer, case, index, exchange);
            let largest = case.sets.largest(&shifts);
            self.scratch.bounds.push(largest);
            bound += case.weight * largest;
        }
        if bound < self.limit {
            let candidate = Candidate { exchange, bound };
            self.scratch.candidates.push(candidate);
        } else {
            let kept = self.scratch.candidates.len() * self.scratch.num_cases;
            self.scratch.bounds.truncate(kept);
        }
    }
}

impl Scratch {
    /// Forgets what was collected, and looks at the layer as it is now.
    #[inline(always)]
    fn begin(&mut self, layer: &Layer, worth: &Worth) {
        self.num_cases = worth.cases.len();
        let is_shared = |&slot: &u32| layer.count(layer.expert(slot)) > 1;
        self.shared.clear();
        self.shared
            .extend((0..layer.ranks().len() as u32).filter(is_shared));
        self.candidates.clear();
        self.bounds.clear();
        self.leaving.clear();
        self.leaving.resize(layer.ranks().len() * self.num_cases, 0);
        for (index, case) in worth.cases.iter().enumerate() {
            self.look(layer, case, index);
        }
    }

    #[inline(always)]
    fn look(&mut self, layer: &Layer, case: &Case, index: usize) {
        let leaving = self.leaving[index..].iter_mut().step_by(self.num_cases);
        for (slot, leaving) in (0..).zip(leaving) {
            *leaving = case.sets.leaving(layer, slot);
        }
    }

    /// What an exchange does to the sets of one load.
    #[inline(always)]
    fn shifts(&self, layer: &Layer, case: &Case, index: usize, exchange: Exchange) -> [Shift; 2] {
        let sets = &case.sets;
        let leaving = |slot: u32| self.leaving[slot as usize * self.num_cases + index];
        let within = |slot: u32| sets.within(layer.rank(slot as usize));
        let experts = layer.concerned(exchange);
        let after = match exchange {
            Exchange::Replace { slot, .. } => {
                [leaving(slot), sets.alone(experts[1]) & within(slot)]
            }
            Exchange::Swap { a, b } => [leaving(a) & within(b), leaving(b) & within(a)],
        };
        [0, 1].map(|which| {
            let expert = experts[which];
            Shift::new(case.loads[expert], sets.alone(expert), after[which])
        })
    }

    /// Raises bounds to what a set shows that was found for one of the loads.
    #[inline(always)]
    fn raise(&mut self, layer: &Layer, case: &Case, index: usize, set: usize) {
        self.look(layer, case, index);
        for place in 0..self.candidates.len() {
            let Candidate { exchange, bound } = self.candidates[place];
            let shifts = self.shifts(layer, case, index, exchange);
            let raised = case.sets.mean(set, &shifts);
            let of_case = &mut self.bounds[place * self.num_cases + index];
            if raised > *of_case {
                self.candidates[place].bound = bound + case.weight * (raised - *of_case);
                *of_case = raised;
            }
        }
    }

    /// The candidate of the least bound below `limit`, the first of several.
    #[inline(always)]
    fn best(&self, limit: f32) -> Option<usize> {
        let mut best = (limit, None);
        for (place, candidate) in self.candidates.iter().enumerate() {
            if candidate.bound < best.0 {
                best = (candidate.bound, Some(place));
            }
        }
        best.1
    }
}

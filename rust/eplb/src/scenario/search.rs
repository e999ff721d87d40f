//! Exchanges that make a layer better in its scenarios, one after another.

use multiversion::multiversion;

use super::cuts::Cuts;
use super::even::Even;
use super::layer::{Exchange, Layer};
use super::rows::{Change, Futures};
use crate::balance::Fuel;

/// What a placement is worth in the scenarios; less is better.
pub(super) trait Judge {
    /// The most rows its table may have.
    fn capacity(&self) -> usize;

    /// What the placement is worth after a change: exactly, or a bound below.
    fn value(&self, futures: &Futures, change: &Change) -> f32;

    /// Looks at what is worst now.
    fn look(&mut self, layer: &Layer, futures: &Futures);

    /// Whether an exchange relieves what was worst at the last look.
    fn may_help(&self, layer: &Layer, exchange: Exchange) -> bool;

    /// Writes what an exchange would change.
    fn change(&self, layer: &Layer, exchange: Exchange, change: &mut Change);

    /// Takes note of an exchange that was made, which concerned these experts.
    fn made(&mut self, layer: &Layer, futures: &Futures, experts: [usize; 2]);

    /// Makes [`value`](Self::value) exact for the placement as it is, or shows that it is above
    /// the limit. Returns whether that took new rows.
    fn settle(&mut self, layer: &Layer, futures: &Futures, limit: f32) -> bool;
}

/// How many exchanges are tried after each look at all of them.
const TRIED: usize = 100;

/// What an exchange must gain at least, as a part of the mean rank load.
const LEAST_GAIN: f32 = 1e-5;

/// What it must gain for each move.
const GAIN_PER_MOVE: f32 = 1e-4;

/// Looking at so many exchanges costs as much as trying one.
const LOOKS_PER_STEP: usize = 64;

/// How many slots may hold another expert than at first.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_moves: usize,
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
pub(super) fn improve_even(
    layer: &mut Layer,
    futures: &Futures,
    limits: Limits,
    fuel: &mut Fuel,
    scratch: &mut Scratch,
) {
    let judge = Even::new(layer, futures);
    improve(layer, futures, judge, limits, fuel, scratch);
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
pub(super) fn improve_shared(
    layer: &mut Layer,
    futures: &Futures,
    limits: Limits,
    fuel: &mut Fuel,
    scratch: &mut Scratch,
) {
    let judge = Cuts::new(layer, futures);
    improve(layer, futures, judge, limits, fuel, scratch);
}

/// Candidates, kept between looks.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    candidates: Vec<(f32, Exchange)>,
}

#[inline(always)]
fn improve<J: Judge>(
    layer: &mut Layer,
    futures: &Futures,
    judge: J,
    limits: Limits,
    fuel: &mut Fuel,
    scratch: &mut Scratch,
) {
    let mut search = Search {
        change: Change::with_capacity(judge.capacity()),
        layer,
        futures,
        judge,
        limits,
    };
    while search.look(fuel, &mut scratch.candidates) {
        for &(_, exchange) in &scratch.candidates {
            if !fuel.step() {
                return;
            }
            search.attempt(exchange);
        }
    }
}

struct Search<'a, J> {
    layer: &'a mut Layer,
    futures: &'a Futures,
    judge: J,
    limits: Limits,
    change: Change,
}

impl<J: Judge> Search<'_, J> {
    /// Lists the exchanges that gain most, best first; false if none does.
    #[inline(always)]
    fn look(&mut self, fuel: &mut Fuel, candidates: &mut Vec<(f32, Exchange)>) -> bool {
        self.judge.look(self.layer, self.futures);
        let now = self.judge.value(self.futures, &self.change);
        candidates.clear();
        let num_slots = self.layer.ranks().len() as u32;
        let num_experts = self.layer.num_experts() as u32;
        let mut looks = 0;
        for a in 0..num_slots {
            let swaps = (a + 1..num_slots).map(|b| Exchange::Swap { a, b });
            let replaces = (0..num_experts).map(|expert| Exchange::Replace { slot: a, expert });
            let single = self.layer.count(self.layer.expert(a)) == 1;
            let replaces = replaces.take(if single { 0 } else { num_experts as usize });
            for exchange in replaces.chain(swaps) {
                if !self.judge.may_help(self.layer, exchange) {
                    continue;
                }
                let Some(most) = self.most(now, exchange) else {
                    continue;
                };
                let value = self.value_after(exchange);
                if value < most {
                    candidates.push((most - value, exchange));
                }
                looks += 1;
                if looks % LOOKS_PER_STEP == 0 && !fuel.step() {
                    break;
                }
            }
        }
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
        candidates.truncate(TRIED);
        !candidates.is_empty()
    }

    /// Below what the value must come for an exchange to be made; none if it may not be.
    #[inline(always)]
    fn most(&self, now: f32, exchange: Exchange) -> Option<f32> {
        if !self.layer.allows(exchange) {
            return None;
        }
        let more = self.layer.more_moves(exchange);
        let moves = self.layer.num_moves() as i32 + more;
        if more > 0 && moves > self.limits.max_moves as i32 {
            return None;
        }
        Some(now - LEAST_GAIN - GAIN_PER_MOVE * more as f32)
    }

    #[inline(always)]
    fn value_after(&mut self, exchange: Exchange) -> f32 {
        self.judge.change(self.layer, exchange, &mut self.change);
        let value = self.judge.value(self.futures, &self.change);
        self.change.clear();
        value
    }

    /// Makes an exchange if it still gains.
    #[inline(always)]
    fn attempt(&mut self, exchange: Exchange) {
        let now = self.judge.value(self.futures, &self.change);
        let Some(most) = self.most(now, exchange) else {
            return;
        };
        if self.value_after(exchange) >= most {
            return;
        }
        let experts = self.change.experts;
        let back = self.layer.make(exchange);
        self.judge.made(self.layer, self.futures, experts);
        let more = self.judge.settle(self.layer, self.futures, most);
        let value = self.judge.value(self.futures, &self.change);
        // New rows say more of the placement before, too.
        let most = if more {
            most - now + self.value_after(back)
        } else {
            most
        };
        if value >= most {
            self.layer.make(back);
            self.judge.made(self.layer, self.futures, experts);
        }
    }
}

//! Exchanges that make a layer better in its scenarios, one after another.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use multiversion::multiversion;

use super::even::Even;
use super::layer::{Exchange, Layer};
use super::rows::{Change, Futures};
use crate::balance::Fuel;

/// What a placement is worth in the scenarios; less is better.
pub(super) trait Judge {
    /// The most rows its table may have.
    fn capacity(&self) -> usize;

    /// What a placement of even ranks is worth.
    fn ideal(&self) -> f32;

    /// What the placement is worth, if it is settled; else a bound below.
    fn value(&self, futures: &Futures) -> f32;

    /// A bound below for what it is worth after a change.
    fn bound(&self, futures: &Futures, change: &Change) -> f32;

    /// Looks at what is worst now.
    fn look(&mut self, layer: &Layer, futures: &Futures);

    /// Whether what was worst at the last look would be relieved if an expert were elsewhere, too.
    fn suspects(&self, layer: &Layer, expert: usize) -> bool;

    /// Whether it would be relieved if a slot held any other expert.
    fn sheds(&self, layer: &Layer, slot: u32) -> bool;

    /// Writes what an exchange would change.
    fn change(&self, layer: &Layer, exchange: Exchange, change: &mut Change);

    /// Takes note of an exchange that was made, which concerned these experts.
    fn made(&mut self, layer: &Layer, futures: &Futures, experts: [usize; 2]);

    /// Makes [`value`](Self::value) exact for the placement as it is, or shows that it is above
    /// the limit.
    fn settle(&mut self, layer: &Layer, futures: &Futures, limit: f32);
}

/// What an exchange must gain at least, as a part of what the layer loses at first to ranks not
/// being even, and in any case, for the rounding of sums.
const LEAST_PART: f32 = 1e-4;
const LEAST_GAIN: f32 = 2e-6;

/// What as many moves as there may be must gain together, as the same part: so much for each as to
/// spend them well.
const PART_OF_ALL_MOVES: f32 = 0.05;

/// Looking at so many exchanges costs about as much as trying one.
const LOOKS_PER_STEP: u32 = 64;

/// What a search may change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// How many experts may arrive on a rank that did not hold them.
    pub(super) max_moves: usize,
}

/// An exchange that was made: what the layer was worth afterwards, and in how many moves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Made {
    pub(super) exchange: Exchange,
    pub(super) num_moves: usize,
    pub(super) value: f32,
}

/// What a search uses and leaves behind.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// What may gain, and how much it did when that was seen last: most, then listed first, first.
    candidates: Vec<Exchange>,
    queue: BinaryHeap<(u32, Reverse<u32>)>,
    suspects: Vec<u32>,
    /// What the layer was worth at first, and all exchanges made.
    pub(super) first: f32,
    pub(super) path: Vec<Made>,
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

#[inline(always)]
fn improve<J: Judge>(
    layer: &mut Layer,
    futures: &Futures,
    judge: J,
    limits: Limits,
    fuel: &mut Fuel,
    scratch: &mut Scratch,
) {
    scratch.first = judge.value(futures);
    scratch.path.clear();
    let lost = scratch.first - judge.ideal();
    let mut search = Search {
        change: Change::with_capacity(judge.capacity()),
        least_gain: LEAST_GAIN + LEAST_PART * lost,
        gain_per_move: PART_OF_ALL_MOVES * lost / limits.max_moves.max(1) as f32,
        looks: 0,
        layer,
        futures,
        judge,
        limits,
        scratch,
    };
    search.descend(fuel);
}

struct Search<'a, J> {
    layer: &'a mut Layer,
    futures: &'a Futures,
    judge: J,
    limits: Limits,
    least_gain: f32,
    gain_per_move: f32,
    /// How many exchanges were looked at since a step was last taken for it.
    looks: u32,
    change: Change,
    scratch: &'a mut Scratch,
}

impl<J: Judge> Search<'_, J> {
    /// Makes exchanges until none helps.
    #[inline(always)]
    fn descend(&mut self, fuel: &mut Fuel) {
        loop {
            self.look(fuel);
            if self.scratch.queue.is_empty() {
                return;
            }
            while let Some((_, Reverse(index))) = self.scratch.queue.pop() {
                if fuel.is_empty() {
                    return;
                }
                // What has become worth less than the next waits for its turn.
                let exchange = self.scratch.candidates[index as usize];
                let Some(gain) = self.gain(exchange, fuel) else {
                    continue;
                };
                let next = self.scratch.queue.peek();
                if next.is_some_and(|&next| next > (gain, Reverse(index))) {
                    self.scratch.queue.push((gain, Reverse(index)));
                } else {
                    fuel.step();
                    self.attempt(exchange);
                }
            }
        }
    }

    /// Queues the exchanges that gain.
    #[inline(always)]
    fn look(&mut self, fuel: &mut Fuel) {
        self.judge.look(self.layer, self.futures);
        let num_experts = self.layer.num_experts() as u32;
        let num_slots = self.layer.ranks().len() as u32;
        self.scratch.candidates.clear();
        self.scratch.queue.clear();
        self.scratch.suspects.clear();
        let suspects =
            (0..num_experts).filter(|&expert| self.judge.suspects(self.layer, expert as usize));
        self.scratch.suspects.extend(suspects);
        for index in 0..self.scratch.suspects.len() {
            let expert = self.scratch.suspects[index];
            for slot in 0..num_slots {
                self.consider(Exchange::Replace { slot, expert }, fuel);
            }
            for place in 0..self.layer.count(expert as usize) {
                let a = self.layer.places(expert as usize)[place];
                for b in 0..num_slots {
                    // Of a swap of two suspects, once.
                    if a < b || !self.judge.suspects(self.layer, self.layer.expert(b)) {
                        self.consider(Exchange::Swap { a, b }, fuel);
                    }
                }
            }
        }
        for slot in 0..num_slots {
            if self.judge.sheds(self.layer, slot) && self.layer.count(self.layer.expert(slot)) > 1 {
                for expert in 0..num_experts {
                    if !self.judge.suspects(self.layer, expert as usize) {
                        self.consider(Exchange::Replace { slot, expert }, fuel);
                    }
                }
            }
        }
    }

    /// Queues an exchange if it gains.
    #[inline(always)]
    fn consider(&mut self, exchange: Exchange, fuel: &mut Fuel) {
        if fuel.is_empty() {
            return;
        }
        if let Some(gain) = self.gain(exchange, fuel) {
            let index = self.scratch.candidates.len() as u32;
            self.scratch.candidates.push(exchange);
            self.scratch.queue.push((gain, Reverse(index)));
        }
    }

    /// How much more than it must an exchange gains at most, or each of its moves, as the bits of a number above zero,
    /// which are in its order; none if it does not, or may not be made.
    #[inline(always)]
    fn gain(&mut self, exchange: Exchange, fuel: &mut Fuel) -> Option<u32> {
        let most = self.most(self.judge.value(self.futures), exchange)?;
        self.looks += 1;
        if self.looks == LOOKS_PER_STEP {
            self.looks = 0;
            fuel.step();
        }
        // Moves are handed out over layers: what counts is what each gains.
        let gain = most - self.bound_after(exchange);
        let gain = gain / self.layer.more_moves(exchange).max(1) as f32;
        (gain > 0.0).then_some(gain.to_bits())
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
        Some(now - self.least_gain - self.gain_per_move * more as f32)
    }

    #[inline(always)]
    fn bound_after(&mut self, exchange: Exchange) -> f32 {
        self.judge.change(self.layer, exchange, &mut self.change);
        let value = self.judge.bound(self.futures, &self.change);
        self.change.clear();
        value
    }

    /// Makes an exchange if it gains.
    #[inline(always)]
    fn attempt(&mut self, exchange: Exchange) {
        let now = self.judge.value(self.futures);
        let Some(most) = self.most(now, exchange) else {
            return;
        };
        let back = self.make(exchange);
        self.judge.settle(self.layer, self.futures, most);
        let value = self.judge.value(self.futures);
        if value >= most {
            self.make(back);
            return;
        }
        self.scratch.path.push(Made {
            exchange,
            num_moves: self.layer.num_moves(),
            value,
        });
    }

    #[inline(always)]
    fn make(&mut self, exchange: Exchange) -> Exchange {
        let experts = self.layer.concerned(exchange);
        let back = self.layer.make(exchange);
        self.judge.made(self.layer, self.futures, experts);
        back
    }
}

//! Exchanges that each help by themselves, those that gain most first: so moves can be handed out
//! over layers. For tokens that are split evenly.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use multiversion::multiversion;

use super::account::Account;
use super::layer::{Exchange, Layer};
use super::paths::{Made, Path};
use super::rows::Futures;
use crate::balance::Fuel;

/// What an exchange must gain at least, as a part of what the layer is worth at first, and in any
/// case, for the rounding of sums.
const LEAST_PART: f32 = 1e-4;
const LEAST_GAIN: f32 = 2e-6;

/// What as many moves as there may be must gain together, as the same part: so much for each as to
/// spend them well.
const PART_OF_ALL_MOVES: f32 = 0.05;

/// So many exchanges that are looked at are a step.
const LOOKS_PER_STEP: u32 = 64;

/// Makes exchanges until none helps, or there is no more fuel; notes them in the layer's path.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
pub(super) fn descend(
    layer: &mut Layer,
    futures: &Futures,
    max_moves: usize,
    fuel: &mut Fuel,
    path: &mut Path,
) {
    let account = Account::<false>::new(layer, futures);
    let first = account.worth();
    let mut search = Search {
        max_moves: max_moves as i32,
        least_gain: LEAST_GAIN + LEAST_PART * first,
        gain_per_move: PART_OF_ALL_MOVES * first / max_moves.max(1) as f32,
        heaviest: vec![false; layer.num_ranks()],
        candidates: Vec::new(),
        queue: BinaryHeap::new(),
        looks: 0,
        made: Vec::new(),
        layer,
        futures,
        account,
    };
    search.descend(fuel);
    path.take(first, &search.made);
}

struct Search<'a> {
    layer: &'a mut Layer,
    futures: &'a Futures,
    account: Account<false>,
    max_moves: i32,
    least_gain: f32,
    gain_per_move: f32,
    /// Whether a rank was the heaviest in some scenario at the last look.
    heaviest: Vec<bool>,
    /// What may gain, and how much it did when that was seen last: most, then listed first, first.
    candidates: Vec<Exchange>,
    queue: BinaryHeap<(u32, Reverse<u32>)>,
    /// How many exchanges were looked at since a step was last taken for it.
    looks: u32,
    made: Vec<Made>,
}

impl Search<'_> {
    #[inline(always)]
    fn descend(&mut self, fuel: &mut Fuel) {
        loop {
            self.look(fuel);
            if self.queue.is_empty() {
                return;
            }
            while let Some((_, Reverse(index))) = self.queue.pop() {
                if fuel.is_empty() {
                    return;
                }
                // What has become worth less than the next waits for its turn.
                let exchange = self.candidates[index as usize];
                let Some(gain) = self.gain(exchange, fuel) else {
                    continue;
                };
                let next = self.queue.peek();
                if next.is_some_and(|&next| next > (gain, Reverse(index))) {
                    self.queue.push((gain, Reverse(index)));
                } else {
                    fuel.step();
                    self.attempt(exchange);
                }
            }
        }
    }

    /// Queues the exchanges that gain, of those that relieve one of the heaviest ranks.
    #[inline(always)]
    fn look(&mut self, fuel: &mut Fuel) {
        self.account.mark_heaviest(self.futures, &mut self.heaviest);
        self.candidates.clear();
        self.queue.clear();
        let num_experts = self.layer.num_experts() as u32;
        let num_slots = self.layer.ranks().len() as u32;
        for expert in 0..num_experts {
            if !self.burdens(expert as usize) {
                continue;
            }
            for slot in 0..num_slots {
                self.consider(Exchange::Replace { slot, expert }, fuel);
            }
            for place in 0..self.layer.count(expert as usize) {
                let a = self.layer.places(expert as usize)[place];
                for b in 0..num_slots {
                    // Of a swap of two that burden one, once.
                    if a < b || !self.burdens(self.layer.expert(b)) {
                        self.consider(Exchange::Swap { a, b }, fuel);
                    }
                }
            }
        }
        for slot in 0..num_slots {
            if self.heaviest[self.layer.rank(slot as usize)] {
                for expert in 0..num_experts {
                    if !self.burdens(expert as usize) {
                        self.consider(Exchange::Replace { slot, expert }, fuel);
                    }
                }
            }
        }
    }

    /// Whether an expert is on one of the heaviest ranks.
    #[inline(always)]
    fn burdens(&self, expert: usize) -> bool {
        let mut places = self.layer.places(expert).iter();
        places.any(|&slot| self.heaviest[self.layer.rank(slot as usize)])
    }

    /// Queues an exchange if it gains.
    #[inline(always)]
    fn consider(&mut self, exchange: Exchange, fuel: &mut Fuel) {
        if fuel.is_empty() {
            return;
        }
        if let Some(gain) = self.gain(exchange, fuel) {
            let index = self.candidates.len() as u32;
            self.candidates.push(exchange);
            self.queue.push((gain, Reverse(index)));
        }
    }

    /// How much more than it must an exchange gains, or each of its moves, as the bits of a number
    /// above zero, which are in its order; none if it does not, or may not be made.
    #[inline(always)]
    fn gain(&mut self, exchange: Exchange, fuel: &mut Fuel) -> Option<u32> {
        let limit = self.limit(exchange)?;
        self.looks += 1;
        if self.looks == LOOKS_PER_STEP {
            self.looks = 0;
            fuel.step();
        }
        let after = self.account.after(self.layer, self.futures, exchange);
        // Moves are handed out over layers: what counts is what each gains.
        let gain = (limit - after) / self.layer.more_moves(exchange).max(1) as f32;
        (gain > 0.0).then_some(gain.to_bits())
    }

    /// Below what the worth must come for an exchange to be made; none if it may not be.
    #[inline(always)]
    fn limit(&self, exchange: Exchange) -> Option<f32> {
        if !self.layer.allows(exchange) {
            return None;
        }
        let more = self.layer.more_moves(exchange);
        if more > 0 && self.layer.num_moves() as i32 + more > self.max_moves {
            return None;
        }
        Some(self.account.worth() - self.least_gain - self.gain_per_move * more as f32)
    }

    /// Makes an exchange if it gains.
    #[inline(always)]
    fn attempt(&mut self, exchange: Exchange) {
        let Some(limit) = self.limit(exchange) else {
            return;
        };
        if self
            .account
            .attempt(self.layer, self.futures, exchange, limit)
        {
            self.made.push(Made {
                exchange,
                num_moves: self.layer.num_moves(),
                value: self.account.worth(),
            });
        }
    }
}

//! What slots and ranks carry in each scenario, while exchanges are tried.

mod pour;

use super::layer::{Exchange, Layer};
use super::rows::{Futures, LANES, Row, squares};

/// How often all shared experts are poured at first, at most, and after an exchange.
const SWEEPS_AT_FIRST: usize = 32;
const SWEEPS_AFTER: usize = 2;

/// How often the experts around an exchange are poured before it is given up.
const SWEEPS_IN_TRIAL: usize = 4;

/// A trial is given up where more is missing than in so many times the usual one that came to
/// a good end; what is usual is an average over about so many.
const HOPE: f32 = 4.0;
const MEMORY: f32 = 8.0;

/// The tokens of slots and ranks in all scenarios, and what the placement is worth: the squares of
/// what ranks carry above the mean, the sum over ranks in the weighted mean over scenarios.
///
/// The largest rank load alone would say nothing of exchanges between other ranks, one of which is
/// the largest when the next load is a little different, and has plateaus where several are.
///
/// With `SHARES`, tokens are split so as to make these squares least. That split makes the largest
/// rank load least, then the next, and so on: no expert's tokens can flow to a rank that carries
/// less. It is found, for all scenarios side by side, by pouring one expert after another over its
/// ranks like water, and mended around each exchange in the same way. So a placement may be worth
/// a little more than it is said to be, never less.
#[derive(Debug)]
pub(super) struct Account<const SHARES: bool> {
    num_blocks: usize,
    /// The tokens of each slot, `[R, blocks]`, and of each rank, `[D, blocks]`.
    parts: Vec<Row>,
    ranks: Vec<Row>,
    /// What each rank adds to the worth, and their sum.
    squares: Vec<f32>,
    worth: f32,
    trial: Trial,
}

/// What the exchange on trial has touched, and what was there before.
#[derive(Debug)]
struct Trial {
    number: u32,
    sweep: u32,
    ranks: Vec<u32>,
    slots: Vec<u32>,
    /// As in the account, where touched.
    rank_rows: Vec<Row>,
    slot_rows: Vec<Row>,
    squares: Vec<f32>,
    /// The trial in which each rank and slot was last touched, the sweep in which each expert was
    /// last poured.
    rank_touched: Vec<u32>,
    slot_touched: Vec<u32>,
    poured: Vec<u32>,
    /// What was missing before each sweep in trials that came to a good end, on average.
    usual: [f32; SWEEPS_IN_TRIAL],
    /// The ranks of an expert that has many.
    hosts: Vec<(u32, u32)>,
}

impl<const SHARES: bool> Account<SHARES> {
    #[inline(always)]
    pub(super) fn new(layer: &Layer, futures: &Futures) -> Self {
        let (num_ranks, num_slots) = (layer.num_ranks(), layer.ranks().len());
        let num_blocks = futures.num_blocks();
        let mut account = Self {
            num_blocks,
            parts: vec![[0.0; LANES]; num_slots * num_blocks],
            ranks: vec![[0.0; LANES]; num_ranks * num_blocks],
            squares: vec![0.0; num_ranks],
            worth: 0.0,
            trial: Trial {
                number: 0,
                sweep: 0,
                ranks: Vec::with_capacity(num_ranks),
                slots: Vec::with_capacity(num_slots),
                rank_rows: vec![[0.0; LANES]; num_ranks * num_blocks],
                slot_rows: vec![[0.0; LANES]; num_slots * num_blocks],
                squares: vec![0.0; num_ranks],
                rank_touched: vec![0; num_ranks],
                slot_touched: vec![0; num_slots],
                poured: vec![0; layer.num_experts()],
                usual: [f32::INFINITY; SWEEPS_IN_TRIAL],
                hosts: Vec::with_capacity(num_slots),
            },
        };
        for expert in 0..layer.num_experts() {
            account.pour(layer, futures, expert);
        }
        account.sum(layer, futures);
        let mut before = f32::INFINITY;
        for _ in 0..if SHARES { SWEEPS_AT_FIRST } else { 0 } {
            if account.worth > before * 0.999 {
                break;
            }
            before = account.worth;
            account.sweep(layer, futures);
            account.sum(layer, futures);
        }
        account
    }

    /// What the placement is worth; less is better, and 0 the best.
    pub(super) fn worth(&self) -> f32 {
        self.worth
    }

    /// Makes an exchange if the placement is worth less than the limit then; says whether.
    #[inline(always)]
    pub(super) fn attempt(
        &mut self,
        layer: &mut Layer,
        futures: &Futures,
        exchange: Exchange,
        limit: f32,
    ) -> bool {
        let back = self.put_on_trial(layer, futures, exchange);
        let mut missing = self.worth_on_trial(futures) - limit;
        let mut course = [0.0; SWEEPS_IN_TRIAL];
        for sweep in 0..if SHARES { SWEEPS_IN_TRIAL } else { 0 } {
            if missing < 0.0 || missing > HOPE * self.trial.usual[sweep] {
                break;
            }
            course[sweep] = missing;
            self.spread(layer, futures);
            missing = self.worth_on_trial(futures) - limit;
        }
        if missing >= 0.0 {
            layer.make(back);
            self.take_back();
            return false;
        }
        for (usual, missing) in self.trial.usual.iter_mut().zip(course) {
            if missing > 0.0 {
                let known = if *usual == f32::INFINITY {
                    missing
                } else {
                    *usual
                };
                *usual = known + (missing - known) / MEMORY;
            }
        }
        if SHARES {
            for _ in 0..SWEEPS_AFTER {
                self.sweep(layer, futures);
            }
        }
        self.sum(layer, futures);
        true
    }

    /// What the placement is worth after an exchange, the tokens of other experts as they are.
    #[inline(always)]
    pub(super) fn after(
        &mut self,
        layer: &mut Layer,
        futures: &Futures,
        exchange: Exchange,
    ) -> f32 {
        let back = self.put_on_trial(layer, futures, exchange);
        let worth = self.worth_on_trial(futures);
        layer.make(back);
        self.take_back();
        worth
    }

    /// Makes an exchange on trial, pouring the two experts that it concerns; returns the one that
    /// takes it back.
    #[inline(always)]
    fn put_on_trial(
        &mut self,
        layer: &mut Layer,
        futures: &Futures,
        exchange: Exchange,
    ) -> Exchange {
        self.trial.number += 1;
        self.trial.ranks.clear();
        self.trial.slots.clear();
        if !SHARES && let Exchange::Swap { a, b } = exchange {
            // Shares stay as they are, and so does all else.
            let slots = [a, b].map(|slot| slot as usize);
            slots.iter().for_each(|&slot| self.touch_slot(layer, slot));
            let back = layer.make(exchange);
            for slot in slots {
                self.fill(layer, futures, slot);
            }
            return back;
        }
        let experts = layer.concerned(exchange);
        for expert in experts {
            self.touch(layer, expert);
            self.lift(layer, expert);
        }
        let back = layer.make(exchange);
        for expert in experts {
            self.touch(layer, expert);
            self.pour(layer, futures, expert);
        }
        back
    }

    /// Marks the ranks that are the heaviest in some scenario.
    #[inline(always)]
    pub(super) fn mark_heaviest(&self, futures: &Futures, marks: &mut [bool]) {
        marks.fill(false);
        for scenario in 0..futures.num_scenarios {
            let (block, lane) = (scenario / LANES, scenario % LANES);
            let mut heaviest = (0.0, 0);
            for rank in 0..marks.len() {
                let load = self.ranks[rank * self.num_blocks + block][lane];
                if load > heaviest.0 {
                    heaviest = (load, rank);
                }
            }
            marks[heaviest.1] = true;
        }
    }

    /// Sums ranks and squares anew: what was added and taken away has left rounding behind.
    #[inline(always)]
    fn sum(&mut self, layer: &Layer, futures: &Futures) {
        self.worth = 0.0;
        for rank in 0..self.squares.len() {
            self.squares[rank] = 0.0;
            for block in 0..self.num_blocks {
                let mut sum = [0.0; LANES];
                for slot in layer.slots(rank) {
                    let part = &self.parts[slot as usize * self.num_blocks + block];
                    for lane in 0..LANES {
                        sum[lane] += part[lane];
                    }
                }
                self.ranks[rank * self.num_blocks + block] = sum;
                self.squares[rank] += squares(&sum, &futures.weights[block]);
            }
            self.worth += self.squares[rank];
        }
    }

    /// What the placement is worth with the exchange on trial.
    #[inline(always)]
    fn worth_on_trial(&mut self, futures: &Futures) -> f32 {
        let mut worth = self.worth;
        for &rank in &self.trial.ranks {
            let rank = rank as usize;
            let mut sum = 0.0;
            for (block, weights) in futures.weights.iter().enumerate() {
                sum += squares(&self.ranks[rank * self.num_blocks + block], weights);
            }
            self.squares[rank] = sum;
            worth += sum - self.trial.squares[rank];
        }
        worth
    }

    /// Pours every expert that has several slots, once.
    #[inline(always)]
    fn sweep(&mut self, layer: &Layer, futures: &Futures) {
        for expert in 0..layer.num_experts() {
            if layer.count(expert) > 1 {
                self.pour(layer, futures, expert);
            }
        }
    }

    /// Pours what the ranks touched so far share with others, once.
    #[inline(always)]
    fn spread(&mut self, layer: &Layer, futures: &Futures) {
        self.trial.sweep += 1;
        for index in 0..self.trial.ranks.len() {
            let rank = self.trial.ranks[index] as usize;
            for slot in layer.slots(rank) {
                let expert = layer.expert(slot);
                if layer.count(expert) > 1 && self.trial.poured[expert] != self.trial.sweep {
                    self.trial.poured[expert] = self.trial.sweep;
                    self.touch(layer, expert);
                    self.pour(layer, futures, expert);
                }
            }
        }
    }

    /// Remembers what the slots of an expert and their ranks carry.
    #[inline(always)]
    fn touch(&mut self, layer: &Layer, expert: usize) {
        for &slot in layer.places(expert) {
            self.touch_slot(layer, slot as usize);
        }
    }

    #[inline(always)]
    fn touch_slot(&mut self, layer: &Layer, slot: usize) {
        let trial = &mut self.trial;
        if trial.slot_touched[slot] == trial.number {
            return;
        }
        trial.slot_touched[slot] = trial.number;
        trial.slots.push(slot as u32);
        copy(&self.parts, &mut trial.slot_rows, slot, self.num_blocks);
        let rank = layer.rank(slot);
        if trial.rank_touched[rank] != trial.number {
            trial.rank_touched[rank] = trial.number;
            trial.ranks.push(rank as u32);
            copy(&self.ranks, &mut trial.rank_rows, rank, self.num_blocks);
            trial.squares[rank] = self.squares[rank];
        }
    }

    #[inline(always)]
    fn take_back(&mut self) {
        let trial = &self.trial;
        for &slot in &trial.slots {
            copy(
                &trial.slot_rows,
                &mut self.parts,
                slot as usize,
                self.num_blocks,
            );
        }
        for &rank in &trial.ranks {
            let rank = rank as usize;
            copy(&trial.rank_rows, &mut self.ranks, rank, self.num_blocks);
            self.squares[rank] = trial.squares[rank];
        }
    }
}

/// Copies the rows of one slot or rank.
#[inline(always)]
fn copy(from: &[Row], to: &mut [Row], index: usize, num_blocks: usize) {
    let rows = index * num_blocks..(index + 1) * num_blocks;
    for (to, from) in to[rows.clone()].iter_mut().zip(&from[rows]) {
        *to = *from;
    }
}

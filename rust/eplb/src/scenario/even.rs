//! Replicas share evenly: what a placement is worth then.

use super::layer::{Exchange, Layer};
use super::rows::{Change, Futures, LANES, Table, add};
use super::search::Judge;

/// Judges a placement by the squares of what ranks carry above the mean, in each scenario.
///
/// The largest rank load alone would say nothing of exchanges between other ranks, one of which is
/// the largest when the next load is a little different.
#[derive(Debug)]
pub(super) struct Even {
    /// What each rank carries.
    ranks: Table,
    /// Whether a rank is the heaviest in some scenario.
    heaviest: Vec<bool>,
}

impl Even {
    pub(super) fn new(layer: &Layer, futures: &Futures) -> Self {
        let num_ranks = layer.num_ranks();
        let mut ranks = Table::new(futures.num_blocks(), num_ranks);
        ranks.len = num_ranks;
        let mut even = Self {
            ranks,
            heaviest: vec![false; num_ranks],
        };
        even.sum(layer, futures);
        even
    }

    #[inline(always)]
    fn sum(&mut self, layer: &Layer, futures: &Futures) {
        self.ranks.clear();
        for block in 0..futures.num_blocks() {
            for (slot, &rank) in (0..).zip(layer.ranks()) {
                let expert = layer.expert(slot);
                let share = 1.0 / layer.count(expert) as f32;
                let row = self.ranks.row_mut(block, rank as usize);
                add(row, share, futures.load(block, expert));
            }
        }
    }

    fn is_heaviest(&self, layer: &Layer, slot: u32) -> bool {
        self.heaviest[layer.rank(slot as usize)]
    }
}

impl Judge for Even {
    fn capacity(&self) -> usize {
        self.heaviest.len()
    }

    #[inline(always)]
    fn value(&self, futures: &Futures, change: &Change) -> f32 {
        let [first, second] = change.experts;
        let mut value = 0.0;
        for (block, weights) in futures.weights.iter().enumerate() {
            let loads = (futures.load(block, first), futures.load(block, second));
            let mut squares = [0.0f32; LANES];
            for (rank, row) in self.ranks.block(block).iter().enumerate() {
                let (a, b) = (change.gains[0][rank], change.gains[1][rank]);
                for lane in 0..LANES {
                    let load = row[lane] + a * loads.0[lane] + b * loads.1[lane];
                    let over = if load > 1.0 { load - 1.0 } else { 0.0 };
                    squares[lane] += over * over;
                }
            }
            for lane in 0..LANES {
                value += weights[lane] * squares[lane];
            }
        }
        value
    }

    fn look(&mut self, _layer: &Layer, futures: &Futures) {
        self.heaviest.fill(false);
        let Self { ranks, heaviest } = self;
        ranks.for_largest(futures, |rank| heaviest[rank] = true);
    }

    #[inline(always)]
    fn may_help(&self, layer: &Layer, exchange: Exchange) -> bool {
        match exchange {
            Exchange::Replace { slot, expert } => {
                let mut places = layer.places(expert as usize).iter();
                self.is_heaviest(layer, slot) || places.any(|&slot| self.is_heaviest(layer, slot))
            }
            Exchange::Swap { a, b } => self.is_heaviest(layer, a) || self.is_heaviest(layer, b),
        }
    }

    #[inline(always)]
    fn change(&self, layer: &Layer, exchange: Exchange, change: &mut Change) {
        match exchange {
            Exchange::Replace { slot, expert } => {
                let rank = layer.rank(slot as usize);
                let (old, new) = (layer.expert(slot), expert as usize);
                change.experts = [old, new];
                let count = layer.count(old) as f32;
                let share = 1.0 / (count - 1.0);
                for &place in layer.places(old) {
                    change.gain(0, layer.rank(place as usize), share - 1.0 / count);
                }
                change.gain(0, rank, -share);
                let count = layer.count(new) as f32;
                let share = 1.0 / (count + 1.0);
                for &place in layer.places(new) {
                    change.gain(1, layer.rank(place as usize), share - 1.0 / count);
                }
                change.gain(1, rank, share);
            }
            Exchange::Swap { a, b } => {
                change.experts = [layer.expert(a), layer.expert(b)];
                let ranks = [layer.rank(a as usize), layer.rank(b as usize)];
                for (which, expert) in change.experts.into_iter().enumerate() {
                    let share = 1.0 / layer.count(expert) as f32;
                    change.gain(which, ranks[which], -share);
                    change.gain(which, ranks[1 - which], share);
                }
            }
        }
    }

    #[inline(always)]
    fn made(&mut self, layer: &Layer, futures: &Futures, _experts: [usize; 2]) {
        self.sum(layer, futures);
    }

    fn settle(&mut self, _layer: &Layer, _futures: &Futures, _limit: f32) -> bool {
        false
    }
}

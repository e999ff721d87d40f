//! Replicas share evenly: what a placement is worth then.

use super::layer::{Exchange, Layer};
use super::rows::{Change, Futures, Table, add, squares};
use super::search::Judge;

/// Judges a placement by the squares of what ranks carry above the mean, in each scenario.
///
/// The largest rank load alone would say nothing of exchanges between other ranks, one of which is
/// the largest when the next load is a little different.
#[derive(Debug)]
pub(super) struct Even {
    /// What each rank carries.
    ranks: Table,
    /// What each rank adds to the value, and their sum.
    squares: Vec<f32>,
    value: f32,
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
            squares: vec![0.0; num_ranks],
            value: 0.0,
            heaviest: vec![false; num_ranks],
        };
        even.sum(layer, futures);
        even
    }

    #[inline(always)]
    fn sum(&mut self, layer: &Layer, futures: &Futures) {
        self.ranks.clear();
        self.squares.fill(0.0);
        for (block, weights) in futures.weights.iter().enumerate() {
            for (slot, &rank) in (0..).zip(layer.ranks()) {
                let expert = layer.expert(slot);
                let share = 1.0 / layer.count(expert) as f32;
                let row = self.ranks.row_mut(block, rank as usize);
                add(row, share, futures.load(block, expert));
            }
            for (row, sum) in self.ranks.block(block).iter().zip(&mut self.squares) {
                *sum += squares(row, weights);
            }
        }
        self.value = self.squares.iter().sum();
    }
}

impl Judge for Even {
    fn capacity(&self) -> usize {
        self.heaviest.len()
    }

    fn ideal(&self) -> f32 {
        0.0
    }

    fn value(&self, _futures: &Futures) -> f32 {
        self.value
    }

    #[inline(always)]
    fn bound(&self, futures: &Futures, change: &Change) -> f32 {
        let mut value = self.value;
        for &rank in &change.rows {
            value -= self.squares[rank as usize];
        }
        for (block, weights) in futures.weights.iter().enumerate() {
            let ranks = self.ranks.block(block);
            let loads = change.experts.map(|expert| futures.load(block, expert));
            for &rank in &change.rows {
                let mut row = ranks[rank as usize];
                let gains = change.of(rank);
                add(&mut row, gains[0], loads[0]);
                add(&mut row, gains[1], loads[1]);
                value += squares(&row, weights);
            }
        }
        value
    }

    fn look(&mut self, _layer: &Layer, futures: &Futures) {
        self.heaviest.fill(false);
        let Self {
            ranks, heaviest, ..
        } = self;
        ranks.for_largest(futures, |rank| heaviest[rank] = true);
    }

    #[inline(always)]
    fn suspects(&self, layer: &Layer, expert: usize) -> bool {
        let mut places = layer.places(expert).iter();
        places.any(|&slot| self.sheds(layer, slot))
    }

    #[inline(always)]
    fn sheds(&self, layer: &Layer, slot: u32) -> bool {
        self.heaviest[layer.rank(slot as usize)]
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

    fn settle(&mut self, _layer: &Layer, _futures: &Futures, _limit: f32) {}
}

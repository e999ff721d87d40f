//! Sets of ranks that bound what a layer can be worth where tokens are split anew.
//!
//! No split makes the largest rank load less than the mean, over a set of ranks, of the load of
//! experts that these hold alone. That is so for any placement, and an exchange changes the mean by
//! the loads of the experts it concerns.

use super::layer::Layer;

/// How many sets of ranks are kept for each load, one bit each.
const MOST: usize = u64::BITS as usize;

/// A number for each set.
type Row = [f32; MOST];

/// Rows are worked on in parts of so many sets, up to the last that is in use.
const LANES: usize = 16;

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
    pub(super) fn new(num_ranks: usize, num_experts: usize) -> Self {
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
    pub(super) fn keep(&mut self, layer: &Layer, loads: &[f32], ranks: &[u32]) {
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
        for sets in &mut self.alone {
            *sets &= !bit;
        }
        let mut sum = 0.0;
        for &rank in ranks {
            for slot in layer.slots(rank as usize) {
                let expert = layer.expert(slot);
                if (self.holding(layer, expert, None) & !self.alone[expert]) & bit != 0 {
                    self.alone[expert] |= bit;
                    sum += f64::from(loads[expert]);
                }
            }
        }
        self.sums[set] = sum;
        self.means[set] = (self.sums[set] / ranks.len() as f64) as f32;
    }

    /// Takes note that the set that was kept last is tight.
    pub(super) fn hold_tight(&mut self) {
        self.tight = self.latest;
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

    /// What it does to the sets that an expert is where the layer has it now.
    #[inline(always)]
    pub(super) fn shift(&self, layer: &Layer, expert: usize, load: f32) -> Shift {
        let after = self.holding(layer, expert, None);
        Shift::new(load, self.alone[expert], after)
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

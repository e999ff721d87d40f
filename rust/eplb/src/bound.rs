//! How little the heaviest rank can carry, whatever the placement.

use std::collections::BinaryHeap;

use crate::error::{Code, Error, Result};
use crate::load::Load;
use crate::planner::check_slots;
use crate::topology::Topology;

/// A lower bound on the largest rank load of each layer, `[num_layers]`, for any placement of
/// these experts in these slots whose replicas share their expert's tokens evenly.
///
/// The larger of two bounds: the mean rank load, and the least largest share. An expert of load
/// `w` with `c` replicas on `D` ranks puts at least `w / min(c, D)` on some rank; giving each
/// spare slot to the largest share in turn makes the largest of these as small as it can be.
/// Where ranks differ in speed, it is a bound on the time of the slowest: loads are divided by
/// speeds, of which the mean counts as 1. Dead GPUs count for nothing.
///
/// O(layers x slots x log experts): 0.3 ms for 58 x 256 on 288 slots.
///
/// # Errors
/// [`Code::TooSmall`] if there are fewer slots than experts.
pub fn lower_bound(load: &Load<'_>, topology: &Topology) -> Result<Vec<f64>> {
    check_slots(load.num_experts(), topology)?;
    let mut heap = BinaryHeap::with_capacity(load.num_experts());
    let num_ranks = topology.num_live_gpus();
    let speeds = || topology.live_gpus().map(|(.., speed)| speed);
    let mean_speed = speeds().sum::<f64>() / num_ranks as f64;
    let fastest = speeds().fold(0.0, f64::max) / mean_speed;
    let bounds = load.layers().map(|row| {
        let total: f64 = row.iter().map(|&load| f64::from(load)).sum();
        let mean = total / num_ranks as f64;
        let slots = topology.num_live_slots();
        mean.max(least_largest_share(row, slots, num_ranks, &mut heap) / fastest)
    });
    Ok(bounds.collect())
}

/// A tighter bound than [`lower_bound`], which costs more. It looks for a proof that no placement
/// has a largest rank load below a level, for levels between that bound and `upper`: what a
/// placement at hand reaches.
///
/// It is tighter where all ranks are alike and have two slots. There a level `T` needs, for every
/// size `v` above `T / 2`, as many replicas of at most `T - v` as there are of at least `v`. Any
/// prices on these conditions that no choice of counts can pay prove that `T` is too low; they are
/// looked for by subgradient steps. Elsewhere the cheap bound is returned.
///
/// About 5 ms a layer of 256 experts on 288 slots.
///
/// # Errors
/// As [`lower_bound`]; [`Code::WrongShape`] unless `upper` has a value for each layer.
pub fn tight_lower_bound(load: &Load<'_>, topology: &Topology, upper: &[f64]) -> Result<Vec<f64>> {
    let mut bounds = lower_bound(load, topology)?;
    if upper.len() != load.num_layers() {
        return Err(Error::invalid(
            Code::WrongShape,
            "upper",
            format!("{} values", upper.len()),
            format!("{}, one for each layer", load.num_layers()),
            "",
        ));
    }
    if topology.is_even() && topology.slots_per_gpu() == 2 {
        let mut prices = Prices::default();
        for ((row, bound), &upper) in load.layers().zip(&mut bounds).zip(upper) {
            *bound = prices.raise(row, topology.num_gpus(), *bound, upper);
        }
    }
    Ok(bounds)
}

/// The smallest possible maximum of `load / min(count, ranks)` over counts that fill the slots.
fn least_largest_share(
    row: &[f32],
    num_slots: usize,
    num_ranks: usize,
    heap: &mut BinaryHeap<(u64, u32, usize)>,
) -> f64 {
    // The bits of floats that are not negative are in their order.
    heap.clear();
    heap.extend(
        row.iter()
            .enumerate()
            .map(|(expert, &load)| (f64::from(load.abs()).to_bits(), 1, expert)),
    );
    for _ in row.len()..num_slots {
        let Some(mut top) = heap.peek_mut() else {
            break;
        };
        let (_, count, expert) = *top;
        if count as usize == num_ranks {
            break;
        }
        let share = f64::from(row[expert].abs()) / f64::from(count + 1);
        *top = (share.to_bits(), count + 1, expert);
    }
    heap.peek()
        .map_or(0.0, |&(bits, _, _)| f64::from_bits(bits))
}

/// Sizes above half of the level for which there is a price.
const PRICES: usize = 96;

/// How many steps a proof may take, and how often the interval of levels is halved.
const STEPS: u32 = 300;
const HALVINGS: u32 = 7;

/// The value of a slot that prices aim at.
const AIM: f64 = 0.5;

/// How many counts of an expert are tried while prices are looked for; all are in the proof.
const FEW: usize = 12;

/// How far below a level that is proved too low the bound stays, for the rounding of sums.
const ROUNDING: f64 = 1e-9;

/// What a replica of a size is charged for the partners it needs, less what it earns as one.
#[derive(Debug)]
struct Prices {
    price: [f64; PRICES],
    /// The price of a slot.
    slot: f64,
    /// Sums of prices: of the first sizes.
    charge: [f64; PRICES + 1],
}

impl Default for Prices {
    fn default() -> Self {
        Self {
            price: [0.0; PRICES],
            slot: 0.0,
            charge: [0.0; PRICES + 1],
        }
    }
}

impl Prices {
    /// The highest level between two that is proved too low, or the lower.
    fn raise(&mut self, row: &[f32], num_ranks: usize, lower: f64, upper: f64) -> f64 {
        let (mut low, mut high) = (lower, upper);
        *self = Self::default();
        self.price.fill(1.0 / PRICES as f64);
        self.slot = 0.5;
        for _ in 0..HALVINGS {
            let level = 0.5 * (low + high);
            if self.prove_too_low(row, num_ranks, level) {
                low = level;
            } else {
                high = level;
            }
        }
        if low > lower {
            lower.max(low * (1.0 - ROUNDING))
        } else {
            lower
        }
    }

    /// Looks for prices that no counts can pay at a level.
    fn prove_too_low(&mut self, row: &[f32], num_ranks: usize, level: f64) -> bool {
        let num_slots = 2.0 * num_ranks as f64;
        let mut start = self.price;
        let mut start_slot = self.slot;
        let mut best = f64::NEG_INFINITY;
        for step in 0..STEPS {
            let mut sum = 0.0;
            for (index, &price) in self.price.iter().enumerate() {
                self.charge[index] = sum;
                sum += price;
            }
            self.charge[PRICES] = sum;
            // The slope of the value in each price, and in the price of a slot.
            let mut slope = [0.0; PRICES];
            let mut slots = -num_slots;
            let mut value = -self.slot * num_slots;
            for &load in row {
                let load = f64::from(load);
                let Some((cost, count)) = self.cheapest(load, num_ranks, FEW, level) else {
                    // More than the level on every rank: no counts help.
                    return true;
                };
                value += cost;
                slots += count;
                let (bin, sign) = place(load / count, level);
                for slope in &mut slope[..bin] {
                    *slope += sign * count;
                }
            }
            if value > self.margin(num_slots) && self.holds(row, num_ranks, level) {
                return true;
            }
            if value > best {
                (best, start, start_slot) = (value, self.price, self.slot);
            }
            let square = slope.iter().map(|slope| slope * slope).sum::<f64>() + slots * slots;
            if square == 0.0 {
                break;
            }
            // Polyak's step, towards a value just above zero, damped as steps go by.
            let aim = AIM * f64::from(STEPS - step) / f64::from(STEPS);
            let size = (aim * num_slots - value) / square;
            for (price, slope) in self.price.iter_mut().zip(slope) {
                *price = (*price + size * slope).max(0.0);
            }
            self.slot += size * slots;
            // Only ratios matter.
            let norm = self.price.iter().sum::<f64>();
            if norm > 0.0 {
                for price in &mut self.price {
                    *price /= norm;
                }
                self.slot /= norm;
            }
        }
        (self.price, self.slot) = (start, start_slot);
        false
    }

    /// How far above zero a value is that rounding does not explain.
    fn margin(&self, num_slots: f64) -> f64 {
        1e-7 * (self.charge[PRICES] + self.slot.abs()) * num_slots
    }

    /// Whether the prices prove a level too low, all counts considered.
    fn holds(&self, row: &[f32], num_ranks: usize, level: f64) -> bool {
        let num_slots = 2.0 * num_ranks as f64;
        let mut value = -self.slot * num_slots;
        for &load in row {
            match self.cheapest(f64::from(load), num_ranks, num_ranks, level) {
                Some((cost, _)) => value += cost,
                None => return true,
            }
        }
        value > self.margin(num_slots)
    }

    /// The least that an expert can cost with any of the first `few` counts that bring its share
    /// below the level, and the count it has then; `None` if no count does.
    fn cheapest(&self, load: f64, num_ranks: usize, few: usize, level: f64) -> Option<(f64, f64)> {
        let most = num_ranks as f64;
        let mut count = (load / level).ceil().max(1.0);
        if count > most {
            return None;
        }
        let last = most.min(count + few as f64 - 1.0);
        let mut best: Option<(f64, f64)> = None;
        while count <= last {
            let (bin, sign) = place(load / count, level);
            let cost = count * (sign * self.charge[bin] + self.slot);
            if best.is_none_or(|best| cost < best.0) {
                best = Some((cost, count));
            }
            count += 1.0;
        }
        best
    }
}

/// How many of the priced sizes a share reaches, with `1.0`; or, if it is below half of the level,
/// how many it is a partner for, with `-1.0`.
fn place(share: f64, level: f64) -> (usize, f64) {
    // The priced sizes are `level / 2 * (1 + (k + 1) / PRICES)`, none of them half the level.
    let above_half = |size: f64| ((2.0 * size / level - 1.0) * PRICES as f64).floor();
    if 2.0 * share > level {
        ((above_half(share).max(0.0) as usize).min(PRICES), 1.0)
    } else {
        (
            (above_half(level - share).max(0.0) as usize).min(PRICES),
            -1.0,
        )
    }
}

//! Exchanges drawn at random, and made where they help, or hardly harm.

use multiversion::multiversion;

use super::Split;
use super::account::Account;
use super::layer::{Exchange, Layer};
use super::rows::Futures;
use crate::balance::{Fuel, Random};

/// What an exchange must gain at least, as a part of what the layer is worth at first.
const LEAST_PART: f32 = 1e-4;

/// What as many moves as there may be must gain together, as the same part: so much for each as to
/// spend them well.
const PART_OF_ALL_MOVES: f32 = 0.05;

/// What an exchange may lose at first, as the same part, on average over what is drawn: the more
/// of the budget is spent, the less, and nothing in the end. So search does not end in the first
/// hollow.
///
/// Source: G. Dueck, T. Scheuer, "Threshold accepting", Journal of Computational Physics 90, 1990.
const SHARES_HEAT: f32 = 0.005;
const EVEN_HEAT: f32 = 0.015;

/// So many exchanges are tried in a step, of at most so many drawn: not all are allowed.
const TRIALS_PER_STEP: usize = 16;
const DRAWN_PER_STEP: usize = 4 * TRIALS_PER_STEP;

/// Improves a layer for as long as there is fuel, and leaves the best placement it came by. Starts
/// from what its slots hold or, if it is worth less and within reach, from the `other` placement.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
pub(super) fn climb(
    layer: &mut Layer,
    futures: &Futures,
    split: Split,
    max_moves: usize,
    other: Option<&[i64]>,
    fuel: &mut Fuel,
) {
    match split {
        Split::Uniform => climb_by::<false>(layer, futures, max_moves, other, fuel),
        Split::Shares => climb_by::<true>(layer, futures, max_moves, other, fuel),
    }
}

#[inline(always)]
fn climb_by<const SHARES: bool>(
    layer: &mut Layer,
    futures: &Futures,
    max_moves: usize,
    other: Option<&[i64]>,
    fuel: &mut Fuel,
) {
    let mut account = Account::<SHARES>::new(layer, futures);
    if let Some(other) = other {
        let here = layer.experts().to_vec();
        layer.hold(other);
        let there = Account::<SHARES>::new(layer, futures);
        if layer.num_moves() <= max_moves && there.worth() < account.worth() {
            account = there;
        } else {
            layer.hold(&here);
        }
    }
    let first = account.worth();
    let most_heat = if SHARES { SHARES_HEAT } else { EVEN_HEAT } * first;
    let least_gain = LEAST_PART * first;
    let gain_per_move = PART_OF_ALL_MOVES * first / max_moves.max(1) as f32;
    let mut best = layer.experts().to_vec();
    let mut least = first;
    let mut random = Random::new();
    while account.worth() > least_gain && fuel.step() {
        let left = 1.0 - fuel.spent();
        if left <= 0.0 {
            break;
        }
        let heat = most_heat * left * left;
        let mut trials = 0;
        for _ in 0..DRAWN_PER_STEP {
            let exchange = draw(layer, &mut random);
            if !layer.allows(exchange) {
                continue;
            }
            let more = layer.more_moves(exchange);
            if more > 0 && layer.num_moves() as i32 + more > max_moves as i32 {
                continue;
            }
            let gain = least_gain + gain_per_move * more as f32;
            let limit = account.worth() - gain + heat * chance(&mut random);
            if account.attempt(layer, futures, exchange, limit) {
                let cost = account.worth() + gain_per_move * layer.num_moves() as f32;
                if cost < least {
                    least = cost;
                    best.copy_from_slice(layer.experts());
                }
            }
            trials += 1;
            if trials == TRIALS_PER_STEP {
                break;
            }
        }
    }
    layer.hold(&best);
}

/// Any exchange, allowed or not.
#[inline(always)]
fn draw(layer: &Layer, random: &mut Random) -> Exchange {
    let num_slots = layer.ranks().len();
    let slot = random.below(num_slots) as u32;
    if random.below(2) == 0 {
        let expert = random.below(layer.num_experts()) as u32;
        Exchange::Replace { slot, expert }
    } else {
        let b = random.below(num_slots) as u32;
        Exchange::Swap { a: slot, b }
    }
}

/// A number that looks drawn, from 0 to 2.
#[inline(always)]
fn chance(random: &mut Random) -> f32 {
    const STEPS: usize = 1 << 16;
    random.below(2 * STEPS) as f32 / STEPS as f32
}

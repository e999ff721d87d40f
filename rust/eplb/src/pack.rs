//! Greedy packing: each item, heaviest first, goes to the lightest pack that is not full.
//!
//! Ties go to the lowest pack and sums are `f32`, in the order of arrival. The order of packs by
//! (sum, index) is kept as an array of floats, lightest first: a pack's sum with its index and
//! how many items it has in the low bits of an `f64`, which an `f32` leaves free. Taking the
//! lightest and putting it back is then one pass of minima and maxima over a fixed-size array,
//! without a branch, and a full pack is an infinite one.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Bits for the number of items in a pack.
const COUNT_BITS: u32 = 21;
/// Bits for the number of items and, above it, the index of the pack.
const TAG_BITS: u32 = 29;
const TAG: u64 = (1 << TAG_BITS) - 1;

/// The most packs that the array holds; more go on a heap.
const MOST_LANES: usize = 128;

/// Stands for an empty pack's sum of zero: vanishes in any `f32` sum, yet keeps the `f64` normal,
/// so that its low bits count in comparisons even where denormals are flushed to zero.
const NOTHING: f64 = f64::from_bits(1 << 52);

/// Where an item went: the pack, and how many items were there before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) pack: u32,
    pub(crate) arrival: u32,
}

/// Scratch of [`pack`], kept between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    heap: BinaryHeap<Reverse<(u64, u32, u32)>>,
}

/// Packs `K` lists of items, each sorted heaviest first, each into `num_packs` packs of
/// `capacity` items. The lists share one length, `num_packs * capacity`; they are packed side by
/// side, since one alone would wait for its own sums.
#[inline(always)]
pub(crate) fn pack<const K: usize>(
    items: [&[f32]; K],
    num_packs: usize,
    capacity: usize,
    places: [&mut [Place]; K],
    scratch: &mut Scratch,
) {
    match num_packs {
        ..=4 => in_lanes::<4, K>(items, num_packs, capacity, places),
        5..=8 => in_lanes::<8, K>(items, num_packs, capacity, places),
        9..=16 => in_lanes::<16, K>(items, num_packs, capacity, places),
        17..=32 => in_lanes::<32, K>(items, num_packs, capacity, places),
        33..=64 => in_lanes::<64, K>(items, num_packs, capacity, places),
        65..=MOST_LANES => in_lanes::<MOST_LANES, K>(items, num_packs, capacity, places),
        _ => {
            for (items, places) in items.into_iter().zip(places) {
                on_heap(items, num_packs, capacity, places, &mut scratch.heap);
            }
        }
    }
}

#[inline(always)]
fn in_lanes<const M: usize, const K: usize>(
    items: [&[f32]; K],
    num_packs: usize,
    capacity: usize,
    places: [&mut [Place]; K],
) {
    let mut order = [[f64::INFINITY; M]; K];
    for lanes in &mut order {
        for (index, lane) in lanes.iter_mut().enumerate().take(num_packs) {
            *lane = f64::from_bits(NOTHING.to_bits() | ((index as u64) << COUNT_BITS));
        }
    }
    let full = capacity as u64;
    for step in 0..num_packs * capacity {
        for k in 0..K {
            let lanes = &mut order[k];
            let lightest = lanes[0].to_bits();
            let tag = lightest & TAG;
            let count = tag & ((1 << COUNT_BITS) - 1);
            places[k][step] = Place {
                pack: (tag >> COUNT_BITS) as u32,
                arrival: count as u32,
            };
            // Rounding the exact f64 sum of two f32 to f32 is the f32 sum.
            let sum = f64::from_bits(lightest & !TAG) + f64::from(items[k][step]);
            let sum = f64::from(sum as f32);
            let sum = if sum > NOTHING { sum } else { NOTHING };
            let tagged = f64::from_bits(sum.to_bits() | (tag + 1));
            let back = if count + 1 == full {
                f64::INFINITY
            } else {
                tagged
            };
            *lanes = replace_first(lanes, back);
        }
    }
}

/// The sorted array with its first element taken out and `back`, which is larger, put in.
#[inline(always)]
fn replace_first<const M: usize>(lanes: &[f64; M], back: f64) -> [f64; M] {
    let mut next = [f64::INFINITY; M];
    next[..M - 1].copy_from_slice(&lanes[1..]);
    let mut out = [0.0; M];
    for lane in 0..M {
        let larger = if lanes[lane] > back {
            lanes[lane]
        } else {
            back
        };
        out[lane] = if larger < next[lane] {
            larger
        } else {
            next[lane]
        };
    }
    out
}

fn on_heap(
    items: &[f32],
    num_packs: usize,
    capacity: usize,
    places: &mut [Place],
    heap: &mut BinaryHeap<Reverse<(u64, u32, u32)>>,
) {
    heap.clear();
    heap.extend((0..num_packs as u32).map(|pack| Reverse((0, pack, 0))));
    for (&item, place) in items.iter().zip(places) {
        let Some(mut lightest) = heap.peek_mut() else {
            return;
        };
        let Reverse((sum, pack, arrival)) = *lightest;
        *place = Place { pack, arrival };
        // The bits of floats that are not negative are in their order.
        let sum = if arrival as usize + 1 == capacity {
            u64::MAX
        } else {
            u64::from((f32::from_bits(sum as u32) + item + 0.0).to_bits())
        };
        *lightest = Reverse((sum, pack, arrival + 1));
    }
}

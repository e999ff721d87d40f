//! Greedy packing: each item, heaviest first, goes to the lightest pack that is not full.
//!
//! Ties go to the lowest pack and sums are `f32`, in the order of arrival. All lanes pack in
//! step. Their packs are kept in the order of (sum, index), lightest first, as keys: taking the
//! lightest and putting it back is one pass of minima and maxima, without a branch. A full pack
//! is infinitely heavy.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::lanes::{LANES, Row, key, tag, value};

/// The most packs that are kept in order by a pass over all of them; more go on a heap.
const PASS_LIMIT: usize = 512;

/// Where the items of each lane went: the pack times `capacity`, plus how many were there before.
pub(crate) type Places = [u32; LANES];

/// Scratch of [`pack`], kept between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    packs: Vec<Row>,
    heap: BinaryHeap<Reverse<(u64, usize)>>,
}

/// Packs the items of each lane, sorted heaviest first, into `num_packs` packs of `capacity`
/// items each; there are as many items as fit. The tags of items are ignored.
#[inline(always)]
pub(crate) fn pack(
    items: &[Row],
    num_packs: usize,
    capacity: usize,
    places: &mut Vec<Places>,
    scratch: &mut Scratch,
) {
    places.clear();
    if num_packs > PASS_LIMIT {
        places.resize(items.len(), Places::default());
        for lane in 0..LANES {
            pack_on_heap(lane, items, num_packs, capacity, places, &mut scratch.heap);
        }
        return;
    }
    // The tag of a pack: its index, then, in the low bits, how many items it has.
    let count_bits = usize::BITS - capacity.leading_zeros();
    let packs = &mut scratch.packs;
    packs.clear();
    packs.extend((0..num_packs as u64).map(|index| Row([key(0.0, index << count_bits); LANES])));
    pack_in_step(items, packs, capacity, count_bits, places);
}

#[inline(always)]
fn pack_in_step(
    items: &[Row],
    packs: &mut [Row],
    capacity: usize,
    count_bits: u32,
    places: &mut Vec<Places>,
) {
    let count_mask = (1 << count_bits) - 1;
    let last = capacity as u64 - 1;
    for item in items {
        let mut back = Row::default();
        let mut place = Places::default();
        for lane in 0..LANES {
            let lightest = packs[0].0[lane];
            let tag = tag(lightest);
            let (index, count) = ((tag >> count_bits) as u32, tag & count_mask);
            place[lane] = index * capacity as u32 + count as u32;
            // The sum of two f32 in f64, rounded to f32, is their f32 sum.
            let sum = (value(lightest) + value(item.0[lane])) as f32;
            let sum = key(f64::from(sum), tag + 1);
            back.0[lane] = if count == last { f64::INFINITY } else { sum };
        }
        places.push(place);
        put_back(packs, &back);
    }
}

/// Takes the first of the sorted rows out and puts `back`, which is larger, in its place in the
/// order.
#[inline(always)]
fn put_back(sorted: &mut [Row], back: &Row) {
    // `back` sinks: each row moves one forward unless what sinks is smaller.
    let mut sinking = *back;
    for index in 1..sorted.len() {
        let next = sorted[index];
        sorted[index - 1] = next.smaller(&sinking);
        sinking = next.larger(&sinking);
    }
    if let Some(last) = sorted.last_mut() {
        *last = sinking;
    }
}

/// The same for many packs, lane by lane.
fn pack_on_heap(
    lane: usize,
    items: &[Row],
    num_packs: usize,
    capacity: usize,
    places: &mut [Places],
    heap: &mut BinaryHeap<Reverse<(u64, usize)>>,
) {
    heap.clear();
    heap.extend((0..num_packs).map(|index| Reverse((0, index * capacity))));
    for (item, place) in items.iter().zip(places) {
        let Some(mut lightest) = heap.peek_mut() else {
            return;
        };
        // The bits of floats that are not negative are in their order.
        let Reverse((sum, slot)) = *lightest;
        place[lane] = slot as u32;
        let sum = f32::from_bits(sum as u32) + value(item.0[lane]) as f32;
        let full = (slot + 1).is_multiple_of(capacity);
        let sum = if full { u64::MAX } else { sum.to_bits().into() };
        *lightest = Reverse((sum, slot + 1));
    }
}

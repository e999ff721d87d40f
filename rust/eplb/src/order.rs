//! Stable descending order of a few hundred loads.
//!
//! A short list is ranked by counting: the rank of an item is the number of items before it.
//! That is O(n^2) comparisons but no branch, sixteen to a vector; below [`COUNTING_LIMIT`] items
//! it is faster than any sort. Longer lists are sorted by integer keys.

/// How many items a block of the counting kernel has.
const BLOCK: usize = 16;

/// The most items that are ranked by counting.
const COUNTING_LIMIT: usize = 192;

/// Loads that are not negative, as integers in the same order. `-0.0` becomes `0.0`.
#[inline(always)]
pub(crate) fn bits(load: f32) -> u32 {
    (load + 0.0).to_bits()
}

/// A sort key: descending by load, then ascending by index.
#[inline(always)]
pub(crate) fn key(load: f32, index: u32) -> u64 {
    (u64::from(!bits(load)) << 32) | u64::from(index)
}

/// The index in a [`key`].
#[inline(always)]
pub(crate) fn index_of(key: u64) -> u32 {
    key as u32
}

/// The load in a [`key`].
#[inline(always)]
pub(crate) fn load_of(key: u64) -> f32 {
    f32::from_bits(!((key >> 32) as u32))
}

/// Scratch of [`sort_keys`], kept between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    blocks: Vec<[i32; BLOCK]>,
    ranks: Vec<[i32; BLOCK]>,
}

/// Writes the keys of `loads` in ascending order, which is the loads in stable descending order.
/// `keys` is as long as `loads`.
#[inline(always)]
pub(crate) fn sort_keys(loads: &[f32], keys: &mut [u64], scratch: &mut Scratch) {
    if loads.len() > COUNTING_LIMIT {
        for (index, (key_out, &load)) in keys.iter_mut().zip(loads).enumerate() {
            *key_out = key(load, index as u32);
        }
        keys.sort_unstable();
        return;
    }
    let num_blocks = loads.len().div_ceil(BLOCK);
    scratch.blocks.clear();
    // Padding is lighter than any load, so it ranks last.
    scratch.blocks.resize(num_blocks, [-1; BLOCK]);
    scratch.ranks.clear();
    scratch.ranks.resize(num_blocks, [0; BLOCK]);
    for (block, loads) in scratch.blocks.iter_mut().zip(loads.chunks(BLOCK)) {
        for (value, &load) in block.iter_mut().zip(loads) {
            *value = bits(load) as i32;
        }
    }
    for (i, ranks) in scratch.ranks.iter_mut().enumerate() {
        let mine = &scratch.blocks[i];
        for before in &scratch.blocks[..i] {
            count_before::<true>(before, mine, ranks);
        }
        count_within(mine, ranks);
        for after in &scratch.blocks[i + 1..] {
            count_before::<false>(after, mine, ranks);
        }
    }
    let ranks = scratch.ranks.as_flattened();
    for (index, (&load, &rank)) in loads.iter().zip(ranks).enumerate() {
        if let Some(place) = keys.get_mut(rank as usize) {
            *place = key(load, index as u32);
        }
    }
}

/// Adds to each rank how many of `others` come before it; equal ones do if `TIES_COME_BEFORE`.
#[inline(always)]
fn count_before<const TIES_COME_BEFORE: bool>(
    others: &[i32; BLOCK],
    mine: &[i32; BLOCK],
    ranks: &mut [i32; BLOCK],
) {
    for &other in others {
        for lane in 0..BLOCK {
            let before = if TIES_COME_BEFORE {
                other >= mine[lane]
            } else {
                other > mine[lane]
            };
            ranks[lane] += i32::from(before);
        }
    }
}

/// Adds to each rank how many of its own block come before it.
#[inline(always)]
fn count_within(mine: &[i32; BLOCK], ranks: &mut [i32; BLOCK]) {
    for (other, &value) in mine.iter().enumerate() {
        for lane in 0..BLOCK {
            // Equal loads keep their order: a tie comes before only what stands after it.
            let value = value + i32::from(other < lane);
            ranks[lane] += i32::from(value > mine[lane]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_order_is_that_of_a_stable_sort(
            loads in prop::collection::vec(
                prop_oneof![Just(0.0f32), Just(-0.0), Just(1.0), 0.0f32..1e9, 0.0f32..3.0],
                1..400,
            )
        ) {
            let mut keys = vec![0; loads.len()];
            sort_keys(&loads, &mut keys, &mut Scratch::default());
            let mut stable: Vec<usize> = (0..loads.len()).collect();
            stable.sort_by(|&a, &b| loads[b].partial_cmp(&loads[a]).unwrap_or(std::cmp::Ordering::Equal));
            let got: Vec<usize> = keys.iter().map(|&key| index_of(key) as usize).collect();
            prop_assert_eq!(got, stable);
        }
    }
}

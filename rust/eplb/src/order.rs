//! Sorting the problems in all lanes at once, each by its own keys.
//!
//! Batcher's odd-even merge sort: its comparisons do not depend on the data, so the lanes need
//! not agree. Source: K. E. Batcher, "Sorting networks and their applications", 1968.

use crate::lanes::{LANES, Row};

/// The most rows that go through the network; more are sorted lane by lane. The network takes
/// O(n log^2 n) comparisons.
const NETWORK_LIMIT: usize = 1024;

/// Rows are first sorted in runs of this length, in registers.
const RUN: usize = 4;

/// Scratch of [`sort_descending`], kept between calls.
pub(crate) type Scratch = Vec<u64>;

/// Sorts each lane, largest key first. Keys of a lane differ by their tags.
#[inline(always)]
pub(crate) fn sort_descending(rows: &mut [Row], scratch: &mut Scratch) {
    if rows.len() > NETWORK_LIMIT {
        sort_lane_by_lane(rows, scratch);
        return;
    }
    sort_runs(rows);
    let mut run = RUN;
    while run < rows.len() {
        merge_runs(rows, run);
        run *= 2;
    }
}

/// Sorts every four rows.
#[inline(always)]
fn sort_runs(rows: &mut [Row]) {
    let mut runs = rows.chunks_exact_mut(RUN);
    for run in &mut runs {
        if let [a, b, c, d] = run {
            exchange(a, b);
            exchange(c, d);
            exchange(a, c);
            exchange(b, d);
            exchange(b, c);
        }
    }
    match runs.into_remainder() {
        [a, b, c] => {
            exchange(a, b);
            exchange(a, c);
            exchange(b, c);
        }
        [a, b] => exchange(a, b),
        _ => {}
    }
}

/// Merges each two neighbouring sorted runs of `run` rows, a power of two.
#[inline(always)]
fn merge_runs(rows: &mut [Row], run: usize) {
    for pair in rows.chunks_mut(2 * run) {
        // The first step compares the two runs, the others neighbours at half the distance.
        exchange_across(pair, run);
        let mut distance = run / 2;
        while distance > 0 {
            let inner = pair.get_mut(distance..).unwrap_or_default();
            for block in inner.chunks_mut(2 * distance) {
                exchange_across(block, distance);
            }
            distance /= 2;
        }
    }
}

/// Compares each of the first `distance` rows with the one `distance` further on, if there is
/// one.
#[inline(always)]
fn exchange_across(rows: &mut [Row], distance: usize) {
    if rows.len() > distance {
        let (front, back) = rows.split_at_mut(distance);
        for (front, back) in front.iter_mut().zip(back) {
            exchange(front, back);
        }
    }
}

/// Puts the larger key of each lane in front.
#[inline(always)]
fn exchange(front: &mut Row, back: &mut Row) {
    (*front, *back) = (front.larger(back), front.smaller(back));
}

/// For long lists, where the network's extra factor of log n outweighs its lanes.
fn sort_lane_by_lane(rows: &mut [Row], keys: &mut Scratch) {
    for lane in 0..LANES {
        // The bits of floats that are not negative are in their order.
        keys.clear();
        keys.extend(rows.iter().map(|row| !row.0[lane].to_bits()));
        keys.sort_unstable();
        for (&key, row) in keys.iter().zip(&mut *rows) {
            row.0[lane] = f64::from_bits(!key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes::key;
    use proptest::prelude::*;

    fn check(loads: &[[f32; LANES]]) {
        let mut rows: Vec<Row> = loads
            .iter()
            .enumerate()
            .map(|(index, loads)| Row(loads.map(|load| key(f64::from(load), index as u64))))
            .collect();
        let mut expected = rows.clone();
        sort_descending(&mut rows, &mut Scratch::new());
        for lane in 0..LANES {
            expected.sort_by(|a, b| b.0[lane].total_cmp(&a.0[lane]));
            for (got, wanted) in rows.iter().zip(&expected) {
                assert_eq!(got.0[lane].to_bits(), wanted.0[lane].to_bits());
            }
        }
    }

    proptest! {
        #[test]
        fn each_lane_is_sorted_by_load_and_tag(
            loads in prop::collection::vec(
                prop::array::uniform8(prop_oneof![
                    Just(0.0f32), Just(-0.0), Just(1.0), Just(1e-45), 0.0f32..1e30, 0.0f32..3.0
                ]),
                1..300,
            )
        ) {
            check(&loads);
        }
    }

    #[test]
    fn long_lists_are_sorted_too() {
        let loads: Vec<_> = (0..NETWORK_LIMIT + 7)
            .map(|index| std::array::from_fn(|lane| ((index * 37 + lane) % 101) as f32))
            .collect();
        check(&loads);
        check(&loads[..NETWORK_LIMIT]);
    }

    /// A network that sorts all zero-one inputs sorts every input.
    #[test]
    fn short_networks_sort_all_inputs_of_zeros_and_ones() {
        for length in 1..=13usize {
            for pattern in 0u32..1 << length {
                let mut rows: Vec<Row> = (0..length)
                    .map(|bit| Row([f64::from(pattern >> bit & 1); LANES]))
                    .collect();
                sort_descending(&mut rows, &mut Scratch::new());
                assert!(rows.is_sorted_by(|a, b| a.0[0] >= b.0[0]), "{pattern:b}");
            }
        }
    }
}

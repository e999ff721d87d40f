//! Loops over one integer per rank, which the compiler turns into vectors.

/// Rows are as long as the next multiple of this.
pub(super) const ROW: usize = 16;

/// The lowest index of the smallest value, and the value.
#[inline(always)]
pub(super) fn argmin(values: &[i32]) -> (usize, i32) {
    let least = values
        .iter()
        .fold(i32::MAX, |least, &value| least.min(value));
    (position(values, least), least)
}

/// The lowest index of the largest value, and the value.
#[inline(always)]
pub(super) fn argmax(values: &[i32]) -> (usize, i32) {
    let most = values.iter().fold(i32::MIN, |most, &value| most.max(value));
    (position(values, most), most)
}

/// The lowest index of a value that is there.
#[inline(always)]
fn position(values: &[i32], wanted: i32) -> usize {
    let mut place = u32::MAX;
    for (index, &value) in values.iter().enumerate() {
        place = place.min(if value == wanted {
            index as u32
        } else {
            u32::MAX
        });
    }
    place as usize
}

/// Lowers each lane of `least` to how far its goal is from the nearest of the values.
#[inline(always)]
pub(super) fn nearest(values: &[i32], goals: &[i32], least: &mut [i32]) {
    let (eights, rest) = values.as_chunks::<8>();
    for values in eights {
        nearest_of(values, goals, least);
    }
    let (fours, rest) = rest.as_chunks::<4>();
    for values in fours {
        nearest_of(values, goals, least);
    }
    for &value in rest {
        nearest_of(&[value], goals, least);
    }
}

#[inline(always)]
fn nearest_of<const K: usize>(values: &[i32; K], goals: &[i32], least: &mut [i32]) {
    for (least, &goal) in least.iter_mut().zip(goals) {
        let mut near = *least;
        for &value in values {
            near = near.min((value - goal).abs());
        }
        *least = near;
    }
}

/// Lowers each lane of `least`, taken as unsigned, to the least by which a value is above the
/// row's; what is below it wraps around.
#[inline(always)]
pub(super) fn least_above(values: &[i32], row: &[i32], least: &mut [i32]) {
    let (fours, rest) = values.as_chunks::<4>();
    for values in fours {
        least_above_of(values, row, least);
    }
    for &value in rest {
        least_above_of(&[value], row, least);
    }
}

#[inline(always)]
fn least_above_of<const K: usize>(values: &[i32; K], row: &[i32], least: &mut [i32]) {
    for (least, &share) in least.iter_mut().zip(row) {
        let mut above = *least as u32;
        for &value in values {
            above = above.min(value.wrapping_sub(share) as u32);
        }
        *least = above as i32;
    }
}

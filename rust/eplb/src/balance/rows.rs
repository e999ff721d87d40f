//! Loops over the shares of ranks, which the compiler turns into vectors.

use super::ranks::BARRED;

/// Rows are as long as the next multiple of this.
pub(crate) const LANES: usize = 16;

/// Further than any two shares differ; with a level on top it still fits an `i32`.
const FAR: i32 = i32::MAX - BARRED;

/// How near the difference of one of `ours` and one of `theirs` comes to a goal.
#[inline(always)]
pub(crate) fn nearest(ours: &[i32], theirs: &[i32], goal: i32) -> i32 {
    let mut least = FAR;
    let (eights, rest) = ours.as_chunks::<8>();
    for ours in eights {
        least = least.min(nearest_of(ours, theirs, goal));
    }
    for &ours in rest {
        least = least.min(nearest_of(&[ours], theirs, goal));
    }
    least
}

#[inline(always)]
fn nearest_of<const N: usize>(ours: &[i32; N], theirs: &[i32], goal: i32) -> i32 {
    let mut least = FAR;
    for &theirs in theirs {
        let wanted = theirs + goal;
        for &ours in ours {
            least = least.min((ours - wanted).abs());
        }
    }
    least
}

/// The first two whose difference is as near to a goal.
#[inline(always)]
pub(crate) fn find(ours: &[i32], theirs: &[i32], goal: i32, near: i32) -> Option<(usize, usize)> {
    let is_it = |ours: i32, theirs: i32| (ours - theirs - goal).abs() == near;
    let first = ours.iter().position(|&ours| {
        let hit = |hit, &theirs: &i32| hit | is_it(ours, theirs);
        theirs.iter().fold(false, hit)
    })?;
    let second = theirs
        .iter()
        .position(|&theirs| is_it(ours[first], theirs))?;
    Some((first, second))
}

/// Lowers each lane of `best` to `even` plus how near the difference of one of `ours` and one of
/// `theirs` comes to `half`, and notes `name` where that is lower.
#[inline(always)]
pub(crate) fn lower<const N: usize>(
    ours: &[i32; N],
    theirs: &[i32],
    half: i32,
    even: i32,
    name: u32,
    best: &mut [i32],
    who: &mut [u32],
) {
    for ((best, who), &theirs) in best.iter_mut().zip(who).zip(theirs) {
        let wanted = theirs + half;
        let mut near = FAR;
        for &ours in ours {
            near = near.min((ours - wanted).abs());
        }
        let after = near + even;
        *who = if after < *best { name } else { *who };
        *best = after.min(*best);
    }
}

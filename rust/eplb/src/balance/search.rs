//! Local search: exchanges that lighten the heaviest rank, and replicas that change owner.

use super::counts::share;
use super::fuel::Fuel;
use super::part::Part;
use super::random::Random;
use super::ranks::Ranks;
use super::swaps;

/// How far above the mean a rank may be for exchanges to stop.
const EVEN_ENOUGH: f64 = 3e-5;

/// How far above the mean the heaviest rank may be, times the steps a search may take, for changes
/// of counts to be left out.
const PATIENCE: f64 = 0.3;

/// How many of the lightest ranks are asked for an exchange of one replica for one, before any is
/// asked for more.
const FIRST: usize = 6;

/// How many of the lightest ranks are asked for an exchange of two replicas for two.
const PARTNERS: usize = 16;

/// How many exchanges may follow a change of counts before it is judged.
const EXCHANGES: u32 = 32;

/// One in so many changes of counts is for an expert of any rank, not of the heaviest.
const STRAYS: usize = 8;

/// With so few ranks, all have a part in what is wrong: every other change is a stray one, and every
/// other is followed by one more.
const SMALL: usize = 4;

/// With so few ranks, after how many tries the search returns to the best it has seen.
const WANDER: u32 = 4;

/// How many changes of counts are made at once, at most; after each, one in so many times another.
const CHANGES: usize = 3;
const FURTHER: usize = 4;

/// How many changes of counts are looked at before one is made.
const CANDIDATES: usize = 8;

/// How much less than its slack a part is evened out to: loads change after the plan is made.
const MARGIN: f64 = 0.01;

/// Has room for all that an improvement may need, so that none allocates.
pub(crate) fn reserve(ranks: &Ranks, best: &mut Ranks, scratch: &mut swaps::Scratch) {
    scratch.reserve(ranks);
    best.reserve_for(ranks);
}

/// Improves a placement; ranks may be as far above the mean as `slack` says, less a margin. With
/// more fuel it takes the same steps and then more, and what it leaves is the best it has seen: more
/// fuel never gives a worse placement.
pub(crate) fn improve(
    ranks: &mut Ranks,
    part: &Part,
    slack: f64,
    fuel: &mut Fuel,
    best: &mut Ranks,
    scratch: &mut swaps::Scratch,
) {
    reserve(ranks, best, scratch);
    let enough = EVEN_ENOUGH.max(slack - MARGIN);
    let target = part.level_over_mean(enough);
    scratch.order.sort(ranks);
    let level = descend(ranks, target, fuel, scratch);
    let loose = part.level_over_mean(enough.max(PATIENCE / f64::from(fuel.capacity)));
    if level > loose && !fuel.is_empty() {
        change_counts(ranks, part, loose, level, fuel, best, scratch);
    }
}

/// Exchanges replicas of the heaviest rank until it carries no more than the target, or no
/// exchange helps, or the fuel is used up; returns what it carries then.
fn descend(ranks: &mut Ranks, target: i32, fuel: &mut Fuel, scratch: &mut swaps::Scratch) -> i32 {
    loop {
        let (heavy, level) = scratch.order.heaviest();
        if level <= target || !fuel.step() {
            return level;
        }
        if let Some(swap) = ranks.best_swap(heavy, FIRST, scratch) {
            ranks.apply_in_order(&[swap], &mut scratch.order);
        } else if let Some(swaps) = ranks.best_double_swap(heavy, PARTNERS, scratch) {
            ranks.apply_in_order(&swaps, &mut scratch.order);
        } else if let Some(swap) = ranks.best_swap(heavy, usize::MAX, scratch) {
            ranks.apply_in_order(&[swap], &mut scratch.order);
        } else {
            return level;
        }
    }
}

/// Gives an expert of the heaviest rank one more replica, in the place of another's, evens out by
/// exchanges, and keeps what is no worse; until the heaviest rank carries no more than the target
/// or the fuel is used up.
fn change_counts(
    ranks: &mut Ranks,
    part: &Part,
    target: i32,
    level: i32,
    fuel: &mut Fuel,
    best: &mut Ranks,
    scratch: &mut swaps::Scratch,
) {
    let target_of_exchanges = part.level_over_mean(EVEN_ENOUGH);
    let share_of = |expert: usize, count: u32| share(part.weight[expert], count);
    let mut random = Random::new();
    let mut level = level;
    best.copy_from(ranks);
    let small = ranks.num_ranks() <= SMALL;
    let mut tries = 0u32;
    while level > target && fuel.step() {
        tries += 1;
        let mut changed = false;
        for change in 0..CHANGES {
            // One change more, now and then: some placements are two changes away from any better.
            if change > 0 && random.below(if small { 2 } else { FURTHER }) > 0 {
                break;
            }
            let (heavy, _) = ranks.heaviest();
            changed |= change_count(ranks, heavy, &mut random, share_of);
        }
        if !changed {
            continue;
        }
        scratch.order.mend(ranks);
        let new = fuel.spend(EXCHANGES, |fuel| {
            descend(ranks, target_of_exchanges, fuel, scratch)
        });
        if new <= level {
            level = new;
            best.copy_from(ranks);
        } else if !small || tries.is_multiple_of(WANDER) {
            ranks.copy_from(best);
            scratch.order.mend(ranks);
        }
    }
    ranks.copy_from(best);
}

/// Gives an expert of the heaviest rank, or now and then of another, one more replica, in the place
/// of another's: of a few such changes, the one that leaves the ranks it burdens lightest. Returns
/// whether there was one.
fn change_count(
    ranks: &mut Ranks,
    heavy: usize,
    random: &mut Random,
    share_of: impl Fn(usize, u32) -> i32 + Copy,
) -> bool {
    // An expert of any rank may be what keeps the others from fitting.
    let source = match random.below(if ranks.num_ranks() <= SMALL {
        2
    } else {
        STRAYS
    }) {
        0 => random.below(ranks.num_ranks()),
        _ => heavy,
    };
    if ranks.filled(source) == 0 {
        return false;
    }
    let hot = ranks.expert_in(source, random.below(ranks.filled(source)));
    let mut choice = (i32::MAX, 0, 0);
    for _ in 0..CANDIDATES {
        let rank = random.below(ranks.num_ranks());
        if ranks.filled(rank) == 0 || ranks.holds(rank, hot) {
            continue;
        }
        let slot = random.below(ranks.filled(rank));
        if ranks.count(ranks.expert_in(rank, slot)) > 1 {
            let after = ranks.level_after_recount(rank, slot, hot, share_of);
            choice = choice.min((after, rank, slot));
        }
    }
    let (after, rank, slot) = choice;
    if after < i32::MAX {
        ranks.recount(rank, slot, hot, share_of);
    }
    after < i32::MAX
}

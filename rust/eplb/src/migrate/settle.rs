//! Moves that cannot be avoided: a place for experts that lost theirs, and something for slots that
//! hold nothing.

use super::table::{Ranks, Site, Table};
use crate::balance::share;

/// Stands for no island.
const NOWHERE: u32 = u32::MAX;

/// Scratch of [`settle`].
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    orphans: Vec<u32>,
    /// Empty slots.
    empty: Vec<Site>,
    /// The island of each group, and how many slots each island has to spare.
    island_of_group: Vec<u32>,
    spare: Vec<i64>,
}

/// Finds a place for experts that have none, heaviest first, and something for every empty slot.
///
/// An expert goes where its group is; a group that has lost all its places, to the island with most
/// slots to spare. Unless slots may repeat an expert of their rank, each empty one takes a move.
pub(crate) fn settle(
    ranks: &Ranks,
    weight: &[i32],
    table: &mut Table,
    repeats: bool,
    scratch: &mut Scratch,
) {
    let orphans = &mut scratch.orphans;
    orphans.clear();
    let nowhere = (0..weight.len()).filter(|&expert| table.count(expert) == 0);
    orphans.extend(nowhere.map(|expert| expert as u32));
    orphans.sort_unstable_by_key(|&expert| (-weight[expert as usize], expert));
    let has_empty = |rank| empty_slots(ranks, table, rank).next().is_some();
    if orphans.is_empty() && !(0..ranks.len()).any(has_empty) {
        return;
    }
    find_groups(ranks, weight.len(), table, scratch);
    let Scratch {
        orphans,
        empty,
        island_of_group,
        ..
    } = scratch;
    empty.clear();
    empty.extend((0..ranks.len()).flat_map(|rank| empty_slots(ranks, table, rank)));
    let may_hold = |rank: usize, expert: usize| {
        let group = ranks
            .group_size()
            .map(|size| island_of_group[expert / size]);
        group.is_none_or(|island| island == NOWHERE || island as usize == ranks.island_of(rank))
    };
    for &expert in &*orphans {
        let expert = expert as usize;
        let mut best: Option<(i32, Site)> = None;
        for &site in empty.iter().chain(table.shared()) {
            if !may_hold(site.rank(), expert) {
                continue;
            }
            let most = best.map_or(i32::MAX, |(level, _)| level);
            if let Some(level) = level_with(ranks, weight, table, site, expert, most)
                && best.is_none_or(|best| (level, site) < best)
            {
                best = Some((level, site));
            }
        }
        if let Some((_, site)) = best {
            table.give(weight, site, expert);
            empty.retain(|&other| other != site);
        }
    }
    for rank in 0..ranks.len() {
        let may_hold = |expert| may_hold(rank, expert);
        if repeats {
            fill_with_one(ranks, weight, table, rank, may_hold);
        } else {
            fill_with_many(ranks, weight, table, rank, may_hold);
        }
    }
}

/// Finds the island of each group.
fn find_groups(ranks: &Ranks, num_experts: usize, table: &Table, scratch: &mut Scratch) {
    let Scratch {
        island_of_group,
        spare,
        ..
    } = scratch;
    island_of_group.clear();
    let Some(size) = ranks.group_size() else {
        return;
    };
    island_of_group.resize(num_experts / size, NOWHERE);
    spare.clear();
    spare.resize(ranks.num_islands(), 0);
    for rank in 0..ranks.len() {
        spare[ranks.island_of(rank)] += ranks.slots(rank).len() as i64;
    }
    for expert in 0..num_experts {
        table.each_host(expert, |rank, _| {
            island_of_group[expert / size] = ranks.island_of(rank) as u32;
        });
    }
    for &island in &*island_of_group {
        if let Some(spare) = spare.get_mut(island as usize) {
            *spare -= size as i64;
        }
    }
    for island in island_of_group
        .iter_mut()
        .filter(|island| **island == NOWHERE)
    {
        let most = (0..spare.len()).max_by_key(|&island| (spare[island], usize::MAX - island));
        if let Some(most) = most.filter(|&most| spare[most] >= size as i64) {
            *island = most as u32;
            spare[most] -= size as i64;
        }
    }
}

/// The longest that any rank takes whose load changes if an expert without a place gets a slot; none
/// if that is more than `most`.
fn level_with(
    ranks: &Ranks,
    weight: &[i32],
    table: &Table,
    site: Site,
    expert: usize,
    most: i32,
) -> Option<i32> {
    let rank = site.rank();
    let load = table.load[rank] + weight[expert];
    let Some(old) = table.expert_in(site) else {
        return Some(ranks.time(rank, load)).filter(|&level| level <= most);
    };
    let before = table.carried_in(site, weight, old);
    if ranks.time(rank, load - before) > most {
        return None;
    }
    let more = share(weight[old], table.count(old) - 1) - before;
    let again = (table.times(rank, old) - 1) * more;
    let mut level = ranks.time(rank, load - before + again);
    table.each_host(old, |host, times| {
        if host != rank {
            level = level.max(ranks.time(host, table.load[host] + times * more));
        }
    });
    (level <= most).then_some(level)
}

/// The empty slots of a rank.
fn empty_slots(ranks: &Ranks, table: &Table, rank: usize) -> impl Iterator<Item = Site> {
    let sites = ranks.slots(rank).map(move |slot| Site::new(rank, slot));
    sites.filter(|&site| table.expert_in(site).is_none())
}

/// Fills the empty slots of a rank: with an expert that it holds, which takes no move; where it holds
/// nothing, with one that it may. The one that comes nearest to making the rank carry the mean.
fn fill_with_one(
    ranks: &Ranks,
    weight: &[i32],
    table: &mut Table,
    rank: usize,
    may_hold: impl Fn(usize) -> bool,
) {
    let free = empty_slots(ranks, table, rank).count() as u32;
    if free == 0 {
        return;
    }
    let bare = !(0..weight.len()).any(|expert| table.holds(rank, expert));
    let candidates = (0..weight.len()).filter(|&expert| {
        if bare {
            may_hold(expert)
        } else {
            table.holds(rank, expert)
        }
    });
    let nearest = candidates.min_by_key(|&expert| {
        let (count, times) = (table.count(expert), table.times(rank, expert));
        let before = share(weight[expert], count.max(1)) * times;
        let after = share(weight[expert], count + free) * (times + free as i32);
        let time = ranks.time(rank, table.load[rank] + after - before);
        (f64::from(time) - ranks.mean()).abs() as i64
    });
    let Some(expert) = nearest else { return };
    for slot in ranks.slots(rank) {
        let site = Site::new(rank, slot);
        if table.expert_in(site).is_none() {
            table.give(weight, site, expert);
        }
    }
}

/// Fills each empty slot of a rank with an expert that it lacks: with what comes nearest to making it
/// carry the mean, if all its empty slots took as much. What it holds is repeated where it lacks
/// none.
fn fill_with_many(
    ranks: &Ranks,
    weight: &[i32],
    table: &mut Table,
    rank: usize,
    may_hold: impl Fn(usize) -> bool,
) {
    loop {
        let free = empty_slots(ranks, table, rank).count();
        let Some(site) = empty_slots(ranks, table, rank).next() else {
            return;
        };
        let missing = ranks.mean() - f64::from(ranks.time(rank, table.load[rank]));
        let want = missing / free as f64;
        let lacking = |&expert: &usize| !table.holds(rank, expert) && may_hold(expert);
        let nearest = (0..weight.len()).filter(lacking).min_by_key(|&expert| {
            let more = share(weight[expert], table.count(expert) + 1);
            (f64::from(ranks.time(rank, more)) - want).abs() as i64
        });
        let Some(expert) = nearest else {
            return fill_with_one(ranks, weight, table, rank, may_hold);
        };
        table.give(weight, site, expert);
    }
}

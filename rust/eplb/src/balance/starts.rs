//! The first placements of eight layers side by side, where all ranks are alike.
//!
//! As in the reference policy, sorting and packing are chains of comparisons that leave a vector
//! register idle on one layer; so eight layers run in step, one in each [lane](crate::lanes). What
//! comes out is that of [`fill`](super::fill), but for an expert that comes twice to a rank, which
//! changes places afterwards.

use multiversion::multiversion;

use super::counts;
use super::part::Part;
use super::ranks::Ranks;
use crate::lanes::{LANES, NOTHING, Row, TAG, key, larger, tag};
use crate::order::{self, sort_descending};
use crate::pack::{self, Places};
use crate::topology::Topology;

/// First placements of up to eight layers, and the scratch they need.
#[derive(Debug, Default)]
pub(crate) struct Starts {
    layers: [Start; LANES],
    rows: Vec<Row>,
    order: order::Scratch,
    pack: pack::Scratch,
    places: Vec<Places>,
    /// The rank of each place, of so many slots.
    rank_of: Vec<u32>,
    slots_per_rank: usize,
    head: Vec<(i32, u32)>,
    misplaced: Vec<(usize, usize, i32)>,
}

/// The first placement of one layer.
#[derive(Debug, Default)]
struct Start {
    part: Part,
    count: Vec<u32>,
    items: Vec<(i32, u32)>,
    /// The share and the expert of each replica, heaviest first.
    replicas: Vec<(i32, u32)>,
}

/// Replicas that could not be placed: the counts of experts, and the list of shares.
pub(crate) type Unplaced<'a> = (&'a [u32], &'a [(i32, u32)]);

impl Starts {
    /// Whether the first placements can be made side by side: all ranks are alike. Two slots a rank
    /// have a [way of their own](super::fold).
    pub(crate) fn serve(topology: &Topology) -> bool {
        topology.is_even() && topology.slots_per_gpu() != 2
    }

    /// Makes the first placements of up to eight layers, `[layers, num_experts]`.
    pub(crate) fn make(&mut self, topology: &Topology, loads: &[f32], num_experts: usize) {
        self.slots_per_rank = topology.slots_per_gpu();
        let (num_ranks, slots) = (topology.num_gpus(), self.slots_per_rank);
        self.rank_of.clear();
        self.rank_of
            .extend((0..num_ranks as u32).flat_map(|rank| (0..slots).map(move |_| rank)));
        self.rows.clear();
        self.rows.resize(num_experts, Row::default());
        for (lane, load) in loads.chunks_exact(num_experts).enumerate() {
            for (expert, (row, &load)) in self.rows.iter_mut().zip(load).enumerate() {
                row.0[lane] = key(f64::from(load), TAG - expert as u64);
            }
        }
        sort(&mut self.rows, &mut self.order);
        let most = num_ranks as u32;
        self.head.clear();
        self.head.reserve(num_experts);
        self.misplaced.clear();
        self.misplaced.reserve(topology.num_slots());
        for (lane, load) in loads.chunks_exact(num_experts).enumerate() {
            let Start {
                part,
                count,
                items,
                replicas,
            } = &mut self.layers[lane];
            part.set_ranks(topology.live_gpus());
            let sorted = self.rows.iter().map(|row| (TAG - tag(row.0[lane])) as u32);
            part.set_sorted(sorted, load);
            counts::greedy(&part.weight, part.num_slots(), most, count, &mut self.head);
            counts::list(&part.weight, count, &mut self.head, items);
            replicas.clear();
            for &item in &*items {
                for _ in 0..count[item.1 as usize] {
                    replicas.push(item);
                }
            }
        }
        self.rows.clear();
        self.rows.resize(topology.num_slots(), Row::default());
        for (lane, start) in self.layers.iter().enumerate() {
            for (row, &(share, _)) in self.rows.iter_mut().zip(&start.replicas) {
                row.0[lane] = larger(f64::from(share), NOTHING);
            }
        }
        pack_all(
            &self.rows,
            num_ranks,
            slots,
            &mut self.places,
            &mut self.pack,
        );
    }

    /// Hands out the start of a layer: experts and ranks, and who holds what. Returns the counts
    /// and the list of shares if an expert would be twice on a rank whatever it changes places
    /// with.
    pub(crate) fn take(
        &mut self,
        lane: usize,
        part: &mut Part,
        ranks: &mut Ranks,
    ) -> Result<(), Unplaced<'_>> {
        let Self {
            layers,
            places,
            rank_of,
            misplaced,
            ..
        } = self;
        let Start {
            part: made,
            count,
            items,
            replicas,
        } = &mut layers[lane];
        std::mem::swap(part, made);
        ranks.reset(part, count.len());
        misplaced.clear();
        for (&(share, expert), place) in replicas.iter().zip(places) {
            let rank = rank_of[place[lane] as usize] as usize;
            if ranks.holds(rank, expert as usize) {
                misplaced.push((rank, expert as usize, share));
            } else {
                ranks.push(rank, expert as usize, share);
            }
        }
        let settled = misplaced
            .iter()
            .all(|&(rank, expert, share)| settle(ranks, rank, expert, share));
        if settled { Ok(()) } else { Err((count, items)) }
    }
}

/// Gives a rank with room a replica of another, and that rank the replica that the first holds
/// already, so that the heavier of the two is as light as can be; false if there is none.
fn settle(ranks: &mut Ranks, rank: usize, expert: usize, share: i32) -> bool {
    let mut best: Option<(i32, usize, usize)> = None;
    for other in (0..ranks.num_ranks()).filter(|&other| !ranks.holds(other, expert)) {
        for (slot, other_share) in ranks.shares_of(other).iter().enumerate() {
            let after = ranks.load(rank) + other_share;
            let level = after.max(ranks.load(other) - other_share + share);
            let candidate = (level, other, slot);
            if best.is_none_or(|best| candidate < best) && ranks.may_move(slot, other, rank) {
                best = Some(candidate);
            }
        }
    }
    let Some((_, other, slot)) = best else {
        return false;
    };
    let (moved, moved_share) = ranks.replace(other, slot, expert, share);
    ranks.push(rank, moved, moved_share);
    true
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
fn sort(rows: &mut [Row], scratch: &mut order::Scratch) {
    sort_descending(rows, scratch);
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
fn pack_all(
    items: &[Row],
    num_packs: usize,
    capacity: usize,
    places: &mut Vec<Places>,
    scratch: &mut pack::Scratch,
) {
    pack::pack(items, num_packs, capacity, places, scratch);
}

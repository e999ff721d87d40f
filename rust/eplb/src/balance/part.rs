//! A problem of its own: experts, and the ranks they are to be placed on.

use super::ranks::WHOLE;

/// What the loads of a part are scaled to: a little less than [`WHOLE`], for what rounding adds.
pub(crate) const TOTAL: f64 = (WHOLE - (1 << 21)) as f64;

/// Binary digits of [`Part::slowness`] after the point.
const SLOWNESS_BITS: u32 = 20;

/// Experts and ranks: a layer, or what of it stays on one node.
#[derive(Debug, Default)]
pub(crate) struct Part {
    /// The ranks, by their numbers in the topology, and how many slots each has.
    pub(crate) ranks: Vec<u32>,
    pub(crate) slots_of: Vec<u32>,
    /// How many times slower than the mean each rank is, fixed point; empty if none is.
    slowness: Vec<i64>,
    /// The experts, heaviest first, and their loads in integer units.
    pub(crate) experts: Vec<u32>,
    pub(crate) weight: Vec<i32>,
    keys: Vec<u64>,
}

impl Part {
    /// Takes the ranks: number, slots and speed of each.
    pub(crate) fn set_ranks(&mut self, ranks: impl Iterator<Item = (usize, usize, f64)> + Clone) {
        self.ranks.clear();
        self.slots_of.clear();
        self.slowness.clear();
        for (rank, slots, _) in ranks.clone() {
            self.ranks.push(rank as u32);
            self.slots_of.push(slots as u32);
        }
        let total: f64 = ranks.clone().map(|(_, _, speed)| speed).sum();
        let mean = total / self.ranks.len().max(1) as f64;
        if ranks.clone().any(|(_, _, speed)| speed != mean) {
            let one = f64::from(1u32 << SLOWNESS_BITS);
            self.slowness
                .extend(ranks.map(|(_, _, speed)| (mean / speed * one).round() as i64));
        }
    }

    /// Takes the experts, by number, and their loads.
    pub(crate) fn set_experts(&mut self, experts: impl Iterator<Item = u32>, load: &[f32]) {
        self.keys.clear();
        // Loads that are not negative are in the order of their bits; ties go to the lower index.
        self.keys.extend(experts.map(|expert| {
            let bits = (load[expert as usize] + 0.0).to_bits();
            u64::from(!bits) << 32 | u64::from(expert)
        }));
        self.keys.sort_unstable();
        let keys = std::mem::take(&mut self.keys);
        self.set_sorted(keys.iter().map(|&key| key as u32), load);
        self.keys = keys;
    }

    /// Takes the experts, by number, heaviest first, and their loads.
    pub(crate) fn set_sorted(&mut self, experts: impl Iterator<Item = u32>, load: &[f32]) {
        self.experts.clear();
        self.experts.extend(experts);
        let loads = self.experts.iter().map(|&expert| load[expert as usize]);
        let total: f64 = loads.clone().map(f64::from).sum();
        let scale = if total > 0.0 { TOTAL / total } else { 0.0 };
        self.weight.clear();
        self.weight
            .extend(loads.map(|load| (f64::from(load) * scale + 0.5) as i32));
    }

    pub(crate) fn num_ranks(&self) -> usize {
        self.ranks.len()
    }

    pub(crate) fn num_slots(&self) -> usize {
        self.slots_of.iter().sum::<u32>() as usize
    }

    /// Whether all ranks are equally fast.
    #[inline(always)]
    pub(crate) fn is_even(&self) -> bool {
        self.slowness.is_empty()
    }

    /// The slowness of each rank, empty if all are equally fast.
    pub(crate) fn slowness(&self) -> &[i64] {
        &self.slowness
    }

    /// How long a rank takes for a load, in the units of load of a rank of mean speed.
    #[inline(always)]
    pub(crate) fn time(&self, rank: usize, load: i32) -> i32 {
        self.slowness
            .get(rank)
            .map_or(load, |&slowness| scaled(load, slowness))
    }

    /// The time that the heaviest rank takes if all take `over` more than the mean.
    pub(crate) fn level_over_mean(&self, over: f64) -> i32 {
        (TOTAL / self.num_ranks().max(1) as f64 * (1.0 + over)) as i32
    }
}

/// A load times a slowness.
#[inline(always)]
pub(crate) fn scaled(load: i32, slowness: i64) -> i32 {
    ((i64::from(load) * slowness) >> SLOWNESS_BITS).min(i64::from(i32::MAX / 2)) as i32
}

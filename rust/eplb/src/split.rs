//! How each expert's tokens are split over its replicas, the placement as it is.
//!
//! Weights stay where they are: a split only says which share of an expert's tokens each of its
//! slots gets. The best split for a load is exact; see [`Splitter`].

mod entries;
mod flow;
mod graph;
mod speeds;

use std::ops::Range;

use crate::error::{Code, Error, Result, require_length};
use crate::load::Load;
use crate::placement::Placement;
use graph::{Graphs, SharedSlot};
use speeds::Speeds;

pub use entries::{MAX_WIDTH, entries, entries_into, quotas_into};
pub(crate) use flow::Flow;
pub(crate) use graph::LayerGraph;

/// The most tokens a layer may have in all: sums stay exact as `f64`.
pub const MAX_TOKENS: i64 = 1 << 53;

/// The most bits of the whole numbers that a layer's load is scaled to, in all.
const MAX_BITS: u32 = 51;

/// Splits loads over the replicas of one placement so that the largest rank load of each layer is
/// the least possible.
///
/// Prepared once, it allocates nothing afterwards. An expert that is on a rank several times
/// counts there once, and its slots there get equal parts. Where ranks differ in speed, what is
/// least is the longest rank time: load over speed, the mean speed of live ranks being 1.
///
/// # The answer
/// Loads are scaled, by a power of two for each layer, to whole numbers of 51 bits in all, and
/// split exactly: the largest rank load is the optimum to within 1 part in 10^12 (1 in 10^9 where
/// speeds differ, which takes some of the bits). Of the splits
/// that reach it, the answer is the one found so. Experts in the order of their first slot are
/// poured over their ranks as water, the remainder to the lowest ranks, three times. While a rank is
/// above the optimum, ranks that share experts are evened out along a tree of these, from the
/// lowest rank and breadth first, twice; then tokens go from ranks above the optimum, in the order
/// of ranks, along shortest paths of shared experts to ranks below it, the lowest first. That
/// is a rule, not a choice: the same input gives the same bytes everywhere. An expert without load
/// is split evenly. Where speeds differ, the rule is followed with slower ranks filled up by what
/// they can carry less than the fastest in the time tried, and that time is raised, from a bound
/// below, until it is enough.
///
/// # Cost
/// For 58 layers of 256 experts on 288 slots of 32 ranks, one core: see `benches/results`.
#[derive(Debug, Clone)]
pub struct Splitter {
    num_layers: usize,
    num_experts: usize,
    num_slots: usize,
    num_ranks: usize,
    graphs: Graphs,
    /// The slots of each rank, and the speeds of ranks that are not all alike.
    slots_of: Vec<Range<usize>>,
    speeds: Option<Speeds>,
    /// The slots of dead ranks, which hold nothing.
    idle: Vec<Range<usize>>,
    /// How many bits a layer's whole numbers have in all.
    bits: u32,
    /// Which expert each slot holds, `[L, R]`; that of an idle slot is no matter.
    phy2log: Vec<u32>,
    /// The load of a layer in whole numbers, `[E]`.
    load: Vec<i64>,
    /// The inverse of each item's load.
    inverse: Vec<f64>,
    flow: Flow,
}

/// Where [`Splitter::split`] writes, for L layers, R slots and D ranks.
#[derive(Debug)]
pub struct SharesMut<'a> {
    /// The share of its expert's tokens that each slot gets, `[L, R]`; those of an expert add up
    /// to 1, and slots of dead ranks get 0.
    pub shares: &'a mut [f64],
    /// The largest rank load of each layer, or the longest rank time where ranks differ in speed,
    /// `[L]`, in the unit of the load. No split of this placement has a smaller one.
    pub level: &'a mut [f64],
    /// What each rank carries, `[L, D]`, or `None`.
    pub rank_load: Option<&'a mut [f64]>,
    /// The certificate, `[L, D]`, or `None`: ranks that hold some experts alone, whose loads
    /// divided by the number of these ranks, or the sum of their speeds, are the level.
    pub tight: Option<&'a mut [bool]>,
}

impl Splitter {
    /// Prepares a placement. O(L (R + E)), and D log R of it: 0.2 ms for 58 x 288 slots.
    #[must_use]
    pub fn new(placement: &Placement) -> Self {
        let graphs = Graphs::new(placement);
        let topology = placement.topology();
        let gpus = 0..topology.num_gpus();
        let dead = gpus.clone().filter(|&gpu| topology.is_dead(gpu));
        let speeds = Speeds::new(topology);
        let experts = placement.phy2log().iter();
        Self {
            slots_of: gpus.map(|gpu| topology.slots_of(gpu)).collect(),
            idle: dead.map(|gpu| topology.slots_of(gpu)).collect(),
            bits: speeds.as_ref().map_or(MAX_BITS, Speeds::bits).min(MAX_BITS),
            speeds,
            num_layers: placement.num_layers(),
            num_experts: placement.num_experts(),
            num_slots: topology.num_slots(),
            num_ranks: topology.num_gpus(),
            phy2log: experts.map(|&expert| expert.max(0) as u32).collect(),
            load: vec![0; placement.num_experts()],
            inverse: vec![0.0; graphs.max_items()],
            flow: Flow::with_capacity(
                topology.num_gpus(),
                graphs.max_items(),
                graphs.max_entries(),
            ),
            graphs,
        }
    }

    /// How many layers the placement has (L).
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// How many experts each layer has (E).
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// How many slots each layer has (R).
    #[must_use]
    pub fn num_slots(&self) -> usize {
        self.num_slots
    }

    /// How many ranks there are (D).
    #[must_use]
    pub fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    /// The best split of every layer.
    ///
    /// # Errors
    /// [`Code::WrongShape`] if the load or a buffer has another shape; the buffers are then as
    /// they were.
    pub fn split(&mut self, load: &Load<'_>, out: &mut SharesMut<'_>) -> Result<()> {
        self.check_load(load, self.num_layers)?;
        let (slots, ranks) = (self.num_slots, self.num_ranks);
        let layers = self.num_layers;
        require_length("shares", out.shares.len(), layers * slots)?;
        require_length("level", out.level.len(), layers)?;
        if let Some(rank_load) = &out.rank_load {
            require_length("rank_load", rank_load.len(), layers * ranks)?;
        }
        if let Some(tight) = &out.tight {
            require_length("tight", tight.len(), layers * ranks)?;
        }
        let parts = load.layers().zip(out.shares.chunks_exact_mut(slots));
        for (layer, ((row, shares), level)) in parts.zip(&mut *out.level).enumerate() {
            let unit = self.solve(layer, row, shares, level);
            let of_layer = layer * ranks..(layer + 1) * ranks;
            if let Some(rank_load) = &mut out.rank_load {
                let to = rank_load[of_layer.clone()].iter_mut();
                for (to, &units) in to.zip(&self.flow.rank_load) {
                    *to = units as f64 * unit;
                }
            }
            if let Some(tight) = &mut out.tight {
                self.write_tight(&mut tight[of_layer]);
            }
        }
        Ok(())
    }

    /// The best split of one layer, for a load of that layer alone: writes the share of each slot,
    /// `[R]`, and returns the largest rank load, which no other split has smaller.
    ///
    /// # Errors
    /// [`Code::OutOfRange`] for the layer, [`Code::WrongShape`] for the load or `shares`, which is
    /// then as it was.
    pub fn split_layer(
        &mut self,
        layer: usize,
        load: &Load<'_>,
        shares: &mut [f64],
    ) -> Result<f64> {
        self.check_layer(layer)?;
        self.check_load(load, 1)?;
        require_length("shares", shares.len(), self.num_slots)?;
        let mut level = 0.0;
        self.solve(layer, load.values(), shares, &mut level);
        Ok(level)
    }

    /// The best split of one layer in whole tokens: writes the tokens that each slot gets, `[R]`,
    /// whose sums over each expert's slots are exactly its tokens, and returns the largest number
    /// of tokens on a rank. No other split into whole tokens has a smaller one, or, where ranks
    /// differ in speed, a shorter longest rank time.
    ///
    /// # Errors
    /// [`Code::OutOfRange`] for the layer, [`Code::WrongShape`] for `tokens` (`[E]`) or `quotas`,
    /// [`Code::Negative`] or [`Code::TooLarge`] for a number of tokens, or for more in all than
    /// [`MAX_TOKENS`], fewer where ranks differ in speed; `quotas` is then as it was.
    pub fn quotas_layer(
        &mut self,
        layer: usize,
        tokens: &[i64],
        quotas: &mut [i64],
    ) -> Result<i64> {
        self.check_layer(layer)?;
        require_length("tokens", tokens.len(), self.num_experts)?;
        require_length("quotas", quotas.len(), self.num_slots)?;
        let most = if self.speeds.is_some() {
            1 << self.bits
        } else {
            MAX_TOKENS
        };
        check_tokens(tokens, most)?;
        let graph = self.graphs.layer(layer);
        let level = match &mut self.speeds {
            None => self.flow.solve(&graph, tokens),
            Some(speeds) => {
                speeds.solve(&mut self.flow, &graph, tokens);
                self.flow.rank_load.iter().copied().fold(0, i64::max)
            }
        };
        let phy2log = &self.phy2log[layer * self.num_slots..][..self.num_slots];
        for (quota, &expert) in quotas.iter_mut().zip(phy2log) {
            *quota = tokens[expert as usize];
        }
        for shared in self.graphs.shared_slots(layer) {
            let flow = self.flow.flow[shared.entry as usize];
            let (part, remainder) = (
                flow / i64::from(shared.parts),
                flow % i64::from(shared.parts),
            );
            quotas[shared.slot as usize] = part + i64::from(i64::from(shared.number) < remainder);
        }
        for idle in &self.idle {
            quotas[idle.clone()].fill(0);
        }
        Ok(level)
    }

    /// The certificate of the layer that was split last, `[D]`: see [`SharesMut::tight`].
    ///
    /// # Errors
    /// [`Code::WrongShape`] for the buffer.
    pub fn tight_into(&self, tight: &mut [bool]) -> Result<()> {
        require_length("tight", tight.len(), self.num_ranks)?;
        self.write_tight(tight);
        Ok(())
    }

    /// The share of each slot when replicas share evenly, `[L, R]`.
    ///
    /// # Errors
    /// [`Code::WrongShape`] for the buffer.
    pub fn uniform_into(&self, shares: &mut [f64]) -> Result<()> {
        require_length("shares", shares.len(), self.num_layers * self.num_slots)?;
        for (layer, shares) in shares.chunks_exact_mut(self.num_slots).enumerate() {
            shares.fill(1.0);
            for shared in self.graphs.shared_slots(layer) {
                shares[shared.slot as usize] = 1.0 / f64::from(shared.count);
            }
            self.clear_idle(shares);
        }
        Ok(())
    }

    /// What each rank carries, `[L, D]`, if a load is split by shares, `[L, R]`, that may have
    /// been made for another one. Summed in the order of slots. O(L R).
    ///
    /// # Errors
    /// [`Code::WrongShape`] for the load, the shares or the buffer.
    pub fn rank_load_into(
        &self,
        load: &Load<'_>,
        shares: &[f64],
        rank_load: &mut [f64],
    ) -> Result<()> {
        self.check_load(load, self.num_layers)?;
        require_length("shares", shares.len(), self.num_layers * self.num_slots)?;
        require_length(
            "rank_load",
            rank_load.len(),
            self.num_layers * self.num_ranks,
        )?;
        let layers = self.phy2log.chunks_exact(self.num_slots);
        let layers = layers.zip(shares.chunks_exact(self.num_slots));
        let ranks = rank_load.chunks_exact_mut(self.num_ranks);
        for ((row, (experts, shares)), ranks) in load.layers().zip(layers).zip(ranks) {
            for (slots, sum) in self.slots_of.iter().zip(ranks) {
                let parts = experts[slots.clone()].iter().zip(&shares[slots.clone()]);
                *sum = parts
                    .map(|(&expert, share)| f64::from(row[expert as usize]) * share)
                    .sum();
            }
        }
        Ok(())
    }

    /// Splits a layer; returns the unit of the whole numbers it was split in.
    fn solve(&mut self, layer: usize, row: &[f32], shares: &mut [f64], level: &mut f64) -> f64 {
        let unit = to_units(row, &mut self.load, self.bits);
        let graph = self.graphs.layer(layer);
        *level = unit
            * match &mut self.speeds {
                None => self.flow.solve(&graph, &self.load) as f64,
                Some(speeds) => speeds.solve(&mut self.flow, &graph, &self.load),
            };
        for (inverse, item) in self.inverse.iter_mut().zip(graph.items) {
            *inverse = match self.load[item.expert as usize] {
                0 => 0.0,
                units => 1.0 / units as f64,
            };
        }
        shares.fill(1.0);
        for &SharedSlot {
            slot,
            entry,
            item,
            parts,
            count,
            ..
        } in self.graphs.shared_slots(layer)
        {
            let inverse = self.inverse[item as usize];
            shares[slot as usize] = if inverse == 0.0 {
                1.0 / f64::from(count)
            } else {
                self.flow.flow[entry as usize] as f64 * inverse / f64::from(parts)
            };
        }
        self.clear_idle(shares);
        unit
    }

    fn clear_idle(&self, shares: &mut [f64]) {
        for idle in &self.idle {
            shares[idle.clone()].fill(0.0);
        }
    }

    fn write_tight(&self, tight: &mut [bool]) {
        tight.fill(false);
        for &rank in &self.flow.tight {
            tight[rank as usize] = true;
        }
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        if layer < self.num_layers {
            return Ok(());
        }
        Err(Error::invalid(
            Code::OutOfRange,
            "layer",
            layer,
            format!("a layer from 0 to {}", self.num_layers - 1),
            "",
        ))
    }

    fn check_load(&self, load: &Load<'_>, num_layers: usize) -> Result<()> {
        if (load.num_layers(), load.num_experts()) == (num_layers, self.num_experts) {
            return Ok(());
        }
        Err(Error::invalid(
            Code::WrongShape,
            "load",
            format!("{} x {}", load.num_layers(), load.num_experts()),
            format!("{num_layers} x {}, as the placement has", self.num_experts),
            "",
        ))
    }
}

/// Scales a row, by a power of two, to whole numbers that add up to about 2^bits, and returns what
/// one of them stands for.
fn to_units(row: &[f32], units: &mut [i64], bits: u32) -> f64 {
    /// Adding it to a number from 0 to 2^52 rounds that to a whole one and leaves it in the low
    /// bits, which is a vector instruction where conversion may be none.
    const ROUND: f64 = (1u64 << 52) as f64;
    let mut sums = [0.0f64; 8];
    let chunks = row.chunks_exact(8);
    let rest: f64 = chunks.remainder().iter().map(|&load| f64::from(load)).sum();
    for chunk in chunks {
        for (sum, &load) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(load);
        }
    }
    let total = sums.iter().sum::<f64>() + rest;
    // Sums of f32 are normal as f64, or zero: the bits are 1023 more than the exponent.
    let exponent = (total.to_bits() >> 52) as i64 - 1023;
    let shift = if total > 0.0 {
        i64::from(bits) - 1 - exponent
    } else {
        0
    };
    let power = |exponent: i64| f64::from_bits(((exponent + 1023) as u64) << 52);
    let scale = power(shift);
    for (units, &load) in units.iter_mut().zip(row) {
        let rounded = f64::from(load.abs()) * scale + ROUND;
        *units = (rounded.to_bits() - ROUND.to_bits()) as i64;
    }
    power(-shift)
}

fn check_tokens(tokens: &[i64], most: i64) -> Result<()> {
    let mut sum = 0i64;
    for (expert, &count) in tokens.iter().enumerate() {
        if count < 0 {
            return Err(Error::invalid(
                Code::Negative,
                "tokens",
                format!("{count} at expert {expert}"),
                "0 or more",
                "",
            ));
        }
        sum = sum.saturating_add(count);
    }
    if sum <= most {
        return Ok(());
    }
    Err(Error::invalid(
        Code::TooLarge,
        "tokens",
        format!("{sum} or more in all"),
        format!("at most {most} in all"),
        "",
    ))
}

//! Which expert each slot holds, and where each expert's replicas are.

mod check;
mod write;

use crate::error::{Code, Error, Result, require_positive};
use crate::load::Load;
use crate::topology::Topology;

use check::{
    check_dead_slots, check_layer, no_such_expert, whole_layers, without_slot, wrong_length,
};
pub use write::PlacementMut;
use write::{max_replicas, write_layer};

/// In `phy2log`, stands for what the slot of a dead GPU holds: nothing.
const EMPTY: i64 = -1;

/// What one slot holds: a replica of an expert.
///
/// The compact form in which policies write a layer: `num_slots` of these, by slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replica {
    /// The logical expert.
    pub expert: u32,
    /// Which of the expert's replicas this is, from 0.
    pub number: u32,
}

impl Replica {
    /// What a slot holds that holds nothing, as on a dead GPU.
    pub const NONE: Self = Self {
        expert: u32::MAX,
        number: 0,
    };
}

/// The experts in the slots of every layer, in the three forms that engines read.
///
/// Letters: L layers, E logical experts, R slots, X the largest number of replicas.
///
/// - `phy2log` `[L, R]`: the expert in each slot; -1 in the slots of a dead GPU.
/// - `log2phy` `[L, E, X]`: the slots of each expert's replicas, by replica number; -1 pads.
/// - `logcnt` `[L, E]`: how many replicas each expert has.
///
/// All are `i64`, as the engines have them. Once made, a placement is valid: each slot holds an
/// expert, each expert has a slot, and the three forms agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    topology: Topology,
    num_layers: usize,
    num_experts: usize,
    max_replicas: usize,
    phy2log: Vec<i64>,
    log2phy: Vec<i64>,
    logcnt: Vec<i64>,
}

impl Placement {
    /// Takes the three forms and checks that they are a placement. O(L (R + E X)).
    ///
    /// # Errors
    /// [`Code::NotPositive`] or [`Code::WrongShape`] for the sizes, [`Code::OutOfRange`] for an
    /// expert that does not exist, [`Code::TooSmall`] for an expert without a slot,
    /// [`Code::Inconsistent`] where `log2phy` or `logcnt` contradict `phy2log`.
    pub fn new(
        topology: Topology,
        num_experts: usize,
        phy2log: Vec<i64>,
        log2phy: Vec<i64>,
        logcnt: Vec<i64>,
    ) -> Result<Self> {
        require_positive("num_experts", num_experts)?;
        let num_slots = topology.num_slots();
        let num_layers = whole_layers("phy2log", phy2log.len(), num_slots)?;
        if Some(logcnt.len()) != num_layers.checked_mul(num_experts) {
            return Err(wrong_length("logcnt", logcnt.len(), num_experts));
        }
        let max_replicas = log2phy.len() / logcnt.len();
        if max_replicas == 0 || log2phy.len() != logcnt.len() * max_replicas {
            return Err(wrong_length("log2phy", log2phy.len(), logcnt.len()));
        }
        let layers = phy2log
            .chunks_exact(num_slots)
            .zip(log2phy.chunks_exact(num_experts * max_replicas))
            .zip(logcnt.chunks_exact(num_experts));
        let mut listed = vec![false; num_slots];
        for (layer, ((phy2log, log2phy), logcnt)) in layers.enumerate() {
            listed.fill(false);
            check_layer(&topology, layer, phy2log, log2phy, logcnt, &mut listed)?;
        }
        check_dead_slots(&topology, &phy2log)?;
        let widest = logcnt.iter().max().copied().unwrap_or(0);
        if widest != max_replicas as i64 {
            return Err(Error::invalid(
                Code::Inconsistent,
                "log2phy",
                format!("{max_replicas} wide"),
                format!("as wide as the largest count in `logcnt` ({widest})"),
                "",
            ));
        }
        Ok(Self {
            topology,
            num_layers,
            num_experts,
            max_replicas,
            phy2log,
            log2phy,
            logcnt,
        })
    }

    /// Takes what each slot holds; the other two forms follow, replicas numbered by slot.
    ///
    /// # Errors
    /// As [`new`](Self::new), for `phy2log`.
    pub fn from_phy2log(topology: Topology, num_experts: usize, phy2log: Vec<i64>) -> Result<Self> {
        require_positive("num_experts", num_experts)?;
        let num_slots = topology.num_slots();
        whole_layers("phy2log", phy2log.len(), num_slots)?;
        let mut replicas = Vec::with_capacity(phy2log.len());
        let mut count = vec![0u32; num_experts];
        for (layer, row) in phy2log.chunks_exact(num_slots).enumerate() {
            count.fill(0);
            for (slot, &expert) in row.iter().enumerate() {
                if expert == EMPTY && topology.is_dead(topology.gpu_of(slot)) {
                    replicas.push(Replica::NONE);
                    continue;
                }
                let known = usize::try_from(expert)
                    .ok()
                    .and_then(|e| count.get_mut(e).map(|count| (e, count)));
                let Some((expert, number)) = known else {
                    return Err(no_such_expert(layer, slot, expert, num_experts));
                };
                replicas.push(Replica {
                    expert: expert as u32,
                    number: *number,
                });
                *number += 1;
            }
            if let Some(expert) = count.iter().position(|&count| count == 0) {
                return Err(without_slot(layer, expert));
            }
        }
        check_dead_slots(&topology, &phy2log)?;
        Self::from_replicas(topology, num_experts, &replicas)
    }

    /// Takes valid replicas from a policy, `[num_layers, num_slots]` by slot.
    pub(crate) fn from_replicas(
        topology: Topology,
        num_experts: usize,
        replicas: &[Replica],
    ) -> Result<Self> {
        let num_slots = topology.num_slots();
        let num_layers = replicas.len() / num_slots;
        let max_replicas = max_replicas(replicas);
        let mut phy2log = reserve("num_layers", num_layers, &[num_layers, num_slots])?;
        let mut logcnt = reserve("num_layers", num_layers, &[num_layers, num_experts])?;
        let sizes = [num_layers, num_experts, max_replicas];
        let mut log2phy = reserve("num_layers", num_layers, &sizes)?;
        for row in replicas.chunks_exact(num_slots) {
            // Grown a layer at a time, so that the padding is in cache when slots land in it.
            let (p, l, c) = (phy2log.len(), log2phy.len(), logcnt.len());
            phy2log.resize(p + num_slots, 0);
            log2phy.resize(l + num_experts * max_replicas, -1);
            logcnt.resize(c + num_experts, 0);
            write_layer(
                row,
                &mut phy2log[p..],
                &mut log2phy[l..],
                max_replicas,
                &mut logcnt[c..],
            );
        }
        Ok(Self {
            topology,
            num_layers,
            num_experts,
            max_replicas,
            phy2log,
            log2phy,
            logcnt,
        })
    }

    /// The machines this is a placement on.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// How many layers there are (L).
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// How many logical experts each layer has (E).
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// The largest number of replicas of any expert (X).
    #[must_use]
    pub fn max_replicas(&self) -> usize {
        self.max_replicas
    }

    /// The expert in each slot, `[L, R]`.
    #[must_use]
    pub fn phy2log(&self) -> &[i64] {
        &self.phy2log
    }

    /// The slots of each expert's replicas by replica number, `[L, E, X]`; -1 pads.
    #[must_use]
    pub fn log2phy(&self) -> &[i64] {
        &self.log2phy
    }

    /// How many replicas each expert has, `[L, E]`.
    #[must_use]
    pub fn logcnt(&self) -> &[i64] {
        &self.logcnt
    }

    /// `phy2log`, `log2phy` and `logcnt`, moved out.
    #[must_use]
    pub fn into_parts(self) -> (Vec<i64>, Vec<i64>, Vec<i64>) {
        (self.phy2log, self.log2phy, self.logcnt)
    }

    /// The load of each rank, `[L, num_gpus]`, when each expert's tokens are split evenly over
    /// its replicas. Summed in `f64`, in the order of slots. O(L R).
    ///
    /// # Errors
    /// [`Code::WrongShape`] if `load` has other layers or experts.
    pub fn rank_load(&self, load: &Load<'_>) -> Result<Vec<f64>> {
        if (load.num_layers(), load.num_experts()) != (self.num_layers, self.num_experts) {
            return Err(Error::invalid(
                Code::WrongShape,
                "load",
                format!("{} x {}", load.num_layers(), load.num_experts()),
                format!(
                    "{} layers x {} experts, as the placement has",
                    self.num_layers, self.num_experts
                ),
                "",
            ));
        }
        let num_slots = self.topology.num_slots();
        let num_gpus = self.topology.num_gpus();
        let mut ranks = Vec::with_capacity(self.num_layers * num_gpus);
        let layers = self.phy2log.chunks_exact(num_slots);
        for ((phy2log, logcnt), load) in layers
            .zip(self.logcnt.chunks_exact(self.num_experts))
            .zip(load.layers())
        {
            let share = |&expert: &i64| match usize::try_from(expert) {
                Ok(expert) => f64::from(load[expert]) / logcnt[expert] as f64,
                Err(_) => 0.0,
            };
            ranks.extend((0..num_gpus).map(|gpu| {
                let slots = &phy2log[self.topology.slots_of(gpu)];
                slots.iter().map(share).sum::<f64>()
            }));
        }
        Ok(ranks)
    }

    /// How many slots of each layer hold an expert that an earlier slot of the same rank holds
    /// already, `[L]`. Such a slot serves no balance. O(L (R + E)).
    #[must_use]
    pub fn duplicates(&self) -> Vec<usize> {
        let mut seen_on = vec![usize::MAX; self.num_experts];
        let mut duplicates = vec![0; self.num_layers];
        let layers = self.phy2log.chunks_exact(self.topology.num_slots());
        for (phy2log, duplicates) in layers.zip(&mut duplicates) {
            seen_on.fill(usize::MAX);
            for gpu in 0..self.topology.num_gpus() {
                for &expert in &phy2log[self.topology.slots_of(gpu)] {
                    if expert == EMPTY {
                        continue;
                    }
                    let seen = &mut seen_on[expert as usize];
                    *duplicates += usize::from(*seen == gpu);
                    *seen = gpu;
                }
            }
        }
        duplicates
    }
}

/// An empty vector with room for the product of `sizes`, or a refusal where there is none.
fn reserve(argument: &'static str, got: usize, sizes: &[usize]) -> Result<Vec<i64>> {
    let mut vector = Vec::new();
    let length = sizes.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
    match length.map(|length| vector.try_reserve_exact(length)) {
        Some(Ok(())) => Ok(vector),
        _ => Err(Error::invalid(
            Code::TooLarge,
            argument,
            got,
            format!("small enough for {sizes:?} values of 8 bytes to fit in memory"),
            "plan fewer layers at a time",
        )),
    }
}

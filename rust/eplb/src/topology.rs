//! The machines: nodes, the GPUs in them, and the expert slots on each GPU.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Code, Error, Result, require_multiple, require_positive};

/// The most expert slots a topology may have, over all its GPUs.
///
/// Far above any machine there is, and low enough that counts are exact as `f32` and that
/// slot numbers fit 32 bits everywhere.
pub const MAX_SLOTS: usize = 1 << 20;

/// How many times faster than the slowest GPU the fastest may be.
pub const MAX_SPEED_RATIO: f64 = 1000.0;

/// Nodes, GPUs per node, and expert slots per GPU.
///
/// Each GPU is one rank of expert parallelism. Ranks are numbered node by node and slots rank
/// by rank, so that rank `r` holds the slots [`slots_of(r)`](Self::slots_of) and node `n` the
/// ranks [`gpus_of(n)`](Self::gpus_of). GPUs may have different [slots](Self::with_slots) and
/// [speeds](Self::with_speeds), and some may be [dead](Self::with_dead).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Topology {
    num_nodes: usize,
    gpus_per_node: usize,
    slots_per_gpu: usize,
    /// What sets GPUs apart, if anything does.
    uneven: Option<Arc<Uneven>>,
}

/// What each GPU has, where they are not all alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Uneven {
    /// The first slot of each GPU, and the number of all slots.
    first_slot: Vec<usize>,
    /// The bits of how fast each GPU is.
    speed: Vec<u64>,
    dead: Vec<bool>,
}

impl Topology {
    /// Machines that are all alike.
    ///
    /// # Errors
    /// [`Code::NotPositive`] for a zero, [`Code::TooLarge`] beyond [`MAX_SLOTS`] slots in all.
    pub fn new(num_nodes: usize, gpus_per_node: usize, slots_per_gpu: usize) -> Result<Self> {
        require_positive("num_nodes", num_nodes)?;
        require_positive("gpus_per_node", gpus_per_node)?;
        require_positive("slots_per_gpu", slots_per_gpu)?;
        let slots = num_nodes
            .checked_mul(gpus_per_node)
            .and_then(|gpus| gpus.checked_mul(slots_per_gpu));
        if slots.is_none_or(|slots| slots > MAX_SLOTS) {
            return Err(Error::invalid(
                Code::TooLarge,
                "slots_per_gpu",
                slots_per_gpu,
                format!(
                    "at most {} on {num_nodes} x {gpus_per_node} GPUs",
                    MAX_SLOTS / num_nodes.saturating_mul(gpus_per_node)
                ),
                format!("a topology holds at most {MAX_SLOTS} slots in all"),
            ));
        }
        Ok(Self {
            num_nodes,
            gpus_per_node,
            slots_per_gpu,
            uneven: None,
        })
    }

    /// Machines that are all alike, from the totals that `rebalance_experts` is called with.
    ///
    /// # Errors
    /// [`Code::NotPositive`], [`Code::NotMultiple`] (`num_gpus` of `num_nodes`, `num_replicas`
    /// of `num_gpus`) or [`Code::TooLarge`].
    pub fn from_totals(num_replicas: usize, num_nodes: usize, num_gpus: usize) -> Result<Self> {
        require_positive("num_replicas", num_replicas)?;
        require_positive("num_nodes", num_nodes)?;
        require_positive("num_gpus", num_gpus)?;
        require_multiple("num_gpus", num_gpus, "num_nodes", num_nodes)?;
        require_multiple("num_replicas", num_replicas, "num_gpus", num_gpus)?;
        if num_replicas > MAX_SLOTS {
            return Err(Error::invalid(
                Code::TooLarge,
                "num_replicas",
                num_replicas,
                format!("at most {MAX_SLOTS}"),
                "",
            ));
        }
        Self::new(num_nodes, num_gpus / num_nodes, num_replicas / num_gpus)
    }

    /// The same machines with `slots[gpu]` expert slots on each GPU.
    ///
    /// # Errors
    /// [`Code::WrongShape`] unless there is one number for each GPU, [`Code::NotPositive`] for a
    /// zero, [`Code::TooLarge`] beyond [`MAX_SLOTS`] slots in all.
    pub fn with_slots(&self, slots: &[usize]) -> Result<Self> {
        self.check_one_each("slots", slots.len())?;
        for &slots in slots {
            require_positive("slots", slots)?;
        }
        let total = slots.iter().try_fold(0usize, |a, &b| a.checked_add(b));
        if total.is_none_or(|total| total > MAX_SLOTS) {
            return Err(Error::invalid(
                Code::TooLarge,
                "slots",
                total.map_or_else(
                    || "too many to count".into(),
                    |total| format!("{total} in all"),
                ),
                format!("at most {MAX_SLOTS} in all"),
                "",
            ));
        }
        let mut uneven = self.to_uneven();
        let mut first = 0;
        for (gpu, &slots) in slots.iter().enumerate() {
            uneven.first_slot[gpu] = first;
            first += slots;
        }
        uneven.first_slot[slots.len()] = first;
        let slots_per_gpu = slots.iter().max().copied().unwrap_or(self.slots_per_gpu);
        Ok(Self {
            slots_per_gpu,
            ..self.clone()
        }
        .with_uneven(uneven))
    }

    /// The same machines with GPUs of these speeds: how much load each serves in the same time, in
    /// any unit.
    ///
    /// # Errors
    /// [`Code::WrongShape`] unless there is one number for each GPU, [`Code::OutOfRange`] unless
    /// all are above zero and the fastest is at most [`MAX_SPEED_RATIO`] times the slowest.
    pub fn with_speeds(&self, speeds: &[f64]) -> Result<Self> {
        self.check_one_each("speeds", speeds.len())?;
        let least = speeds.iter().copied().fold(f64::INFINITY, f64::min);
        let most = speeds.iter().copied().fold(0.0, f64::max);
        let unsound = |speed: &f64| !speed.is_finite() || *speed <= 0.0;
        let got = match speeds.iter().position(unsound) {
            Some(gpu) => Some(format!("{:e} for GPU {gpu}", speeds[gpu])),
            None => (most > least * MAX_SPEED_RATIO).then(|| format!("{least:e} to {most:e}")),
        };
        if let Some(got) = got {
            return Err(Error::invalid(
                Code::OutOfRange,
                "speeds",
                got,
                format!(
                    "finite, above 0, the largest at most {MAX_SPEED_RATIO} times the smallest"
                ),
                "a GPU that serves nothing is dead",
            ));
        }
        let mut uneven = self.to_uneven();
        uneven.speed = speeds.iter().map(|speed| speed.to_bits()).collect();
        Ok(self.clone().with_uneven(uneven))
    }

    /// The same machines when these GPUs, and no others, are dead. Their slots keep their numbers
    /// and hold nothing.
    ///
    /// # Errors
    /// [`Code::OutOfRange`] for a GPU that does not exist, [`Code::TooSmall`] if none is left.
    pub fn with_dead(&self, dead: &[usize]) -> Result<Self> {
        let mut uneven = self.to_uneven();
        uneven.dead.fill(false);
        for &gpu in dead {
            let Some(dead) = uneven.dead.get_mut(gpu) else {
                return Err(Error::invalid(
                    Code::OutOfRange,
                    "dead",
                    gpu,
                    format!("a GPU from 0 to {}", self.num_gpus() - 1),
                    "",
                ));
            };
            *dead = true;
        }
        if uneven.dead.iter().all(|&dead| dead) {
            return Err(Error::invalid(
                Code::TooSmall,
                "dead",
                format!("all {} GPUs", self.num_gpus()),
                "fewer than all GPUs",
                "",
            ));
        }
        Ok(self.clone().with_uneven(uneven))
    }

    /// How many nodes there are.
    #[must_use]
    pub fn num_nodes(&self) -> usize {
        self.num_nodes
    }

    /// How many GPUs each node has.
    #[must_use]
    pub fn gpus_per_node(&self) -> usize {
        self.gpus_per_node
    }

    /// How many slots each GPU has; the most of any, where they differ.
    #[must_use]
    pub fn slots_per_gpu(&self) -> usize {
        self.slots_per_gpu
    }

    /// How many GPUs there are, over all nodes.
    #[must_use]
    pub fn num_gpus(&self) -> usize {
        self.num_nodes * self.gpus_per_node
    }

    /// How many slots there are, over all GPUs, dead ones too.
    #[must_use]
    pub fn num_slots(&self) -> usize {
        match &self.uneven {
            None => self.num_gpus() * self.slots_per_gpu,
            Some(uneven) => uneven.first_slot[self.num_gpus()],
        }
    }

    /// How many slots there are on GPUs that are not dead.
    #[must_use]
    pub fn num_live_slots(&self) -> usize {
        self.live_gpus().map(|(_, slots, _)| slots).sum()
    }

    /// How many GPUs are not dead.
    #[must_use]
    pub fn num_live_gpus(&self) -> usize {
        self.live_gpus().count()
    }

    /// Whether all GPUs have the same number of slots and the same speed, and none is dead.
    #[must_use]
    pub fn is_even(&self) -> bool {
        self.uneven.is_none()
    }

    /// Whether a GPU is dead.
    #[must_use]
    pub fn is_dead(&self, gpu: usize) -> bool {
        self.uneven.as_ref().is_some_and(|uneven| uneven.dead[gpu])
    }

    /// How fast a GPU is, in the unit of [`with_speeds`](Self::with_speeds); 1 unless told.
    #[must_use]
    pub fn speed(&self, gpu: usize) -> f64 {
        self.uneven
            .as_ref()
            .map_or(1.0, |uneven| f64::from_bits(uneven.speed[gpu]))
    }

    /// The node of a GPU.
    #[must_use]
    pub fn node_of(&self, gpu: usize) -> usize {
        gpu / self.gpus_per_node
    }

    /// The GPU of a slot.
    #[must_use]
    pub fn gpu_of(&self, slot: usize) -> usize {
        match &self.uneven {
            None => slot / self.slots_per_gpu,
            Some(uneven) => uneven.first_slot.partition_point(|&first| first <= slot) - 1,
        }
    }

    /// The GPUs that are not dead: number, slots and speed of each.
    pub(crate) fn live_gpus(&self) -> impl Iterator<Item = (usize, usize, f64)> + Clone + '_ {
        (0..self.num_gpus())
            .filter(|&gpu| !self.is_dead(gpu))
            .map(|gpu| (gpu, self.slots_of(gpu).len(), self.speed(gpu)))
    }

    /// The GPUs of a node.
    #[must_use]
    pub fn gpus_of(&self, node: usize) -> Range<usize> {
        node * self.gpus_per_node..(node + 1) * self.gpus_per_node
    }

    /// The slots of a GPU.
    #[must_use]
    pub fn slots_of(&self, gpu: usize) -> Range<usize> {
        match &self.uneven {
            None => gpu * self.slots_per_gpu..(gpu + 1) * self.slots_per_gpu,
            Some(uneven) => uneven.first_slot[gpu]..uneven.first_slot[gpu + 1],
        }
    }

    fn to_uneven(&self) -> Uneven {
        let gpus = 0..self.num_gpus();
        let mut first_slot: Vec<_> = gpus.clone().map(|gpu| self.slots_of(gpu).start).collect();
        first_slot.push(self.num_slots());
        Uneven {
            first_slot,
            speed: gpus.clone().map(|gpu| self.speed(gpu).to_bits()).collect(),
            dead: gpus.map(|gpu| self.is_dead(gpu)).collect(),
        }
    }

    /// Equal machines are equal however they were made: what is not uneven is kept as even.
    fn with_uneven(self, uneven: Uneven) -> Self {
        let slots = self.slots_per_gpu;
        let alike = uneven
            .first_slot
            .windows(2)
            .all(|pair| pair[1] - pair[0] == slots)
            && uneven.speed.windows(2).all(|pair| pair[0] == pair[1])
            && !uneven.dead.contains(&true);
        let uneven = (!alike).then(|| Arc::new(uneven));
        Self { uneven, ..self }
    }

    fn check_one_each(&self, argument: &'static str, got: usize) -> Result<()> {
        if got == self.num_gpus() {
            return Ok(());
        }
        Err(Error::invalid(
            Code::WrongShape,
            argument,
            format!("{got} numbers"),
            format!("one for each of {} GPUs", self.num_gpus()),
            "",
        ))
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may fail")]
    use super::*;

    #[test]
    fn ranges_follow_one_another() {
        let topology = Topology::new(2, 3, 4).unwrap();
        assert_eq!((topology.num_gpus(), topology.num_slots()), (6, 24));
        assert_eq!(topology.gpus_of(1), 3..6);
        assert_eq!(topology.slots_of(5), 20..24);
    }

    #[test]
    fn a_refusal_names_the_nearest_that_would_do() {
        let error = Topology::from_totals(290, 4, 32).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`num_replicas` (290) must be a multiple of `num_gpus` (32); nearest: 288, 320"
        );
        let error = Topology::from_totals(5, 4, 2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`num_gpus` (2) must be a multiple of `num_nodes` (4); nearest: 4"
        );
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        for (nodes, gpus, slots) in [(usize::MAX, 2, 2), (1, usize::MAX, 1), (1024, 1024, 2)] {
            let error = Topology::new(nodes, gpus, slots).unwrap_err();
            assert_eq!(error.refusal().code, Code::TooLarge);
        }
    }
}

//! The machines: nodes, the GPUs in them, and the expert slots on each GPU.

use std::ops::Range;

use crate::error::{Code, Error, Result, require_multiple, require_positive};

/// The most expert slots a topology may have, over all its GPUs.
///
/// Far above any machine there is, and low enough that counts are exact as `f32` and that
/// slot numbers fit 32 bits everywhere.
pub const MAX_SLOTS: usize = 1 << 20;

/// Nodes, GPUs per node, and expert slots per GPU.
///
/// Each GPU is one rank of expert parallelism. Ranks are numbered node by node and slots rank
/// by rank, so that rank `r` holds the slots [`slots_of(r)`](Self::slots_of) and node `n` the
/// ranks [`gpus_of(n)`](Self::gpus_of). Callers ask for these ranges rather than compute them:
/// that is what lets ranks differ one day.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Topology {
    num_nodes: usize,
    gpus_per_node: usize,
    slots_per_gpu: usize,
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

    /// How many slots each GPU has.
    #[must_use]
    pub fn slots_per_gpu(&self) -> usize {
        self.slots_per_gpu
    }

    /// How many GPUs there are, over all nodes.
    #[must_use]
    pub fn num_gpus(&self) -> usize {
        self.num_nodes * self.gpus_per_node
    }

    /// How many slots there are, over all GPUs.
    #[must_use]
    pub fn num_slots(&self) -> usize {
        self.num_gpus() * self.slots_per_gpu
    }

    /// The GPUs of a node.
    #[must_use]
    pub fn gpus_of(&self, node: usize) -> Range<usize> {
        node * self.gpus_per_node..(node + 1) * self.gpus_per_node
    }

    /// The slots of a GPU.
    #[must_use]
    pub fn slots_of(&self, gpu: usize) -> Range<usize> {
        gpu * self.slots_per_gpu..(gpu + 1) * self.slots_per_gpu
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

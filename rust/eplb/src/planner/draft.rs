//! A placement that has been computed and not been written anywhere yet.

use super::{Planner, Scratch};
use crate::error::Result;
use crate::placement::{Placement, PlacementMut, Replica};

/// A placement in the memory of the planner that computed it, which gets it back on drop.
#[derive(Debug)]
pub struct Draft<'a> {
    pub(super) planner: &'a Planner,
    pub(super) num_layers: usize,
    pub(super) num_experts: usize,
    pub(super) scratch: Scratch,
}

impl Draft<'_> {
    /// What each slot holds, `[num_layers, num_slots]`.
    #[must_use]
    pub fn replicas(&self) -> &[Replica] {
        &self.scratch.replicas
    }

    /// The placement, in memory of its own.
    ///
    /// # Errors
    /// [`Code::TooLarge`](crate::Code::TooLarge) if it does not fit in memory.
    pub fn to_placement(&self) -> Result<Placement> {
        let topology = self.planner.topology.clone();
        Placement::from_replicas(topology, self.num_experts, self.replicas())
    }

    /// The placement, in memory of the caller's.
    ///
    /// # Errors
    /// [`Code::WrongShape`](crate::Code::WrongShape) or
    /// [`Code::TooSmall`](crate::Code::TooSmall) for the buffers, which are then left as they
    /// were.
    pub fn write_into(&self, out: &mut PlacementMut<'_>) -> Result<()> {
        out.write(self.num_layers, self.num_experts, self.replicas())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        let scratch = std::mem::take(&mut self.scratch);
        self.planner.idle_scratch().push(scratch);
    }
}

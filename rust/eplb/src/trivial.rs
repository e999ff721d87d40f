//! What engines start from: slot `i` holds expert `i mod num_experts`, whatever the load.

use crate::placement::Replica;

/// Plans one layer; there are at least as many slots as experts, and at least one expert.
pub(crate) fn plan_layer(num_experts: usize, slots: &mut [Replica]) {
    for (number, slots) in slots.chunks_mut(num_experts).enumerate() {
        for (expert, slot) in slots.iter_mut().enumerate() {
            *slot = Replica {
                expert: expert as u32,
                number: number as u32,
            };
        }
    }
}

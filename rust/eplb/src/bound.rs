//! How little the heaviest rank can carry, whatever the placement.

use std::collections::BinaryHeap;

use crate::error::Result;
use crate::load::Load;
use crate::planner::check_slots;
use crate::topology::Topology;

/// A lower bound on the largest rank load of each layer, `[num_layers]`, for any placement of
/// these experts in these slots whose replicas share their expert's tokens evenly.
///
/// The larger of two bounds: the mean rank load, and the least largest share. An expert of load
/// `w` with `c` replicas on `D` ranks puts at least `w / min(c, D)` on some rank; giving each
/// spare slot to the largest share in turn makes the largest of these as small as it can be.
///
/// O(layers x slots x log experts): 0.3 ms for 58 x 256 on 288 slots.
///
/// # Errors
/// [`Code::TooSmall`](crate::Code::TooSmall) if there are fewer slots than experts.
pub fn lower_bound(load: &Load<'_>, topology: &Topology) -> Result<Vec<f64>> {
    check_slots(load.num_experts(), topology)?;
    let mut heap = BinaryHeap::with_capacity(load.num_experts());
    let bounds = load.layers().map(|row| {
        let total: f64 = row.iter().map(|&load| f64::from(load)).sum();
        let mean = total / topology.num_gpus() as f64;
        mean.max(least_largest_share(row, topology, &mut heap))
    });
    Ok(bounds.collect())
}

/// The smallest possible maximum of `load / min(count, ranks)` over counts that fill the slots.
fn least_largest_share(
    row: &[f32],
    topology: &Topology,
    heap: &mut BinaryHeap<(u64, u32, usize)>,
) -> f64 {
    // The bits of floats that are not negative are in their order.
    heap.clear();
    heap.extend(
        row.iter()
            .enumerate()
            .map(|(expert, &load)| (f64::from(load.abs()).to_bits(), 1, expert)),
    );
    for _ in row.len()..topology.num_slots() {
        let Some(mut top) = heap.peek_mut() else {
            break;
        };
        let (_, count, expert) = *top;
        if count as usize == topology.num_gpus() {
            break;
        }
        let share = f64::from(row[expert].abs()) / f64::from(count + 1);
        *top = (share.to_bits(), count + 1, expert);
    }
    heap.peek()
        .map_or(0.0, |&(bits, _, _)| f64::from_bits(bits))
}

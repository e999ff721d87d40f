//! What a layer is judged by: its heaviest rank, and what crosses between nodes at a price.

use super::table::{Ranks, Site, Table, renew};
use crate::balance::share;

/// The price of tokens that are served off the home of their expert's group.
#[derive(Debug)]
pub(crate) struct Price {
    /// What a token that crosses costs, as a mean over ranks.
    pub(crate) cost: f64,
    pub(crate) group_size: usize,
    pub(crate) num_nodes: usize,
    /// The node of each rank.
    pub(crate) node_of: Vec<u32>,
}

impl Price {
    /// What crosses costs, in the units of a table. A group's home is the node that serves most of it.
    pub(crate) fn of(
        &self,
        ranks: &Ranks,
        weight: &[i32],
        table: &Table,
        served: &mut Vec<i64>,
    ) -> i32 {
        renew(served, weight.len() / self.group_size * self.num_nodes, 0);
        for rank in 0..ranks.len() {
            for slot in ranks.slots(rank) {
                if let Some(expert) = table.expert_in(Site::new(rank, slot)) {
                    let place = expert / self.group_size * self.num_nodes;
                    let share = share(weight[expert], table.count(expert));
                    served[place + self.node_of[rank] as usize] += i64::from(share);
                }
            }
        }
        let groups = served.chunks_exact(self.num_nodes);
        let crossing = groups
            .map(|group| group.iter().sum::<i64>() - group.iter().copied().max().unwrap_or(0));
        (crossing.sum::<i64>() as f64 * self.cost) as i32
    }
}

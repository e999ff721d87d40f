//! Plans within so many moves of each layer.
#![expect(clippy::unwrap_used, reason = "tests may fail")]

use eplb::{Load, Planner, Policy, Reach, Topology};

const LAYERS: usize = 6;
const EXPERTS: usize = 16;
const RANKS: usize = 4;
const SLOTS: usize = 24;

fn load(seed: usize) -> Vec<f32> {
    let value = |index: usize| ((index * 37 + seed * 101) % 97) as f32;
    (0..LAYERS * EXPERTS).map(value).collect()
}

/// How many experts of each layer are on a rank that did not hold them.
fn arrivals(now: &[i64], then: &[i64]) -> Vec<usize> {
    let ranks = now.chunks(SLOTS / RANKS).zip(then.chunks(SLOTS / RANKS));
    let of_ranks: Vec<usize> = ranks
        .map(|(now, then)| now.iter().filter(|expert| !then.contains(expert)).count())
        .collect();
    of_ranks
        .chunks(RANKS)
        .map(|ranks| ranks.iter().sum())
        .collect()
}

#[test]
fn no_layer_moves_more_than_it_may() {
    let topology = Topology::new(1, RANKS, SLOTS / RANKS).unwrap();
    let planner = Planner::new(topology, 1, Policy::Balanced, 1).unwrap();
    let (before, after) = (load(0), load(5));
    let before = planner
        .plan(&Load::new(&before, LAYERS, EXPERTS).unwrap())
        .unwrap();
    let after = Load::new(&after, LAYERS, EXPERTS).unwrap();
    let mut most = Vec::new();
    for limit in 0..6 {
        let reach = Reach {
            max_moves_per_layer: Some(limit),
            ..Reach::default()
        };
        let plan = planner.plan_from(&after, &before, &reach).unwrap();
        let moved = arrivals(plan.phy2log(), before.phy2log());
        most.push(moved.into_iter().max().unwrap());
    }
    assert_eq!(most, [0, 1, 2, 3, 4, 5]);
}

//! A warm planner allocates nothing.
#![expect(clippy::unwrap_used, reason = "tests may fail")]

use eplb::{Budget, Load, PlacementMut, Planner, Policy, Topology};

#[test]
fn a_warm_planner_allocates_nothing() {
    let (layers, experts) = (20, 256);
    // The load that warms up is even; those that follow take longer walks.
    let even = vec![1.0; layers * experts];
    let loads: Vec<f32> = (0..layers * experts)
        .map(|index| (index * 7919 % 1009) as f32)
        .collect();
    let skewed: Vec<f32> = loads.iter().map(|load| load.powi(4)).collect();
    // Hierarchical, global, one slot a GPU, so many spare slots that heaps serve them, and so
    // many packs too.
    for (nodes, gpus, slots, groups) in [
        (4, 8, 9, 8),
        (4, 8, 9, 1),
        (1, 64, 5, 1),
        (1, 288, 1, 1),
        (1, 8, 160, 1),
        (1, 600, 2, 1),
    ] {
        for policy in [Policy::DeepSeek, Policy::Balanced] {
            let topology = Topology::new(nodes, gpus, slots).unwrap();
            let width = topology.num_slots() - experts + 1;
            let planner = Planner::new(topology, groups, policy, 1).unwrap();
            let planner = planner.with_budget(Budget::Iterations(300));
            let mut phy2log = vec![0; layers * planner.topology().num_slots()];
            let mut log2phy = vec![0; layers * experts * width];
            let mut logcnt = vec![0; layers * experts];
            let mut plan = |loads: &[f32]| {
                let load = Load::new(loads, layers, experts).unwrap();
                let mut out = PlacementMut {
                    phy2log: &mut phy2log,
                    log2phy: Some(&mut log2phy),
                    logcnt: &mut logcnt,
                };
                planner.plan_into(&load, &mut out).unwrap();
            };
            plan(&even);
            let counted = allocation_counter::measure(|| {
                for _ in 0..3 {
                    plan(&loads);
                    plan(&skewed);
                }
            });
            assert_eq!(
                (counted.count_total, counted.bytes_total),
                (0, 0),
                "{policy:?}: {nodes} x {gpus} x {slots}, {groups} groups"
            );
        }
    }
}

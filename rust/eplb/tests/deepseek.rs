//! The reference policy against the algorithm as it is told, step by step and without haste.
#![expect(clippy::unwrap_used, reason = "tests may fail")]

use eplb::{Load, Placement, PlacementMut, Planner, Policy, Topology};
use proptest::prelude::*;

/// One layer, as the facts have it: plain loops, stable sorts, `f32` sums.
fn told(
    loads: &[f32],
    topology: &Topology,
    num_groups: usize,
) -> (Vec<i64>, Vec<Vec<i64>>, Vec<i64>) {
    let hierarchical = num_groups.is_multiple_of(topology.num_nodes());
    let (groups, nodes) = if hierarchical {
        (num_groups, topology.num_nodes())
    } else {
        (1, 1)
    };
    let size = loads.len() / groups;
    let group_loads: Vec<f32> = loads.chunks(size).map(|group| group.iter().sum()).collect();
    let (node_of, place_of) = packed(&group_loads, nodes);
    let (node_slots, node_gpus) = (topology.num_slots() / nodes, topology.num_gpus() / nodes);
    let mut phy2log = vec![-1; topology.num_slots()];
    let mut slots_of = vec![Vec::new(); loads.len()];
    for node in 0..nodes {
        let mut mine: Vec<usize> = (0..groups)
            .filter(|&group| node_of[group] == node)
            .collect();
        mine.sort_by_key(|&group| place_of[group]);
        let list: Vec<usize> = mine
            .iter()
            .flat_map(|&group| group * size..(group + 1) * size)
            .collect();
        let mut replicas = list.clone();
        let mut count = vec![1.0f32; loads.len()];
        while replicas.len() < node_slots {
            let mut hottest = list[0];
            for &expert in &list {
                if loads[expert] / count[expert] > loads[hottest] / count[hottest] {
                    hottest = expert;
                }
            }
            replicas.push(hottest);
            count[hottest] += 1.0;
        }
        let shares: Vec<f32> = replicas
            .iter()
            .map(|&expert| loads[expert] / count[expert])
            .collect();
        let (gpu_of, arrival_of) = packed(&shares, node_gpus);
        for (replica, &expert) in replicas.iter().enumerate() {
            let gpu = node * node_gpus + gpu_of[replica];
            let slot = gpu * topology.slots_per_gpu() + arrival_of[replica];
            phy2log[slot] = expert as i64;
            slots_of[expert].push(slot as i64);
        }
    }
    let counts = slots_of.iter().map(|slots| slots.len() as i64).collect();
    (phy2log, slots_of, counts)
}

fn packed(items: &[f32], packs: usize) -> (Vec<usize>, Vec<usize>) {
    let capacity = items.len() / packs;
    if capacity == 1 {
        return ((0..packs).collect(), vec![0; packs]);
    }
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by(|&a, &b| items[b].partial_cmp(&items[a]).unwrap());
    let mut sums = vec![0.0f32; packs];
    let mut counts = vec![0; packs];
    let (mut pack_of, mut arrival_of) = (vec![0; items.len()], vec![0; items.len()]);
    for item in order {
        let open = (0..packs).filter(|&pack| counts[pack] < capacity);
        let lightest = open.reduce(|best, pack| if sums[pack] < sums[best] { pack } else { best });
        let pack = lightest.unwrap();
        pack_of[item] = pack;
        arrival_of[item] = counts[pack];
        sums[pack] += items[item];
        counts[pack] += 1;
    }
    (pack_of, arrival_of)
}

fn check(load: &Load<'_>, topology: &Topology, num_groups: usize) -> Placement {
    let planner = Planner::new(topology.clone(), num_groups, Policy::DeepSeek, 1).unwrap();
    let placement = planner.plan(load).unwrap();
    let width = placement.max_replicas();
    let mut widest = 0;
    let layers = load
        .layers()
        .zip(placement.phy2log().chunks(topology.num_slots()))
        .zip(placement.log2phy().chunks(load.num_experts() * width))
        .zip(placement.logcnt().chunks(load.num_experts()));
    for (((loads, phy2log), log2phy), logcnt) in layers {
        let (slots, by_expert, counts) = told(loads, topology, num_groups);
        assert_eq!(phy2log, slots);
        assert_eq!(logcnt, counts);
        for (got, mut wanted) in log2phy.chunks(width).zip(by_expert) {
            widest = widest.max(wanted.len());
            wanted.resize(width, -1);
            assert_eq!(got, wanted);
        }
    }
    assert_eq!(width, widest);
    placement
}

fn one_load() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => (0u32..50).prop_map(|tokens| tokens as f32),
        4 => (0.0f32..8.0).prop_map(|exponent| exponent.exp2() * 37.0),
        1 => Just(0.0),
        1 => Just(-0.0),
        1 => Just(f32::from_bits(1)),
        1 => Just(16_777_217.0),
        1 => 0.0f32..1e33,
    ]
}

/// Layers, nodes, GPUs a node, slots a GPU, groups, experts a group: as many as there are slots
/// for.
fn sizes() -> impl Strategy<Value = (usize, Topology, usize, usize)> {
    let machines = (1usize..20, 1usize..5, 1usize..10, 1usize..12);
    machines.prop_flat_map(|(layers, nodes, gpus, slots)| {
        let topology = Topology::new(nodes, gpus, slots).unwrap();
        let num_slots = topology.num_slots();
        (1..=num_slots.min(3 * nodes)).prop_flat_map(move |groups| {
            let topology = topology.clone();
            (1..=num_slots / groups)
                .prop_map(move |size| (layers, topology.clone(), groups, groups * size))
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn plans_are_those_of_the_algorithm_as_told(
        ((layers, topology, groups, experts), loads) in sizes().prop_flat_map(|sizes| {
            let length = sizes.0 * sizes.3;
            (Just(sizes), prop::collection::vec(one_load(), length))
        })
    ) {
        let load = Load::new(&loads, layers, experts).unwrap();
        let placement = check(&load, &topology, groups);

        // The same bytes on any number of threads, and through the caller's own buffers.
        for threads in [2, 3, 8] {
            let planner = Planner::new(topology.clone(), groups, Policy::DeepSeek, threads).unwrap();
            prop_assert_eq!(&planner.plan(&load).unwrap(), &placement);
        }
        let planner = Planner::new(topology.clone(), groups, Policy::DeepSeek, 1).unwrap();
        let width = placement.max_replicas() + 1;
        let mut phy2log = vec![7; placement.phy2log().len()];
        let mut log2phy = vec![7; layers * experts * width];
        let mut logcnt = vec![7; placement.logcnt().len()];
        let mut out = PlacementMut {
            phy2log: &mut phy2log,
            log2phy: Some(&mut log2phy),
            logcnt: &mut logcnt,
        };
        planner.plan_into(&load, &mut out).unwrap();
        prop_assert_eq!(&phy2log[..], placement.phy2log());
        prop_assert_eq!(&logcnt[..], placement.logcnt());
        for (wide, narrow) in log2phy.chunks(width).zip(placement.log2phy().chunks(width - 1)) {
            prop_assert_eq!(&wide[..width - 1], narrow);
            prop_assert_eq!(wide[width - 1], -1);
        }

        // What it made is a placement by its own rules, and its loads add up.
        let (p, l, c) = placement.clone().into_parts();
        prop_assert_eq!(&Placement::new(topology.clone(), experts, p, l, c).unwrap(), &placement);
        let ranks = placement.rank_load(&load).unwrap();
        let together = if planner.keeps_groups() { groups } else { 1 };
        let bounds = eplb::lower_bound(&load, &topology, together).unwrap();
        for ((ranks, row), bound) in ranks.chunks(topology.num_gpus()).zip(load.layers()).zip(bounds) {
            let total: f64 = row.iter().map(|&load| f64::from(load)).sum();
            let carried: f64 = ranks.iter().sum();
            prop_assert!((carried - total).abs() <= total * 1e-12);
            let largest = ranks.iter().copied().fold(0.0, f64::max);
            prop_assert!(bound <= largest * (1.0 + 1e-12));
        }
    }
}

#[test]
fn the_published_example() {
    let loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ];
    let loads: Vec<f32> = loads.as_flattened().iter().map(|&n| n as f32).collect();
    let load = Load::new(&loads, 2, 12).unwrap();
    let placement = check(&load, &Topology::new(2, 4, 2).unwrap(), 4);
    let published = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ];
    assert_eq!(placement.phy2log(), published.as_flattened());
}

/// Sizes at which the policy changes from passes to heaps and from the network to a sort.
#[test]
fn large_problems_are_planned_alike() {
    let mut state = 1u32;
    let mut random = |bound: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % bound
    };
    for (layers, experts, nodes, gpus, slots, groups) in [
        (2, 400, 1, 8, 100, 1),
        (1, 1200, 1, 600, 3, 1),
        (1, 700, 1, 1000, 2, 1),
        (1, 64, 1, 700, 1, 1),
        (3, 512, 2, 16, 40, 8),
    ] {
        let loads: Vec<f32> = (0..layers * experts)
            .map(|_| random(1000) as f32 * random(1000) as f32)
            .collect();
        let load = Load::new(&loads, layers, experts).unwrap();
        check(&load, &Topology::new(nodes, gpus, slots).unwrap(), groups);
    }
}

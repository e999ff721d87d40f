//! The best split is feasible, meets its certificate, and costs no allocation.
#![expect(clippy::unwrap_used, reason = "tests may fail")]

use eplb::{Load, Placement, Planner, Policy, SharesMut, Splitter, Topology};
use proptest::prelude::*;

/// A placement of some experts and loads for it, some of them zero.
fn cases() -> impl Strategy<Value = (Placement, Vec<f32>)> {
    (1usize..4, 1usize..12, 1usize..6, 0u64..1000).prop_flat_map(|(layers, ranks, slots, _)| {
        let total = ranks * slots;
        (1..=total).prop_flat_map(move |experts| {
            let slots_held = prop::collection::vec(0..experts as i64, layers * total);
            let loads = prop::collection::vec(
                prop_oneof![Just(0.0f32), 0.0f32..1.0, 0.0f32..1e6, Just(7.0)],
                layers * experts,
            );
            (slots_held, loads).prop_map(move |(mut held, loads)| {
                // Every expert somewhere: the last slots of each layer, in a scrambled order.
                for row in held.chunks_exact_mut(total) {
                    for expert in 0..experts {
                        row[(expert * 7919 + 13) % total] = expert as i64;
                    }
                    for expert in 0..experts {
                        if !row.contains(&(expert as i64)) {
                            for (slot, expert) in row.iter_mut().zip(0..experts) {
                                *slot = expert as i64;
                            }
                        }
                    }
                }
                let topology = Topology::new(1, ranks, slots).unwrap();
                let placement = Placement::from_phy2log(topology, experts, held).unwrap();
                (placement, loads)
            })
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_split_meets_its_certificate((placement, loads) in cases()) {
        let (layers, experts) = (placement.num_layers(), placement.num_experts());
        let topology = placement.topology().clone();
        let (slots, ranks) = (topology.num_slots(), topology.num_gpus());
        let load = Load::new(&loads, layers, experts).unwrap();
        let mut splitter = Splitter::new(&placement);
        let mut shares = vec![f64::NAN; layers * slots];
        let mut level = vec![f64::NAN; layers];
        let mut rank_load = vec![f64::NAN; layers * ranks];
        let mut tight = vec![false; layers * ranks];
        splitter.split(&load, &mut SharesMut {
            shares: &mut shares,
            level: &mut level,
            rank_load: Some(&mut rank_load),
            tight: Some(&mut tight),
        }).unwrap();
        let mut by_shares = vec![f64::NAN; layers * ranks];
        splitter.rank_load_into(&load, &shares, &mut by_shares).unwrap();
        for layer in 0..layers {
            let held = &placement.phy2log()[layer * slots..][..slots];
            let row = &loads[layer * experts..][..experts];
            let shares = &shares[layer * slots..][..slots];
            let small = 1e-9 * row.iter().map(|&load| f64::from(load)).sum::<f64>();
            let mut sums = vec![0.0; experts];
            for (&expert, &share) in held.iter().zip(shares) {
                prop_assert!((0.0..=1.0 + 1e-12).contains(&share));
                sums[expert as usize] += share;
            }
            prop_assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-12));
            // Feasible: no rank is above the level.
            for rank in layer * ranks..(layer + 1) * ranks {
                prop_assert!((by_shares[rank] - rank_load[rank]).abs() <= small);
                prop_assert!(by_shares[rank] <= level[layer] + small);
            }
            // Optimal: the tight ranks hold some experts alone, of that mean.
            let tight = &tight[layer * ranks..][..ranks];
            let mut outside = vec![false; experts];
            for (slot, &expert) in held.iter().enumerate() {
                outside[expert as usize] |= !tight[slot / (slots / ranks)];
            }
            let alone = (0..experts).filter(|&expert| !outside[expert]);
            let sum: f64 = alone.map(|expert| f64::from(row[expert])).sum();
            let count = tight.iter().filter(|&&tight| tight).count();
            prop_assert!(level[layer] * count as f64 <= sum + small * count as f64);
        }
    }

    #[test]
    fn whole_tokens_add_up((placement, loads) in cases()) {
        let mut splitter = Splitter::new(&placement);
        let slots = placement.topology().num_slots();
        let mut quotas = vec![0; slots];
        let mut shares = vec![0.0; slots];
        for layer in 0..placement.num_layers() {
            let experts = placement.num_experts();
            let row = &loads[layer * experts..][..experts];
            let tokens: Vec<i64> = row.iter().map(|&load| load as i64).collect();
            let whole: Vec<f32> = tokens.iter().map(|&tokens| tokens as f32).collect();
            let level = splitter.quotas_layer(layer, &tokens, &mut quotas).unwrap();
            let load = Load::new(&whole, 1, experts).unwrap();
            let exact = splitter.split_layer(layer, &load, &mut shares).unwrap();
            prop_assert!((level as f64) < exact + 1.0 + 1e-6 && level as f64 + 1e-6 > exact);
            let mut sums = vec![0; experts];
            let mut ranks = vec![0; placement.topology().num_gpus()];
            for (slot, &quota) in quotas.iter().enumerate() {
                prop_assert!(quota >= 0);
                sums[placement.phy2log()[layer * slots + slot] as usize] += quota;
                ranks[slot / placement.topology().slots_per_gpu()] += quota;
            }
            prop_assert_eq!(sums, tokens);
            prop_assert_eq!(ranks.into_iter().max().unwrap(), level);
        }
    }
}

#[test]
fn a_prepared_splitter_allocates_nothing() {
    let (layers, experts) = (8, 256);
    let loads: Vec<f32> = (0..layers * experts)
        .map(|index| (index * 7919 % 1009) as f32)
        .collect();
    let load = Load::new(&loads, layers, experts).unwrap();
    for (ranks, slots) in [(32, 9), (64, 8), (8, 40), (144, 2)] {
        let topology = Topology::new(1, ranks, slots).unwrap();
        let planner = Planner::new(topology, 1, Policy::DeepSeek, 1).unwrap();
        let placement = planner.plan(&load).unwrap();
        let mut splitter = Splitter::new(&placement);
        let mut shares = vec![0.0; layers * ranks * slots];
        let mut level = vec![0.0; layers];
        let mut quotas = vec![0; ranks * slots];
        let jittered: Vec<f32> = loads.iter().rev().copied().collect();
        let tokens: Vec<i64> = jittered[..experts]
            .iter()
            .map(|&load| load as i64)
            .collect();
        let counted = allocation_counter::measure(|| {
            let load = Load::new(&jittered, layers, experts).unwrap();
            let mut out = SharesMut {
                shares: &mut shares,
                level: &mut level,
                rank_load: None,
                tight: None,
            };
            splitter.split(&load, &mut out).unwrap();
            splitter.quotas_layer(0, &tokens, &mut quotas).unwrap();
        });
        assert_eq!((counted.count_total, counted.bytes_total), (0, 0));
    }
}

//! A plan of a step is a plan, keeps its limits, and costs no allocation.
#![expect(clippy::unwrap_used, reason = "tests may fail")]

use eplb::{Limits, StepMut, StepPlanner};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_adds_up_and_keeps_its_limits(
        (ranks, home, spare) in (1usize..13, 1usize..6, 1usize..4),
        seeds in prop::collection::vec(prop_oneof![Just(0i32), 0i32..50, 0i32..100_000], 12 * 12 * 5),
        target in prop_oneof![Just(1.0), 1.0..1.5f64],
        (max_copies, max_out, max_in) in (
            prop_oneof![Just(usize::MAX), 0usize..8],
            prop_oneof![Just(usize::MAX), 0usize..4],
            prop_oneof![Just(usize::MAX), 0usize..3],
        ),
        min_tokens in prop_oneof![Just(1i64), 1i64..1000],
    ) {
        let experts = ranks * home;
        let load = &seeds[..ranks * experts];
        let limits = Limits { target_imbalance: target, max_copies, max_out, max_in, min_tokens };
        let mut planner = StepPlanner::new(ranks, home, spare, limits).unwrap();
        let mut copied = vec![7; ranks * spare];
        let mut tokens = vec![7; ranks * spare];
        let mut by_source = vec![7; ranks * spare * ranks];
        let step = planner.plan_step(load, &mut StepMut {
            experts: &mut copied,
            tokens: &mut tokens,
            by_source: Some(&mut by_source),
        }).unwrap();

        let totals: Vec<i64> = (0..experts)
            .map(|expert| load.iter().skip(expert).step_by(experts).map(|&n| i64::from(n)).sum())
            .collect();
        let mut left = totals.clone();
        let mut ranks_load = vec![0; ranks];
        let mut out = vec![0; ranks];
        let mut copies = 0;
        for rank in 0..ranks {
            let slots = rank * spare..(rank + 1) * spare;
            prop_assert!(copied[slots.clone()].iter().filter(|&&e| e >= 0).count() <= max_in);
            for slot in slots.clone() {
                if copied[slot] < 0 {
                    prop_assert_eq!((copied[slot], tokens[slot]), (-1, 0));
                    continue;
                }
                let expert = copied[slot] as usize;
                prop_assert!(expert / home != rank, "a copy beside its home");
                prop_assert!(!copied[slots.start..slot].contains(&copied[slot]), "the same twice");
                prop_assert!(tokens[slot] >= min_tokens);
                left[expert] -= tokens[slot];
                ranks_load[rank] += tokens[slot];
                out[expert / home] += 1;
                copies += 1;
            }
        }
        prop_assert!(left.iter().all(|&left| left >= 0));
        for (expert, &left) in left.iter().enumerate() {
            ranks_load[expert / home] += left;
        }
        prop_assert_eq!(step.num_copies, copies);
        prop_assert_eq!(step.total, totals.iter().sum::<i64>());
        prop_assert_eq!(Some(&step.level), ranks_load.iter().max());
        prop_assert!(copies <= max_copies);
        prop_assert!(out.iter().all(|&out| out <= max_out));
        let before = totals.chunks_exact(home).map(|rank| rank.iter().sum::<i64>());
        prop_assert!(step.level <= before.max().unwrap());

        // By source: nothing is sent that is not there, and own copies come first.
        let mut sent = vec![0i64; ranks * experts];
        for slot in 0..ranks * spare {
            let row = &by_source[slot * ranks..(slot + 1) * ranks];
            let sum: i64 = row.iter().map(|&n| i64::from(n)).sum();
            prop_assert_eq!(sum, tokens[slot]);
            if copied[slot] < 0 {
                continue;
            }
            let (rank, expert) = (slot / spare, copied[slot] as usize);
            for (source, &count) in row.iter().enumerate() {
                prop_assert!(count >= 0);
                sent[source * experts + expert] += i64::from(count);
            }
            prop_assert_eq!(
                i64::from(row[rank]),
                tokens[slot].min(i64::from(load[rank * experts + expert]))
            );
        }
        for (&sent, &load) in sent.iter().zip(load) {
            prop_assert!(sent <= load.into());
        }
        // What the home takes is its own rank's as far as that goes.
        for (expert, &left) in left.iter().enumerate() {
            let home = expert / home;
            let own = i64::from(load[home * experts + expert]);
            prop_assert!(own - sent[home * experts + expert] >= own.min(left));
        }
    }
}

#[test]
fn a_plan_of_a_step_allocates_nothing() {
    let (ranks, home, spare) = (16, 4, 2);
    let experts = ranks * home;
    let load: Vec<i32> = (0..ranks * experts)
        .map(|index| (index * index * 31 % 1009) as i32)
        .collect();
    let mut planner = StepPlanner::new(ranks, home, spare, Limits::default()).unwrap();
    let mut copied = vec![0; ranks * spare];
    let mut tokens = vec![0; ranks * spare];
    let mut by_source = vec![0; ranks * spare * ranks];
    let counted = allocation_counter::measure(|| {
        let mut out = StepMut {
            experts: &mut copied,
            tokens: &mut tokens,
            by_source: Some(&mut by_source),
        };
        planner.plan_step(&load, &mut out).unwrap();
    });
    assert_eq!((counted.count_total, counted.bytes_total), (0, 0));
}

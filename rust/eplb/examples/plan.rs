//! Plans a model of the size of DeepSeek-R1 onto 32 GPUs, and prints how even it came out.
//!
//! `cargo run --release --example plan`
#![expect(clippy::print_stdout, reason = "a program prints")]

use std::time::Instant;

use eplb::{Load, Placement, Planner, Policy, Topology, lower_bound};

const NUM_LAYERS: usize = 58;
const NUM_EXPERTS: usize = 256;
const NUM_GROUPS: usize = 8;

fn main() -> eplb::Result<()> {
    let tokens = skewed_tokens();
    let load = Load::new(&tokens, NUM_LAYERS, NUM_EXPERTS)?;

    // Four nodes of eight GPUs; nine slots on each, one more than the experts need.
    let topology = Topology::new(4, 8, 9)?;
    let bound: f64 = lower_bound(&load, &topology, 1)?.iter().sum();
    let total: f64 = tokens.iter().copied().map(f64::from).sum();
    let mean = total / topology.num_gpus() as f64;
    println!("{:<28} {:>8} {:>10}", "plan", "balance", "time");

    for (name, num_groups, policy) in [
        ("whatever the load", 1, Policy::Trivial),
        ("reference, groups on a node", NUM_GROUPS, Policy::DeepSeek),
        ("reference, any node", 1, Policy::DeepSeek),
        ("balanced, groups on a node", NUM_GROUPS, Policy::Balanced),
        ("balanced, any node", 1, Policy::Balanced),
    ] {
        let planner = Planner::new(topology.clone(), num_groups, policy, 1)?;
        planner.plan(&load)?; // the first call asks for memory, later ones have it
        let start = Instant::now();
        let placement = planner.plan(&load)?;
        let time = start.elapsed();
        let balance = mean / heaviest_ranks(&placement, &load)?;
        println!("{name:<28} {balance:>8.4} {time:>10.0?}");
    }
    println!("{:<28} {:>8.4}", "at most", mean / bound);
    Ok(())
}

/// The load of the heaviest rank of each layer, summed over layers.
fn heaviest_ranks(placement: &Placement, load: &Load<'_>) -> eplb::Result<f64> {
    let rank_load = placement.rank_load(load)?;
    let ranks = placement.topology().num_gpus();
    let heaviest = |layer: &[f64]| layer.iter().copied().fold(0.0, f64::max);
    Ok(rank_load.chunks_exact(ranks).map(heaviest).sum())
}

/// Tokens per layer and expert, `[NUM_LAYERS, NUM_EXPERTS]`: in each layer the k-th hottest expert
/// gets a share of 1 / (k + 8), and which expert that is differs from layer to layer.
fn skewed_tokens() -> Vec<f32> {
    let mut tokens = Vec::with_capacity(NUM_LAYERS * NUM_EXPERTS);
    for layer in 0..NUM_LAYERS {
        for expert in 0..NUM_EXPERTS {
            // An odd multiplier makes this a permutation of the experts.
            let place = (expert * (2 * layer + 77) + 31 * layer) % NUM_EXPERTS;
            tokens.push((100_000.0 / (place as f32 + 8.0)).round());
        }
    }
    tokens
}

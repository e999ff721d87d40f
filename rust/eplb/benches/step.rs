//! Times one layer at a time, shares and plans of a step, and prints what it saw as JSON.
//!
//! - `cargo bench -p eplb --bench step -- realtime FILE RANKS HOME SPARE CALLS`, where FILE holds
//!   little-endian `i32` tokens, `[ranks, experts]`: plans with quotas by source.
//! - `cargo bench -p eplb --bench step -- split LOADS SLOTS LAYERS EXPERTS REPLICAS GPUS CALLS`,
//!   where LOADS holds little-endian `f32` loads and SLOTS little-endian `i64` `phy2log`: splits
//!   each layer alone, then all of them at once.
//!
//! `benches/realtime.py` and `benches/shares.py` make such files and check the answers.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program of its own, run by hand"
)]

use std::hint::black_box;
use std::time::Instant;

use eplb::{Limits, Load, Placement, SharesMut, Splitter, StepMut, StepPlanner, Topology};

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    match arguments.first().map(String::as_str) {
        Some("realtime") => realtime(&arguments[1], &numbers(&arguments[2..])),
        Some("split") => split(&arguments[1], &arguments[2], &numbers(&arguments[3..])),
        _ => println!("usage: realtime FILE RANKS HOME SPARE CALLS, or split LOADS SLOTS ..."),
    }
}

fn numbers(arguments: &[String]) -> Vec<usize> {
    arguments.iter().map(|text| text.parse().unwrap()).collect()
}

fn read<const N: usize, T>(file: &str, from: impl Fn([u8; N]) -> T) -> Vec<T> {
    let bytes = std::fs::read(file).unwrap();
    let values = bytes.chunks_exact(N);
    values
        .map(|bytes| from(bytes.try_into().unwrap()))
        .collect()
}

/// The times of calls in microseconds, after a few to warm up.
fn timed(calls: usize, mut call: impl FnMut()) -> Vec<f64> {
    for _ in 0..20 {
        call();
    }
    let time = |_| {
        let start = Instant::now();
        call();
        start.elapsed().as_secs_f64() * 1e6
    };
    (0..calls).map(time).collect()
}

fn listed(samples: &[f64]) -> String {
    let texts: Vec<String> = samples.iter().map(|us| format!("{us:.2}")).collect();
    format!("[{}]", texts.join(","))
}

fn realtime(file: &str, numbers: &[usize]) {
    let &[ranks, home, spare, calls] = numbers else {
        return;
    };
    let load = read(file, i32::from_le_bytes);
    let mut planner = StepPlanner::new(ranks, home, spare, Limits::default()).unwrap();
    let mut experts = vec![0; ranks * spare];
    let mut tokens = vec![0; ranks * spare];
    let mut by_source = vec![0; ranks * spare * ranks];
    let mut level = 0;
    let samples = timed(calls, || {
        let mut out = StepMut {
            experts: &mut experts,
            tokens: &mut tokens,
            by_source: Some(&mut by_source),
        };
        level = planner.plan_step(black_box(&load), &mut out).unwrap().level;
    });
    println!("{{\"level\": {level}, \"us\": {}}}", listed(&samples));
}

fn split(loads: &str, slots: &str, numbers: &[usize]) {
    let &[layers, experts, replicas, gpus, calls] = numbers else {
        return;
    };
    let load = read(loads, f32::from_le_bytes);
    let phy2log = read(slots, i64::from_le_bytes);
    let topology = Topology::from_totals(replicas, 1, gpus).unwrap();
    let placement = Placement::from_phy2log(topology, experts, phy2log).unwrap();
    let mut splitter = Splitter::new(&placement);
    let mut shares = vec![0.0; layers * replicas];
    let mut level = vec![0.0; layers];
    let mut step = Vec::new();
    for (layer, row) in load.chunks_exact(experts).enumerate() {
        let shares = &mut shares[..replicas];
        step.extend(timed(calls, || {
            let load = Load::new(black_box(row), 1, experts).unwrap();
            splitter.split_layer(layer, &load, shares).unwrap();
        }));
    }
    let mut all = |splitter: &mut Splitter| {
        let load = Load::new(black_box(&load), layers, experts).unwrap();
        let mut out = SharesMut {
            shares: &mut shares,
            level: &mut level,
            rank_load: None,
            tight: None,
        };
        splitter.split(&load, &mut out).unwrap();
    };
    let prepared = timed(calls, || all(&mut splitter));
    let whole = timed(calls, || all(&mut Splitter::new(black_box(&placement))));
    println!(
        "{{\"levels\": {level:?}, \"step\": {}, \"prepared\": {}, \"whole\": {}}}",
        listed(&step),
        listed(&prepared),
        listed(&whole)
    );
}

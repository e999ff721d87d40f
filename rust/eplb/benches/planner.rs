//! Times the planner on a load from a file, and prints what it saw as JSON.
//!
//! `cargo bench -p eplb --bench planner -- FILE LAYERS EXPERTS REPLICAS GROUPS NODES GPUS [LENGTH]`,
//! where LENGTH is seconds of calls, or a number of calls (`10x`), and FILE holds little-endian
//! `f32` loads, row-major. `benches/planner.py` makes such files, runs this on all its cases and
//! compares the answers.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program of its own, run by hand"
)]

use std::hint::black_box;
use std::time::Instant;

use eplb::{Load, PlacementMut, Planner, Policy, Topology};

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let [file, sizes @ ..] = &arguments[..] else {
        println!("usage: FILE LAYERS EXPERTS REPLICAS GROUPS NODES GPUS [LENGTH]");
        return;
    };
    let number = |index: usize| sizes[index].parse::<usize>().unwrap();
    let (layers, experts) = (number(0), number(1));
    let topology = Topology::from_totals(number(2), number(4), number(5)).unwrap();
    let planner = Planner::new(topology, number(3), Policy::DeepSeek, 1).unwrap();
    let length = sizes.get(6).map_or("1", String::as_str);
    let (calls, seconds) = match length.strip_suffix('x') {
        Some(calls) => (calls.parse().unwrap(), f64::INFINITY),
        None => (usize::MAX, length.parse().unwrap()),
    };

    let values: Vec<f32> = std::fs::read(file)
        .unwrap()
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    let load = Load::new(&values, layers, experts).unwrap();
    let placement = planner.plan(&load).unwrap();
    let mut phy2log = placement.phy2log().to_vec();
    let mut log2phy = placement.log2phy().to_vec();
    let mut logcnt = placement.logcnt().to_vec();
    let mut plan = || {
        let load = Load::new(black_box(&values), layers, experts).unwrap();
        let mut out = PlacementMut {
            phy2log: &mut phy2log,
            log2phy: Some(&mut log2phy),
            logcnt: &mut logcnt,
        };
        planner.plan_into(&load, &mut out).unwrap();
    };
    for _ in 0..20 {
        plan();
    }
    let mut samples: Vec<f64> = Vec::with_capacity(1 << 20);
    let begin = Instant::now();
    while samples.len() < calls && begin.elapsed().as_secs_f64() < seconds {
        let start = Instant::now();
        plan();
        samples.push(start.elapsed().as_secs_f64() * 1e6);
    }
    assert_eq!(phy2log, placement.phy2log(), "the same input, another plan");
    samples.sort_by(f64::total_cmp);
    let quantile = |q: f64| samples[((samples.len() - 1) as f64 * q).round() as usize];
    println!(
        "{{\"calls\": {}, \"best_us\": {:.1}, \"median_us\": {:.1}, \"p99_us\": {:.1}, \"p999_us\": {:.1}, \"checksum\": {}}}",
        samples.len(),
        samples[0],
        quantile(0.5),
        quantile(0.99),
        quantile(0.999),
        checksum(&phy2log) ^ checksum(&log2phy).rotate_left(1) ^ checksum(&logcnt).rotate_left(2),
    );
}

/// FNV-1a over the low bytes, which is what distinguishes plans.
fn checksum(values: &[i64]) -> u32 {
    values.iter().fold(0x811c_9dc5, |hash, &value| {
        (hash ^ (value as u32 & 0xffff)).wrapping_mul(0x0100_0193)
    })
}

//! Which schedule keeps eight ranks busiest, and what it holds: `cargo run --example compare`.

#![expect(clippy::print_stdout, reason = "an example prints")]

use pipeline::{Costs, Method, Request, SimulateOptions, simulate};

fn main() -> pipeline::Result<()> {
    println!(
        "{:24} {:>9} {:>8} {:>12}",
        "schedule", "makespan", "bubble", "activations"
    );
    for method in Method::ALL {
        let schedule = Request::new(method, 8, 32).generate()?;
        // Give every schedule the same work a rank, however many stages it cuts it into.
        let stages_held = schedule.layout().num_stages() * schedule.layout().num_copies() / 8;
        let unit = if method.is_bidirectional() {
            1.0
        } else {
            1.0 / stages_held as f64
        };
        let costs = Costs::uniform(schedule.layout(), unit, unit, unit);
        let timeline = simulate(&schedule, &costs, &SimulateOptions::default())?;
        let activations = timeline.peaks.iter().map(|peak| peak.activations).max();
        println!(
            "{:24} {:9} {:7.1}% {:12.1}",
            method.name(),
            timeline.makespan,
            100.0 * timeline.bubble_ratio,
            f64::from(activations.unwrap_or(0)) * unit,
        );
    }
    Ok(())
}

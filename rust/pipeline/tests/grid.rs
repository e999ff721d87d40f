//! Every generator, over a small grid, proved and read back; the large grid runs from Python.

use pipeline::verify::{Rule, VerifyOptions, verify};
use pipeline::{
    Costs, CsvOptions, Error, Kind, Method, Op, Request, Schedule, SimulateOptions,
    place_transfers, simulate,
};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn requests() -> impl Iterator<Item = Request> {
    let sizes = (1..=6).flat_map(|p| (1..=3 * p as u32).map(move |m| (p, m)));
    sizes.flat_map(|(p, m)| {
        let methods = Method::ALL.into_iter();
        methods
            .filter(move |method| p % 2 == 0 || !method.is_bidirectional())
            .map(move |method| Request::new(method, p, m))
    })
}

#[test]
fn generated_schedules_are_right_and_read_back() -> Outcome {
    for request in requests() {
        let schedule = request.generate()?;
        verify(&schedule, &VerifyOptions::default())?;
        assert_eq!(Schedule::parse(&schedule.text())?, schedule);
        assert_eq!(place_transfers(&schedule.compute_only())?, schedule);
        if !request.method.is_bidirectional() {
            let csv = schedule.to_torch_csv(CsvOptions::default())?;
            let name = request.method.name();
            assert_eq!(
                Schedule::from_torch_csv(&csv, name)?,
                schedule.compute_only()
            );
        }
        let costs = Costs::uniform(schedule.layout(), 1.0, 1.0, 1.0);
        let timeline = simulate(&schedule, &costs, &SimulateOptions::default())?;
        let work =
            3.0 * f64::from(request.num_micro_batches) * schedule.layout().num_stages() as f64;
        assert!((timeline.busy.iter().sum::<f64>() - work).abs() < 1e-6);
    }
    Ok(())
}

#[test]
fn a_deadlock_is_a_circle() -> Outcome {
    let schedule = Request::new(Method::OneFOneB, 2, 2).generate()?;
    let mut ops = schedule.ops().to_vec();
    // Rank 0 asks for the gradient before it computes anything, and then waits for its own send.
    let receive = ops
        .iter()
        .position(|op| op.kind == Kind::ReceiveGradient)
        .ok_or("no receive")?;
    ops[..=receive].rotate_right(1);
    let broken = Schedule::new(
        "broken",
        schedule.layout().clone(),
        schedule.starts().to_vec(),
        ops,
    )?;
    let Err(Error::Rule(violation)) = verify(&broken, &VerifyOptions::default()) else {
        return Err("a deadlock went unnoticed".into());
    };
    assert_eq!(violation.rule, Rule::Deadlock);
    assert!(violation.grid.contains('['));
    Ok(())
}

#[test]
fn torn_pairs_and_strangers_are_refused() -> Outcome {
    let schedule = Request::new(Method::DualPipeV, 2, 4).order()?;
    let layout = schedule.layout().clone();
    let mut ops = schedule.ops().to_vec();
    let pair = ops
        .iter()
        .position(|op| op.kind == Kind::OverlapForward)
        .ok_or("no pair")?;
    ops.swap(pair, pair + 1);
    assert!(Schedule::new("torn", layout.clone(), schedule.starts().to_vec(), ops).is_err());
    let strange = vec![Op::new(Kind::Forward, 1, 0, 0)];
    assert!(Schedule::new("strange", layout, vec![0, 1, 1], strange).is_err());
    Ok(())
}

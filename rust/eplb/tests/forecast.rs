//! Estimates of the next window: what they are, what they never are, and that they cost no memory.
#![expect(clippy::unwrap_used, reason = "tests may fail")]

use eplb::forecast::{BACKTESTED, Estimator, Forecaster, MAX_WINDOWS, SHIFT_THRESHOLD};
use eplb::{Code, Load, total_variation};
use proptest::prelude::*;

const LAYERS: usize = 2;
const EXPERTS: usize = 3;

fn all() -> impl Iterator<Item = Estimator> {
    BACKTESTED.into_iter().chain([Estimator::Backtest])
}

fn forecaster(estimator: Estimator) -> Forecaster {
    Forecaster::new(LAYERS, EXPERTS, estimator, Some(SHIFT_THRESHOLD)).unwrap()
}

fn observe(forecaster: &mut Forecaster, window: &[f32]) -> bool {
    let load = Load::new(window, forecaster.num_layers(), forecaster.num_experts()).unwrap();
    forecaster.observe(&load).unwrap()
}

fn fed(estimator: Estimator, windows: &[Vec<f32>]) -> Forecaster {
    fed_to(forecaster(estimator), windows)
}

fn fed_to(mut forecaster: Forecaster, windows: &[Vec<f32>]) -> Forecaster {
    for window in windows {
        observe(&mut forecaster, window);
    }
    forecaster
}

/// One layer of two experts that share 100 tokens.
fn of_two(estimator: Estimator, first: &[f32]) -> Vec<f32> {
    let mut forecaster = Forecaster::new(1, 2, estimator, None).unwrap();
    for &load in first {
        observe(&mut forecaster, &[load, 100.0 - load]);
    }
    forecaster.estimate().unwrap().to_vec()
}

#[test]
fn each_estimator_is_what_it_says() {
    let windows = [10.0, 20.0, 60.0, 50.0];
    let one = |estimator| of_two(estimator, &windows)[0];
    assert_eq!(one(Estimator::Last), 50.0);
    assert_eq!(one(Estimator::Average { windows: 2 }), 55.0);
    assert_eq!(one(Estimator::Average { windows: 16 }), 35.0);
    assert_eq!(one(Estimator::Mean), 35.0);
    // Each weighs half of the one after it.
    let weighted = (10.0 + 2.0 * 20.0 + 4.0 * 60.0 + 8.0 * 50.0) / 15.0;
    assert_eq!(one(Estimator::Exponential { windows: 3 }), weighted);
    assert_eq!(one(Estimator::Trend { windows: 2 }), 40.0);
    // 10, 20, 60, 50 rise by 16 a window around 35.
    assert_eq!(one(Estimator::Trend { windows: 4 }), 75.0);
    assert_eq!(
        of_two(Estimator::Trend { windows: 2 }, &[60.0, 10.0]),
        [0.0, 140.0]
    );
}

#[test]
fn shrinkage_finds_how_much_to_believe() {
    // Noise around 50: the mean is all there is to know.
    let noise = of_two(Estimator::Shrinkage, &[60.0, 40.0].repeat(40));
    assert!((noise[0] - 50.0).abs() < 0.5, "{noise:?}");
    // Steps that last: the last window is.
    let steps: Vec<f32> = (0..80).map(|t| [30.0, 70.0][t / 20 % 2]).collect();
    let steps = of_two(Estimator::Shrinkage, &steps);
    assert!((steps[0] - 70.0).abs() < 5.0, "{steps:?}");
}

#[test]
fn the_back_test_chooses_by_layer_and_the_simplest_of_several() {
    let mut forecaster = Forecaster::new(3, 2, Estimator::Backtest, None).unwrap();
    for t in 0..30u8 {
        let (noise, line) = ([60.0, 40.0][usize::from(t % 2)], 10.0 + 2.0 * f32::from(t));
        let window = [noise, 100.0 - noise, line, 100.0 - line, 30.0, 70.0];
        observe(&mut forecaster, &window);
    }
    let chosen: Vec<_> = forecaster.chosen().collect();
    assert_eq!(chosen[0], Estimator::Average { windows: 2 });
    assert_eq!(chosen[1], Estimator::Trend { windows: 4 });
    assert_eq!(chosen[2], Estimator::Last);
}

#[test]
fn a_shift_of_the_domain_is_seen_and_the_past_forgotten() {
    let (law, code) = ([60.0, 30.0, 10.0], [10.0, 30.0, 60.0]);
    let window = |row: [f32; 3]| [row, row].concat();
    let mut forecaster = forecaster(Estimator::Mean);
    for _ in 0..5 {
        assert!(!observe(&mut forecaster, &window(law)));
    }
    assert!(observe(&mut forecaster, &window(code)));
    assert_eq!(forecaster.estimate().unwrap(), window(code));
    assert_eq!(forecaster.windows_since_shift(), 1);
    assert_eq!(forecaster.distance(), [0.5, 0.5]);
    assert!(!observe(&mut forecaster, &window(code)));
    assert_eq!(forecaster.windows_since_shift(), 2);

    let mut never = Forecaster::new(1, 3, Estimator::Mean, None).unwrap();
    for row in [law, law, code] {
        assert!(!observe(&mut never, &row));
    }
    assert_eq!(never.windows_since_shift(), 3);
}

#[test]
fn small_noisy_windows_are_no_shifts() {
    // Each window is all on one expert or another: as far apart as can be, always.
    let mut forecaster = Forecaster::new(1, 4, Estimator::Mean, Some(SHIFT_THRESHOLD)).unwrap();
    for t in 0..40 {
        let mut window = [0.0; 4];
        window[t * 7 % 4] = 1.0;
        assert!(!observe(&mut forecaster, &window));
    }
}

#[test]
fn the_second_window_is_a_shift_if_it_holds_tokens_enough() {
    for (tokens, expected) in [(10.0, false), (1000.0, true)] {
        let mut forecaster = Forecaster::new(1, 4, Estimator::Mean, Some(SHIFT_THRESHOLD)).unwrap();
        observe(
            &mut forecaster,
            &[0.4, 0.2, 0.2, 0.2].map(|part| part * tokens),
        );
        let next = [0.1, 0.2, 0.2, 0.5].map(|part| part * tokens);
        assert_eq!(observe(&mut forecaster, &next), expected);
    }
}

#[test]
fn where_every_window_is_far_from_the_last_that_is_usual() {
    let mut forecaster = Forecaster::new(1, 8, Estimator::Mean, Some(SHIFT_THRESHOLD)).unwrap();
    let mut shifts = Vec::new();
    for t in 0..40 {
        let mut window = [1000.0; 8];
        window[t * 3 % 8] = 8000.0;
        if observe(&mut forecaster, &window) {
            shifts.push(t);
        }
    }
    assert_eq!(shifts, [1, 2]);
}

#[test]
fn the_uncertainty_is_that_of_past_errors() {
    let mut forecaster = Forecaster::new(1, 2, Estimator::Last, None).unwrap();
    let mut out = [0.0; 2];
    observe(&mut forecaster, &[60.0, 40.0]);
    forecaster.uncertainty_into(&mut out).unwrap();
    assert_eq!(out, [60.0, 40.0]); // nothing is known of it
    for t in 0..200 {
        observe(&mut forecaster, &[[40.0, 60.0], [60.0, 40.0]][t % 2]);
    }
    forecaster.uncertainty_into(&mut out).unwrap();
    assert!(out.iter().all(|sd| (sd - 20.0).abs() < 1.0), "{out:?}");
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let code = |made: eplb::Result<Forecaster>| made.unwrap_err().refusal().code;
    let new = |estimator, threshold| Forecaster::new(1, 3, estimator, threshold);
    assert_eq!(
        code(Forecaster::new(0, 3, Estimator::Last, None)),
        Code::NotPositive
    );
    assert_eq!(
        code(Forecaster::new(3, 0, Estimator::Last, None)),
        Code::NotPositive
    );
    let huge = Forecaster::new(usize::MAX, 2, Estimator::Last, None);
    assert_eq!(code(huge), Code::TooLarge);
    for estimator in [
        Estimator::Average { windows: 0 },
        Estimator::Trend { windows: 1 },
        Estimator::Exponential {
            windows: MAX_WINDOWS + 1,
        },
    ] {
        assert_eq!(code(new(estimator, None)), Code::OutOfRange);
    }
    for threshold in [-0.1, 1.1, f64::NAN] {
        assert_eq!(
            code(new(Estimator::Last, Some(threshold))),
            Code::OutOfRange
        );
    }

    let mut forecaster = new(Estimator::Last, None).unwrap();
    assert_eq!(
        forecaster.estimate().unwrap_err().refusal().code,
        Code::TooSmall
    );
    observe(&mut forecaster, &[1.0, 2.0, 3.0]);
    let other = Load::new(&[1.0, 2.0], 1, 2).unwrap();
    assert_eq!(
        forecaster.observe(&other).unwrap_err().refusal().code,
        Code::WrongShape
    );
    let refused = forecaster.uncertainty_into(&mut [0.0; 2]).unwrap_err();
    assert_eq!(refused.refusal().code, Code::WrongShape);
    assert_eq!(forecaster.estimate().unwrap(), [1.0, 2.0, 3.0]);
    assert_eq!(forecaster.num_windows(), 1);
}

#[test]
fn a_window_without_load_is_passed_over() {
    for estimator in all() {
        let window = vec![5.0, 3.0, 2.0, 0.0, 0.0, 0.0];
        let mut forecaster = fed(estimator, &[window.clone(), window.clone()]);
        let before = forecaster.estimate().unwrap().to_vec();
        assert!(!observe(&mut forecaster, &[0.0; 6]));
        assert_eq!(forecaster.estimate().unwrap(), before, "{estimator:?}");
        assert_eq!(forecaster.num_windows(), 2);
    }
}

#[test]
fn the_largest_loads_stay_loads() {
    let most = f32::MAX / 2.0 / 3.0;
    for estimator in all() {
        let windows: Vec<_> = (0..6)
            .map(|t| {
                vec![
                    [0.0, most][t % 2],
                    most,
                    1e-45,
                    most,
                    0.0,
                    [most, 0.0][t % 2],
                ]
            })
            .collect();
        for count in 1..=6 {
            let forecaster = fed(estimator, &windows[..count]);
            let estimate = forecaster.estimate().unwrap();
            assert!(
                Load::new(estimate, LAYERS, EXPERTS).is_ok(),
                "{estimator:?}"
            );
            let mut out = [f32::NAN; LAYERS * EXPERTS];
            forecaster.uncertainty_into(&mut out).unwrap();
            assert!(out.iter().all(|sd| sd.is_finite() && *sd >= 0.0));
        }
    }
}

#[test]
fn a_forecaster_allocates_nothing_once_it_is_made() {
    for estimator in all() {
        let mut forecaster = forecaster(estimator);
        let mut out = [0.0; LAYERS * EXPERTS];
        let counted = allocation_counter::measure(|| {
            for t in 0..40u8 {
                let tokens = f32::from(t);
                observe(
                    &mut forecaster,
                    &[tokens, 20.0, 30.0, 30.0, tokens * tokens, 1.0],
                );
                forecaster.uncertainty_into(&mut out).unwrap();
            }
        });
        assert_eq!(
            (counted.count_total, counted.bytes_total),
            (0, 0),
            "{estimator:?}"
        );
    }
}

#[test]
fn total_variation_is_what_would_have_to_go_elsewhere() {
    let load = |values: &'static [f32]| Load::new(values, 2, 2).unwrap();
    let apart = total_variation(&load(&[3.0, 1.0, 0.0, 0.0]), &load(&[2.0, 2.0, 1.0, 0.0]));
    assert_eq!(apart.unwrap(), [0.25, 1.0]);
    let other = Load::new(&[1.0; 4], 1, 4).unwrap();
    let refused = total_variation(&other, &load(&[1.0; 4])).unwrap_err();
    assert_eq!(refused.refusal().code, Code::WrongShape);
}

fn estimators() -> impl Strategy<Value = Estimator> {
    prop_oneof![
        prop::sample::select(all().collect::<Vec<_>>()),
        (1..40usize).prop_map(|windows| Estimator::Average { windows }),
        (1..40usize).prop_map(|windows| Estimator::Exponential { windows }),
        (2..40usize).prop_map(|windows| Estimator::Trend { windows }),
    ]
}

fn traces() -> impl Strategy<Value = Vec<Vec<f32>>> {
    let window = prop::collection::vec((0..1000u16).prop_map(f32::from), LAYERS * EXPERTS);
    prop::collection::vec(window, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn constant_loads_are_reproduced(estimator in estimators(), windows in traces(), times in 1..30usize) {
        let forecaster = fed(estimator, &vec![windows[0].clone(); times]);
        prop_assume!(forecaster.num_windows() > 0);
        prop_assert_eq!(forecaster.estimate().unwrap(), &windows[0][..]);
        if times > 1 {
            let mut out = [0.0; LAYERS * EXPERTS];
            forecaster.uncertainty_into(&mut out).unwrap();
            prop_assert!(out.iter().zip(&windows[0]).all(|(sd, load)| *sd <= 1e-6 * load));
        }
    }

    #[test]
    fn loads_in_another_unit_give_the_same_in_it(estimator in estimators(), windows in traces()) {
        // A power of two, so that nothing is rounded otherwise.
        let scaled: Vec<Vec<f32>> = windows
            .iter()
            .map(|window| window.iter().map(|load| load * 0.125).collect())
            .collect();
        // What is a shift depends on how many tokens there are.
        let never = Forecaster::new(LAYERS, EXPERTS, estimator, None).unwrap();
        let (forecaster, in_eighths) = (fed_to(never.clone(), &windows), fed_to(never, &scaled));
        prop_assume!(forecaster.num_windows() > 0);
        let expected: Vec<f32> = forecaster.estimate().unwrap().iter().map(|load| load * 0.125).collect();
        prop_assert_eq!(in_eighths.estimate().unwrap(), expected);
    }

    #[test]
    fn the_order_of_experts_plays_no_part(estimator in estimators(), windows in traces()) {
        let turned: Vec<Vec<f32>> = windows
            .iter()
            .map(|window| window.chunks_exact(EXPERTS).flat_map(|row| [row[2], row[0], row[1]]).collect())
            .collect();
        let (forecaster, other) = (fed(estimator, &windows), fed(estimator, &turned));
        prop_assume!(forecaster.num_windows() > 0);
        let estimates = forecaster.estimate().unwrap().chunks_exact(EXPERTS);
        for (row, other) in estimates.zip(other.estimate().unwrap().chunks_exact(EXPERTS)) {
            for (a, b) in [row[2], row[0], row[1]].iter().zip(other) {
                prop_assert!((a - b).abs() <= 1e-4 * a.abs().max(1.0) || estimator == Estimator::Backtest);
            }
        }
    }

    #[test]
    fn an_estimate_is_a_load_and_the_future_plays_no_part(
        estimator in estimators(), windows in traces(), seen in 1..24usize,
    ) {
        let seen = seen.min(windows.len());
        let mut forecaster = forecaster(estimator);
        let mut then = Vec::new();
        for (t, window) in windows.iter().enumerate() {
            observe(&mut forecaster, window);
            if t + 1 == seen && forecaster.num_windows() > 0 {
                then = forecaster.estimate().unwrap().to_vec();
            }
        }
        if !then.is_empty() {
            prop_assert!(Load::new(&then, LAYERS, EXPERTS).is_ok());
            let alone = fed(estimator, &windows[..seen]);
            prop_assert_eq!(alone.estimate().unwrap(), &then[..]);
        }
    }
}

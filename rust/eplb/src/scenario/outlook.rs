//! What the next window may bring, told from those that have been.

use super::scenarios::{MAX_SCENARIOS, Scenarios, check_count};
use crate::balance::Random;
use crate::error::{Code, Error, Result};
use crate::forecast::{SHIFT_THRESHOLD, ShiftDetector, total};
use crate::load::Load;

/// The largest spread.
const MAX_SPREAD: f64 = 100.0;

/// The most that an expert of mean load scatters, as a part of it. Windows of few tokens scatter
/// more; to plan for more gains nothing.
const MAX_PART: f64 = 0.3;

/// Makes scenarios of windows: those since the load last shifted, and copies that differ from
/// them, each from one in turn, as a window to come may.
///
/// How far windows differ follows from how much they hold: a count of n tokens scatters by
/// `sqrt(n)` if each token chooses by itself, and by some multiple of that, which several windows
/// show, as tokens come in texts and loads drift. So copies of windows of a thousand tokens differ
/// much, and those of millions hardly at all, unless they did before.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// When the load has shifted; see [`SHIFT_THRESHOLD`]. `None` takes it never to have.
    pub shift_threshold: Option<f64>,
    /// The most windows that are taken, from the last back.
    pub most_windows: usize,
    /// How many copies there are.
    pub copies: usize,
    /// How many times as far copies scatter as windows have done. What they scatter about is drawn
    /// to an even load, by as much as an expert of mean load scatters, as a part of its load.
    pub spread: f64,
}

impl Default for Outlook {
    fn default() -> Self {
        Self {
            shift_threshold: Some(SHIFT_THRESHOLD),
            most_windows: 8,
            copies: 24,
            spread: 3.0,
        }
    }
}

impl Outlook {
    /// The first window after the last shift, as a [`Forecaster`](crate::Forecaster) tells it that
    /// is fed these windows. O(T L E).
    ///
    /// # Errors
    /// [`Code::OutOfRange`] for the threshold.
    pub fn since_shift(&self, windows: &Scenarios<'_>) -> Result<usize> {
        let mut shifts = ShiftDetector::new(windows.num_layers, self.shift_threshold)?;
        let mut sum = vec![0.0f64; windows.num_layers * windows.num_experts];
        let mut first = 0;
        for (index, window) in windows.values.chunks_exact(sum.len()).enumerate() {
            let load = Load::new(window, windows.num_layers, windows.num_experts)?;
            if shifts.compare(&load, &sum) {
                first = index;
                sum.fill(0.0);
            }
            for (sum, &load) in sum.iter_mut().zip(window) {
                *sum += f64::from(load);
            }
        }
        Ok(first)
    }

    /// The scenarios, `[K, L, E]`: windows from the last back, then copies. The same ones for the
    /// same windows, everywhere. O((T + K) L E).
    ///
    /// # Errors
    /// [`Code::OutOfRange`] for a setting, [`Code::TooLarge`] if there would be more than
    /// [`MAX_SCENARIOS`].
    pub fn scenarios(&self, windows: &Scenarios<'_>) -> Result<Vec<f32>> {
        self.check()?;
        let Scenarios {
            num_scenarios,
            num_layers,
            num_experts,
            ..
        } = *windows;
        let kept = (num_scenarios - self.since_shift(windows)?).min(self.most_windows);
        let layers = num_layers * num_experts;
        check_count(kept)?;
        if self.copies > MAX_SCENARIOS - kept {
            return Err(Error::invalid(
                Code::TooLarge,
                "copies",
                self.copies,
                format!("at most {MAX_SCENARIOS}, {kept} windows included"),
                "16 to 32 scenarios tell most of what there is to tell",
            ));
        }
        let mut scenarios = Vec::with_capacity((kept + self.copies) * layers);
        for window in (num_scenarios - kept..num_scenarios).rev() {
            scenarios.extend_from_slice(&windows.values[window * layers..][..layers]);
        }
        scenarios.resize((kept + self.copies) * layers, 0.0);
        let (of_windows, copies) = scenarios.split_at_mut(kept * layers);
        for layer in 0..num_layers {
            // Every layer draws the same numbers, so that its plan does not depend on others.
            let mut random = Random::new();
            let begin = layer * num_experts;
            let rows = of_windows.chunks_exact(layers);
            let scatter = self.spread * excess(rows.map(|window| &window[begin..][..num_experts]));
            for (copy, windows) in copies
                .chunks_exact_mut(layers)
                .zip(of_windows.chunks_exact(layers).cycle())
            {
                let window = &windows[begin..][..num_experts];
                scattered(
                    window,
                    scatter,
                    &mut random,
                    &mut copy[begin..][..num_experts],
                );
            }
        }
        Ok(scenarios)
    }

    fn check(&self) -> Result<()> {
        crate::error::require_positive("most_windows", self.most_windows)?;
        if (0.0..=MAX_SPREAD).contains(&self.spread) {
            return Ok(());
        }
        Err(Error::invalid(
            Code::OutOfRange,
            "spread",
            self.spread,
            format!("from 0 to {MAX_SPREAD}"),
            "1 is the scatter of counts",
        ))
    }
}

/// How many times as far apart a layer's windows are, each from the next, as their counts alone
/// would scatter: the root of the mean square over experts, to which one that is as expected is
/// added, so that a single window is taken to be.
fn excess<'a>(windows: impl Iterator<Item = &'a [f32]> + Clone) -> f64 {
    let (mut squares, mut degrees) = (1.0, 1.0);
    for (a, b) in windows.clone().zip(windows.skip(1)) {
        let totals = (total(a), total(b));
        if totals.0 == 0.0 || totals.1 == 0.0 {
            continue;
        }
        // For counts a and b that add up to A and B, the difference of shares has the variance
        // p (1 / A + 1 / B), with the pooled share p = (a + b) / (A + B).
        for (&a, &b) in a.iter().zip(b).filter(|&(&a, &b)| a + b > 0.0) {
            let (a, b) = (f64::from(a), f64::from(b));
            let apart = a / totals.0 - b / totals.1;
            squares += apart * apart * totals.0 * totals.1 / (a + b);
            degrees += 1.0;
        }
        degrees -= 1.0;
    }
    (squares / degrees).sqrt()
}

/// A copy of a layer's load whose experts scatter so many times as far as counts do.
fn scattered(window: &[f32], scatter: f64, random: &mut Random, copy: &mut [f32]) {
    let average = total(window) / window.len() as f64;
    // What an expert of mean load scatters by, as a part of it.
    let part = (scatter / average.sqrt()).min(MAX_PART);
    for (to, &load) in copy.iter_mut().zip(window) {
        let load = f64::from(load);
        let load = load + part * (average - load);
        let load = load + part * (average * load).sqrt() * f64::from(normal(random));
        *to = load.max(0.0) as f32;
    }
}

/// A number that looks drawn from a normal distribution: the sum of twelve even ones.
pub(super) fn normal(random: &mut Random) -> f32 {
    const STEPS: usize = 1 << 16;
    let sum: usize = (0..12).map(|_| random.below(STEPS)).sum();
    sum as f32 / STEPS as f32 - 6.0
}

//! What the next window may bring, told from those that have been.

use super::{MAX_SCENARIOS, Scenarios, check_windows};
use crate::balance::Random;
use crate::error::{Code, Error, Result};

/// Makes scenarios of windows: those since the load last shifted, and copies that differ from
/// them, each from one in turn, as a window to come may.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// A shift is where shares of load change by more than this from one window to the next: half
    /// the sum of absolute differences, in the mean over layers.
    pub shift: f64,
    /// The most windows that are taken, from the last back.
    pub most_windows: usize,
    /// How many copies there are.
    pub copies: usize,
    /// How far copies scatter: the standard deviation of an expert of mean load, in units of
    /// that load. The variance grows with the load.
    pub spread: f64,
    /// How far what copies scatter about is drawn to an even load, from 0 to 1.
    pub flatness: f64,
}

impl Default for Outlook {
    fn default() -> Self {
        Self {
            shift: 0.25,
            most_windows: 8,
            copies: 24,
            spread: 0.3,
            flatness: 0.3,
        }
    }
}

impl Outlook {
    /// The first window after the last shift.
    #[must_use]
    pub fn since_shift(&self, windows: &Scenarios<'_>) -> usize {
        let changed = |later: &usize| {
            let layers = 0..windows.num_layers;
            let changes = layers.map(|layer| {
                change(
                    windows.layer(later - 1, layer),
                    windows.layer(*later, layer),
                )
            });
            changes.sum::<f64>() > self.shift * windows.num_layers as f64
        };
        (1..windows.num_scenarios).rev().find(changed).unwrap_or(0)
    }

    /// The scenarios, `[K, L, E]`: windows from the last back, then copies. The same ones for the
    /// same windows, everywhere. O(K L E).
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
        let kept = (num_scenarios - self.since_shift(windows)).min(self.most_windows);
        let layers = num_layers * num_experts;
        check_windows(kept)?;
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
        let flatness = self.flatness as f32;
        for layer in 0..num_layers {
            // Every layer draws the same numbers, so that its plan does not depend on others.
            let mut random = Random::new();
            let begin = layer * num_experts;
            for (copy, windows) in copies
                .chunks_exact_mut(layers)
                .zip(of_windows.chunks_exact(layers).cycle())
            {
                let window = &windows[begin..begin + num_experts];
                let average = window.iter().sum::<f32>() / num_experts as f32;
                let variance = (self.spread * self.spread) as f32 * average;
                for (to, &load) in copy[begin..].iter_mut().zip(window) {
                    let load = load + flatness * (average - load);
                    let load = load + (variance * load).sqrt() * normal(&mut random);
                    *to = if load > 0.0 { load } else { 0.0 };
                }
            }
        }
        Ok(scenarios)
    }

    fn check(&self) -> Result<()> {
        let range = |argument, value: f64, most: f64| {
            if (0.0..=most).contains(&value) {
                return Ok(());
            }
            Err(Error::invalid(
                Code::OutOfRange,
                argument,
                value,
                format!("from 0 to {most}"),
                "",
            ))
        };
        range("shift", self.shift, 1.0)?;
        range("spread", self.spread, 10.0)?;
        range("flatness", self.flatness, 1.0)?;
        crate::error::require_positive("most_windows", self.most_windows)
    }
}

/// How much of the load is elsewhere: half the sum of absolute differences of shares.
fn change(before: &[f32], after: &[f32]) -> f64 {
    let sum = |row: &[f32]| row.iter().map(|&load| f64::from(load)).sum::<f64>();
    let (all_before, all_after) = (sum(before).max(1e-300), sum(after).max(1e-300));
    let pairs = before.iter().zip(after);
    let differences = pairs.map(|(&before, &after)| {
        (f64::from(before) / all_before - f64::from(after) / all_after).abs()
    });
    differences.sum::<f64>() / 2.0
}

/// A number that looks drawn from a normal distribution: the sum of twelve even ones.
pub(super) fn normal(random: &mut Random) -> f32 {
    const STEPS: usize = 1 << 16;
    let sum: usize = (0..12).map(|_| random.below(STEPS)).sum();
    sum as f32 / STEPS as f32 - 6.0
}

//! Several loads, of which a plan is to be good in each.

use crate::error::{Code, Error, Result, require_positive};
use crate::load::Load;

/// The most scenarios of a plan: more would tell little and cost much.
pub const MAX_SCENARIOS: usize = 256;

/// Loads of the same experts at several times, or as they may be: `[K, L, E]`, checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scenarios<'a> {
    pub(super) values: &'a [f32],
    pub(super) num_scenarios: usize,
    pub(super) num_layers: usize,
    pub(super) num_experts: usize,
}

impl<'a> Scenarios<'a> {
    /// Checks a row-major `[num_scenarios, num_layers, num_experts]` buffer.
    ///
    /// # Errors
    /// As [`Load::new`], for `scenarios`.
    pub fn new(
        values: &'a [f32],
        num_scenarios: usize,
        num_layers: usize,
        num_experts: usize,
    ) -> Result<Self> {
        require_positive("num_scenarios", num_scenarios)?;
        let each = num_layers.saturating_mul(num_experts);
        if num_scenarios.checked_mul(each) != Some(values.len()) {
            return Err(Error::invalid(
                Code::WrongShape,
                "scenarios",
                format!("{} values", values.len()),
                format!("{num_scenarios} x {num_layers} x {num_experts} values"),
                "",
            ));
        }
        for scenario in 0..num_scenarios {
            let load = &values[scenario * each..][..each];
            if let Err(error) = Load::new(load, num_layers, num_experts) {
                let refusal = error.refusal();
                return Err(Error::invalid(
                    refusal.code,
                    "scenarios",
                    format!("{}, scenario {scenario}", refusal.got),
                    refusal.expected.clone(),
                    refusal.hint.clone(),
                ));
            }
        }
        Ok(Self {
            values,
            num_scenarios,
            num_layers,
            num_experts,
        })
    }

    /// How many there are (K).
    #[must_use]
    pub fn num_scenarios(&self) -> usize {
        self.num_scenarios
    }

    /// How many layers each has (L).
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// How many experts each layer has (E).
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// The load of one layer in one scenario, `[E]`.
    pub(super) fn layer(&self, scenario: usize, layer: usize) -> &'a [f32] {
        let begin = (scenario * self.num_layers + layer) * self.num_experts;
        &self.values[begin..begin + self.num_experts]
    }

    /// The mean load over scenarios, `[L, E]`.
    pub(super) fn mean(&self, weights: &[f64]) -> Vec<f32> {
        let each = self.num_layers * self.num_experts;
        let all: f64 = weights.iter().sum();
        let mut mean = vec![0.0f64; each];
        for (load, weight) in self.values.chunks_exact(each).zip(weights) {
            for (mean, &load) in mean.iter_mut().zip(load) {
                *mean += f64::from(load) * (weight / all);
            }
        }
        mean.into_iter().map(|load| load as f32).collect()
    }
}

pub(super) fn check_count(num_scenarios: usize) -> Result<()> {
    if num_scenarios <= MAX_SCENARIOS {
        return Ok(());
    }
    Err(Error::invalid(
        Code::TooLarge,
        "scenarios",
        num_scenarios,
        format!("at most {MAX_SCENARIOS}"),
        "16 to 32 tell most of what there is to tell",
    ))
}

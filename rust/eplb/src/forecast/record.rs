//! How good past forecasts were: what the back-test goes by, and how uncertain the next one is.

use super::memory::{inverse, total};
use super::shift::variation;
use crate::load::Load;

/// What is left of a score one window later: about 16 windows are remembered.
const KEEP: f64 = 15.0 / 17.0;

/// As many scored forecasts weigh as much as what the layer as a whole says of an expert.
const PRIOR: f64 = 4.0;

/// The scores of past forecasts.
#[derive(Debug, Clone)]
pub(super) struct Record {
    num_layers: usize,
    num_experts: usize,
    /// The total variations of each predictor's forecasts, `[predictors, L]`, fading sums.
    score: Vec<f64>,
    /// The squared errors of the forecasts that were given, in shares of the layer, `[L, E]`,
    /// fading sums.
    square: Vec<f64>,
    /// How many forecasts are in them, `[L]`, fading too.
    weight: Vec<f64>,
}

impl Record {
    pub(super) fn new(num_layers: usize, num_experts: usize, num_predictors: usize) -> Self {
        Self {
            num_layers,
            num_experts,
            score: vec![0.0; num_predictors * num_layers],
            square: vec![0.0; num_layers * num_experts],
            weight: vec![0.0; num_layers],
        }
    }

    /// Scores what was said of a window, `[predictors, L, E]`, and what was believed, `[L, E]`. A
    /// layer without load says nothing.
    pub(super) fn score(&mut self, window: &Load<'_>, predictions: &[f32], estimate: &[f32]) {
        let experts = self.num_experts;
        let single = self.score.len() == self.num_layers;
        for (layer, actual) in window.layers().enumerate() {
            let actual_total = total(actual);
            if actual_total == 0.0 {
                continue;
            }
            if !single {
                let sizes = (self.num_layers, experts);
                let said = predictions.chunks_exact(sizes.0 * sizes.1);
                let scores = self.score.chunks_exact_mut(sizes.0);
                for (score, said) in scores.zip(said) {
                    let said = &said[layer * experts..][..experts];
                    let values = said.iter().map(|&value| f64::from(value));
                    let apart = variation(actual, actual_total, values, total(said));
                    score[layer] = score[layer] * KEEP + apart;
                }
            }
            let estimate = &estimate[layer * experts..][..experts];
            let scale = inverse(total(estimate));
            let actual_scale = inverse(actual_total);
            let squares = &mut self.square[layer * experts..][..experts];
            for ((square, &actual), &estimate) in squares.iter_mut().zip(actual).zip(estimate) {
                let error = f64::from(actual) * actual_scale - f64::from(estimate) * scale;
                *square = *square * KEEP + error * error;
            }
            self.weight[layer] = self.weight[layer] * KEEP + 1.0;
        }
    }

    /// The predictor whose forecasts were best in a layer; the first of several.
    pub(super) fn best(&self, layer: usize) -> usize {
        let scores = self.score.iter().skip(layer).step_by(self.num_layers);
        let mut best = (0, f64::INFINITY);
        for (predictor, &score) in scores.enumerate() {
            if score < best.1 {
                best = (predictor, score);
            }
        }
        best.0
    }

    /// The standard deviation of the error of an estimate, `[L, E]`.
    pub(super) fn uncertainty(&self, estimate: &[f32], out: &mut [f32]) {
        let experts = self.num_experts;
        let layers = estimate
            .chunks_exact(experts)
            .zip(out.chunks_exact_mut(experts));
        for (layer, (estimate, out)) in layers.enumerate() {
            let weight = self.weight[layer];
            if weight == 0.0 {
                out.copy_from_slice(estimate);
                continue;
            }
            let squares = &self.square[layer * experts..][..experts];
            // Counts vary as they are large: of the layer's variance, each expert has its share.
            let variance = squares.iter().sum::<f64>() / weight;
            let total = total(estimate);
            let scale = inverse(total);
            for ((out, &square), &estimate) in out.iter_mut().zip(squares).zip(estimate) {
                let prior = variance * f64::from(estimate) * scale;
                let blended = (PRIOR * prior + square) / (PRIOR + weight);
                *out = (total * blended.sqrt()) as f32;
            }
        }
    }
}

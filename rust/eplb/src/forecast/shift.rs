//! How far loads are apart, and when the domain has shifted.

use super::memory::{inverse, total};
use crate::error::{Code, Error, Result};
use crate::load::Load;

/// The total variation of two loads in each layer, `[L]`: the share of the tokens that would have
/// to go to other experts for one to become the other, 0 to 1.
///
/// Of a layer, the totals play no part. It is 0 where neither load has any, and 1 where only one
/// has. O(L E): 10 us for 58 x 256.
///
/// # Errors
/// [`Code::WrongShape`] if the loads have other layers or experts.
pub fn total_variation(load: &Load<'_>, other: &Load<'_>) -> Result<Vec<f64>> {
    let sizes = |load: &Load<'_>| (load.num_layers(), load.num_experts());
    if sizes(load) != sizes(other) {
        return Err(Error::invalid(
            Code::WrongShape,
            "other",
            format!("{:?}", sizes(other)),
            format!("of {:?} layers and experts, as the first load", sizes(load)),
            "",
        ));
    }
    let layers = load.layers().zip(other.layers());
    Ok(layers
        .map(|(load, other)| {
            let totals = (total(load), total(other));
            let values = other.iter().map(|&value| f64::from(value));
            variation(load, totals.0, values, totals.1)
        })
        .collect())
}

/// The total variation of two layers with these totals.
pub(super) fn variation(
    load: &[f32],
    load_total: f64,
    other: impl Iterator<Item = f64>,
    other_total: f64,
) -> f64 {
    if load_total == 0.0 || other_total == 0.0 {
        return f64::from(u8::from(load_total != other_total));
    }
    let (scale, other_scale) = (inverse(load_total), inverse(other_total));
    let apart = load
        .iter()
        .zip(other)
        .map(|(&value, other)| (f64::from(value) * scale - other * other_scale).abs());
    0.5 * apart.sum::<f64>()
}

/// Tells shifts of the domain from the usual coming and going.
#[derive(Debug, Clone)]
pub(super) struct ShiftDetector {
    threshold: Option<f64>,
    /// The distances that were no shifts: their sum and number.
    usual: f64,
    num_usual: usize,
    /// Of the last window, by layer.
    distance: Vec<f64>,
}

impl ShiftDetector {
    pub(super) fn new(num_layers: usize, threshold: Option<f64>) -> Result<Self> {
        if let Some(threshold) = threshold
            && !(0.0..=1.0).contains(&threshold)
        {
            return Err(Error::invalid(
                Code::OutOfRange,
                "shift_threshold",
                threshold,
                "0 to 1",
                "None never takes the domain to have shifted",
            ));
        }
        Ok(Self {
            threshold,
            usual: 0.0,
            num_usual: 0,
            distance: vec![0.0; num_layers],
        })
    }

    pub(super) fn distance(&self) -> &[f64] {
        &self.distance
    }

    /// Compares a window with the sum of those since the last shift, `[L, E]`, and says whether
    /// the domain has shifted. The first distance is taken to be a usual one.
    pub(super) fn compare(&mut self, window: &Load<'_>, sum: &[f64]) -> bool {
        let mut mean = 0.0;
        let mut loaded = 0usize;
        for ((distance, values), sum) in self
            .distance
            .iter_mut()
            .zip(window.layers())
            .zip(sum.chunks_exact(window.num_experts()))
        {
            let totals = (total(values), sum.iter().sum());
            *distance = variation(values, totals.0, sum.iter().copied(), totals.1);
            if totals.0 > 0.0 {
                mean += *distance;
                loaded += 1;
            }
        }
        let mean = mean / loaded.max(1) as f64;
        let usual = self.usual / self.num_usual.max(1) as f64;
        let shifted = self.num_usual > 0
            && self
                .threshold
                .is_some_and(|threshold| mean > usual + threshold);
        if !shifted {
            self.usual += mean;
            self.num_usual += 1;
        }
        shifted
    }
}

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

/// How much of the load must be elsewhere, beyond what is usual, for the domain to have shifted.
///
/// A window's *distance* is its [total variation](total_variation) from all windows since the last
/// shift, in the mean over layers. If each token chose its expert by itself, the numbers of tokens
/// would say how large it is on average: at most the sum of `sqrt(a + b) / (2 sqrt(A B))` over
/// experts, for counts a and b that add up to A and B. Tokens come in texts, and loads drift, so
/// what is usual is a multiple of that: the median of the last 8, and 1 before. Where the distance
/// exceeds the usual one by more than the threshold, the domain has shifted.
pub const SHIFT_THRESHOLD: f64 = 0.15;

/// How far apart samples of one and the same load are on average, at most: half the sum over
/// experts of the root of the mean square of what their shares differ by, which is
/// `p (1 / A + 1 / B)` for the pooled share `p = (a + b) / (A + B)`.
fn sampling_noise(load: &[f32], load_total: f64, other: &[f64], other_total: f64) -> f64 {
    let pairs = load.iter().zip(other);
    let roots = pairs.map(|(&value, &other)| (f64::from(value) + other).sqrt());
    roots.sum::<f64>() / (2.0 * load_total.sqrt() * other_total.sqrt())
}

/// How many past distances tell what is usual.
const REMEMBERED: usize = 8;

/// Tells shifts of the domain from the usual coming and going: see [`SHIFT_THRESHOLD`].
#[derive(Debug, Clone)]
pub(crate) struct ShiftDetector {
    threshold: Option<f64>,
    /// The last distances, as multiples of the sampling noise, a ring; and how many there were.
    multiples: [f64; REMEMBERED],
    num_compared: usize,
    /// Of the last window, by layer.
    distance: Vec<f64>,
}

impl ShiftDetector {
    pub(crate) fn new(num_layers: usize, threshold: Option<f64>) -> Result<Self> {
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
            multiples: [0.0; REMEMBERED],
            num_compared: 0,
            distance: vec![0.0; num_layers],
        })
    }

    pub(crate) fn distance(&self) -> &[f64] {
        &self.distance
    }

    /// Compares a window with the sum of those since the last shift, `[L, E]`, and says whether
    /// the domain has shifted. A layer without load in one of them says nothing of that.
    pub(crate) fn compare(&mut self, window: &Load<'_>, sum: &[f64]) -> bool {
        let (mut apart, mut noise, mut loaded) = (0.0, 0.0, 0usize);
        for ((distance, values), sum) in self
            .distance
            .iter_mut()
            .zip(window.layers())
            .zip(sum.chunks_exact(window.num_experts()))
        {
            let totals = (total(values), sum.iter().sum());
            *distance = variation(values, totals.0, sum.iter().copied(), totals.1);
            if totals.0 > 0.0 && totals.1 > 0.0 {
                apart += *distance;
                noise += sampling_noise(values, totals.0, sum, totals.1);
                loaded += 1;
            }
        }
        if loaded == 0 {
            return false;
        }
        let usual = noise * self.usual_multiple();
        self.multiples[self.num_compared % REMEMBERED] = apart / noise;
        self.num_compared += 1;
        let beyond = (apart - usual) / loaded as f64;
        self.threshold.is_some_and(|threshold| beyond > threshold)
    }

    /// The lower median of the last multiples, and 1 as long as there is room.
    fn usual_multiple(&self) -> f64 {
        let mut sorted = [1.0; REMEMBERED];
        let len = (self.num_compared + 1).min(REMEMBERED);
        let seen = self.num_compared.min(REMEMBERED);
        sorted[..seen].copy_from_slice(&self.multiples[..seen]);
        let sorted = &mut sorted[..len];
        sorted.sort_unstable_by(f64::total_cmp);
        sorted[(len - 1) / 2]
    }
}

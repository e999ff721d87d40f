//! The windows that are remembered, and what estimators make of them.

use super::Estimator;
use crate::load::Load;

/// Past windows, and sums of them.
#[derive(Debug, Clone)]
pub(super) struct Memory {
    num_layers: usize,
    num_experts: usize,
    /// The last windows, `[depth, L, E]`, a ring.
    recent: Vec<f32>,
    depth: usize,
    /// Where in the ring the last window is.
    newest: usize,
    /// How many windows came since the last shift.
    since_shift: usize,
    /// Their sum, `[L, E]`.
    sum_since_shift: Vec<f64>,
    /// The sum of all windows ever, `[L, E]`.
    sum_ever: Vec<f64>,
}

impl Memory {
    pub(super) fn new(num_layers: usize, num_experts: usize, depth: usize) -> Self {
        let size = num_layers * num_experts;
        Self {
            num_layers,
            num_experts,
            recent: vec![0.0; depth * size],
            depth,
            newest: 0,
            since_shift: 0,
            sum_since_shift: vec![0.0; size],
            sum_ever: vec![0.0; size],
        }
    }

    pub(super) fn since_shift(&self) -> usize {
        self.since_shift
    }

    pub(super) fn sum_since_shift(&self) -> &[f64] {
        &self.sum_since_shift
    }

    /// Adds a window; if the domain shifted with it, forgets those before it.
    pub(super) fn push(&mut self, values: &[f32], shifted: bool) {
        if shifted {
            self.since_shift = 0;
            self.sum_since_shift.fill(0.0);
        }
        self.since_shift += 1;
        self.newest = (self.newest + 1) % self.depth;
        self.recent[self.newest * values.len()..][..values.len()].copy_from_slice(values);
        add(&mut self.sum_since_shift, values, 1.0);
        add(&mut self.sum_ever, values, 1.0);
    }

    /// The window that came `age` windows before the last; `age` is less than the depth.
    fn window(&self, age: usize) -> &[f32] {
        let size = self.num_layers * self.num_experts;
        let place = (self.newest + self.depth - age) % self.depth;
        &self.recent[place * size..][..size]
    }
}

/// One estimator, and what it keeps besides the windows.
#[derive(Debug, Clone)]
pub(super) struct Predictor {
    estimator: Estimator,
    /// The estimate as it is summed up, `[L, E]`; an exponential average is kept in it.
    sum: Vec<f64>,
    /// The weight of all windows in an exponential average.
    weight: f64,
    /// How far each layer's last window is drawn towards the mean.
    pull: Vec<Pull>,
}

/// Least squares of one number, from the sums of products and squares.
#[derive(Debug, Clone, Copy, Default)]
struct Pull {
    product: f64,
    square: f64,
}

impl Pull {
    /// 0 keeps the last window, 1 takes the mean; half way, where nothing is known.
    fn amount(self) -> f64 {
        if self.square > 0.0 {
            (self.product / self.square).clamp(0.0, 1.0)
        } else {
            0.5
        }
    }
}

impl Predictor {
    pub(super) fn new(estimator: Estimator, num_layers: usize, num_experts: usize) -> Self {
        let pulls = if estimator == Estimator::Shrinkage {
            num_layers
        } else {
            0
        };
        Self {
            estimator,
            sum: vec![0.0; num_layers * num_experts],
            weight: 0.0,
            pull: vec![Pull::default(); pulls],
        }
    }

    pub(super) fn estimator(&self) -> Estimator {
        self.estimator
    }

    /// Learns from the window that followed those in memory, before it is there itself.
    pub(super) fn learn(&mut self, window: &Load<'_>, memory: &Memory) {
        let experts = memory.num_experts;
        let last = memory.window(0).chunks_exact(experts);
        let mean = memory.sum_ever.chunks_exact(experts);
        for (((pull, last), mean), next) in self
            .pull
            .iter_mut()
            .zip(last)
            .zip(mean)
            .zip(window.layers())
        {
            let (to_last, to_next) = (inverse(total(last)), inverse(total(next)));
            let to_mean = inverse(mean.iter().sum());
            for ((&last, &mean), &next) in last.iter().zip(mean).zip(next) {
                let last = f64::from(last) * to_last;
                let off = last - mean * to_mean;
                pull.product += off * (last - f64::from(next) * to_next);
                pull.square += off * off;
            }
        }
    }

    /// Says what comes after the windows in memory, the last of which is `last`.
    pub(super) fn predict(
        &mut self,
        memory: &Memory,
        last: &[f32],
        shifted: bool,
        out: &mut [f32],
    ) {
        let held = memory.since_shift;
        match self.estimator {
            Estimator::Average { windows } => {
                let windows = windows.min(held);
                let weight = 1.0 / windows as f64;
                self.combine(memory, windows, |_| weight);
            }
            Estimator::Trend { windows } if held > 1 => {
                let windows = windows.min(held);
                // The line through (-age, load), one after the last: where it is at the middle of
                // the windows, and how far it rises from there.
                let count = windows as f64;
                let middle = (count - 1.0) / 2.0;
                let spread = count * (count * count - 1.0) / 12.0;
                self.combine(memory, windows, |age| {
                    1.0 / count + (middle + 1.0) * (middle - age as f64) / spread
                });
            }
            Estimator::Mean => {
                let weight = 1.0 / held as f64;
                for (sum, &all) in self.sum.iter_mut().zip(&memory.sum_since_shift) {
                    *sum = all * weight;
                }
            }
            Estimator::Exponential { windows } => {
                let windows = windows as f64;
                let keep = if shifted {
                    0.0
                } else {
                    (windows - 1.0) / (windows + 1.0)
                };
                self.weight = self.weight * keep + 1.0;
                for (sum, &last) in self.sum.iter_mut().zip(last) {
                    *sum = *sum * keep + f64::from(last);
                }
                let scale = 1.0 / self.weight;
                return write(&self.sum, scale, memory.num_experts, out);
            }
            Estimator::Shrinkage => self.shrink(memory, last),
            Estimator::Last | Estimator::Trend { .. } | Estimator::Backtest => {
                return out.copy_from_slice(last);
            }
        }
        write(&self.sum, 1.0, memory.num_experts, out);
    }

    /// The last windows, each times the weight of its age.
    fn combine(&mut self, memory: &Memory, windows: usize, weight: impl Fn(usize) -> f64) {
        self.sum.fill(0.0);
        for age in (0..windows).rev() {
            add(&mut self.sum, memory.window(age), weight(age));
        }
    }

    fn shrink(&mut self, memory: &Memory, last: &[f32]) {
        let experts = memory.num_experts;
        let mean = memory.sum_ever.chunks_exact(experts);
        let out = self.sum.chunks_exact_mut(experts);
        for (((pull, out), mean), last) in self
            .pull
            .iter()
            .zip(out)
            .zip(mean)
            .zip(last.chunks_exact(experts))
        {
            let amount = pull.amount();
            let scale = total(last) * inverse(mean.iter().sum());
            for ((out, &mean), &last) in out.iter_mut().zip(mean).zip(last) {
                let last = f64::from(last);
                *out = last + amount * (mean * scale - last);
            }
        }
    }
}

/// An estimate as a load: no value is below 0, and no layer's sum overflows.
fn write(sum: &[f64], scale: f64, num_experts: usize, out: &mut [f32]) {
    let most = f64::from(f32::MAX) / 2.0 / num_experts as f64;
    for (out, &sum) in out.iter_mut().zip(sum) {
        *out = (sum * scale).clamp(0.0, most) as f32;
    }
}

fn add(sum: &mut [f64], values: &[f32], weight: f64) {
    for (sum, &value) in sum.iter_mut().zip(values) {
        *sum += f64::from(value) * weight;
    }
}

/// The tokens of a layer.
pub(crate) fn total(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value)).sum()
}

/// 1 over a total; 0 for a layer without load, whose shares are then 0.
pub(super) fn inverse(total: f64) -> f64 {
    if total > 0.0 { 1.0 / total } else { 0.0 }
}

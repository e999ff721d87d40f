//! What the next window's load will be, from the windows that have passed.
//!
//! A plan is made from the past and used in the future. An [`Estimator`] says what the future is
//! taken to be; a [`Forecaster`] is fed one window at a time, as they arrive, and has an estimate
//! and its uncertainty ready after each.

mod memory;
mod record;
mod shift;

use crate::error::{Code, Error, Result, require_positive};
use crate::load::Load;
use memory::{Memory, Predictor};
use record::Record;

pub(crate) use memory::total;
pub(crate) use shift::ShiftDetector;
pub use shift::{SHIFT_THRESHOLD, total_variation};

/// The most windows that an estimator looks back on.
pub const MAX_WINDOWS: usize = 1024;

/// The most values of four bytes that a forecaster keeps.
const MAX_VALUES: usize = 1 << 31;

/// How the load of the next window is estimated.
///
/// Windows since the last shift of the domain count, all others are forgotten; only
/// [`Shrinkage`](Self::Shrinkage) remembers its long-run mean. Windows are added as they are, so
/// one with more tokens weighs more. Where fewer windows have been seen than an estimator looks
/// back on, it takes those there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Estimator {
    /// The last window.
    Last,
    /// The mean of the last windows.
    Average {
        /// How many.
        windows: usize,
    },
    /// The mean of all windows since the last shift.
    Mean,
    /// An exponential average: each window weighs `(windows - 1) / (windows + 1)` of the one after
    /// it, so that the mean age of what is remembered is that of `windows` equal ones.
    Exponential {
        /// The span.
        windows: usize,
    },
    /// A straight line through the last windows, by least squares, and where it is one window
    /// later; at least 0.
    Trend {
        /// Through how many; at least 2.
        windows: usize,
    },
    /// The last window, drawn towards the mean of all windows ever: by as much, in each layer, as
    /// would have brought past windows nearest (in squares) to the ones that followed them.
    Shrinkage,
    /// In each layer, the one of [`BACKTESTED`] whose forecasts have been best so far.
    ///
    /// A forecast is scored, when its window has come, by the total variation between the two: the
    /// share of the tokens that would have to go to other experts. Old scores fade, over about
    /// 16 windows. Ties go to the first in the list.
    Backtest,
}

/// What [`Estimator::Backtest`] chooses from, the simplest first.
pub const BACKTESTED: [Estimator; 11] = [
    Estimator::Last,
    Estimator::Average { windows: 2 },
    Estimator::Average { windows: 4 },
    Estimator::Average { windows: 8 },
    Estimator::Average { windows: 16 },
    Estimator::Mean,
    Estimator::Exponential { windows: 3 },
    Estimator::Exponential { windows: 7 },
    Estimator::Trend { windows: 4 },
    Estimator::Trend { windows: 8 },
    Estimator::Shrinkage,
];

impl Estimator {
    /// How many windows it looks back on, where that is a setting.
    #[must_use]
    pub fn windows(self) -> Option<usize> {
        match self {
            Self::Average { windows } | Self::Exponential { windows } | Self::Trend { windows } => {
                Some(windows)
            }
            _ => None,
        }
    }

    fn check(self) -> Result<()> {
        let least = if matches!(self, Self::Trend { .. }) {
            2
        } else {
            1
        };
        let Some(windows) = self.windows() else {
            return Ok(());
        };
        if (least..=MAX_WINDOWS).contains(&windows) {
            return Ok(());
        }
        Err(Error::invalid(
            Code::OutOfRange,
            "estimator",
            format!("over {windows} windows"),
            format!("over {least} to {MAX_WINDOWS} windows"),
            "",
        ))
    }
}

/// Estimates the next window's load from those it has been fed.
///
/// Allocates nothing after it is made. The same windows give the same bytes on every machine.
///
/// ```
/// use eplb::forecast::{Estimator, Forecaster, SHIFT_THRESHOLD};
/// use eplb::Load;
///
/// let average = Estimator::Average { windows: 2 };
/// let mut forecaster = Forecaster::new(1, 3, average, Some(SHIFT_THRESHOLD))?;
/// for window in [[30.0, 20.0, 10.0], [20.0, 30.0, 10.0]] {
///     forecaster.observe(&Load::new(&window, 1, 3)?)?;
/// }
/// assert_eq!(forecaster.estimate()?, [25.0, 25.0, 10.0]);
/// # Ok::<(), eplb::Error>(())
/// ```
///
/// # Cost
/// For 58 layers of 256 experts, one core, a window takes 0.1 to 0.2 ms, or 1 ms under
/// [`Estimator::Backtest`], which keeps 16 windows.
#[derive(Debug, Clone)]
pub struct Forecaster {
    estimator: Estimator,
    num_layers: usize,
    num_experts: usize,
    num_windows: usize,
    memory: Memory,
    predictors: Vec<Predictor>,
    /// What each predictor says of the next window, `[predictors, L, E]`.
    predictions: Vec<f32>,
    /// Which predictor is believed in each layer, `[L]`.
    chosen: Vec<usize>,
    /// What is believed, `[L, E]`.
    estimate: Vec<f32>,
    record: Record,
    shifts: ShiftDetector,
}

impl Forecaster {
    /// A forecaster that has seen nothing yet.
    ///
    /// # Arguments
    /// * `shift_threshold`: When the domain has shifted, so that all windows before are forgotten;
    ///   see [`SHIFT_THRESHOLD`]. `None` never forgets.
    ///
    /// # Errors
    /// [`Code::NotPositive`] or [`Code::TooLarge`] for the sizes, [`Code::OutOfRange`] for the
    /// number of windows of the estimator or a threshold outside 0 to 1.
    pub fn new(
        num_layers: usize,
        num_experts: usize,
        estimator: Estimator,
        shift_threshold: Option<f64>,
    ) -> Result<Self> {
        require_positive("num_layers", num_layers)?;
        require_positive("num_experts", num_experts)?;
        estimator.check()?;
        let only = [estimator];
        let listed = match estimator {
            Estimator::Backtest => &BACKTESTED[..],
            _ => &only[..],
        };
        let depth = listed.iter().filter_map(|one| one.windows()).max();
        let depth = depth.unwrap_or(1);
        let most = MAX_VALUES / (depth + 2 * listed.len() + 4);
        if num_layers
            .checked_mul(num_experts)
            .is_none_or(|size| size > most)
        {
            return Err(Error::invalid(
                Code::TooLarge,
                "num_layers",
                num_layers,
                format!("few enough for {depth} windows of {num_experts} experts to fit in 8 GiB"),
                "fewer layers at a time, or an estimator that looks back on fewer windows",
            ));
        }
        let size = num_layers * num_experts;
        Ok(Self {
            estimator,
            num_layers,
            num_experts,
            num_windows: 0,
            memory: Memory::new(num_layers, num_experts, depth),
            predictors: listed
                .iter()
                .map(|&estimator| Predictor::new(estimator, num_layers, num_experts))
                .collect(),
            predictions: vec![0.0; listed.len() * size],
            chosen: vec![0; num_layers],
            estimate: vec![0.0; size],
            record: Record::new(num_layers, num_experts, listed.len()),
            shifts: ShiftDetector::new(num_layers, shift_threshold)?,
        })
    }

    /// How many layers there are.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// How many experts each layer has.
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// How it estimates.
    #[must_use]
    pub fn estimator(&self) -> Estimator {
        self.estimator
    }

    /// How many windows it has been fed; those without any load do not count.
    #[must_use]
    pub fn num_windows(&self) -> usize {
        self.num_windows
    }

    /// How many of them came since the last shift of the domain, the first after it included.
    #[must_use]
    pub fn windows_since_shift(&self) -> usize {
        self.memory.since_shift()
    }

    /// How far each layer of the window that came last was from the mean of those since the last
    /// shift before it, `[L]`: their total variation, 0 to 1. 0 before two windows have come.
    #[must_use]
    pub fn distance(&self) -> &[f64] {
        self.shifts.distance()
    }

    /// Feeds the window that has come, and says whether the domain shifted with it.
    ///
    /// Past forecasts are scored before anything is learnt from the window; not by a window with
    /// which the domain shifted, for none could know. A window without any load says nothing, and
    /// is passed over.
    ///
    /// # Errors
    /// [`Code::WrongShape`] for other layers or experts. The forecaster is then as it was.
    pub fn observe(&mut self, window: &Load<'_>) -> Result<bool> {
        if (window.num_layers(), window.num_experts()) != (self.num_layers, self.num_experts) {
            return Err(Error::invalid(
                Code::WrongShape,
                "window",
                format!("{} x {}", window.num_layers(), window.num_experts()),
                format!(
                    "of {} layers x {} experts, as those before it",
                    self.num_layers, self.num_experts
                ),
                "",
            ));
        }
        if window.values().iter().all(|&value| value == 0.0) {
            return Ok(false);
        }
        let mut shifted = false;
        if self.num_windows > 0 {
            shifted = self.shifts.compare(window, self.memory.sum_since_shift());
            if !shifted {
                self.record.score(window, &self.predictions, &self.estimate);
            }
            for predictor in &mut self.predictors {
                predictor.learn(window, &self.memory);
            }
        }
        self.memory.push(window.values(), shifted);
        self.num_windows += 1;
        let size = self.num_layers * self.num_experts;
        for (predictor, out) in self
            .predictors
            .iter_mut()
            .zip(self.predictions.chunks_exact_mut(size))
        {
            predictor.predict(&self.memory, window.values(), shifted, out);
        }
        self.choose();
        Ok(shifted)
    }

    /// Takes the best predictor of each layer at its word.
    fn choose(&mut self) {
        let (experts, size) = (self.num_experts, self.num_layers * self.num_experts);
        for (layer, chosen) in self.chosen.iter_mut().enumerate() {
            *chosen = self.record.best(layer);
            let start = *chosen * size + layer * experts;
            self.estimate[layer * experts..][..experts]
                .copy_from_slice(&self.predictions[start..][..experts]);
        }
    }

    /// The estimate of the next window, `[L, E]`, in the unit of the windows: a load that
    /// [`Load::new`] takes.
    ///
    /// # Errors
    /// [`Code::TooSmall`] before any window has come.
    pub fn estimate(&self) -> Result<&[f32]> {
        self.require_windows()?;
        Ok(&self.estimate)
    }

    /// The uncertainty of the estimate, `[L, E]`, into `out`: the standard deviation of its error,
    /// in the unit of the windows, once the layer's total is known.
    ///
    /// It is measured, not modelled: the mean square of the errors of the forecasts made so far,
    /// fading over about 16 windows; as long as they are few, drawn towards what the errors of the
    /// whole layer say of an expert of this size. Before any forecast could be scored it is as
    /// large as the estimate. That the domain may shift is not in it.
    ///
    /// # Errors
    /// [`Code::TooSmall`] before any window has come, [`Code::WrongShape`] for another length.
    pub fn uncertainty_into(&self, out: &mut [f32]) -> Result<()> {
        self.require_windows()?;
        if out.len() != self.estimate.len() {
            return Err(Error::invalid(
                Code::WrongShape,
                "out",
                format!("{} values", out.len()),
                format!("{} x {} values", self.num_layers, self.num_experts),
                "",
            ));
        }
        self.record.uncertainty(&self.estimate, out);
        Ok(())
    }

    /// By which estimator each layer is estimated.
    pub fn chosen(&self) -> impl ExactSizeIterator<Item = Estimator> {
        let predictors = &self.predictors;
        self.chosen.iter().map(|&one| predictors[one].estimator())
    }

    fn require_windows(&self) -> Result<()> {
        if self.num_windows > 0 {
            return Ok(());
        }
        Err(Error::invalid(
            Code::TooSmall,
            "windows",
            "none so far",
            "at least 1",
            "observe one first",
        ))
    }
}

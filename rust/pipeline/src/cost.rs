//! What instructions and links cost.

use crate::error::{Error, Result};
use crate::schedule::Layout;

/// A figure for every link between two ranks.
#[derive(Clone, Debug, PartialEq)]
pub enum Links {
    /// The same for all.
    Uniform(f64),
    /// One for each, `[from * num_ranks + to]`.
    Each(Vec<f64>),
}

impl Links {
    #[inline]
    pub(crate) fn between(&self, num_ranks: usize, from: usize, to: usize) -> f64 {
        match self {
            Self::Uniform(figure) => *figure,
            Self::Each(figures) => figures[from * num_ranks + to],
        }
    }

    fn check(&self, argument: &'static str, num_ranks: usize, zero_is_fine: bool) -> Result<()> {
        let figures = match self {
            Self::Uniform(figure) => std::slice::from_ref(figure),
            Self::Each(figures) => {
                lengths(
                    argument,
                    figures.len(),
                    num_ranks * num_ranks,
                    "[num_ranks, num_ranks]",
                )?;
                figures
            }
        };
        let bad = figures
            .iter()
            .find(|&&figure| !(figure > 0.0 || (zero_is_fine && figure == 0.0)));
        match bad {
            None => Ok(()),
            Some(figure) => Err(Error::input(
                "negative_time",
                argument,
                figure,
                if zero_is_fine {
                    "0 or more"
                } else {
                    "more than 0"
                },
                "leave it out for a link that costs nothing",
            )),
        }
    }
}

/// How long instructions take and what links cost. Times are in any one unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// F of every stage, `[num_stages]`.
    pub forward: Vec<f64>,
    /// B of every stage, `[num_stages]`.
    pub backward: Vec<f64>,
    /// I of every stage, `[num_stages]`.
    pub backward_input: Vec<f64>,
    /// W of every stage, `[num_stages]`.
    pub backward_weight: Vec<f64>,
    /// How much slower each rank is, `[num_ranks]`; every time on it is multiplied by this.
    pub rank_factor: Vec<f64>,
    /// What an overlapped pair takes, as a part of its forward and backward one after the other.
    pub overlap_factor: f64,
    /// Or what it takes outright, by the stage of its forward, `[num_stages]`.
    pub pair: Option<Vec<f64>>,
    /// Time from a message's last byte leaving to its being there.
    pub latency: Links,
    /// Bytes a unit of time.
    pub bandwidth: Links,
    /// One stage's output for one micro-batch, in bytes, `[num_stages]`.
    pub message_bytes: Vec<f64>,
}

impl Costs {
    /// The same times for every stage, B = I + W, free links.
    #[must_use]
    pub fn uniform(layout: &Layout, forward: f64, input: f64, weight: f64) -> Self {
        let stages = layout.num_stages();
        Self {
            forward: vec![forward; stages],
            backward: vec![input + weight; stages],
            backward_input: vec![input; stages],
            backward_weight: vec![weight; stages],
            rank_factor: vec![1.0; layout.num_ranks()],
            overlap_factor: 1.0,
            pair: None,
            latency: Links::Uniform(0.0),
            bandwidth: Links::Uniform(f64::INFINITY),
            message_bytes: vec![0.0; stages],
        }
    }

    /// # Errors
    ///
    /// [`Error::Input`] when a time is negative or not a number, or there are too few or too many.
    pub(crate) fn check(&self, layout: &Layout) -> Result<()> {
        let (stages, ranks) = (layout.num_stages(), layout.num_ranks());
        let per_stage = [
            ("forward", &self.forward),
            ("backward", &self.backward),
            ("backward_input", &self.backward_input),
            ("backward_weight", &self.backward_weight),
            ("message_bytes", &self.message_bytes),
        ];
        for (argument, times) in per_stage {
            lengths(argument, times.len(), stages, "[num_stages]")?;
            not_negative(argument, times)?;
        }
        if let Some(pair) = &self.pair {
            lengths("pair", pair.len(), stages, "[num_stages]")?;
            not_negative("pair", pair)?;
        }
        lengths("rank_factor", self.rank_factor.len(), ranks, "[num_ranks]")?;
        not_negative("rank_factor", &self.rank_factor)?;
        not_negative("overlap_factor", &[self.overlap_factor])?;
        self.latency.check("latency", ranks, true)?;
        self.bandwidth.check("bandwidth", ranks, false)
    }
}

fn lengths(argument: &'static str, got: usize, expected: usize, shape: &str) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::input(
        "length",
        argument,
        format!("{got} figures"),
        format!("{expected} figures"),
        format!("its shape is {shape}"),
    ))
}

fn not_negative(argument: &'static str, figures: &[f64]) -> Result<()> {
    match figures
        .iter()
        .position(|&figure| !(figure >= 0.0 && figure.is_finite()))
    {
        None => Ok(()),
        Some(at) => Err(Error::input(
            "negative_time",
            argument,
            format!("{} at {at}", figures[at]),
            "0 or more, and finite",
            "check the measurement",
        )),
    }
}

//! Planning one layer in microseconds, from the exact load of this micro-batch.
//!
//! Experts keep their home slots; each rank has a few spare slots that are filled anew each time.
//! See [`StepPlanner`].

mod relieve;
mod sources;

use crate::error::{Code, Error, Result, require_length, require_positive};
use crate::load::MAX_EXPERTS;
use relieve::Relief;

pub use sources::Count;

/// The most ranks a [`StepPlanner`] takes.
pub const MAX_RANKS: usize = 1 << relieve::RANK_BITS;

/// The most tokens a layer may have in all.
pub const MAX_STEP_TOKENS: i64 = 1 << 50;

/// The most spare slots, over all ranks.
pub const MAX_SPARE_SLOTS: usize = 1 << 14;

/// What a plan may use. The default allows all there is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// The imbalance, largest over mean rank load, at which more copies are not worth it. At least
    /// 1; the default, 1, asks for the least there is.
    pub target_imbalance: f64,
    /// The most copies in all.
    pub max_copies: usize,
    /// The most copies of the experts of one home rank.
    pub max_out: usize,
    /// The most copies into one rank, spare slots permitting.
    pub max_in: usize,
    /// The fewest tokens that a copy is worth.
    pub min_tokens: i64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            target_imbalance: 1.0,
            max_copies: usize::MAX,
            max_out: usize::MAX,
            max_in: usize::MAX,
            min_tokens: 1,
        }
    }
}

/// Where a plan is written, for D ranks with S spare slots each.
#[derive(Debug)]
pub struct StepMut<'a, T> {
    /// The expert that is copied into each spare slot, `[D, S]`; -1 where none is.
    pub experts: &'a mut [i64],
    /// How many tokens that copy takes, `[D, S]`; its home takes what is left.
    pub tokens: &'a mut [i64],
    /// How many of them come from each source rank, `[D, S, D]`, or `None`. Needs a load by
    /// source.
    pub by_source: Option<&'a mut [T]>,
}

/// What a plan achieves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// The largest number of tokens on a rank.
    pub level: i64,
    /// All tokens.
    pub total: i64,
    /// How many copies are made.
    pub num_copies: usize,
}

/// Plans one layer of experts that keep their home slots: which expert is copied into which spare
/// slot, and how many tokens each copy takes.
///
/// Expert `e` is at home on rank `e / home_slots`. The largest rank load is made as small as the
/// search finds, with few copies; see `relieve.rs` for how, and [`Limits`] for what it may use.
/// Nothing is allocated after [`new`](Self::new). The same input gives the same bytes everywhere.
///
/// # Cost
/// A few rounds of O(copies x ranks), 12 at most: see `benches/results`.
///
/// # Source
/// The setting is UltraEP's (2026): home slots, spare slots refilled for each layer and
/// micro-batch, quotas by source rank with a rank's own copy first.
#[derive(Debug, Clone)]
pub struct StepPlanner {
    num_ranks: usize,
    home_slots: usize,
    spare_slots: usize,
    limits: Limits,
    /// Tokens of each expert, `[E]`.
    totals: Vec<i64>,
    /// Tokens of each rank's experts, `[D]`.
    base: Vec<i64>,
    relief: Relief,
    sources: sources::Scratch,
}

/// The most rounds of the search for the least level, the last one to save copies included: so
/// many, or, where limits leave the best found more than 1/32 above what may be possible, so many.
const ROUNDS: usize = 5;
const FAR_ROUNDS: usize = 12;

impl StepPlanner {
    /// A planner for ranks with so many home and spare slots each.
    ///
    /// # Errors
    /// [`Code::NotPositive`] for a zero or `limits.min_tokens` below 1, [`Code::TooLarge`] beyond
    /// [`MAX_RANKS`] ranks, [`MAX_SPARE_SLOTS`] or [`MAX_EXPERTS`] experts,
    /// [`Code::OutOfRange`] for a target that is no number of at least 1.
    pub fn new(
        num_ranks: usize,
        home_slots: usize,
        spare_slots: usize,
        limits: Limits,
    ) -> Result<Self> {
        require_positive("num_ranks", num_ranks)?;
        require_positive("home_slots", home_slots)?;
        require_positive("spare_slots", spare_slots)?;
        if num_ranks > MAX_RANKS {
            let expected = format!("at most {MAX_RANKS}");
            return Err(Error::invalid(
                Code::TooLarge,
                "num_ranks",
                num_ranks,
                expected,
                "",
            ));
        }
        for (argument, slots, most) in [
            ("home_slots", home_slots, MAX_EXPERTS),
            ("spare_slots", spare_slots, MAX_SPARE_SLOTS),
        ] {
            if slots > most / num_ranks {
                let expected = format!("at most {} on {num_ranks} ranks", most / num_ranks);
                return Err(Error::invalid(
                    Code::TooLarge,
                    argument,
                    slots,
                    expected,
                    "",
                ));
            }
        }
        if !(1.0..=f64::MAX).contains(&limits.target_imbalance) {
            return Err(Error::invalid(
                Code::OutOfRange,
                "target_imbalance",
                limits.target_imbalance,
                "a number of at least 1",
                "it is the largest rank load over the mean",
            ));
        }
        if limits.min_tokens < 1 {
            return Err(Error::invalid(
                Code::NotPositive,
                "min_tokens",
                limits.min_tokens,
                "at least 1",
                "a copy that takes no tokens serves nothing",
            ));
        }
        Ok(Self {
            num_ranks,
            home_slots,
            spare_slots,
            limits,
            totals: vec![0; num_ranks * home_slots],
            base: vec![0; num_ranks],
            relief: Relief::with_capacity(num_ranks, home_slots, spare_slots),
            sources: sources::Scratch::with_capacity(
                num_ranks,
                num_ranks * home_slots,
                num_ranks * spare_slots,
            ),
        })
    }

    /// How many ranks there are (D).
    #[must_use]
    pub fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    /// How many experts there are (E), at home in `home_slots` slots on each rank.
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.num_ranks * self.home_slots
    }

    /// How many experts each rank is home to.
    #[must_use]
    pub fn home_slots(&self) -> usize {
        self.home_slots
    }

    /// How many spare slots each rank has (S).
    #[must_use]
    pub fn spare_slots(&self) -> usize {
        self.spare_slots
    }

    /// What plans may use.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Plans a load, tokens by expert `[E]` or by source rank and expert `[D, E]`, and writes the
    /// plan into buffers.
    ///
    /// # Errors
    /// [`Code::WrongShape`] for the load or a buffer, [`Code::Inconsistent`] if quotas by source
    /// are asked for of a load that is not by source, [`Code::Negative`] or [`Code::TooLarge`] for
    /// tokens. The buffers are then as they were.
    pub fn plan_step<T: Count>(&mut self, load: &[T], out: &mut StepMut<'_, T>) -> Result<Step> {
        let (ranks, experts) = (self.num_ranks, self.num_experts());
        let spare = ranks * self.spare_slots;
        let by_source = load.len() == ranks * experts;
        if !by_source && load.len() != experts {
            return Err(Error::invalid(
                Code::WrongShape,
                "load",
                format!("{} values", load.len()),
                format!("{experts} values, or {ranks} x {experts}"),
                "a number of tokens for each expert, or for each source rank and expert",
            ));
        }
        require_length("experts", out.experts.len(), spare)?;
        require_length("tokens", out.tokens.len(), spare)?;
        if let Some(buffer) = &out.by_source {
            require_length("by_source", buffer.len(), spare * ranks)?;
            if !by_source {
                return Err(Error::invalid(
                    Code::Inconsistent,
                    "by_source",
                    "a buffer",
                    "None for a load by expert alone",
                    "give a load [source rank, expert]",
                ));
            }
        }
        let total = sources::add_up(load, &mut self.totals)?;
        for (base, experts) in self
            .base
            .iter_mut()
            .zip(self.totals.chunks_exact(self.home_slots))
        {
            *base = experts.iter().sum();
        }
        let level = self
            .relief
            .search(&self.base, &self.totals, total, &self.limits);
        let copies = self.relief.plan();
        out.experts.fill(-1);
        out.tokens.fill(0);
        for copy in copies {
            out.experts[copy.slot as usize] = copy.expert.into();
            out.tokens[copy.slot as usize] = copy.tokens;
        }
        if let Some(buffer) = &mut out.by_source {
            self.sources.split(load, copies, buffer);
        }
        Ok(Step {
            level,
            total,
            num_copies: copies.len(),
        })
    }
}

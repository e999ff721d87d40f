//! Every schedule of the field, one idea a file.
//!
//! A generator fixes the compute order; [`place_transfers`](crate::place_transfers) then
//! places what moves between ranks. Both together take 7 to 10 ms for DualPipeV on 64 ranks with
//! 512 micro-batches.

mod chimera;
mod dualpipe;
mod dualpipev;
mod gpipe;
mod interleaved;
mod one_f_one_b;
mod order;
mod v_blocks;
mod zbv;
mod zero_bubble;

use crate::error::{Error, Result};
use crate::schedule::Schedule;
use crate::transfers::place_checked;

/// The V and DualPipe orders unfold over 2P micro-batches of 2P stages: this bounds their memory.
const MOST_RANKS: usize = 2048;

/// A schedule of the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Method {
    /// All forwards, then all backwards (GPipe, arXiv 1811.06965).
    GPipe,
    /// GPipe over several stages a rank, stage by stage (breadth-first, arXiv 2211.05953).
    LoopedBfs,
    /// One forward, one backward (PipeDream-Flush, arXiv 2006.09503).
    OneFOneB,
    /// 1F1B over several stages a rank (Megatron-LM, arXiv 2104.04473).
    Interleaved1F1B,
    /// The same with split backwards, whose weight parts fill the gaps (arXiv 2401.10241).
    InterleavedZeroBubble,
    /// Zero bubble at 1F1B's memory (ZB-H1 of arXiv 2401.10241; the DualPipe table's ZB1P).
    ZbH1,
    /// Zero bubble at twice the memory (ZB-H2 of arXiv 2401.10241).
    ZbH2,
    /// Zero bubble on a V of two stages a rank, at 1F1B's memory (arXiv 2405.15362).
    Zbv,
    /// The V with half of 1F1B's memory (arXiv 2405.15362).
    VHalf,
    /// The V with a third of 1F1B's memory (arXiv 2405.15362).
    VMin,
    /// Two opposite pipelines of two weight copies (arXiv 2107.06925).
    Chimera,
    /// Two opposite pipelines whose forwards and backwards overlap (DeepSeek-V3, arXiv 2412.19437).
    DualPipe,
    /// DualPipe folded into a V, with one copy of the weights.
    DualPipeV,
}

impl Method {
    /// Every method, in declaration order.
    pub const ALL: [Self; 13] = [
        Self::GPipe,
        Self::LoopedBfs,
        Self::OneFOneB,
        Self::Interleaved1F1B,
        Self::InterleavedZeroBubble,
        Self::ZbH1,
        Self::ZbH2,
        Self::Zbv,
        Self::VHalf,
        Self::VMin,
        Self::Chimera,
        Self::DualPipe,
        Self::DualPipeV,
    ];

    /// The name by which Python, the command line and files know it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::GPipe => "gpipe",
            Self::LoopedBfs => "looped_bfs",
            Self::OneFOneB => "1f1b",
            Self::Interleaved1F1B => "interleaved_1f1b",
            Self::InterleavedZeroBubble => "interleaved_zero_bubble",
            Self::ZbH1 => "zb_h1",
            Self::ZbH2 => "zb_h2",
            Self::Zbv => "zbv",
            Self::VHalf => "v_half",
            Self::VMin => "v_min",
            Self::Chimera => "chimera",
            Self::DualPipe => "dualpipe",
            Self::DualPipeV => "dualpipev",
        }
    }

    /// The method of a name. Case and punctuation are free, `zb1p` is ZB-H1.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] with the names there are.
    pub fn from_name(name: &str) -> Result<Self> {
        let plain = |text: &str| -> String {
            text.chars()
                .filter(char::is_ascii_alphanumeric)
                .map(|c| c.to_ascii_lowercase())
                .collect()
        };
        let wanted = match plain(name).as_str() {
            "zb1p" => "zbh1".to_owned(),
            "bfs" | "loopedbreadthfirst" => "loopedbfs".to_owned(),
            "zbvzerobubble" => "zbv".to_owned(),
            other => other.to_owned(),
        };
        Self::ALL
            .into_iter()
            .find(|method| plain(method.name()) == wanted)
            .ok_or_else(|| {
                let names: Vec<_> = Self::ALL.iter().map(|method| method.name()).collect();
                Error::input(
                    "unknown_method",
                    "method",
                    format!("{name:?}"),
                    "a schedule that can be generated",
                    format!("known: {}", names.join(", ")),
                )
            })
    }

    /// How many stages of one copy a rank holds when nothing else is asked for.
    #[must_use]
    pub const fn default_stages_per_rank(self) -> usize {
        match self {
            Self::LoopedBfs
            | Self::Interleaved1F1B
            | Self::InterleavedZeroBubble
            | Self::Zbv
            | Self::VHalf
            | Self::VMin
            | Self::DualPipeV => 2,
            _ => 1,
        }
    }

    /// Whether the number of stages a rank holds may be chosen.
    #[must_use]
    pub const fn takes_stages_per_rank(self) -> bool {
        matches!(
            self,
            Self::LoopedBfs | Self::Interleaved1F1B | Self::InterleavedZeroBubble
        )
    }

    /// Whether every stage lives on two ranks.
    #[must_use]
    pub const fn is_bidirectional(self) -> bool {
        matches!(self, Self::Chimera | Self::DualPipe)
    }
}

/// What to generate.
///
/// ```
/// use pipeline::{Method, Request};
/// let schedule = Request::new(Method::DualPipe, 8, 20).generate()?;
/// assert_eq!(schedule.layout().num_copies(), 2);
/// # Ok::<(), pipeline::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The schedule's idea.
    pub method: Method,
    /// How many ranks, P.
    pub num_ranks: usize,
    /// How many micro-batches a step has, both directions together.
    pub num_micro_batches: u32,
    /// Stages a rank holds (of each copy); `None` for the method's own number.
    pub stages_per_rank: Option<usize>,
    /// Forwards only, for inference.
    pub forward_only: bool,
}

impl Request {
    /// A training schedule with the method's own number of stages a rank.
    #[must_use]
    pub const fn new(method: Method, num_ranks: usize, num_micro_batches: u32) -> Self {
        Self {
            method,
            num_ranks,
            num_micro_batches,
            stages_per_rank: None,
            forward_only: false,
        }
    }

    /// The schedule with its transfers placed. O(instructions).
    ///
    /// # Errors
    ///
    /// As [`order`](Self::order).
    pub fn generate(&self) -> Result<Schedule> {
        place_checked(&self.order()?)
    }

    /// The compute order alone. O(instructions).
    ///
    /// # Errors
    ///
    /// [`Error::Input`] when a count is zero or too large, the ranks are odd where the idea needs
    /// two halves, or the number of stages a rank holds is not the method's to choose.
    pub fn order(&self) -> Result<Schedule> {
        self.check()?;
        let (p, m) = (self.num_ranks, self.num_micro_batches);
        let v = self
            .stages_per_rank
            .unwrap_or(self.method.default_stages_per_rank());
        let order = match self.method {
            Method::GPipe => gpipe::gpipe(p, m),
            Method::LoopedBfs => gpipe::looped_bfs(p, m, v),
            Method::OneFOneB => one_f_one_b::one_f_one_b(p, m),
            Method::Interleaved1F1B => interleaved::interleaved_1f1b(p, m, v),
            Method::InterleavedZeroBubble => interleaved::interleaved_zero_bubble(p, m, v),
            Method::ZbH1 => zero_bubble::zb_h1(p, m),
            Method::ZbH2 => zero_bubble::zb_h2(p, m),
            Method::Zbv => zbv::zbv(p, m),
            Method::VHalf => v_blocks::v_half(p, m),
            Method::VMin => v_blocks::v_min(p, m),
            Method::Chimera => chimera::chimera(p, m),
            Method::DualPipe => dualpipe::dualpipe(p, m),
            Method::DualPipeV => dualpipev::dualpipev(p, m),
        }?;
        Ok(if self.forward_only {
            order.forward_only()
        } else {
            order
        })
    }

    fn check(&self) -> Result<()> {
        let Self {
            method,
            num_ranks,
            num_micro_batches,
            stages_per_rank,
            ..
        } = *self;
        if num_ranks == 0 || num_ranks > MOST_RANKS {
            return Err(Error::input(
                "num_ranks",
                "num_ranks",
                num_ranks,
                format!("1 to {MOST_RANKS}"),
                "a pipeline has at least one rank, and beyond that many the time of one micro-batch is lost",
            ));
        }
        if num_micro_batches == 0 {
            return Err(Error::input(
                "num_micro_batches",
                "num_micro_batches",
                num_micro_batches,
                "at least 1",
                "a step runs at least one micro-batch",
            ));
        }
        if method.is_bidirectional() && num_ranks % 2 == 1 {
            return Err(Error::input(
                "odd_ranks",
                "num_ranks",
                num_ranks,
                format!("even for {}", method.name()),
                format!(
                    "its two directions mirror each other; nearest: {}{}{}",
                    if num_ranks > 1 {
                        (num_ranks - 1).to_string()
                    } else {
                        String::new()
                    },
                    if num_ranks > 1 { ", " } else { "" },
                    num_ranks + 1
                ),
            ));
        }
        let fixed = method.default_stages_per_rank();
        match stages_per_rank {
            Some(0) => Err(Error::input(
                "stages_per_rank",
                "stages_per_rank",
                0,
                "at least 1",
                "leave it out for the method's own number",
            )),
            Some(v) if v != fixed && !method.takes_stages_per_rank() => Err(Error::input(
                "stages_per_rank",
                "stages_per_rank",
                v,
                format!("{fixed} for {}", method.name()),
                "looped_bfs, interleaved_1f1b and interleaved_zero_bubble take any number",
            )),
            _ => Ok(()),
        }
    }
}

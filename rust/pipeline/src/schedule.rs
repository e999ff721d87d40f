//! Where stages live, and what every rank does in which order.

use crate::error::{Error, Result};
use crate::op::{Kind, Op};

/// At most this many (stage, copy, micro-batch) triples: a schedule beyond it is a typing error.
const MOST_SLOTS: u64 = 1 << 24;

/// Where each copy of each stage lives, and how many micro-batches each copy sees.
///
/// A stage may live on several ranks (DualPipe, Chimera): copy `c` of every stage together forms
/// one whole pipeline, and `micro_batches(c)` micro-batches travel through it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    num_ranks: usize,
    num_stages: usize,
    /// `[copy * num_stages + stage]`
    ranks: Vec<u32>,
    micro_batches: Vec<u32>,
    /// Where the slots of a copy begin.
    slot_bases: Vec<usize>,
}

impl Layout {
    /// A layout from the rank of every stage, copy by copy, and the micro-batches of every copy.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] when a count is zero or too large, a rank does not exist or holds no
    /// stage, or two copies of a stage share a rank.
    pub fn new(
        num_ranks: usize,
        num_stages: usize,
        ranks: Vec<u32>,
        micro_batches: Vec<u32>,
    ) -> Result<Self> {
        let refuse = |argument, got: String, expected: String| {
            Err(Error::input(
                "layout",
                argument,
                got,
                expected,
                "every rank holds at least one stage and every stage has one rank per copy",
            ))
        };
        if num_ranks == 0 || num_ranks > usize::from(u16::MAX) {
            return refuse("num_ranks", num_ranks.to_string(), "1 to 65535".into());
        }
        if num_stages == 0 || num_stages > usize::from(u16::MAX) {
            return refuse("num_stages", num_stages.to_string(), "1 to 65535".into());
        }
        let copies = micro_batches.len();
        if copies == 0 || copies > usize::from(u8::MAX) {
            return refuse(
                "micro_batches",
                format!("{copies} copies"),
                "1 to 255 copies".into(),
            );
        }
        if ranks.len() != copies * num_stages {
            return refuse(
                "placement",
                format!("{} ranks", ranks.len()),
                format!("{copies} copies x {num_stages} stages"),
            );
        }
        let total: u64 = micro_batches.iter().map(|&m| u64::from(m)).sum();
        if total == 0 {
            return refuse("micro_batches", "0".into(), "at least 1".into());
        }
        if total * num_stages as u64 > MOST_SLOTS {
            return refuse(
                "micro_batches",
                total.to_string(),
                format!(
                    "at most {} for {num_stages} stages",
                    MOST_SLOTS / num_stages as u64
                ),
            );
        }
        let mut holds_any = vec![false; num_ranks];
        for (index, &rank) in ranks.iter().enumerate() {
            let stage = index % num_stages;
            let Some(held) = holds_any.get_mut(rank as usize) else {
                return refuse(
                    "placement",
                    format!("rank {rank} for stage {stage}"),
                    format!("a rank below {num_ranks}"),
                );
            };
            *held = true;
            let earlier =
                (0..index / num_stages).any(|copy| ranks[copy * num_stages + stage] == rank);
            if earlier {
                return refuse(
                    "placement",
                    format!("two copies of stage {stage} on rank {rank}"),
                    "different ranks for the copies of a stage".into(),
                );
            }
        }
        if let Some(idle) = holds_any.iter().position(|held| !held) {
            return refuse(
                "placement",
                format!("rank {idle} holds no stage"),
                "at least one stage on every rank".into(),
            );
        }
        let mut slot_bases = Vec::with_capacity(copies + 1);
        let mut base = 0;
        for &m in &micro_batches {
            slot_bases.push(base);
            base += num_stages * m as usize;
        }
        slot_bases.push(base);
        Ok(Self {
            num_ranks,
            num_stages,
            ranks,
            micro_batches,
            slot_bases,
        })
    }

    /// How many ranks work.
    #[must_use]
    #[inline]
    pub fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    /// How many stages the model is cut into, copies not counted.
    #[must_use]
    #[inline]
    pub fn num_stages(&self) -> usize {
        self.num_stages
    }

    /// How many copies every stage has.
    #[must_use]
    #[inline]
    pub fn num_copies(&self) -> usize {
        self.micro_batches.len()
    }

    /// The micro-batches of one copy.
    #[must_use]
    #[inline]
    pub fn micro_batches(&self, copy: u8) -> u32 {
        self.micro_batches[usize::from(copy)]
    }

    /// The micro-batches of all copies together.
    #[must_use]
    pub fn num_micro_batches(&self) -> u32 {
        self.micro_batches.iter().sum()
    }

    /// The rank that holds a copy of a stage.
    #[must_use]
    #[inline]
    pub fn rank_of(&self, copy: u8, stage: u16) -> usize {
        self.ranks[usize::from(copy) * self.num_stages + usize::from(stage)] as usize
    }

    /// The rank of every stage, copy by copy.
    #[must_use]
    pub fn placement(&self) -> &[u32] {
        &self.ranks
    }

    /// The copies of stages that a rank holds, by copy, then by stage.
    pub fn stages_of(&self, rank: usize) -> impl Iterator<Item = (u8, u16)> + '_ {
        self.ranks
            .iter()
            .enumerate()
            .filter(move |&(_, &holder)| holder as usize == rank)
            .map(|(index, _)| {
                // The constructor bounds both counts, so neither conversion truncates.
                (
                    (index / self.num_stages) as u8,
                    (index % self.num_stages) as u16,
                )
            })
    }

    /// How many (copy, stage, micro-batch) triples there are.
    #[must_use]
    #[inline]
    pub fn num_slots(&self) -> usize {
        self.slot_bases[self.micro_batches.len()]
    }

    /// The number of the triple that an instruction names, below [`num_slots`](Self::num_slots).
    ///
    /// The same micro-batch one stage on is [`slot_step`](Self::slot_step) further.
    #[must_use]
    #[inline]
    pub fn slot(&self, op: Op) -> usize {
        let copy = usize::from(op.copy);
        self.slot_bases[copy]
            + usize::from(op.stage) * self.micro_batches[copy] as usize
            + op.micro_batch as usize
    }

    /// How far apart the slots of neighbouring stages are.
    #[must_use]
    #[inline]
    pub fn slot_step(&self, copy: u8) -> usize {
        self.micro_batches[usize::from(copy)] as usize
    }

    /// Whether an instruction names a copy, stage and micro-batch that exist.
    #[must_use]
    pub fn names(&self, op: Op) -> bool {
        usize::from(op.copy) < self.num_copies()
            && usize::from(op.stage) < self.num_stages
            && if op.kind.has_micro_batch() {
                op.micro_batch < self.micro_batches(op.copy)
            } else {
                op.micro_batch == 0
            }
    }

    /// Where the activation of a stage goes: the rank of the next one, `None` after the last.
    #[must_use]
    #[inline]
    pub fn next_rank(&self, copy: u8, stage: u16) -> Option<usize> {
        (usize::from(stage) + 1 < self.num_stages).then(|| self.rank_of(copy, stage + 1))
    }

    /// Where the gradient of a stage goes: the rank of the previous one, `None` before the first.
    #[must_use]
    #[inline]
    pub fn previous_rank(&self, copy: u8, stage: u16) -> Option<usize> {
        (stage > 0).then(|| self.rank_of(copy, stage - 1))
    }
}

/// The instruction stream of every rank, in one flat buffer.
///
/// A value of this type is well formed: every instruction names a copy, stage and micro-batch
/// that exist, and overlapped pairs stand whole. Whether the schedule is *right* is what
/// [`verify`](crate::verify::verify) proves; the streams that [`Request`](crate::Request) makes are.
///
/// ```
/// use pipeline::{Method, Request, Schedule};
/// let schedule = Request::new(Method::OneFOneB, 2, 2).generate()?;
/// let last = schedule.text().lines().last().map(str::to_owned);
/// assert_eq!(last.as_deref(), Some("rank 1: <1f0 <1f1 1F0 1B0 1b0> 1F1 1B1 1b1> 1b0! 1b1!"));
/// assert_eq!(Schedule::parse(&schedule.text())?, schedule);
/// # Ok::<(), pipeline::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    name: String,
    layout: Layout,
    starts: Vec<usize>,
    ops: Vec<Op>,
    has_backward: bool,
    has_transfers: bool,
}

impl Schedule {
    /// A schedule from flat streams: rank `r` runs `ops[starts[r]..starts[r + 1]]`.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] when the name cannot stand in a line, `starts` does not cut `ops` into one stream per rank, an instruction
    /// names something that does not exist, or an overlapped pair is torn.
    pub fn new(
        name: impl Into<String>,
        layout: Layout,
        starts: Vec<usize>,
        ops: Vec<Op>,
    ) -> Result<Self> {
        let name = name.into();
        let prints = !name.contains(|c: char| c.is_control() || c == '#');
        if name.is_empty() || name.trim() != name || !prints {
            return Err(Error::input(
                "name",
                "name",
                format!("{name:?}"),
                "a name without line breaks, `#`, or blanks around it",
                "it stands in the first line of the schedule's text",
            ));
        }
        let cuts_well = starts.len() == layout.num_ranks() + 1
            && starts.first() == Some(&0)
            && starts.last() == Some(&ops.len())
            && starts.is_sorted();
        if !cuts_well {
            return Err(Error::input(
                "streams",
                "starts",
                format!("{} bounds", starts.len()),
                format!(
                    "{} ascending bounds from 0 to {}",
                    layout.num_ranks() + 1,
                    ops.len()
                ),
                "give one stream for every rank",
            ));
        }
        for rank in 0..layout.num_ranks() {
            let stream = &ops[starts[rank]..starts[rank + 1]];
            for (index, &op) in stream.iter().enumerate() {
                if !layout.names(op) {
                    return Err(Error::input(
                        "unknown_place",
                        "ops",
                        format!("{op} at rank {rank}, instruction {index}"),
                        format!(
                            "an instruction for one of {} stages, {} copies and the copy's micro-batches",
                            layout.num_stages(),
                            layout.num_copies()
                        ),
                        "check stage, copy and micro-batch",
                    ));
                }
                let torn = match op.kind {
                    Kind::OverlapForward => {
                        stream.get(index + 1).map(|next| next.kind) != Some(Kind::OverlapBackward)
                    }
                    Kind::OverlapBackward => {
                        index == 0 || stream[index - 1].kind != Kind::OverlapForward
                    }
                    _ => false,
                };
                if torn {
                    return Err(Error::input(
                        "torn_pair",
                        "ops",
                        format!("{op} at rank {rank}, instruction {index}"),
                        "half of a whole pair",
                        "an overlapped pair is its forward and, directly after it, its backward",
                    ));
                }
            }
        }
        Ok(Self::from_parts(name, layout, starts, ops))
    }

    /// For the generators, whose streams are well formed by construction.
    pub(crate) fn from_parts(
        name: String,
        layout: Layout,
        starts: Vec<usize>,
        ops: Vec<Op>,
    ) -> Self {
        let mut has_backward = false;
        let mut has_transfers = false;
        for op in &ops {
            has_backward |= op.kind.is_compute() & !op.kind.is_forward();
            has_transfers |= op.kind.is_transfer();
        }
        Self {
            name,
            layout,
            starts,
            ops,
            has_backward,
            has_transfers,
        }
    }

    /// What the schedule is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where stages live.
    #[must_use]
    #[inline]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The stream of one rank.
    #[must_use]
    #[inline]
    pub fn stream(&self, rank: usize) -> &[Op] {
        &self.ops[self.starts[rank]..self.starts[rank + 1]]
    }

    /// All streams, one after the other.
    #[must_use]
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Where each rank's stream begins in [`ops`](Self::ops), and the end.
    #[must_use]
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// Whether there is any backward; without one it is an inference schedule.
    #[must_use]
    #[inline]
    pub fn has_backward(&self) -> bool {
        self.has_backward
    }

    /// Whether transfers are in the streams; without them only the compute order is fixed.
    #[must_use]
    #[inline]
    pub fn has_transfers(&self) -> bool {
        self.has_transfers
    }

    /// Whether any two neighbouring stages of a copy live on different ranks.
    #[must_use]
    pub fn needs_transfers(&self) -> bool {
        self.layout.num_ranks() > 1
    }

    /// The compute order alone: transfers, waits and reductions left out.
    #[must_use]
    pub fn compute_only(&self) -> Self {
        self.filtered(|op| op.kind.is_compute())
    }

    /// The forwards alone, in their order, for inference. Transfers are left out: place them anew.
    #[must_use]
    pub fn forward_only(&self) -> Self {
        let mut schedule = self.filtered(|op| op.kind.is_forward());
        for op in &mut schedule.ops {
            op.kind = Kind::Forward;
        }
        schedule
    }

    fn filtered(&self, keep: impl Fn(Op) -> bool) -> Self {
        let mut ops = Vec::with_capacity(self.ops.len());
        let mut starts = Vec::with_capacity(self.starts.len());
        starts.push(0);
        for rank in 0..self.layout.num_ranks() {
            ops.extend(self.stream(rank).iter().copied().filter(|&op| keep(op)));
            starts.push(ops.len());
        }
        Self::from_parts(self.name.clone(), self.layout.clone(), starts, ops)
    }
}

//! A counter-example, and how it is shown.

use std::fmt;
use std::fmt::Write as _;

use super::Transport;
use crate::op::Op;
use crate::schedule::Schedule;

/// The rules that a schedule is held to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// An instruction runs where its stage does not live.
    Placement,
    /// Something is done twice.
    Twice,
    /// Something is not done.
    Missing,
    /// Something runs before its input is there.
    Order,
    /// A transfer has no counterpart, or moves what need not move.
    Pairing,
    /// Sends and receives of a pair of ranks disagree on the order.
    MessageOrder,
    /// Ranks wait for one another in a circle.
    Deadlock,
    /// Gradients of a stage's copies are not reduced, or in disagreeing order.
    Reduction,
    /// A rank holds more than it may.
    Memory,
}

impl Rule {
    /// A stable short name.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Placement => "placement",
            Self::Twice => "twice",
            Self::Missing => "missing",
            Self::Order => "order",
            Self::Pairing => "pairing",
            Self::MessageOrder => "message_order",
            Self::Deadlock => "deadlock",
            Self::Reduction => "reduction",
            Self::Memory => "memory",
        }
    }
}

/// One rank that cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// The rank.
    pub rank: usize,
    /// Its instruction, counted in its stream.
    pub index: usize,
    /// That instruction.
    pub op: Op,
    /// The rank that it waits for.
    pub waits_for: usize,
}

/// A rule broken, at one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which rule.
    pub rule: Rule,
    /// On which rank.
    pub rank: usize,
    /// At which instruction of the rank's stream; its length where something is missing at the end.
    pub index: usize,
    /// That instruction, where there is one.
    pub op: Option<Op>,
    /// What is wrong and how to mend it, in a sentence.
    pub message: String,
    /// The transport under which it is wrong, where it is not wrong under all.
    pub transport: Option<Transport>,
    /// Who waits for whom, a circle where ranks wait for one another.
    pub waits: Vec<Wait>,
    /// The neighbourhood, with the cell marked.
    pub grid: String,
}

impl Violation {
    pub(super) fn at(
        schedule: &Schedule,
        rule: Rule,
        rank: usize,
        index: usize,
        message: String,
    ) -> Self {
        Self {
            rule,
            rank,
            index,
            op: schedule.stream(rank).get(index).copied(),
            message,
            transport: None,
            waits: Vec::new(),
            grid: grid(schedule, &[(rank, index)]),
        }
    }

    /// Shows another cell too.
    pub(super) fn with_other(mut self, schedule: &Schedule, rank: usize, index: usize) -> Self {
        self.grid = grid(schedule, &[(self.rank, self.index), (rank, index)]);
        self
    }

    pub(super) fn with_waits(mut self, schedule: &Schedule, waits: Vec<Wait>) -> Self {
        let cells: Vec<_> = waits.iter().map(|wait| (wait.rank, wait.index)).collect();
        if !cells.is_empty() {
            self.grid = grid(schedule, &cells);
        }
        self.waits = waits;
        self
    }

    pub(super) fn under(mut self, transport: Transport) -> Self {
        self.transport = Some(transport);
        self
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: rank {}, instruction {}",
            self.rule.code(),
            self.rank,
            self.index
        )?;
        if let Some(op) = self.op {
            write!(f, " ({op})")?;
        }
        write!(f, ": {}", self.message)?;
        if let Some(transport) = self.transport {
            write!(f, " [transport: {}]", transport.name())?;
        }
        for wait in &self.waits {
            write!(
                f,
                "\n  rank {} at instruction {} ({}, {}) waits for rank {}",
                wait.rank,
                wait.index,
                wait.op,
                wait.op.kind.describe(),
                wait.waits_for
            )?;
        }
        write!(f, "\n{}", self.grid)
    }
}

impl std::error::Error for Violation {}

/// How many instructions to show on each side of a cell.
const AROUND: usize = 3;

/// The marked cells with their neighbours, one row a cell, the cells below one another.
fn grid(schedule: &Schedule, cells: &[(usize, usize)]) -> String {
    let width = 2 * AROUND + 1;
    let rows: Vec<Vec<String>> = cells
        .iter()
        .map(|&(rank, index)| {
            let stream = schedule.stream(rank);
            (0..width)
                .map(|column| {
                    let op = (index + column)
                        .checked_sub(AROUND)
                        .and_then(|at| stream.get(at));
                    match (op, column == AROUND) {
                        (Some(op), true) => format!("[{op}]"),
                        (None, true) => "[end]".into(),
                        (Some(op), false) => op.to_string(),
                        (None, false) => String::new(),
                    }
                })
                .collect()
        })
        .collect();
    let widths: Vec<usize> = (0..width)
        .map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0))
        .collect();
    let heads: Vec<String> = cells
        .iter()
        .map(|(rank, index)| format!("  rank {rank} @ {index}"))
        .collect();
    let head_width = heads.iter().map(String::len).max().unwrap_or(0);

    let mut text = String::new();
    for (head, row) in heads.iter().zip(&rows) {
        let _ = write!(text, "{head:head_width$} |");
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, " {cell:^width$}");
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    let before: usize = widths[..AROUND].iter().map(|width| width + 1).sum();
    let middle = head_width + 2 + before + 1 + widths[AROUND] / 2;
    let _ = write!(text, "{:>middle$}", "^");
    text
}

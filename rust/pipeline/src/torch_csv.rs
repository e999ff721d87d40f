//! The CSV of `torch.distributed.pipelining`: one row a rank, no header, a cell an instruction.
//!
//! ```text
//! action := simple | "(" simple ";" simple ")OVERLAP_F_B"        forward first
//! simple := STAGE TYPE [MICROBATCH]
//! TYPE   := F | I | B | W | UNSHARD | RESHARD | REDUCE_GRAD | SEND_F | RECV_F | SEND_B | RECV_B
//!         | WAIT_SEND_F | WAIT_SEND_B | WAIT_REDUCE_GRAD                  from 2.14 on
//! ```
//!
//! An older dialect writes `B` for the input part and `BW` for the whole backward. The two are
//! told apart by what only one of them can mean. A stage lives on one rank in this form, so
//! schedules with copies of stages cannot be written in it.

use std::fmt::Write as _;

use crate::error::{Error, Result};
use crate::op::{Kind, Op, take_number};
use crate::schedule::{Layout, Schedule};

/// What a backward is called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// I the input part, W the weight part, B the whole.
    #[default]
    Current,
    /// B the input part, W the weight part, BW the whole.
    Older,
}

/// What a file holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// The compute order; PyTorch places the transfers.
    #[default]
    ComputeOnly,
    /// Transfers too.
    ComputeComms,
}

/// How to write a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CsvOptions {
    /// What the file holds.
    pub form: Form,
    /// What a backward is called.
    pub dialect: Dialect,
    /// With transfers: write the waits for sends and reductions, which PyTorch wants from 2.14 on
    /// and does not know before.
    pub waits: bool,
}

impl Schedule {
    /// The schedule as PyTorch's CSV. O(instructions).
    ///
    /// With transfers, and where the schedule does not say it itself, every stage is unsharded
    /// before its first instruction, and its gradients are reduced and it is resharded after its
    /// last: PyTorch scales gradients where it reduces them.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] when stages have copies, or transfers are to be written and there are none.
    pub fn to_torch_csv(&self, options: CsvOptions) -> Result<String> {
        let layout = self.layout();
        if layout.num_copies() > 1 {
            let (first, second) = (layout.rank_of(0, 0), layout.rank_of(1, 0));
            return Err(Error::input(
                "bidirectional",
                "schedule",
                format!(
                    "{}, whose stage 0 lives on ranks {first} and {second}",
                    self.name()
                ),
                "a schedule with every stage on one rank",
                "PyTorch's CSV cannot say which copy of a stage is meant; use text or JSON",
            ));
        }
        let comms = options.form == Form::ComputeComms;
        if comms && self.needs_transfers() && !self.has_transfers() {
            return Err(Error::input(
                "no_transfers",
                "form",
                "compute_comms",
                "compute_only for a schedule without transfers",
                "place the transfers first",
            ));
        }
        let frames = comms && !self.ops().iter().any(|op| !op.kind.has_micro_batch());
        let mut text = String::with_capacity(self.ops().len() * 8);
        for rank in 0..layout.num_ranks() {
            let stream = self.stream(rank);
            let mut row = Row {
                text: &mut text,
                first: true,
                options,
            };
            let bounds: Vec<(u16, usize, usize)> = if frames {
                let ends = layout.stages_of(rank).map(|(_, stage)| {
                    let mut computes = stream
                        .iter()
                        .enumerate()
                        .filter(|(_, op)| op.kind.is_compute() && op.stage == stage);
                    let begin = computes.next().map_or(0, |(at, _)| at);
                    (
                        stage,
                        begin,
                        computes.next_back().map_or(begin, |(at, _)| at),
                    )
                });
                ends.collect()
            } else {
                Vec::new()
            };
            for (index, &op) in stream.iter().enumerate() {
                // A pair is written at its forward; frame it as a whole.
                let covers = match op.kind {
                    Kind::OverlapForward => index..index + 2,
                    Kind::OverlapBackward => continue,
                    _ => index..index + 1,
                };
                for &(stage, _, _) in bounds.iter().filter(|bound| covers.contains(&bound.1)) {
                    row.cell(Op::new(Kind::Unshard, 0, stage, 0), None);
                }
                row.cell(op, stream.get(index + 1).copied());
                for &(stage, _, _) in bounds.iter().filter(|bound| covers.contains(&bound.2)) {
                    if self.has_backward() {
                        row.cell(Op::new(Kind::Reduce, 0, stage, 0), None);
                        row.cell(Op::new(Kind::WaitReduce, 0, stage, 0), None);
                    }
                    row.cell(Op::new(Kind::Reshard, 0, stage, 0), None);
                }
            }
            text.push_str("\r\n");
        }
        Ok(text)
    }

    /// Reads PyTorch's CSV, either form, either dialect. O(cells).
    ///
    /// Strict: every cell must be in the grammar, every stage on one rank. What the file says is
    /// not proved here; [`verify`](crate::verify::verify) does that.
    ///
    /// # Errors
    ///
    /// [`Error::Text`] with row and cell; [`Error::Input`] when rows or stages are missing.
    pub fn from_torch_csv(text: &str, name: &str) -> Result<Self> {
        let mut rows = Vec::new();
        let mut any = Seen::default();
        for (row, line) in text.lines().enumerate() {
            let mut ops = Vec::new();
            for (column, cell) in line.split(',').enumerate() {
                let place = (row + 1, column + 1);
                any.idle |= cell.is_empty();
                read_cell(cell, place, &mut ops, &mut any)?;
            }
            if ops.is_empty() {
                return Err(Error::text(
                    "missing_row",
                    (row + 1, 1),
                    line,
                    "the instructions of a rank",
                    "every rank has a row with at least one instruction",
                ));
            }
            rows.push(ops);
        }
        if rows.is_empty() {
            return Err(Error::text(
                "missing_row",
                (1, 1),
                "",
                "one row for every rank",
                "the file is empty",
            ));
        }
        if any.idle && any.comms {
            return Err(Error::input(
                "idle_cells",
                "csv",
                "a file with transfers and empty cells",
                "one of the two",
                "idle slots belong to compute_only files",
            ));
        }
        let older = dialect(&any)? == Dialect::Older;
        let layout = layout_of(&rows)?;
        let mut ops = Vec::new();
        let mut starts = vec![0];
        for row in rows {
            ops.extend(
                row.into_iter()
                    .map(|cell| Op::new(cell.kind(older), 0, cell.stage, cell.micro_batch)),
            );
            starts.push(ops.len());
        }
        let schedule = Self::new(name, layout, starts, ops)?;
        if any.comms && schedule.needs_transfers() && !schedule.has_transfers() {
            return Err(Error::input(
                "no_transfers",
                "csv",
                "a compute_comms file without a single send or receive",
                "transfers, or a compute_only file",
                "leave out UNSHARD, RESHARD and REDUCE_GRAD to have the transfers placed",
            ));
        }
        Ok(schedule)
    }
}

struct Row<'a> {
    text: &'a mut String,
    first: bool,
    options: CsvOptions,
}

impl Row<'_> {
    /// Writes a cell; of a pair, `next` is the backward.
    fn cell(&mut self, op: Op, next: Option<Op>) {
        let comms = self.options.form == Form::ComputeComms;
        let waits = matches!(
            op.kind,
            Kind::WaitActivation | Kind::WaitGradient | Kind::WaitReduce
        );
        if !op.kind.is_compute() && (!comms || (waits && !self.options.waits)) {
            return;
        }
        if !std::mem::replace(&mut self.first, false) {
            self.text.push(',');
        }
        // Writing into a string cannot fail.
        let _ = match (op.kind, next) {
            (Kind::OverlapForward, Some(backward)) => {
                write!(
                    self.text,
                    "({};{})OVERLAP_F_B",
                    self.simple(op),
                    self.simple(backward)
                )
            }
            _ => write!(self.text, "{}", self.simple(op)),
        };
    }

    fn simple(&self, op: Op) -> String {
        let older = self.options.dialect == Dialect::Older;
        let word = match op.kind {
            Kind::Forward | Kind::OverlapForward => "F",
            Kind::Backward | Kind::OverlapBackward if older => "BW",
            Kind::Backward | Kind::OverlapBackward => "B",
            Kind::BackwardInput if older => "B",
            Kind::BackwardInput => "I",
            Kind::BackwardWeight => "W",
            Kind::SendActivation => "SEND_F",
            Kind::ReceiveActivation => "RECV_F",
            Kind::WaitActivation => "WAIT_SEND_F",
            Kind::SendGradient => "SEND_B",
            Kind::ReceiveGradient => "RECV_B",
            Kind::WaitGradient => "WAIT_SEND_B",
            Kind::Reduce => "REDUCE_GRAD",
            Kind::WaitReduce => "WAIT_REDUCE_GRAD",
            Kind::Unshard => "UNSHARD",
            Kind::Reshard => "RESHARD",
        };
        if op.kind.has_micro_batch() {
            format!("{}{word}{}", op.stage, op.micro_batch)
        } else {
            format!("{}{word}", op.stage)
        }
    }
}

/// A cell before the dialect is known.
#[derive(Clone, Copy)]
struct Cell {
    word: Word,
    stage: u16,
    micro_batch: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Word {
    /// `B`: the whole backward, or in the older dialect the input part.
    B,
    Plain(Kind),
}

impl Cell {
    fn kind(self, older: bool) -> Kind {
        match self.word {
            Word::B if older => Kind::BackwardInput,
            Word::B => Kind::Backward,
            Word::Plain(kind) => kind,
        }
    }
}

#[derive(Default)]
struct Seen {
    idle: bool,
    comms: bool,
    b: bool,
    bw: bool,
    i: bool,
    w: bool,
}

/// `BW` is the older dialect, `I` the current one; `W` with neither can only follow an older `B`.
fn dialect(any: &Seen) -> Result<Dialect> {
    match (any.bw, any.i) {
        (true, true) => Err(Error::input(
            "mixed_dialects",
            "csv",
            "a file with both I and BW",
            "one dialect",
            "PyTorch writes I, W, B today and wrote B, W, BW before",
        )),
        (true, false) => Ok(Dialect::Older),
        (false, false) if any.b && any.w => Ok(Dialect::Older),
        _ => Ok(Dialect::Current),
    }
}

fn read_cell(cell: &str, place: (usize, usize), ops: &mut Vec<Cell>, any: &mut Seen) -> Result<()> {
    let refuse = || {
        Error::text(
            "unknown_word",
            place,
            cell,
            "an instruction of torch.distributed.pipelining",
            "cells look like 0F1, 0B1, 0I1, 0W1, (0F1;1B0)OVERLAP_F_B, 0SEND_F1, 1RECV_F1, 0UNSHARD",
        )
    };
    if cell.is_empty() {
        return Ok(());
    }
    let Some(pair) = cell.strip_prefix('(') else {
        ops.push(read_simple(cell, any).ok_or_else(refuse)?);
        return Ok(());
    };
    let (forward, backward) = pair
        .strip_suffix(")OVERLAP_F_B")
        .and_then(|inside| inside.split_once(';'))
        .ok_or_else(refuse)?;
    let mut forward = read_simple(forward, any).ok_or_else(refuse)?;
    let mut backward = read_simple(backward, any).ok_or_else(refuse)?;
    let whole = backward.word == Word::B || backward.word == Word::Plain(Kind::Backward);
    if forward.word != Word::Plain(Kind::Forward) || !whole {
        return Err(Error::text(
            "torn_pair",
            place,
            cell,
            "a forward and a whole backward",
            "an overlapped pair is written (0F1;1B0)OVERLAP_F_B, forward first",
        ));
    }
    forward.word = Word::Plain(Kind::OverlapForward);
    backward.word = Word::Plain(Kind::OverlapBackward);
    ops.extend([forward, backward]);
    Ok(())
}

fn read_simple(cell: &str, any: &mut Seen) -> Option<Cell> {
    let (stage, rest) = take_number(cell)?;
    let letters = rest.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (word, digits) = rest.split_at(letters);
    let word = match word {
        "F" => Word::Plain(Kind::Forward),
        "B" => {
            any.b = true;
            Word::B
        }
        "BW" => {
            any.bw = true;
            Word::Plain(Kind::Backward)
        }
        "I" => {
            any.i = true;
            Word::Plain(Kind::BackwardInput)
        }
        "W" => {
            any.w = true;
            Word::Plain(Kind::BackwardWeight)
        }
        "SEND_F" => Word::Plain(Kind::SendActivation),
        "RECV_F" => Word::Plain(Kind::ReceiveActivation),
        "WAIT_SEND_F" => Word::Plain(Kind::WaitActivation),
        "SEND_B" => Word::Plain(Kind::SendGradient),
        "RECV_B" => Word::Plain(Kind::ReceiveGradient),
        "WAIT_SEND_B" => Word::Plain(Kind::WaitGradient),
        "REDUCE_GRAD" => Word::Plain(Kind::Reduce),
        "WAIT_REDUCE_GRAD" => Word::Plain(Kind::WaitReduce),
        "UNSHARD" => Word::Plain(Kind::Unshard),
        "RESHARD" => Word::Plain(Kind::Reshard),
        _ => return None,
    };
    let names_one = match word {
        Word::B => true,
        Word::Plain(kind) => {
            any.comms |= !kind.is_compute();
            kind.has_micro_batch()
        }
    };
    let micro_batch = match (names_one, digits) {
        (false, "") => 0,
        (true, digits) => match take_number(digits)? {
            (number, "") => number,
            _ => return None,
        },
        _ => return None,
    };
    Some(Cell {
        word,
        stage: u16::try_from(stage).ok()?,
        micro_batch,
    })
}

/// Which rank each stage is on; every stage up to the highest must be on exactly one.
fn layout_of(rows: &[Vec<Cell>]) -> Result<Layout> {
    let cells = || {
        rows.iter()
            .enumerate()
            .flat_map(|(rank, row)| row.iter().map(move |cell| (rank, cell)))
    };
    let num_stages = cells()
        .map(|(_, cell)| usize::from(cell.stage) + 1)
        .max()
        .unwrap_or(0);
    let last = cells().map(|(_, cell)| cell.micro_batch).max().unwrap_or(0);
    let mut ranks = vec![None; num_stages];
    for (rank, cell) in cells() {
        let stage = usize::from(cell.stage);
        match ranks[stage] {
            Some(other) if other != rank => {
                return Err(Error::input(
                    "two_ranks",
                    "csv",
                    format!("stage {stage} on ranks {other} and {rank}"),
                    "every stage on one rank",
                    "PyTorch's CSV has no words for copies of a stage; keep bidirectional schedules as text or JSON",
                ));
            }
            _ => ranks[stage] = Some(rank),
        }
    }
    let mut placement = Vec::with_capacity(num_stages);
    for (stage, rank) in ranks.into_iter().enumerate() {
        let Some(rank) = rank else {
            return Err(Error::input(
                "missing_row",
                "csv",
                format!("{} rows, none with stage {stage}", rows.len()),
                format!("all stages from 0 to {}", num_stages - 1),
                "a row is missing, or a stage is misnumbered",
            ));
        };
        placement.push(rank as u32);
    }
    let micro_batches = last.checked_add(1).unwrap_or(last);
    Layout::new(rows.len(), num_stages, placement, vec![micro_batches])
}

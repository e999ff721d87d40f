//! The text that a person reads, and that reads back.
//!
//! ```text
//! schedule dualpipe
//! ranks 2, stages 2
//! copy 0: 2 micro-batches through ranks 0 1
//! copy 1: 2 micro-batches through ranks 1 0
//! rank 0: 0F0 0f0> <1'f0 ...
//! rank 1: ...
//! ```
//!
//! The words are those of [`Op`]. `#` starts a comment, empty lines are skipped.

use std::fmt::Write as _;

use crate::error::{Error, Result};
use crate::op::{Kind, Op, take_number};
use crate::schedule::{Layout, Schedule};

impl Schedule {
    /// The schedule as text. O(instructions).
    #[must_use]
    pub fn text(&self) -> String {
        let layout = self.layout();
        let mut text = String::with_capacity(64 + self.ops().len() * 8);
        // Writing into a string cannot fail.
        let _ = writeln!(text, "schedule {}", self.name());
        let _ = writeln!(
            text,
            "ranks {}, stages {}",
            layout.num_ranks(),
            layout.num_stages()
        );
        for (copy, ranks) in (0u8..).zip(layout.placement().chunks(layout.num_stages())) {
            let _ = write!(
                text,
                "copy {copy}: {} micro-batches through ranks",
                layout.micro_batches(copy)
            );
            for rank in ranks {
                let _ = write!(text, " {rank}");
            }
            text.push('\n');
        }
        for rank in 0..layout.num_ranks() {
            let _ = write!(text, "rank {rank}:");
            for op in self.stream(rank) {
                let _ = write!(text, " {op}");
            }
            text.push('\n');
        }
        text
    }

    /// Reads what [`text`](Self::text) writes.
    ///
    /// # Errors
    ///
    /// [`Error::Text`] with line and word where the text is not in the grammar, [`Error::Input`]
    /// where it is, but describes something that cannot be.
    pub fn parse(text: &str) -> Result<Self> {
        let mut lines = text
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line.split('#').next().unwrap_or("").trim()))
            .filter(|(_, line)| !line.is_empty());
        let mut next = |expected: &str| {
            lines.next().ok_or_else(|| {
                Error::text(
                    "text_ends",
                    (text.lines().count() + 1, 1),
                    "",
                    expected,
                    "the text ends too early",
                )
            })
        };

        let (number, line) = next("`schedule NAME`")?;
        let name = line
            .strip_prefix("schedule ")
            .map(str::trim)
            .filter(|name| !name.is_empty() && !name.contains(char::is_control))
            .ok_or_else(|| expected_line(number, line, "`schedule NAME`"))?;
        let (number, line) = next("`ranks N, stages N`")?;
        let (num_ranks, num_stages) = line
            .strip_prefix("ranks ")
            .and_then(|rest| rest.split_once(", stages "))
            .and_then(|(ranks, stages)| Some((whole_number(ranks)?, whole_number(stages)?)))
            .ok_or_else(|| expected_line(number, line, "`ranks N, stages N`"))?;

        let mut placement = Vec::new();
        let mut micro_batches = Vec::new();
        let (mut number, mut line) = next("`copy 0: N micro-batches through ranks ...`")?;
        while line.starts_with("copy ") {
            let parsed = line
                .strip_prefix(&format!("copy {}: ", micro_batches.len()))
                .and_then(|rest| rest.split_once(" micro-batches through ranks "))
                .and_then(|(count, ranks)| {
                    let ranks: Option<Vec<u32>> =
                        ranks.split_whitespace().map(whole_number).collect();
                    Some((whole_number(count)?, ranks?))
                });
            let (count, ranks) = parsed.ok_or_else(|| {
                let form = format!(
                    "`copy {}: N micro-batches through ranks ...`",
                    micro_batches.len()
                );
                expected_line(number, line, &form)
            })?;
            if ranks.len() != num_stages as usize {
                let form = format!("{num_stages} ranks, one for every stage");
                return Err(expected_line(number, line, &form));
            }
            micro_batches.push(count);
            placement.extend(ranks);
            (number, line) = next("`rank 0: ...`")?;
        }
        let layout = Layout::new(
            num_ranks as usize,
            num_stages as usize,
            placement,
            micro_batches,
        )?;

        let mut ops = Vec::new();
        let mut starts = vec![0];
        for rank in 0..layout.num_ranks() {
            if rank > 0 {
                (number, line) = next(&format!("`rank {rank}: ...`"))?;
            }
            let words = line
                .strip_prefix(&format!("rank {rank}:"))
                .ok_or_else(|| expected_line(number, line, &format!("`rank {rank}: ...`")))?;
            for (index, word) in words.split_whitespace().enumerate() {
                let place = (number, index + 1);
                let op = Op::parse(word).ok_or_else(|| {
                    Error::text(
                        "unknown_word",
                        place,
                        word,
                        "an instruction",
                        "instructions look like 3F5, 3'B5, 3I5, 3W5, (3F5 4B1), 3f5>, <4f5, 3f5!, 3b5>, <2b5, 3b5!, 3R, 3R!",
                    )
                })?;
                if !layout.names(op) {
                    return Err(Error::text(
                        "unknown_place",
                        place,
                        word,
                        format!(
                            "an instruction for {} stages, {} copies and the copy's micro-batches",
                            layout.num_stages(),
                            layout.num_copies()
                        ),
                        "check stage, copy and micro-batch",
                    ));
                }
                let open = ops.len() > starts[rank]
                    && ops.last().map(|op: &Op| op.kind) == Some(Kind::OverlapForward);
                if open != (op.kind == Kind::OverlapBackward) {
                    return Err(Error::text(
                        "torn_pair",
                        place,
                        word,
                        "part of a whole pair",
                        "an overlapped pair is written (3F5 4B1)",
                    ));
                }
                ops.push(op);
            }
            if let Some(open) = ops[starts[rank]..]
                .last()
                .filter(|op| op.kind == Kind::OverlapForward)
            {
                return Err(Error::text(
                    "torn_pair",
                    (number, ops.len() - starts[rank]),
                    open,
                    "part of a whole pair",
                    "an overlapped pair is written (3F5 4B1)",
                ));
            }
            starts.push(ops.len());
        }
        if let Some((number, line)) = lines.next() {
            return Err(expected_line(number, line, "the end of the text"));
        }
        Self::new(name, layout, starts, ops)
    }
}

fn whole_number(text: &str) -> Option<u32> {
    match take_number(text)? {
        (number, "") => Some(number),
        _ => None,
    }
}

fn expected_line(number: usize, line: &str, expected: &str) -> Error {
    let mut got: String = line.chars().take(60).collect();
    if got.len() < line.len() {
        got.push_str("...");
    }
    Error::text(
        "unknown_line",
        (number, 1),
        got,
        expected,
        "the first lines name the schedule, its ranks and stages, and its copies; then one line per rank follows",
    )
}

//! One instruction: what to do, for which stage, on which copy of it, with which micro-batch.

use std::fmt;

/// What an instruction does.
///
/// An overlapped pair is two neighbouring instructions, [`Kind::OverlapForward`] and directly
/// after it [`Kind::OverlapBackward`]; a [`Schedule`](crate::Schedule) holds no other arrangement
/// of the two. That keeps every instruction eight bytes wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// F: the forward of a stage.
    Forward,
    /// B: the whole backward, for the input and for the weights.
    Backward,
    /// I: the backward for the input only. Frees nothing: the weight part still needs it all.
    BackwardInput,
    /// W: the backward for the weights only.
    BackwardWeight,
    /// The forward of an overlapped pair.
    OverlapForward,
    /// The whole backward of an overlapped pair.
    OverlapBackward,
    /// Send the activation that the stage has computed to where the next stage lives.
    SendActivation,
    /// Post the receive of the stage's input activation.
    ReceiveActivation,
    /// Wait until a sent activation has left, and release its buffer.
    WaitActivation,
    /// Send the gradient of the stage's input to where the previous stage lives.
    SendGradient,
    /// Post the receive of the gradient of the stage's output.
    ReceiveGradient,
    /// Wait until a sent gradient has left, and release its buffer.
    WaitGradient,
    /// R: start the reduction of the stage's weight gradients over the copies of the stage.
    Reduce,
    /// Wait for that reduction.
    WaitReduce,
    /// Gather the stage's sharded parameters (a PyTorch FSDP instruction, kept for exchange).
    Unshard,
    /// Drop the gathered parameters again (likewise).
    Reshard,
}

impl Kind {
    /// Every kind, in declaration order.
    pub const ALL: [Self; 16] = [
        Self::Forward,
        Self::Backward,
        Self::BackwardInput,
        Self::BackwardWeight,
        Self::OverlapForward,
        Self::OverlapBackward,
        Self::SendActivation,
        Self::ReceiveActivation,
        Self::WaitActivation,
        Self::SendGradient,
        Self::ReceiveGradient,
        Self::WaitGradient,
        Self::Reduce,
        Self::WaitReduce,
        Self::Unshard,
        Self::Reshard,
    ];

    /// Whether the instruction computes.
    #[must_use]
    #[inline]
    pub const fn is_compute(self) -> bool {
        (self as u8) <= Self::OverlapBackward as u8
    }

    /// Whether the instruction belongs to a transfer between two ranks.
    #[must_use]
    #[inline]
    pub const fn is_transfer(self) -> bool {
        (self as u8) >= Self::SendActivation as u8 && (self as u8) <= Self::WaitGradient as u8
    }

    /// Whether the instruction is a forward, alone or in a pair.
    #[must_use]
    #[inline]
    pub const fn is_forward(self) -> bool {
        matches!(self, Self::Forward | Self::OverlapForward)
    }

    /// Whether the instruction produces the gradient of the stage's input.
    #[must_use]
    #[inline]
    pub const fn makes_gradient(self) -> bool {
        matches!(
            self,
            Self::Backward | Self::BackwardInput | Self::OverlapBackward
        )
    }

    /// Whether the instruction adds the micro-batch's weight gradient and frees its activation.
    #[must_use]
    #[inline]
    pub const fn ends_micro_batch(self) -> bool {
        matches!(
            self,
            Self::Backward | Self::BackwardWeight | Self::OverlapBackward
        )
    }

    /// Whether the instruction names a micro-batch; the others speak of a whole stage.
    #[must_use]
    #[inline]
    pub const fn has_micro_batch(self) -> bool {
        (self as u8) <= Self::WaitGradient as u8
    }

    /// The instruction in a sentence.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "full backward",
            Self::BackwardInput => "backward for the input",
            Self::BackwardWeight => "backward for the weights",
            Self::OverlapForward => "forward of an overlapped pair",
            Self::OverlapBackward => "backward of an overlapped pair",
            Self::SendActivation => "send of an activation",
            Self::ReceiveActivation => "receive of an activation",
            Self::WaitActivation => "wait for a sent activation",
            Self::SendGradient => "send of a gradient",
            Self::ReceiveGradient => "receive of a gradient",
            Self::WaitGradient => "wait for a sent gradient",
            Self::Reduce => "reduction of gradients",
            Self::WaitReduce => "wait for a reduction of gradients",
            Self::Unshard => "unshard",
            Self::Reshard => "reshard",
        }
    }
}

/// One instruction, eight bytes.
///
/// Prints as one word of the schedule's text: `3F5` is the forward of stage 3 for micro-batch 5,
/// `3'F5` the same on the stage's second copy, `(3F5 4B1)` an overlapped pair (two words),
/// `3f5>` sends the activation that stage 3 made, `<4f5` receives it for stage 4, `3f5!` waits
/// until it has left; `b` in place of `f` for gradients; `3R` starts the reduction of stage 3's
/// gradients over its copies and `3R!` waits for it; `3U` and `3u` are PyTorch's unshard and
/// reshard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Op {
    /// What to do.
    pub kind: Kind,
    /// Which copy of the stage; also the direction that the micro-batch travels in.
    pub copy: u8,
    /// The stage, counted along the model.
    pub stage: u16,
    /// The micro-batch, counted within its copy; 0 where the kind names none.
    pub micro_batch: u32,
}

const _: () = assert!(size_of::<Op>() == 8);

impl Op {
    /// An instruction.
    #[must_use]
    #[inline]
    pub const fn new(kind: Kind, copy: u8, stage: u16, micro_batch: u32) -> Self {
        Self {
            kind,
            copy,
            stage,
            micro_batch,
        }
    }

    /// The same place with another kind.
    #[must_use]
    #[inline]
    pub const fn with_kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    /// Reads one word; `None` when it is not one.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        let (opens, rest) = strip_flag(word, '(');
        let (closes, rest) = strip_end_flag(rest, ')');
        let (receives, rest) = strip_flag(rest, '<');
        let (sends, rest) = strip_end_flag(rest, '>');
        let (waits, rest) = strip_end_flag(rest, '!');

        let (stage, rest) = take_number(rest)?;
        let primes = rest.len() - rest.trim_start_matches('\'').len();
        let rest = &rest[primes..];
        let mut chars = rest.chars();
        let letter = chars.next()?;
        let rest = chars.as_str();

        let marks = (opens, closes, receives, sends, waits);
        let kind = match (letter, marks) {
            ('F', (false, false, false, false, false)) => Kind::Forward,
            ('F', (true, false, false, false, false)) => Kind::OverlapForward,
            ('B', (false, false, false, false, false)) => Kind::Backward,
            ('B', (false, true, false, false, false)) => Kind::OverlapBackward,
            ('I', (false, false, false, false, false)) => Kind::BackwardInput,
            ('W', (false, false, false, false, false)) => Kind::BackwardWeight,
            ('f', (false, false, false, true, false)) => Kind::SendActivation,
            ('f', (false, false, true, false, false)) => Kind::ReceiveActivation,
            ('f', (false, false, false, false, true)) => Kind::WaitActivation,
            ('b', (false, false, false, true, false)) => Kind::SendGradient,
            ('b', (false, false, true, false, false)) => Kind::ReceiveGradient,
            ('b', (false, false, false, false, true)) => Kind::WaitGradient,
            ('R', (false, false, false, false, false)) => Kind::Reduce,
            ('R', (false, false, false, false, true)) => Kind::WaitReduce,
            ('U', (false, false, false, false, false)) => Kind::Unshard,
            ('u', (false, false, false, false, false)) => Kind::Reshard,
            _ => return None,
        };
        let micro_batch = match (kind.has_micro_batch(), rest) {
            (false, "") => 0,
            (true, digits) => match take_number(digits)? {
                (number, "") => number,
                _ => return None,
            },
            _ => return None,
        };
        Some(Self {
            kind,
            copy: u8::try_from(primes).ok()?,
            stage: u16::try_from(stage).ok()?,
            micro_batch,
        })
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, letter, after) = match self.kind {
            Kind::Forward => ("", "F", ""),
            Kind::Backward => ("", "B", ""),
            Kind::BackwardInput => ("", "I", ""),
            Kind::BackwardWeight => ("", "W", ""),
            Kind::OverlapForward => ("(", "F", ""),
            Kind::OverlapBackward => ("", "B", ")"),
            Kind::SendActivation => ("", "f", ">"),
            Kind::ReceiveActivation => ("<", "f", ""),
            Kind::WaitActivation => ("", "f", "!"),
            Kind::SendGradient => ("", "b", ">"),
            Kind::ReceiveGradient => ("<", "b", ""),
            Kind::WaitGradient => ("", "b", "!"),
            Kind::Reduce => ("", "R", ""),
            Kind::WaitReduce => ("", "R", "!"),
            Kind::Unshard => ("", "U", ""),
            Kind::Reshard => ("", "u", ""),
        };
        write!(f, "{before}{}", self.stage)?;
        for _ in 0..self.copy {
            f.write_str("'")?;
        }
        f.write_str(letter)?;
        if self.kind.has_micro_batch() {
            write!(f, "{}", self.micro_batch)?;
        }
        f.write_str(after)
    }
}

fn strip_flag(word: &str, mark: char) -> (bool, &str) {
    word.strip_prefix(mark)
        .map_or((false, word), |rest| (true, rest))
}

fn strip_end_flag(word: &str, mark: char) -> (bool, &str) {
    word.strip_suffix(mark)
        .map_or((false, word), |rest| (true, rest))
}

/// The decimal number at the front, in the one way it is printed: no sign, no leading zero.
pub(crate) fn take_number(text: &str) -> Option<(u32, &str)> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, rest) = text.split_at(digits);
    if number.len() > 1 && number.starts_with('0') {
        return None;
    }
    Some((number.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_reads_back() {
        for kind in Kind::ALL {
            for copy in 0..3 {
                let micro_batch = if kind.has_micro_batch() { 17 } else { 0 };
                let op = Op::new(kind, copy, 40, micro_batch);
                assert_eq!(Op::parse(&op.to_string()), Some(op), "{op}");
            }
        }
    }

    #[test]
    fn strangers_are_refused() {
        for word in [
            "",
            "F",
            "3",
            "3F",
            "F3",
            "3X4",
            "03F4",
            "3F04",
            "3F4>",
            "<3F4",
            "(3B4",
            "3F4)",
            "<3f4>",
            "3f4",
            "3R4",
            "3F-1",
            "3F4 ",
            "70000F1",
            "3F4294967296",
        ] {
            assert_eq!(Op::parse(word), None, "{word:?}");
        }
    }
}

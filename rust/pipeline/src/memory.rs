//! What a rank holds at once. It follows from the order of its stream alone, not from time.

use crate::error::{Error, Result};
use crate::op::{Kind, Op};
use crate::schedule::{Layout, Schedule};
use crate::wires::Wires;

/// How large things are, in bytes, per stage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// What one micro-batch keeps on a stage from F to the end of its backward, `[num_stages]`.
    pub activation_bytes: Vec<u64>,
    /// One stage's output for one micro-batch, and so its gradient, `[num_stages]`.
    pub message_bytes: Vec<u64>,
}

impl Sizes {
    /// # Errors
    ///
    /// [`Error::Input`] when there is not one size for every stage.
    pub(crate) fn check(&self, layout: &Layout) -> Result<()> {
        for (argument, sizes) in [
            ("activation_bytes", &self.activation_bytes),
            ("message_bytes", &self.message_bytes),
        ] {
            if sizes.len() != layout.num_stages() {
                return Err(Error::input(
                    "sizes",
                    argument,
                    format!("{} sizes", sizes.len()),
                    format!("{} sizes, one for every stage", layout.num_stages()),
                    "give bytes per micro-batch, stage by stage",
                ));
            }
        }
        Ok(())
    }
}

/// The most that one rank holds at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peak {
    /// Micro-batches times stages whose activations are alive (F done, B or W not).
    pub activations: u32,
    /// Of those, the most at once between I and W: I frees nothing.
    pub kept: u32,
    /// Receive buffers, from the post to the end of the instruction that uses them.
    pub receive_buffers: u32,
    /// Send buffers, from the send to its wait.
    pub send_buffers: u32,
    /// All of it in bytes, 0 without sizes: activations, the output gradients kept for W, and
    /// both kinds of buffers.
    pub bytes: u64,
}

/// Follows one rank through its stream.
pub(crate) struct Meter<'a> {
    schedule: &'a Schedule,
    wires: &'a Wires,
    sizes: Option<&'a Sizes>,
    now: Peak,
    peak: Peak,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(schedule: &'a Schedule, wires: &'a Wires, sizes: Option<&'a Sizes>) -> Self {
        Self {
            schedule,
            wires,
            sizes,
            now: Peak::default(),
            peak: Peak::default(),
        }
    }

    pub(crate) fn peak(&self) -> Peak {
        self.peak
    }

    /// Runs an instruction: what it takes is held while it runs, what it frees goes at its end.
    #[inline]
    pub(crate) fn run(&mut self, op: Op) {
        let (now, peak) = (&mut self.now, &mut self.peak);
        match op.kind {
            Kind::Forward | Kind::OverlapForward => {
                now.activations += 1;
                peak.activations = peak.activations.max(now.activations);
            }
            Kind::BackwardInput => {
                now.kept += 1;
                peak.kept = peak.kept.max(now.kept);
            }
            Kind::ReceiveActivation | Kind::ReceiveGradient => {
                now.receive_buffers += 1;
                peak.receive_buffers = peak.receive_buffers.max(now.receive_buffers);
            }
            Kind::SendActivation | Kind::SendGradient => {
                now.send_buffers += 1;
                peak.send_buffers = peak.send_buffers.max(now.send_buffers);
            }
            _ => {}
        }
        if let Some(sizes) = self.sizes {
            self.now.bytes = (self.now.bytes).saturating_add(self.bytes_taken(sizes, op));
            self.peak.bytes = self.peak.bytes.max(self.now.bytes);
            self.now.bytes = (self.now.bytes).saturating_sub(self.bytes_freed(sizes, op));
        }
        // Saturating, because a schedule that has not been proved may free what it never held.
        let received = self.uses_a_receive(op);
        let free = |count: &mut u32| *count = count.saturating_sub(1);
        let now = &mut self.now;
        if received {
            free(&mut now.receive_buffers);
        }
        match op.kind {
            Kind::Forward if !self.schedule.has_backward() => free(&mut now.activations),
            Kind::Backward | Kind::OverlapBackward => free(&mut now.activations),
            Kind::BackwardWeight => {
                free(&mut now.activations);
                free(&mut now.kept);
            }
            Kind::WaitActivation | Kind::WaitGradient => free(&mut now.send_buffers),
            _ => {}
        }
    }

    #[inline]
    fn uses_a_receive(&self, op: Op) -> bool {
        self.schedule.has_transfers() && self.wires.arrives_on(op).is_some()
    }

    fn bytes_taken(&self, sizes: &Sizes, op: Op) -> u64 {
        match op.kind {
            Kind::Forward | Kind::OverlapForward => sizes.activation_bytes[usize::from(op.stage)],
            // The weight part will need the gradient of the stage's output.
            Kind::BackwardInput => sizes.message_bytes[usize::from(op.stage)],
            Kind::SendActivation
            | Kind::SendGradient
            | Kind::ReceiveActivation
            | Kind::ReceiveGradient => message_bytes(sizes, op),
            _ => 0,
        }
    }

    fn bytes_freed(&self, sizes: &Sizes, op: Op) -> u64 {
        let stage = usize::from(op.stage);
        let received = match self.uses_a_receive(op) {
            true if op.kind.is_forward() => sizes.message_bytes[stage - 1],
            true => sizes.message_bytes[stage],
            false => 0,
        };
        received
            + match op.kind {
                Kind::Forward if !self.schedule.has_backward() => sizes.activation_bytes[stage],
                Kind::Backward | Kind::OverlapBackward => sizes.activation_bytes[stage],
                Kind::BackwardWeight => sizes.activation_bytes[stage] + sizes.message_bytes[stage],
                Kind::WaitActivation | Kind::WaitGradient => message_bytes(sizes, op),
                // Sends and receives take their buffer in full and free it elsewhere.
                _ => 0,
            }
    }
}

/// What a transfer moves: a stage's output or its gradient. The gradient of a stage's input is as
/// large as the output of the stage before.
fn message_bytes(sizes: &Sizes, op: Op) -> u64 {
    let stage = usize::from(op.stage);
    match op.kind {
        Kind::SendActivation | Kind::WaitActivation | Kind::ReceiveGradient => {
            sizes.message_bytes[stage]
        }
        // Nothing moves there before the first stage, unless the schedule is wrong.
        _ => stage
            .checked_sub(1)
            .map_or(0, |before| sizes.message_bytes[before]),
    }
}

/// The peak of every rank. O(instructions).
pub(crate) fn peaks(schedule: &Schedule, wires: &Wires, sizes: Option<&Sizes>) -> Vec<Peak> {
    (0..schedule.layout().num_ranks())
        .map(|rank| {
            let mut meter = Meter::new(schedule, wires, sizes);
            for &op in schedule.stream(rank) {
                meter.run(op);
            }
            meter.peak()
        })
        .collect()
}

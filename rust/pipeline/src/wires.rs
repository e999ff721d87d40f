//! The pairs of ranks that talk, numbered, so that per-pair state is a flat array.

use crate::op::{Kind, Op};
use crate::schedule::Layout;

/// No message: a hand-over on the rank itself, or the end of the model.
const NONE: u32 = u32::MAX;

/// Directed pairs of ranks between which stages hand over.
pub(crate) struct Wires {
    num_stages: usize,
    /// Wire of the activation out of `[copy * num_stages + stage]`, [`NONE`] without one.
    activation: Vec<u32>,
    /// Wire of the gradient out of the same.
    gradient: Vec<u32>,
    /// (from, to) of every wire, ascending.
    ends: Vec<(u32, u32)>,
    /// The wire in the other direction, [`NONE`] without one.
    reverse: Vec<u32>,
}

impl Wires {
    pub(crate) fn new(layout: &Layout) -> Self {
        let num_stages = layout.num_stages();
        let places = layout.placement();
        let mut ends = Vec::with_capacity(2 * places.len());
        for copy in places.chunks(num_stages) {
            for pair in copy.windows(2).filter(|pair| pair[0] != pair[1]) {
                ends.push((pair[0], pair[1]));
                ends.push((pair[1], pair[0]));
            }
        }
        ends.sort_unstable();
        ends.dedup();
        let find =
            |from: u32, to: u32| ends.binary_search(&(from, to)).map_or(NONE, |at| at as u32);
        let mut activation = vec![NONE; places.len()];
        let mut gradient = vec![NONE; places.len()];
        for (copy, ranks) in places.chunks(num_stages).enumerate() {
            for stage in 1..num_stages {
                let at = copy * num_stages + stage;
                activation[at - 1] = find(ranks[stage - 1], ranks[stage]);
                gradient[at] = find(ranks[stage], ranks[stage - 1]);
            }
        }
        let reverse = ends.iter().map(|&(from, to)| find(to, from)).collect();
        Self {
            num_stages,
            activation,
            gradient,
            ends,
            reverse,
        }
    }

    /// How many wires there are.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The ranks at the two ends.
    #[inline]
    pub(crate) fn ends(&self, wire: usize) -> (usize, usize) {
        let (from, to) = self.ends[wire];
        (from as usize, to as usize)
    }

    /// The wire between the same ranks in the other direction. Activations go one way and
    /// gradients come back, so there always is one.
    #[inline]
    pub(crate) fn reverse(&self, wire: usize) -> usize {
        self.reverse[wire] as usize
    }

    /// The wires out of a rank.
    pub(crate) fn out_of_rank(&self, rank: usize) -> std::ops::Range<usize> {
        let begin = self
            .ends
            .partition_point(|&(from, _)| (from as usize) < rank);
        let end = self
            .ends
            .partition_point(|&(from, _)| (from as usize) <= rank);
        begin..end
    }

    #[inline]
    fn at(wire: u32) -> Option<usize> {
        (wire != NONE).then_some(wire as usize)
    }

    #[inline]
    fn place(&self, copy: u8, stage: u16) -> usize {
        usize::from(copy) * self.num_stages + usize::from(stage)
    }

    /// The wire that the result of a forward, or of the input part of a backward, leaves on.
    #[inline]
    pub(crate) fn leaves_on(&self, op: Op) -> Option<usize> {
        let place = self.place(op.copy, op.stage);
        match op.kind {
            Kind::Forward | Kind::OverlapForward => Self::at(self.activation[place]),
            Kind::Backward | Kind::BackwardInput | Kind::OverlapBackward => {
                Self::at(self.gradient[place])
            }
            _ => None,
        }
    }

    /// The wire that the input of a forward or a backward comes in on.
    #[inline]
    pub(crate) fn arrives_on(&self, op: Op) -> Option<usize> {
        let place = self.place(op.copy, op.stage);
        match op.kind {
            Kind::Forward | Kind::OverlapForward if op.stage > 0 => {
                Self::at(self.activation[place - 1])
            }
            Kind::Backward | Kind::BackwardInput | Kind::OverlapBackward
                if usize::from(op.stage) + 1 < self.num_stages =>
            {
                Self::at(self.gradient[place + 1])
            }
            _ => None,
        }
    }

    /// The wire of a send, a receive or a wait; `None` where the layout has none there.
    #[inline]
    pub(crate) fn of_transfer(&self, op: Op) -> Option<usize> {
        let place = self.place(op.copy, op.stage);
        match op.kind {
            Kind::SendActivation | Kind::WaitActivation => Self::at(self.activation[place]),
            Kind::SendGradient | Kind::WaitGradient => Self::at(self.gradient[place]),
            Kind::ReceiveActivation if op.stage > 0 => Self::at(self.activation[place - 1]),
            Kind::ReceiveGradient if usize::from(op.stage) + 1 < self.num_stages => {
                Self::at(self.gradient[place + 1])
            }
            _ => None,
        }
    }
}

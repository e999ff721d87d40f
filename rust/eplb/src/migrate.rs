//! From the placement in force to the next: the best balance for a number of moves.

use crate::balance::{self, Shape, Walks};
use crate::error::{Code, Error, Result};
use crate::load::Load;
use crate::placement::{Placement, Replica};
use crate::topology::Topology;

/// How few moves lead how far: the moves, over all layers, and the balance then.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Milestone {
    /// Experts that arrive on a rank that did not hold them.
    pub moves: usize,
    /// The sum over layers of the mean rank load / the sum over layers of the largest.
    pub balance: f64,
}

/// Scratch of migrations, kept between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    balance: balance::Scratch,
    walks: Vec<Walks>,
    /// The mean load of a rank, in each layer.
    means: Vec<f64>,
    /// The next piece of each layer's frontier, steepest first.
    pieces: Vec<Piece>,
    chosen: Vec<usize>,
}

/// From one point of a layer's frontier to the next.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// What a move gains, in the unit of the load.
    slope: f64,
    gain: f64,
    moves: usize,
    layer: usize,
    point: usize,
}

impl Scratch {
    /// Explores what moves would do to each layer.
    pub(crate) fn explore(
        &mut self,
        topology: &Topology,
        shape: &Shape,
        budget: balance::Budget,
        load: &Load<'_>,
        previous: &Placement,
        most: Option<usize>,
    ) -> Result<()> {
        check_previous(topology, load, previous)?;
        // Far more than a layer has slots is no limit.
        let limit = load.num_layers() * topology.num_slots();
        let likely = most.filter(|&most| most < limit);
        let likely = likely.map(|most| most.div_ceil(load.num_layers()) as u32);
        self.walks.resize_with(load.num_layers(), Walks::default);
        self.means.clear();
        self.pieces.clear();
        let num_slots = topology.num_slots();
        let rows = previous.phy2log().chunks_exact(num_slots);
        let layers = load.layers().zip(rows).zip(&mut self.walks).enumerate();
        for (layer, ((load, row), walks)) in layers {
            let mean = self
                .balance
                .explore(topology, shape, budget, load, row, likely, walks);
            self.means.push(mean);
            let points = walks.points();
            for (point, pair) in points.windows(2).enumerate() {
                let moves = (pair[1].moves - pair[0].moves) as usize;
                let gain = f64::from(pair[0].level - pair[1].level) * mean;
                let slope = gain / moves as f64;
                self.pieces.push(Piece {
                    slope,
                    gain,
                    moves,
                    layer,
                    point: point + 1,
                });
            }
        }
        // A layer's own pieces are in this order already.
        self.pieces.sort_by(|a, b| b.slope.total_cmp(&a.slope));
        Ok(())
    }

    /// Hands the moves out over the layers.
    pub(crate) fn choose(&mut self, most: Option<usize>) {
        self.chosen.clear();
        self.chosen.resize(self.walks.len(), 0);
        let spent = self.forced();
        let mut left = most.map_or(usize::MAX, |most| most.saturating_sub(spent));
        for piece in &self.pieces {
            let chosen = &mut self.chosen[piece.layer];
            if piece.moves <= left && piece.point == *chosen + 1 {
                *chosen = piece.point;
                left -= piece.moves;
            }
        }
    }

    /// How many moves there is no way around.
    pub(crate) fn forced(&self) -> usize {
        let firsts = self.walks.iter().filter_map(|walks| walks.points().first());
        firsts.map(|point| point.moves as usize).sum()
    }

    /// Balance against moves, from none that is not forced to as many as help.
    pub(crate) fn frontier(&self, topology: &Topology) -> Vec<Milestone> {
        let units = balance::level_of_mean(topology);
        let mean: f64 = self.means.iter().map(|mean| mean * units).sum();
        let firsts = self.walks.iter().zip(&self.means);
        let mut largest: f64 = firsts
            .filter_map(|(walks, mean)| Some(f64::from(walks.points().first()?.level) * mean))
            .sum();
        let balance = |largest: f64| {
            if largest > 0.0 {
                (mean / largest).min(1.0)
            } else {
                1.0
            }
        };
        let mut moves = self.forced();
        let mut milestones = vec![Milestone {
            moves,
            balance: balance(largest),
        }];
        for piece in &self.pieces {
            moves += piece.moves;
            largest -= piece.gain;
            milestones.push(Milestone {
                moves,
                balance: balance(largest),
            });
        }
        milestones
    }

    /// Writes what each slot holds at the chosen points, `[num_layers, num_slots]`.
    pub(crate) fn write(
        &mut self,
        topology: &Topology,
        load: &Load<'_>,
        previous: &Placement,
        replicas: &mut [Replica],
    ) {
        let num_slots = topology.num_slots();
        let rows = previous.phy2log().chunks_exact(num_slots);
        let layers = load
            .layers()
            .zip(rows)
            .zip(replicas.chunks_exact_mut(num_slots));
        for (layer, ((load, row), slots)) in layers.enumerate() {
            let walks = &self.walks[layer];
            let point = self.chosen[layer];
            self.balance.go(topology, load, row, walks, point, slots);
        }
    }
}

/// Refuses a previous placement of other sizes.
pub(crate) fn check_previous(
    topology: &Topology,
    load: &Load<'_>,
    previous: &Placement,
) -> Result<()> {
    let other = previous.topology();
    let same_slots = other.num_gpus() == topology.num_gpus()
        && (0..other.num_gpus()).all(|gpu| other.slots_of(gpu) == topology.slots_of(gpu));
    if !same_slots {
        return Err(Error::invalid(
            Code::Inconsistent,
            "previous",
            format!("{} slots on {} GPUs", other.num_slots(), other.num_gpus()),
            format!(
                "a plan for the planner's machines ({} slots on {} GPUs), dead or alive",
                topology.num_slots(),
                topology.num_gpus()
            ),
            "give GPUs that are to join a place from the start, and declare them dead until then",
        ));
    }
    let got = (previous.num_layers(), previous.num_experts());
    if got != (load.num_layers(), load.num_experts()) {
        return Err(Error::invalid(
            Code::WrongShape,
            "previous",
            format!("{} layers of {} experts", got.0, got.1),
            format!(
                "{} x {}, as the load has",
                load.num_layers(),
                load.num_experts()
            ),
            "",
        ));
    }
    Ok(())
}

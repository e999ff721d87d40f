//! From the placement in force to the next: the best balance for a number of moves.
//!
//! 1. Each layer [starts](layer) from what its slots hold, after the moves that cannot be avoided
//!    ([settle]).
//! 2. [Walks](walk) lead to levels that no rank is above; each step is a point of the layer's
//!    frontier of level against moves.
//! 3. Moves are handed out over the layers by the convex hull of their frontiers.
//!
//! Which levels are aimed at depends on how many moves there are to hand out: the ranks above a
//! level, over all layers, say about how many moves it takes to get there. Where walks fall short of
//! what was asked for, and moves are left, a plan from scratch is one more point of each frontier, its
//! ranks [renamed](relabel) so that fewest experts move.

mod layer;
mod price;
mod relabel;
mod rows;
mod settle;
mod table;
mod walk;

use std::time::Instant;

use multiversion::multiversion;

use crate::balance::{Budget, Fuel, Shape};
use crate::error::{Code, Error, Result};
use crate::load::Load;
use crate::placement::{Placement, Replica};
use crate::topology::Topology;
use layer::{Layer, Point, Walked};
use table::Ranks;

/// How far above the floor the levels are that are aimed at for a whole frontier, and for its end.
const LEVELS: [f64; 8] = [0.05, 0.03, 0.018, 0.011, 0.007, 0.004, 0.002, 0.0003];
const LAST_LEVELS: [f64; 1] = [0.0008];

/// How much of the largest rank loads a plan without limits leaves to be gained, at most: the last of
/// it takes as many moves as all the rest.
const SPARED: f64 = 0.001;

/// The least that is aimed at.
const LEAST_AIM: f64 = 0.0003;

/// How many levels are aimed at for a number of moves; and from how many moves a layer on it is one
/// less, since each walk then takes long.
const AIMS: u32 = 3;
const MANY: usize = 20;

/// How much further each of them is than the one before, as a fraction of the moves there are, and
/// how many moves for each layer more.
const FURTHER: f64 = 0.1;
const FURTHER_MOVES: f64 = 2.0;

/// What part of the way from the floor to the level that a balance asks for is aimed at: what is gained
/// too much is handed back where it is dearest.
const NEAR: f64 = 0.95;

/// What part of the way to the floor an aim may leave to be called far: where steps at no move alone
/// lead to is then of no use.
const FAR: f64 = 0.25;

/// How few moves lead how far: the moves, over all layers, and the balance then.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Milestone {
    /// Experts that arrive on a rank that did not hold them.
    pub moves: usize,
    /// The sum over layers of the mean rank load / the sum over layers of the largest.
    pub balance: f64,
}

/// How far a plan may go from the placement in force. Moves that cannot be avoided are made
/// whatever it says. Where it says nothing, the plan is as even as one from scratch, to within
/// 0.1 % of the largest rank loads, with as few moves as were found for that.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Reach {
    /// The most moves, over all layers.
    pub max_moves: Option<usize>,
    /// The most moves of each layer.
    pub max_moves_per_layer: Option<usize>,
    /// What a move costs, in load: moves are made where they lower the largest rank loads, summed
    /// over layers, by more than that each.
    pub move_cost: f64,
    /// The balance that is enough: no move is made beyond it.
    pub min_balance: Option<f64>,
    /// Whether a slot may hold an expert that its rank holds already. That takes no move, and shifts
    /// load where other ranks hold the expert as well. Without it, each slot that repeats an expert
    /// or came free takes a move.
    pub repeats: bool,
}

/// Scratch of migrations, kept between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    ranks: Ranks,
    /// The same, where what crosses has a price: then they also walk without leaving their nodes.
    nodes: Ranks,
    layers: Vec<Layer>,
    layer: layer::Scratch,
    /// How far ranks are above the floor of their layer, over all layers, furthest first.
    excesses: Vec<f64>,
    /// The next piece of each layer's frontier, steepest first.
    pieces: Vec<Piece>,
    chosen: Vec<usize>,
    /// Layers that are to be planned from scratch: those that are unsettled, or in which walks did not
    /// lead far enough.
    short: Vec<usize>,
}

/// From one point of a layer's frontier to the next.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// What a move gains, in the unit of the load.
    slope: f64,
    gain: f64,
    /// By how much the heaviest rank is lighter, which is all that is gained where nothing is paid for
    /// what crosses.
    relief: f64,
    moves: usize,
    layer: usize,
    point: usize,
}

/// Hands out a budget visit by visit.
#[derive(Debug)]
struct Meter {
    budget: Budget,
    start: Instant,
    visits: u32,
}

impl Meter {
    fn new(budget: Budget, visits: usize) -> Self {
        Self {
            budget,
            start: Instant::now(),
            visits: visits.min(u32::MAX as usize) as u32,
        }
    }

    fn next(&mut self) -> Fuel {
        match self.budget {
            Budget::Iterations(steps) => Fuel::steps(steps.max(1)),
            // What earlier visits left over is shared by those that follow.
            Budget::Time(time) => {
                let now = Instant::now();
                let left = (self.start + time).saturating_duration_since(now);
                let share = left / self.visits.max(1);
                self.visits = self.visits.saturating_sub(1);
                Fuel::until(now + share)
            }
        }
    }
}

impl Reach {
    /// Whether nothing limits the moves.
    fn is_unlimited(&self) -> bool {
        self.max_moves.is_none()
            && self.max_moves_per_layer.is_none()
            && self.min_balance.is_none()
            && self.move_cost == 0.0
    }
}

impl Scratch {
    /// Takes over the placement in force, and makes the moves that cannot be avoided.
    pub(crate) fn start(
        &mut self,
        topology: &Topology,
        shape: &Shape,
        load: &Load<'_>,
        previous: &Placement,
        repeats: bool,
    ) -> Result<()> {
        check_previous(topology, load, previous)?;
        match shape.price() {
            None => self.ranks.set(topology, shape.kept_group_size()),
            Some((group_size, cost)) => {
                self.ranks.set(topology, None);
                self.ranks.set_price(topology, group_size, cost);
                self.nodes.set(topology, None);
                self.nodes.set_price(topology, group_size, cost);
                self.nodes.confine(topology);
            }
        }
        self.layers.resize_with(load.num_layers(), Layer::default);
        let rows = previous.phy2log().chunks_exact(topology.num_slots());
        for ((layer, load), row) in self.layers.iter_mut().zip(load.layers()).zip(rows) {
            layer.start(&self.ranks, topology, load, row, repeats, &mut self.layer);
        }
        Ok(())
    }

    /// The layers in which an expert found no place, or a slot nothing to hold: where groups are kept
    /// on nodes, they may have to be dealt out anew.
    pub(crate) fn list_unsettled(&mut self) -> &[usize] {
        let layers = self.layers.iter().enumerate();
        let unsettled =
            layers.filter(|(_, layer)| layer.lacks_experts() || layer.leaves_slots(&self.ranks));
        self.short.clear();
        self.short.extend(unsettled.map(|(index, _)| index));
        &self.short
    }

    /// Whether an expert found no place in any layer.
    pub(crate) fn lacks_experts(&self) -> bool {
        self.layers.iter().any(Layer::lacks_experts)
    }

    /// Starts the layers listed last from plans made from scratch, `[listed, num_slots]`.
    pub(crate) fn start_from_plans(&mut self, topology: &Topology, plans: &[Replica]) {
        let rows = plans.chunks_exact(topology.num_slots());
        for (&layer, row) in self.short.iter().zip(rows) {
            self.layers[layer].start_from_plan(&self.ranks, topology, row, &mut self.layer);
        }
    }

    /// The layers listed last.
    pub(crate) fn listed(&self) -> &[usize] {
        &self.short
    }

    /// Explores what moves would do to each layer: along the `whole` frontier, where nothing else says
    /// how far, or at its end alone.
    pub(crate) fn walk(&mut self, reach: &Reach, whole: bool, budget: Budget) {
        let whole = whole || reach.move_cost > 0.0 || self.ranks.price().is_some();
        // More than there are slots is no limit.
        let all = self.layers.len() * self.ranks.num_slots();
        let most = reach.max_moves.filter(|&most| most < all);
        match (most, reach.min_balance) {
            (Some(most), _) => self.walk_moves(most.saturating_sub(self.forced()), budget),
            (None, Some(balance)) => {
                let aim = self.aim_of_balance(balance) * NEAR;
                let (mean, largest) = self.mean_and_largest();
                let is_far = aim < FAR * self.aim_of_balance(mean / largest);
                self.walk_to(&[aim.max(LEAST_AIM)], !is_far, budget);
            }
            (None, None) if whole => self.walk_to(&LEVELS, true, budget),
            (None, None) => self.walk_to(&LAST_LEVELS, true, budget),
        }
        self.list_pieces(reach);
    }

    /// The layers for which a plan from scratch may be worth having: if moves are left when all walks
    /// are walked to their ends, or a balance is not reached, those that are not as even as any plan,
    /// to within what is [spared](SPARED).
    pub(crate) fn list_short(&mut self, reach: &Reach) -> &[usize] {
        self.short.clear();
        let (mean, mut largest) = self.mean_and_largest();
        let mut moves = self.forced();
        for piece in &self.pieces {
            largest -= piece.gain;
            moves += piece.moves;
        }
        let enough = reach.min_balance.map_or(0.0, |balance| mean / balance);
        if largest > enough && reach.max_moves.is_none_or(|most| moves < most) {
            let near = reach.min_balance.map_or(0.0, |balance| 1.0 / balance);
            let near = self.ranks.mean() * near.max(1.0 + SPARED);
            let layers = self.layers.iter().enumerate();
            let short = layers.filter(|(_, layer)| f64::from(layer.value()) > near);
            self.short.extend(short.map(|(index, _)| index));
        }
        &self.short
    }

    /// Takes in plans made from scratch for the layers that fell short, `[short, num_slots]`.
    pub(crate) fn add_plans(&mut self, reach: &Reach, topology: &Topology, plans: &[Replica]) {
        let rows = plans.chunks_exact(topology.num_slots());
        for (&layer, row) in self.short.iter().zip(rows) {
            // What crosses is as planned only if the ranks of a node stay together.
            let ranks = match self.ranks.price() {
                Some(_) => &self.nodes,
                None => &self.ranks,
            };
            self.layers[layer].add_plan(ranks, topology, row, &mut self.layer);
        }
        self.list_pieces(reach);
    }

    /// Walks to levels, given as fractions above the floor of each layer, and first of all as far as
    /// that is possible at no move, if that is wanted.
    fn walk_to(&mut self, aims: &[f64], for_nothing: bool, budget: Budget) {
        let walks = aims.len() + usize::from(for_nothing);
        let mut meter = Meter::new(budget, self.layers.len() * walks);
        if for_nothing {
            self.walk_for_nothing(&mut meter);
        }
        for &aim in aims {
            self.walk_once(aim, usize::MAX, &mut meter);
        }
    }

    /// Walks to levels that take about so many moves.
    fn walk_moves(&mut self, most: usize, budget: Budget) {
        let num_layers = self.layers.len();
        let aims = AIMS - u32::from(most >= MANY * num_layers);
        let mut meter = Meter::new(budget, num_layers * (aims as usize + 1));
        self.walk_for_nothing(&mut meter);
        self.excesses.clear();
        for layer in &self.layers {
            layer.list_excesses(&self.ranks, &mut self.excesses);
        }
        if most == 0 || self.excesses.is_empty() {
            return;
        }
        self.excesses.sort_unstable_by(|a, b| b.total_cmp(a));
        // Below about half of the mean excess, those who take what is shed get scarce, and more and
        // more moves are needed for each rank.
        let spread = self.excesses.iter().sum::<f64>() / self.excesses.len() as f64;
        let moves_for_each = |aim: f64| 1.0 + spread / 4.0 / (aim + spread / 16.0);
        let most_of_layer = 4 * most / num_layers + 8;
        let mut correction = 1.0;
        for further in 0..aims {
            let moves = most as f64 * (1.0 + FURTHER * f64::from(further))
                + FURTHER_MOVES * f64::from(further) * num_layers as f64;
            let mut above = self.excesses.iter().enumerate();
            let place = above
                .find(|&(above, &aim)| above as f64 * moves_for_each(aim) * correction >= moves);
            let aim = place.map_or(0.0, |(_, &aim)| aim) + LEAST_AIM;
            let walked = self.walk_once(aim, most_of_layer, &mut meter);
            if walked.moves > 0 {
                let expected = walked.above as f64 * moves_for_each(aim);
                correction = walked.moves as f64 / expected;
            }
        }
    }

    /// How far above the floors of the layers a balance lets the largest rank loads be.
    fn aim_of_balance(&self, balance: f64) -> f64 {
        let mean: f64 = self.layers.iter().map(|layer| layer.unit).sum::<f64>() * self.ranks.mean();
        let floor: f64 = self
            .layers
            .iter()
            .map(|layer| layer.floor * layer.unit)
            .sum();
        if floor > 0.0 {
            mean / balance / floor - 1.0
        } else {
            0.0
        }
    }

    fn walk_for_nothing(&mut self, meter: &mut Meter) {
        for layer in &mut self.layers {
            walk_for_nothing(layer, &self.ranks, &mut meter.next(), &mut self.layer);
        }
    }

    /// Walks in each layer to a level, or until so many moves are made; returns what that took.
    fn walk_once(&mut self, aim: f64, most: usize, meter: &mut Meter) -> Walked {
        let mut total = Walked::default();
        for layer in &mut self.layers {
            let mut fuel = meter.next();
            if self.ranks.price().is_some() {
                walk_to(layer, &self.nodes, aim, most, &mut fuel, &mut self.layer);
                fuel = fuel.refilled();
            }
            let walked = walk_to(layer, &self.ranks, aim, most, &mut fuel, &mut self.layer);
            total.moves += walked.moves;
            total.above += walked.above;
        }
        total
    }

    /// Lists the pieces of all layers' frontiers.
    fn list_pieces(&mut self, reach: &Reach) {
        let most = reach.max_moves_per_layer.unwrap_or(usize::MAX);
        self.pieces.clear();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            layer.keep_hull(most);
            for (point, pair) in layer.points().windows(2).enumerate() {
                let moves = (pair[1].moves - pair[0].moves) as usize;
                let gain = f64::from(pair[0].value() - pair[1].value()) * layer.unit;
                self.pieces.push(Piece {
                    slope: gain / moves as f64,
                    gain,
                    relief: f64::from(pair[0].level - pair[1].level) * layer.unit,
                    moves,
                    layer: index,
                    point: point + 1,
                });
            }
        }
        // A layer's own pieces are in this order already; of equal ones, the lower layer's is first.
        self.pieces.sort_unstable_by(|a, b| {
            let by_slope = b.slope.total_cmp(&a.slope);
            by_slope.then((a.layer, a.point).cmp(&(b.layer, b.point)))
        });
    }

    /// How many pieces there are to choose from.
    pub(crate) fn num_pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Hands the moves out over the layers, from the first `pieces` of the frontier.
    pub(crate) fn choose(&mut self, reach: &Reach, pieces: usize) {
        self.chosen.clear();
        self.chosen.resize(self.layers.len(), 0);
        let spent = self.forced();
        let most = reach.max_moves.unwrap_or(usize::MAX);
        let mut left = most.saturating_sub(spent);
        let (mean, mut largest) = self.mean_and_largest();
        let enough = match reach.min_balance {
            Some(balance) => mean / balance,
            None if reach.is_unlimited() => {
                let gains = self.pieces.iter().map(|piece| piece.gain);
                let least = largest - gains.sum::<f64>();
                let near = |level: f64| level * (1.0 + SPARED);
                if least > near(mean) {
                    near(least)
                } else {
                    near(mean)
                }
            }
            None => 0.0,
        };
        for piece in self.pieces.iter().take(pieces) {
            if piece.slope <= reach.move_cost || largest <= enough {
                return;
            }
            let chosen = &mut self.chosen[piece.layer];
            if piece.moves <= left && piece.point == *chosen + 1 {
                *chosen = piece.point;
                left -= piece.moves;
                largest -= piece.gain;
            }
        }
    }

    /// How many moves there is no way around.
    fn forced(&self) -> usize {
        self.layers.iter().map(Layer::forced).sum()
    }

    /// The mean rank load and the largest after the moves that are forced and those that cost
    /// nothing, summed over layers; the largest with what crosses, if that is paid for.
    fn mean_and_largest(&self) -> (f64, f64) {
        self.mean_and_first(Point::value)
    }

    fn mean_and_first(&self, of: impl Fn(&Point) -> i32) -> (f64, f64) {
        let units: f64 = self.layers.iter().map(|layer| layer.unit).sum();
        let firsts = self.layers.iter().filter_map(|layer| {
            let first = layer.points().first()?;
            Some(f64::from(of(first)) * layer.unit)
        });
        (units * self.ranks.mean(), firsts.sum())
    }

    /// Balance against moves, from none that is not forced to as many as help.
    pub(crate) fn frontier(&self) -> Vec<Milestone> {
        let (mean, mut largest) = self.mean_and_first(|point| point.level);
        let balance = |largest: f64| {
            if largest > 0.0 {
                (mean / largest).min(1.0)
            } else {
                1.0
            }
        };
        let mut moves = self.forced();
        let mut milestones = Vec::with_capacity(self.pieces.len() + 1);
        milestones.push(Milestone {
            moves,
            balance: balance(largest),
        });
        for piece in &self.pieces {
            moves += piece.moves;
            largest -= piece.relief;
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
        previous: &Placement,
        replicas: &mut [Replica],
    ) {
        let num_slots = topology.num_slots();
        let rows = previous.phy2log().chunks_exact(num_slots);
        let layers = self.layers.iter().zip(rows).zip(&self.chosen);
        for (((layer, row), &point), slots) in layers.zip(replicas.chunks_exact_mut(num_slots)) {
            layer.write(&self.ranks, topology, row, point, slots, &mut self.layer);
        }
    }
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
fn walk_to(
    layer: &mut Layer,
    ranks: &Ranks,
    aim: f64,
    most: usize,
    fuel: &mut Fuel,
    scratch: &mut layer::Scratch,
) -> Walked {
    layer.walk_to(ranks, aim, most, fuel, scratch)
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
fn walk_for_nothing(
    layer: &mut Layer,
    ranks: &Ranks,
    fuel: &mut Fuel,
    scratch: &mut layer::Scratch,
) {
    layer.walk_for_nothing(ranks, fuel, scratch);
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

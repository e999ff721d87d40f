//! The balanced policy: replica counts and packing improved together by local search.
//!
//! 1. A layer is one [part](part), or one a node where groups of experts stay on a node.
//! 2. Spare slots go to the largest shares ([counts]); with two slots a rank, the counts are then
//!    searched for the pairing that is best for them ([fold]).
//! 3. The replicas are placed, heaviest first ([fill]).
//! 4. Exchanges and changes of counts lighten the heaviest rank ([search]).
//!
//! All loads are integers and all ties go to the lowest index, so that the same load gives the
//! same placement on every machine.

mod counts;
mod crossing;
mod fill;
mod fold;
mod fuel;
mod groups;
mod part;
mod random;
mod ranks;
mod rows;
mod search;
mod starts;
mod swaps;

use std::time::Instant;

pub(crate) use counts::share;
pub use fuel::Budget;
pub(crate) use fuel::Fuel;
pub(crate) use groups::Assignment;
pub(crate) use random::Random;
pub(crate) use ranks::WHOLE;

use crate::error::{Code, Error, Result, require_groups};
use crate::lanes::LANES;
use crate::placement::Replica;
use crate::planner::check_slots;
use crate::topology::Topology;
use part::Part;
use ranks::Ranks;
use starts::Starts;

/// Scratch of the policy, kept between calls: nothing is allocated once it is warm.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    part: Part,
    count: Vec<u32>,
    head: Vec<(i32, u32)>,
    items: Vec<(i32, u32)>,
    ranks: Ranks,
    best: Ranks,
    starts: Starts,
    fill: fill::Scratch,
    folds: fold::Scratch,
    search: swaps::Scratch,
    numbers: Vec<u32>,
    groups: Assignment,
    crossing: crossing::Scratch,
    free: Vec<Replica>,
}

/// What the policy is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Shape {
    pub(crate) num_experts: usize,
    /// In how many groups experts are that stay on one node; 1 where there is no such rule.
    num_groups: usize,
    /// What a token costs that crosses to another node, where groups may leave theirs at a price.
    crossing_cost: Option<f64>,
}

/// The most words of a table of ranks: a bit for each expert, and its slots. 1 GiB of them.
const MAX_TABLE_WORDS: usize = 1 << 27;

impl Shape {
    /// Checks that the topology can hold the experts.
    ///
    /// # Errors
    /// `TooSmall` for fewer slots than experts; `TooLarge` for more experts and GPUs than a table
    /// can be kept of; `NotDivisor` for groups that experts do not divide into
    /// groups that stay on a node; infeasible if dead GPUs leave too few slots, or if no node, or
    /// not all nodes together, can hold the groups.
    pub(crate) fn new(topology: &Topology, num_experts: usize, num_groups: usize) -> Result<Self> {
        check_slots(num_experts, topology)?;
        check_table(num_experts, topology)?;
        let live = topology.num_live_slots();
        if live < num_experts {
            return Err(Error::invalid(
                Code::TooSmall,
                "topology",
                format!("{live} slots on {} live GPUs", topology.num_live_gpus()),
                format!("of at least as many live slots as experts ({num_experts})"),
                format!("{} slots are missing", num_experts - live),
            )
            .infeasible());
        }
        if num_groups == 1 {
            return Ok(Self {
                num_experts,
                num_groups,
                crossing_cost: None,
            });
        }
        require_groups(num_groups, num_experts)?;
        let size = num_experts / num_groups;
        let room: usize = (0..topology.num_nodes())
            .map(|node| node_slots(topology, node) / size)
            .sum();
        if room < num_groups {
            return Err(Error::invalid(
                Code::TooSmall,
                "topology",
                format!(
                    "room for {room} whole groups on {} nodes",
                    topology.num_nodes()
                ),
                format!("of room for {num_groups} groups of {size} experts, each on one node"),
                "more slots a GPU, or group_rule=\"free\"",
            )
            .infeasible());
        }
        Ok(Self {
            num_experts,
            num_groups,
            crossing_cost: None,
        })
    }

    /// Refuses a rule for groups that leaves a live node without any.
    ///
    /// # Errors
    /// Infeasible if a node cannot hold a group, or if there are fewer groups than nodes.
    pub(crate) fn check_no_idle_node(&self, topology: &Topology) -> Result<()> {
        if !self.keeps_groups() {
            return Ok(());
        }
        let size = self.num_experts / self.num_groups;
        let slots = (0..topology.num_nodes()).map(|node| node_slots(topology, node));
        let live = slots.clone().filter(|&slots| slots > 0).count();
        let narrow = slots
            .clone()
            .filter(|&slots| 0 < slots && slots < size)
            .count();
        if narrow == 0 && live <= self.num_groups {
            return Ok(());
        }
        Err(Error::invalid(
            Code::TooSmall,
            "topology",
            format!("{live} live nodes, {narrow} of them too small for a group"),
            format!(
                "of at most {} nodes, each with room for a group of {size} experts",
                self.num_groups
            ),
            "slots of the others would stay empty; group_rule=\"free\" fills them",
        )
        .infeasible())
    }

    /// The same, if groups may leave their node at a price. Where groups cannot all stay on a node,
    /// or a node would have none, there is no rule.
    ///
    /// # Errors
    /// As [`new`](Self::new), but for groups that fit on no node.
    pub(crate) fn priced(
        topology: &Topology,
        num_experts: usize,
        num_groups: usize,
        crossing_cost: f64,
    ) -> Result<Self> {
        let free = Self::new(topology, num_experts, 1)?;
        require_groups(num_groups, num_experts)?;
        Ok(match Self::new(topology, num_experts, num_groups) {
            Ok(shape) if shape.check_no_idle_node(topology).is_ok() => Self {
                crossing_cost: Some(crossing_cost),
                ..shape
            },
            _ => free,
        })
    }

    /// Whether the rule keeps groups on one node.
    pub(crate) fn keeps_groups(&self) -> bool {
        self.num_groups > 1
    }

    /// How many experts a group has that may leave its node, and what that costs for each token.
    pub(crate) fn price(&self) -> Option<(usize, f64)> {
        let size = self.num_experts / self.num_groups;
        self.crossing_cost.map(|cost| (size, cost))
    }

    /// How many experts a group has, where groups stay on one node.
    pub(crate) fn kept_group_size(&self) -> Option<usize> {
        self.keeps_groups()
            .then(|| self.num_experts / self.num_groups)
    }
}

/// Refuses what would take a table beyond [`MAX_TABLE_WORDS`], rather than run out of memory.
fn check_table(num_experts: usize, topology: &Topology) -> Result<()> {
    let num_gpus = topology.num_gpus();
    let slots = num_gpus * topology.slots_per_gpu().next_multiple_of(LANES);
    let hosts = num_experts * num_gpus.div_ceil(64);
    if slots + hosts <= MAX_TABLE_WORDS {
        return Ok(());
    }
    Err(Error::invalid(
        Code::TooLarge,
        "topology",
        format!(
            "{num_experts} experts on {num_gpus} GPUs of up to {} slots",
            topology.slots_per_gpu()
        ),
        "small enough for a table of experts and slots by GPU, of 1 GiB at most",
        "fewer GPUs, or policy \"deepseek\", which keeps no table",
    ))
}

fn node_slots(topology: &Topology, node: usize) -> usize {
    let gpus = topology.gpus_of(node).filter(|&gpu| !topology.is_dead(gpu));
    gpus.map(|gpu| topology.slots_of(gpu).len()).sum()
}

/// Plans layers: `[layers, num_experts]` loads to `[layers, num_slots]` replicas by slot.
pub(crate) fn plan_layers(
    topology: &Topology,
    shape: &Shape,
    budget: Budget,
    loads: &[f32],
    replicas: &mut [Replica],
    scratch: &mut Scratch,
) {
    let num_slots = topology.num_slots();
    let num_layers = loads.len() / shape.num_experts;
    let start = Instant::now();
    let side_by_side = !shape.keeps_groups() && Starts::serve(topology);
    let layers = loads
        .chunks_exact(shape.num_experts)
        .zip(replicas.chunks_exact_mut(num_slots));
    for (layer, (load, slots)) in layers.enumerate() {
        let mut fuel = match budget {
            Budget::Iterations(steps) => Fuel::steps(steps),
            // What earlier layers left over is shared by those that follow.
            Budget::Time(time) => {
                let now = Instant::now();
                let left = (start + time).saturating_duration_since(now);
                Fuel::until(now + left / (num_layers - layer) as u32)
            }
        };
        scratch.numbers.clear();
        scratch.numbers.resize(shape.num_experts, 0);
        slots.fill(Replica::NONE);
        if shape.keeps_groups() {
            scratch.groups.assign(topology, shape.num_groups, load);
            for node in 0..topology.num_nodes() {
                scratch.take_node(topology, shape, node, load);
                scratch.solve(scratch.groups.slack_of(node), &mut fuel);
                scratch.write(topology, slots);
            }
            if let Some(cost) = shape.crossing_cost {
                scratch.price_groups(topology, shape, cost, &mut fuel.refilled(), load, slots);
            }
        } else if side_by_side {
            let lane = layer % LANES;
            if lane == 0 {
                let block = &loads[layer * shape.num_experts..];
                let block = &block[..block.len().min(LANES * shape.num_experts)];
                scratch.starts.make(topology, block, shape.num_experts);
            }
            scratch.improve_start(lane, &mut fuel);
            scratch.write(topology, slots);
        } else {
            scratch.solve_whole(topology, &mut fuel, load, slots);
        }
    }
}

impl Scratch {
    /// Plans a layer without regard to nodes.
    fn solve_whole(
        &mut self,
        topology: &Topology,
        fuel: &mut Fuel,
        load: &[f32],
        slots: &mut [Replica],
    ) {
        self.part.set_ranks(topology.live_gpus());
        self.part.set_experts(0..load.len() as u32, load);
        self.solve(0.0, fuel);
        self.write(topology, slots);
    }

    /// Lets groups leave their node at a price.
    fn price_groups(
        &mut self,
        topology: &Topology,
        shape: &Shape,
        cost: f64,
        fuel: &mut Fuel,
        load: &[f32],
        slots: &mut [Replica],
    ) {
        let mut free = std::mem::take(&mut self.free);
        free.clear();
        free.resize(slots.len(), Replica::NONE);
        self.numbers.fill(0);
        self.solve_whole(topology, fuel, load, &mut free);
        let price = crossing::Price {
            topology,
            load,
            group_size: shape.num_experts / shape.num_groups,
            cost,
        };
        crossing::settle(&price, slots, &free, &mut self.crossing);
        self.free = free;
    }

    /// Makes the part of a node: its ranks and the experts of its groups.
    fn take_node(&mut self, topology: &Topology, shape: &Shape, node: usize, load: &[f32]) {
        let size = shape.num_experts / shape.num_groups;
        let on_node = |&(gpu, ..): &(usize, usize, f64)| topology.node_of(gpu) == node;
        self.part.set_ranks(topology.live_gpus().filter(on_node));
        let node_of = self.groups.node_of();
        let experts = 0..shape.num_experts as u32;
        let experts = experts.filter(|&expert| node_of[expert as usize / size] == node as u32);
        self.part.set_experts(experts, load);
    }

    /// Places the experts of the part on its ranks, which may be so far above their mean.
    fn solve(&mut self, slack: f64, fuel: &mut Fuel) {
        let Self {
            part,
            count,
            head,
            items,
            ranks,
            best,
            fill,
            folds,
            search,
            ..
        } = self;
        let most = part.slots_of.iter().filter(|&&slots| slots > 0).count() as u32;
        head.clear();
        head.reserve(part.weight.len());
        counts::greedy(&part.weight, part.num_slots(), most, count, head);
        let pairs = part.slots_of.iter().all(|&slots| slots == 2);
        let paired = part.is_even() && pairs && part.num_ranks() > fold::FEWEST;
        if paired {
            folds.reserve(part.weight.len(), part.num_slots());
            let mean = part.level_over_mean(0.0);
            let level = fold::improve(&part.weight, count, most, mean, fuel, folds);
            let placed = fold::place(ranks, part, count, level, folds);
            items.clear();
            items.reserve(part.weight.len());
            fill.reserve(part);
            search::reserve(ranks, best, search);
            if placed {
                return;
            }
        }
        counts::list(&part.weight, count, head, items);
        fill::fill(ranks, part, items, count, fill);
        // Where the best pairing had to part two replicas of one expert, there is more to find.
        let mut more = fuel.refilled();
        let fuel = if paired { &mut more } else { fuel };
        search::improve(ranks, part, slack, fuel, best, search);
    }

    /// Improves one of the first placements that were made side by side.
    fn improve_start(&mut self, lane: usize, fuel: &mut Fuel) {
        let Self {
            part,
            ranks,
            best,
            starts,
            fill,
            search,
            ..
        } = self;
        if let Err((count, items)) = starts.take(lane, part, ranks) {
            fill::fill(ranks, part, items, count, fill);
        }
        search::improve(ranks, part, 0.0, fuel, best, search);
    }

    /// Writes what each slot of the part's ranks holds.
    fn write(&mut self, topology: &Topology, slots: &mut [Replica]) {
        for rank in 0..self.ranks.num_ranks() {
            let gpu = self.part.ranks[rank] as usize;
            let slots = &mut slots[topology.slots_of(gpu)];
            // Where a rank has more slots than there are experts for it, it has some again.
            for (slot, expert) in slots.iter_mut().zip(self.ranks.experts_of(rank).cycle()) {
                let expert = self.part.experts[expert as usize];
                let number = &mut self.numbers[expert as usize];
                *slot = Replica {
                    expert,
                    number: *number,
                };
                *number += 1;
            }
        }
    }
}

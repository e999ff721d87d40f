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
mod fill;
mod fold;
mod fuel;
mod groups;
mod moves;
mod part;
mod random;
mod ranks;
mod rows;
mod search;
mod starts;
mod swaps;

use std::time::Instant;

pub use fuel::Budget;
pub(crate) use moves::Walks;

use crate::error::{Code, Error, Result, require_multiple};
use crate::lanes::LANES;
use crate::placement::Replica;
use crate::planner::check_slots;
use crate::topology::Topology;
use fuel::Fuel;
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
    group_load: Vec<f64>,
    nodes: Vec<groups::Node>,
    groups: groups::Scratch,
    node_time: Vec<f64>,
    home: Ranks,
    local: Vec<u32>,
    node_of: Vec<u32>,
}

/// The mean load of a rank, in the units of levels.
pub(crate) fn level_of_mean(topology: &Topology) -> f64 {
    let mut part = Part::default();
    part.set_ranks(topology.live_gpus());
    f64::from(part.level_over_mean(0.0))
}

/// What the policy is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) num_experts: usize,
    /// In how many groups experts are that stay on one node; 1 where there is no such rule.
    num_groups: usize,
}

impl Shape {
    /// Checks that the topology can hold the experts.
    ///
    /// # Errors
    /// `TooSmall` for fewer slots than experts; `NotMultiple` for experts that do not divide into
    /// groups that stay on a node; infeasible if dead GPUs leave too few slots, or if no node, or
    /// not all nodes together, can hold the groups.
    pub(crate) fn new(topology: &Topology, num_experts: usize, num_groups: usize) -> Result<Self> {
        check_slots(num_experts, topology)?;
        let live = topology.num_live_slots();
        if live < num_experts {
            return Err(Error::infeasible(
                Code::TooSmall,
                "topology",
                format!("{live} slots on {} live GPUs", topology.num_live_gpus()),
                format!("of at least as many live slots as experts ({num_experts})"),
                format!("{} slots are missing", num_experts - live),
            ));
        }
        if num_groups == 1 {
            return Ok(Self {
                num_experts,
                num_groups,
            });
        }
        require_multiple("num_experts", num_experts, "num_groups", num_groups)?;
        let size = num_experts / num_groups;
        let room: usize = (0..topology.num_nodes())
            .map(|node| node_slots(topology, node) / size)
            .sum();
        if room < num_groups {
            return Err(Error::infeasible(
                Code::TooSmall,
                "topology",
                format!(
                    "room for {room} whole groups on {} nodes",
                    topology.num_nodes()
                ),
                format!("of room for {num_groups} groups of {size} experts, each on one node"),
                "more slots a GPU, or group_rule=\"free\"",
            ));
        }
        Ok(Self {
            num_experts,
            num_groups,
        })
    }

    /// Whether the rule keeps groups on one node.
    pub(crate) fn keeps_groups(&self) -> bool {
        self.num_groups > 1
    }
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
            scratch.assign_groups(topology, shape, load);
            scratch.time_nodes(topology, shape, load);
            for node in 0..topology.num_nodes() {
                scratch.take_node(topology, shape, node, load);
                scratch.solve(scratch.slack_of(node), &mut fuel);
                scratch.write(topology, slots);
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
            scratch.part.set_ranks(topology.live_gpus());
            scratch.part.set_experts(0..shape.num_experts as u32, load);
            scratch.solve(0.0, &mut fuel);
            scratch.write(topology, slots);
        }
    }
}

impl Scratch {
    /// Decides on which node each group goes.
    fn assign_groups(&mut self, topology: &Topology, shape: &Shape, load: &[f32]) {
        let size = shape.num_experts / shape.num_groups;
        self.group_load.clear();
        let sum = |group: &[f32]| group.iter().map(|&load| f64::from(load)).sum::<f64>();
        self.group_load.extend(load.chunks_exact(size).map(sum));
        self.nodes.clear();
        let nodes = 0..topology.num_nodes();
        self.nodes.extend(nodes.map(|node| {
            groups::Node {
                room: node_slots(topology, node) / size,
                speed: topology
                    .live_gpus()
                    .filter(|&(gpu, ..)| topology.node_of(gpu) == node)
                    .map(|(.., speed)| speed)
                    .sum(),
            }
        }));
        groups::assign(&self.group_load, &self.nodes, &mut self.groups);
    }

    /// Makes the part of a node: its ranks and the experts of its groups.
    fn take_node(&mut self, topology: &Topology, shape: &Shape, node: usize, load: &[f32]) {
        let size = shape.num_experts / shape.num_groups;
        let on_node = |&(gpu, ..): &(usize, usize, f64)| topology.node_of(gpu) == node;
        self.part.set_ranks(topology.live_gpus().filter(on_node));
        let node_of = &self.groups.best;
        let experts = 0..shape.num_experts as u32;
        let experts = experts.filter(|&expert| node_of[expert as usize / size] == node as u32);
        self.part.set_experts(experts, load);
    }

    /// Notes how long each node takes, if its ranks are even.
    fn time_nodes(&mut self, topology: &Topology, shape: &Shape, load: &[f32]) {
        let size = shape.num_experts / shape.num_groups;
        self.node_time.clear();
        self.node_time.resize(topology.num_nodes(), 0.0);
        for (experts, &node) in load.chunks_exact(size).zip(&self.groups.best) {
            let load: f64 = experts.iter().copied().map(f64::from).sum();
            self.node_time[node as usize] += load / self.nodes[node as usize].speed;
        }
    }

    /// How far above its mean a node's ranks may be and still take less than the slowest node.
    fn slack_of(&self, node: usize) -> f64 {
        let most = self.node_time.iter().copied().fold(0.0, f64::max);
        let time = self.node_time[node];
        if time > 0.0 { most / time - 1.0 } else { 0.0 }
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
        let mut paired = None;
        let pairs = part.slots_of.iter().all(|&slots| slots == 2);
        if part.is_even() && pairs && part.num_ranks() > fold::FEWEST {
            let target = part.level_over_mean(0.0);
            paired = Some(fold::improve(
                &part.weight,
                count,
                most,
                target,
                fuel,
                folds,
            ));
        }
        counts::list(&part.weight, count, head, items);
        fill::fill(ranks, part, items, count, fill);
        match paired {
            None => search::improve(ranks, part, slack, fuel, best, search),
            // The best pairing; else one that had to part two replicas of one expert.
            Some(level) if ranks.heaviest().1 <= level => {}
            Some(_) => search::improve(ranks, part, slack, &mut fuel.refilled(), best, search),
        }
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

fn explore_walks(
    part: &Part,
    home: &Ranks,
    likely: Option<u32>,
    fuel: &mut Fuel,
    ranks: &mut Ranks,
    search: &mut swaps::Scratch,
    walks: &mut Walks,
) {
    walks.explore(part, home, likely, fuel, ranks, search);
}

/// Migrations: from who holds what to what else is within reach.
impl Scratch {
    /// Explores the moves of one layer from the placement in `row`. Returns how much load a unit of
    /// level stands for.
    #[expect(clippy::too_many_arguments, reason = "what the planner has, handed on")]
    pub(crate) fn explore(
        &mut self,
        topology: &Topology,
        shape: &Shape,
        budget: Budget,
        load: &[f32],
        row: &[i64],
        likely: Option<u32>,
        walks: &mut Walks,
    ) -> f64 {
        let mut fuel = match budget {
            Budget::Iterations(steps) => Fuel::steps(steps.max(1)),
            Budget::Time(time) => Fuel::until(Instant::now() + time),
        };
        self.take_layer(topology, load, row);
        walks.start.copy_from(&self.home);
        if shape.keeps_groups() {
            walks.start.stay_on_nodes(&self.node_of);
        }
        self.settle(walks);
        explore_walks(
            &self.part,
            &self.home,
            likely,
            &mut fuel,
            &mut self.ranks,
            &mut self.search,
            walks,
        );
        let total: f64 = load.iter().map(|&load| f64::from(load)).sum();
        total / f64::from(part::TOTAL as i32)
    }

    /// Makes the part of a whole layer, and who holds what at home.
    fn take_layer(&mut self, topology: &Topology, load: &[f32], row: &[i64]) {
        self.part.set_ranks(topology.live_gpus());
        self.part.set_experts(0..load.len() as u32, load);
        self.local.clear();
        self.local.resize(load.len(), 0);
        for (local, &expert) in self.part.experts.iter().enumerate() {
            self.local[expert as usize] = local as u32;
        }
        self.node_of.clear();
        let nodes = self
            .part
            .ranks
            .iter()
            .map(|&gpu| topology.node_of(gpu as usize) as u32);
        self.node_of.extend(nodes);
        let Self {
            part, home, local, ..
        } = self;
        let slots_of = |rank: usize| topology.slots_of(part.ranks[rank] as usize);
        let share = |expert: usize, count: u32| counts::share(part.weight[expert], count);
        home.take(part, slots_of, row, local, share);
    }

    /// Finds a place for experts that have none, and something for every free slot.
    fn settle(&mut self, walks: &mut Walks) {
        let Self { part, .. } = self;
        let ranks = &mut walks.start;
        let share = |expert: usize, count: u32| counts::share(part.weight[expert], count);
        let lightest_free = |ranks: &Ranks, expert: usize| {
            (0..ranks.num_ranks())
                .filter(|&rank| !ranks.holds(rank, expert))
                .filter_map(|rank| {
                    let slot = (0..ranks.filled(rank)).find(|&slot| ranks.is_free(rank, slot))?;
                    Some((ranks.time(rank, ranks.load(rank)), rank, slot))
                })
                .min()
        };
        for expert in 0..part.weight.len() {
            if ranks.count(expert) > 0 {
                continue;
            }
            if let Some((_, rank, slot)) = lightest_free(ranks, expert) {
                ranks.occupy(rank, slot, expert, share);
                continue;
            }
            // In the place of a replica of another: where the heaviest rank touched is lightest.
            let mut best: Option<(i32, usize, usize)> = None;
            for rank in 0..ranks.num_ranks() {
                for slot in 0..ranks.filled(rank) {
                    if ranks.count(ranks.expert_in(rank, slot)) > 1 {
                        let level = ranks.level_after_recount(rank, slot, expert, share);
                        if best.is_none_or(|best| (level, rank, slot) < best) {
                            best = Some((level, rank, slot));
                        }
                    }
                }
            }
            if let Some((_, rank, slot)) = best {
                ranks.recount(rank, slot, expert, share);
            }
        }
        // A free slot takes what comes nearest to filling its rank up to the mean, if all its free
        // slots took as much.
        let mean = i64::from(part.level_over_mean(0.0));
        for rank in 0..ranks.num_ranks() {
            for slot in 0..ranks.filled(rank) {
                if !ranks.is_free(rank, slot) {
                    continue;
                }
                let free = (slot..ranks.filled(rank)).filter(|&slot| ranks.is_free(rank, slot));
                let missing = mean - i64::from(ranks.time(rank, ranks.load(rank)));
                let want = missing / free.count() as i64;
                let nearest = (0..part.weight.len())
                    .filter(|&expert| !ranks.holds(rank, expert))
                    .min_by_key(|&expert| {
                        let more = share(expert, ranks.count(expert) + 1);
                        (i64::from(ranks.time(rank, more)) - want).abs()
                    });
                if let Some(expert) = nearest {
                    ranks.occupy(rank, slot, expert, share);
                }
            }
        }
    }

    /// Writes what each slot of a layer holds at a point of its frontier. What stays on a rank
    /// keeps its slot.
    pub(crate) fn go(
        &mut self,
        topology: &Topology,
        load: &[f32],
        row: &[i64],
        walks: &Walks,
        point: usize,
        slots: &mut [Replica],
    ) {
        self.take_layer(topology, load, row);
        slots.fill(Replica::NONE);
        let Self {
            part,
            ranks,
            home,
            local,
            numbers,
            ..
        } = self;
        match walks.points().get(point) {
            Some(point) => walks.go(part, point, ranks),
            None => ranks.copy_from(home),
        }
        let stays = |slot: usize, rank: usize, ranks: &Ranks| {
            let expert = usize::try_from(row[slot]).ok()?;
            ranks
                .holds(rank, local[expert] as usize)
                .then_some(expert as u32)
        };
        for rank in 0..ranks.num_ranks() {
            let of_rank = topology.slots_of(part.ranks[rank] as usize);
            let first = of_rank.start;
            for slot in of_rank.clone() {
                if let Some(expert) = stays(slot, rank, ranks)
                    && !slots[first..slot]
                        .iter()
                        .any(|replica| replica.expert == expert)
                {
                    slots[slot] = Replica { expert, number: 0 };
                }
            }
            let mut newcomers = (0..ranks.filled(rank))
                .filter(|&slot| !ranks.is_free(rank, slot))
                .map(|slot| ranks.expert_in(rank, slot))
                .filter(|&expert| !home.holds(rank, expert))
                .map(|expert| part.experts[expert]);
            for slot in of_rank {
                if slots[slot] == Replica::NONE {
                    // A slot that nothing fits, or that repeats an expert, keeps what it has.
                    let kept = u32::try_from(row[slot]).unwrap_or(slots[first].expert);
                    let expert = newcomers.next().unwrap_or(kept);
                    slots[slot] = Replica { expert, number: 0 };
                }
            }
        }
        numbers.clear();
        numbers.resize(load.len(), 0);
        for slot in slots.iter_mut().filter(|slot| **slot != Replica::NONE) {
            slot.number = numbers[slot.expert as usize];
            numbers[slot.expert as usize] += 1;
        }
    }
}

//! What moves would do to one layer: the frontier of its heaviest rank against moves.
//!
//! For each of a few levels a walk starts again from the placement in force, and takes the step that
//! is worth most for what it moves, until no rank is above the level: aiming at a level wastes
//! nothing on ranks that are light enough. Every step of every walk is a point of the frontier: so
//! many moves, so heavy a heaviest rank.

use super::relabel::{self, relabel};
use super::settle::{self, settle};
use super::table::{Ranks, Site, Table, renew, scale};
use super::walk::{self, Step, Walker};
use crate::balance::Fuel;
use crate::placement::Replica;
use crate::topology::Topology;

/// A point of a frontier: where a walk has come to.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Point {
    pub(crate) moves: u32,
    /// The longest that any rank takes, and the price of what crosses.
    pub(crate) level: i32,
    pub(crate) price: i32,
    /// The steps that lead there.
    first: u32,
    end: u32,
}

impl Point {
    /// What a table comes to; the moves and steps that lead there are to be filled in.
    #[inline(always)]
    fn of(ranks: &Ranks, weight: &[i32], table: &Table, served: &mut Vec<i64>) -> Self {
        let price = ranks.price();
        Self {
            level: table.level(ranks),
            price: price.map_or(0, |price| price.of(ranks, weight, table, served)),
            ..Self::default()
        }
    }

    /// What is made least.
    pub(crate) fn value(&self) -> i32 {
        self.level.saturating_add(self.price)
    }
}

/// What a walk took: the moves, and how many ranks were above its level.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Walked {
    pub(crate) moves: usize,
    pub(crate) above: usize,
}

/// Scratch that layers share.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    table: Table,
    walk: walk::Scratch,
    settle: settle::Scratch,
    relabel: relabel::Scratch,
    /// The load and the speed of each island.
    islands: Vec<(f64, f64)>,
    /// What a rank holds and has no slot for yet.
    unplaced: Vec<u32>,
    numbers: Vec<u32>,
    served: Vec<i64>,
    /// Sites that another expert gets.
    changed: Vec<Site>,
}

/// One layer: where it starts, and where its walks have led.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    weight: Vec<i32>,
    /// Who held what before any move.
    home: Vec<u64>,
    /// Who holds what after the moves that cannot be avoided.
    start: Table,
    /// How much load a unit of level stands for.
    pub(crate) unit: f64,
    /// A level that no step leads below: the mean of the island that has most to do.
    pub(crate) floor: f64,
    /// Whether a slot may repeat an expert of its rank.
    repeats: bool,
    steps: Vec<Step>,
    points: Vec<Point>,
}

impl Layer {
    /// Takes over what a row of slots holds, and makes the moves that cannot be avoided.
    pub(crate) fn start(
        &mut self,
        ranks: &Ranks,
        topology: &Topology,
        load: &[f32],
        row: &[i64],
        repeats: bool,
        scratch: &mut Scratch,
    ) {
        self.repeats = repeats;
        self.unit = scale(load, &mut self.weight);
        self.start.take(ranks, &self.weight, topology, row, repeats);
        self.home.clear();
        self.home.extend_from_slice(self.start.hosts());
        settle(
            ranks,
            &self.weight,
            &mut self.start,
            repeats,
            &mut scratch.settle,
        );
        self.begin(ranks, scratch);
    }

    /// Whether an expert found no place: the groups of its island have no room left.
    pub(crate) fn lacks_experts(&self) -> bool {
        (0..self.weight.len()).any(|expert| self.start.count(expert) == 0)
    }

    /// Whether a slot of a rank that lives is empty: its island has no group.
    pub(crate) fn leaves_slots(&self, ranks: &Ranks) -> bool {
        let mut slots = (0..ranks.len()).map(|rank| ranks.slots(rank)).enumerate();
        slots.any(|(rank, mut slots)| {
            slots.any(|slot| self.start.expert_in(Site::new(rank, slot)).is_none())
        })
    }

    /// Starts from a plan made from scratch instead, its ranks renamed: all its moves are forced.
    pub(crate) fn start_from_plan(
        &mut self,
        ranks: &Ranks,
        topology: &Topology,
        plan: &[Replica],
        scratch: &mut Scratch,
    ) {
        self.list_steps_to(ranks, topology, plan, scratch);
        for step in &self.steps {
            step.take(&mut self.start, &self.weight);
        }
        self.begin(ranks, scratch);
    }

    /// Begins the frontier where the moves that cannot be avoided have led.
    fn begin(&mut self, ranks: &Ranks, scratch: &mut Scratch) {
        let moves = self.moves_to(&self.start);
        renew(&mut scratch.islands, ranks.num_islands(), (0.0, 0.0));
        for rank in 0..ranks.len() {
            let (load, speed) = &mut scratch.islands[ranks.island_of(rank)];
            *load += f64::from(self.start.load[rank]);
            *speed += ranks.speed(rank);
        }
        let islands = scratch.islands.iter().filter(|&&(_, speed)| speed > 0.0);
        self.floor = islands
            .map(|(load, speed)| load / speed)
            .fold(0.0, f64::max);
        self.steps.clear();
        self.points.clear();
        let first = Point::of(ranks, &self.weight, &self.start, &mut scratch.served);
        self.points.push(Point { moves, ..first });
    }

    /// How many experts a table has on ranks that did not hold them before any move.
    fn moves_to(&self, table: &Table) -> u32 {
        let came = table.hosts().iter().zip(&self.home);
        came.map(|(now, then)| (now & !then).count_ones()).sum()
    }

    /// How many moves there is no way around.
    pub(crate) fn forced(&self) -> usize {
        self.points.first().map_or(0, |point| point.moves as usize)
    }

    /// Lists how far above the floor each rank is that is above it, as a fraction.
    pub(crate) fn list_excesses(&self, ranks: &Ranks, list: &mut Vec<f64>) {
        if self.floor > 0.0 {
            let loads = (0..ranks.len()).map(|rank| ranks.time(rank, self.start.load[rank]));
            let excesses = loads.map(|time| f64::from(time) / self.floor - 1.0);
            list.extend(excesses.filter(|&excess| excess > 0.0));
        }
    }

    /// Takes the steps that lighten the heaviest rank at no move: those that make slots repeat an
    /// expert.
    #[inline(always)]
    pub(crate) fn walk_for_nothing(
        &mut self,
        ranks: &Ranks,
        fuel: &mut Fuel,
        scratch: &mut Scratch,
    ) {
        if !self.repeats {
            return;
        }
        scratch.table.copy_from(&self.start);
        let mut trail = Trail::new(self.forced(), &mut self.steps, &mut self.points);
        let Scratch {
            table,
            walk,
            served,
            ..
        } = scratch;
        let weight = &self.weight;
        let mut walker = Walker::new(ranks, weight, &self.home, table, walk);
        walker.walk_for_nothing(fuel, |step, moves, table| {
            trail.add(step, moves, Point::of(ranks, weight, table, served));
        });
    }

    /// Walks to a level, given as a fraction above the floor, or until more than so many moves are
    /// made.
    #[inline(always)]
    pub(crate) fn walk_to(
        &mut self,
        ranks: &Ranks,
        aim: f64,
        most: usize,
        fuel: &mut Fuel,
        scratch: &mut Scratch,
    ) -> Walked {
        let target = (self.floor * (1.0 + aim)) as i32;
        let times = (0..ranks.len()).map(|rank| ranks.time(rank, self.start.load[rank]));
        let above = times.filter(|&time| time > target).count();
        if above == 0 {
            return Walked::default();
        }
        scratch.table.copy_from(&self.start);
        let forced = self.forced();
        let mut trail = Trail::new(forced, &mut self.steps, &mut self.points);
        let Scratch {
            table,
            walk,
            served,
            ..
        } = scratch;
        let weight = &self.weight;
        let mut walker = Walker::new(ranks, weight, &self.home, table, walk);
        walker.walk_to(target, self.repeats, fuel, |step, moves, table| {
            trail.add(step, moves, Point::of(ranks, weight, table, served));
            trail.moves as usize <= forced.saturating_add(most)
        });
        let moves = (trail.moves as usize).saturating_sub(forced);
        Walked { moves, above }
    }

    /// Takes in a plan made from scratch, as a path on which each rank gives its slots to what one of
    /// the plan's ranks holds: that which leaves fewest to arrive.
    pub(crate) fn add_plan(
        &mut self,
        ranks: &Ranks,
        topology: &Topology,
        plan: &[Replica],
        scratch: &mut Scratch,
    ) {
        let first = self.steps.len();
        self.list_steps_to(ranks, topology, plan, scratch);
        let Scratch { table, served, .. } = scratch;
        table.copy_from(&self.start);
        for step in &self.steps[first..] {
            step.take(table, &self.weight);
        }
        self.points.push(Point {
            moves: self.moves_to(table),
            first: first as u32,
            end: self.steps.len() as u32,
            ..Point::of(ranks, &self.weight, table, served)
        });
    }

    /// Lists the steps from the start to a plan whose ranks are renamed.
    fn list_steps_to(
        &mut self,
        ranks: &Ranks,
        topology: &Topology,
        plan: &[Replica],
        scratch: &mut Scratch,
    ) {
        let Scratch {
            unplaced,
            changed,
            relabel: names,
            ..
        } = scratch;
        relabel(ranks, topology, &self.home, plan, names);
        for (rank, &origin) in names.origin().iter().enumerate() {
            let slots = topology.slots_of(ranks.gpus[origin as usize] as usize);
            let wanted = plan[slots]
                .iter()
                .filter(|&&replica| replica != Replica::NONE);
            unplaced.clear();
            unplaced.extend(wanted.map(|replica| replica.expert));
            changed.clear();
            for site in ranks.slots(rank).map(|slot| Site::new(rank, slot)) {
                let held = self.start.expert_in(site);
                let stays = unplaced
                    .iter()
                    .position(|&expert| held == Some(expert as usize));
                match stays {
                    Some(place) => drop(unplaced.remove(place)),
                    None => changed.push(site),
                }
            }
            let gifts = changed.iter().zip(&*unplaced);
            let gifts = gifts.map(|(&site, &expert)| Step::Give(site, expert));
            self.steps.extend(gifts);
        }
    }

    /// Keeps the points that no mixture of others beats.
    pub(crate) fn keep_hull(&mut self, most: usize) {
        let most = most.max(self.forced());
        self.points.retain(|point| point.moves as usize <= most);
        keep_hull(&mut self.points);
    }

    /// The least value on the hull.
    pub(crate) fn value(&self) -> i32 {
        self.points.last().map_or(0, Point::value)
    }

    /// The points, by moves.
    pub(crate) fn points(&self) -> &[Point] {
        &self.points
    }

    /// Writes what each slot holds at a point. What stays on a rank keeps its slot.
    pub(crate) fn write(
        &self,
        ranks: &Ranks,
        topology: &Topology,
        row: &[i64],
        point: usize,
        slots: &mut [Replica],
        scratch: &mut Scratch,
    ) {
        let Scratch {
            table,
            unplaced,
            numbers,
            ..
        } = scratch;
        table.copy_from(&self.start);
        let point = self.points.get(point).copied().unwrap_or_default();
        for &step in &self.steps[point.first as usize..point.end as usize] {
            step.take(table, &self.weight);
        }
        slots.fill(Replica::NONE);
        for (rank, &gpu) in ranks.gpus.iter().enumerate() {
            let of_rank = topology.slots_of(gpu as usize);
            unplaced.clear();
            let sites = ranks.slots(rank).map(|slot| Site::new(rank, slot));
            let held = sites.filter_map(|site| table.expert_in(site));
            unplaced.extend(held.map(|expert| expert as u32));
            for slot in of_rank.clone() {
                let stays = unplaced
                    .iter()
                    .position(|&expert| i64::from(expert) == row[slot]);
                if let Some(place) = stays {
                    slots[slot].expert = unplaced.remove(place);
                }
            }
            let mut came = unplaced.iter();
            for slot in of_rank {
                if slots[slot] == Replica::NONE
                    && let Some(&expert) = came.next()
                {
                    slots[slot].expert = expert;
                }
            }
        }
        renew(numbers, self.weight.len(), 0);
        for slot in slots.iter_mut().filter(|slot| **slot != Replica::NONE) {
            slot.number = numbers[slot.expert as usize];
            numbers[slot.expert as usize] += 1;
        }
    }
}

/// Writes down where a walk leads.
struct Trail<'a> {
    moves: u32,
    first: u32,
    steps: &'a mut Vec<Step>,
    points: &'a mut Vec<Point>,
}

impl<'a> Trail<'a> {
    fn new(forced: usize, steps: &'a mut Vec<Step>, points: &'a mut Vec<Point>) -> Self {
        Self {
            moves: forced as u32,
            first: steps.len() as u32,
            steps,
            points,
        }
    }

    #[inline(always)]
    fn add(&mut self, step: Step, moves: i32, point: Point) {
        self.moves = self.moves.saturating_add_signed(moves);
        self.steps.push(step);
        self.points.push(Point {
            moves: self.moves,
            first: self.first,
            end: self.steps.len() as u32,
            ..point
        });
    }
}

/// Keeps the lower convex hull, by moves.
fn keep_hull(points: &mut Vec<Point>) {
    points.sort_unstable_by_key(|point| (point.moves, point.value(), point.first, point.end));
    let mut kept = 0;
    for index in 0..points.len() {
        let next = points[index];
        if kept > 0 && next.value() >= points[kept - 1].value() {
            continue;
        }
        while kept > 1 && above(&points[kept - 2], &points[kept - 1], &next) {
            kept -= 1;
        }
        if kept > 0 && points[kept - 1].moves == next.moves {
            kept -= 1;
        }
        points[kept] = next;
        kept += 1;
    }
    points.truncate(kept);
}

/// Whether the second point is on or above the line from the first to the third.
fn above(a: &Point, b: &Point, c: &Point) -> bool {
    let (run, rise) = (
        i64::from(c.moves) - i64::from(a.moves),
        i64::from(c.value()) - i64::from(a.value()),
    );
    let (part, partial) = (
        i64::from(b.moves) - i64::from(a.moves),
        i64::from(b.value()) - i64::from(a.value()),
    );
    partial * run >= rise * part
}

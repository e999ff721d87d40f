//! From a placement in force to a better one, a few replicas at a time.
//!
//! For each of a few levels the search starts again from the placement in force, and takes the
//! step that lightens the heaviest rank most for what it moves, until no rank is above the level:
//! aiming at a level wastes nothing on ranks that are light enough. Every step of every such walk
//! is a point of the layer's frontier: so many moves, so heavy a heaviest rank.
//!
//! A *move* is an expert that arrives on a rank that did not hold it. Going back is no move.

use super::counts::share;
use super::fuel::Fuel;
use super::part::Part;
use super::ranks::{Ranks, Swap};
use super::swaps::Scratch as Search;

/// How far above the mean the levels are that are aimed at.
const LEVELS: [f64; 8] = [0.05, 0.03, 0.018, 0.011, 0.007, 0.004, 0.002, 0.0003];

/// Which multiples of the likely level are aimed at.
const AIMS: [f64; 4] = [1.3, 0.9, 0.6, 0.35];

/// For so few moves, the first of the fixed levels are aimed at.
const FEW: u32 = 4;

/// How many steps of the first walk may change counts: looking for them takes long, and they help
/// most where few moves do.
const RECOUNTS: usize = 3;

/// One step of a walk.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    /// Two replicas change places.
    Swap(Swap),
    /// A slot is given to another expert.
    Recount {
        rank: usize,
        slot: usize,
        expert: usize,
    },
}

/// A point of a frontier: where a walk has come to.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Point {
    pub(crate) moves: u32,
    pub(crate) level: i32,
    /// The steps that lead there.
    first: u32,
    end: u32,
}

/// Walks of one layer.
#[derive(Debug, Default)]
pub(crate) struct Walks {
    /// Where all walks start.
    pub(crate) start: Ranks,
    steps: Vec<Step>,
    points: Vec<Point>,
    aims: Vec<i32>,
    over: Vec<i32>,
}

impl Walks {
    /// Walks from `start`; `home` is who holds what before any move. Where it is likely that the
    /// layer gets about so many moves, only levels that take about as many are aimed at.
    #[inline(always)]
    pub(crate) fn explore(
        &mut self,
        part: &Part,
        home: &Ranks,
        likely: Option<u32>,
        fuel: &mut Fuel,
        ranks: &mut Ranks,
        search: &mut Search,
    ) {
        self.steps.clear();
        self.points.clear();
        let at_start = moves_from(home, &self.start);
        let most = likely.map_or(u32::MAX, |likely| at_start + 4 * likely + 8);
        let level = self.start.heaviest().1;
        self.points.push(Point {
            moves: at_start,
            level,
            first: 0,
            end: 0,
        });
        self.aims.clear();
        match likely {
            Some(..=FEW) => self
                .aims
                .extend(LEVELS[..4].iter().map(|&over| part.level_over_mean(over))),
            Some(likely) => self.aim_near(part, likely),
            None => self
                .aims
                .extend(LEVELS.map(|over| part.level_over_mean(over))),
        }
        self.aims.retain(|&target| target < level);
        for walk in 0..self.aims.len() {
            let target = self.aims[walk];
            ranks.copy_from(&self.start);
            let first = self.steps.len() as u32;
            let mut moves = at_start;
            loop {
                let (heavy, level) = ranks.heaviest();
                if level <= target || moves > most || !fuel.step() {
                    break;
                }
                let recount = walk == 0 && (self.steps.len() as u32 - first) < RECOUNTS as u32;
                let next = best_step(part, home, ranks, heavy, target, recount, search);
                let Some((step, more)) = next else {
                    break;
                };
                take(part, ranks, &step);
                self.steps.push(step);
                moves = moves.saturating_add_signed(more);
                let (_, level) = ranks.heaviest();
                let end = self.steps.len() as u32;
                self.points.push(Point {
                    moves,
                    level,
                    first,
                    end,
                });
            }
        }
        hull(&mut self.points);
    }

    /// Aims at levels that take about so many moves.
    fn aim_near(&mut self, part: &Part, moves: u32) {
        let mean = part.level_over_mean(0.0);
        self.over.clear();
        let ranks = 0..self.start.num_ranks();
        self.over
            .extend(ranks.map(|rank| self.start.time(rank, self.start.load(rank)) - mean));
        self.over.sort_unstable_by(|a, b| b.cmp(a));
        // The first moves bring a rank below the level each; the more, the less.
        let place = self.over.len() * moves as usize / (self.over.len() + moves as usize);
        let over = self
            .over
            .get(place)
            .map_or(0.0, |&over| f64::from(over.max(0)));
        for factor in AIMS {
            self.aims
                .push(mean + (over * factor) as i32 + part.level_over_mean(3e-4) - mean);
        }
    }

    /// The points that no mixture of others beats, by moves.
    pub(crate) fn points(&self) -> &[Point] {
        &self.points
    }

    /// Goes where a point is.
    pub(crate) fn go(&self, part: &Part, point: &Point, ranks: &mut Ranks) {
        ranks.copy_from(&self.start);
        for step in &self.steps[point.first as usize..point.end as usize] {
            take(part, ranks, step);
        }
    }
}

#[inline(always)]
fn take(part: &Part, ranks: &mut Ranks, step: &Step) {
    match *step {
        Step::Swap(swap) => ranks.apply(&swap),
        Step::Recount { rank, slot, expert } => {
            ranks.recount(rank, slot, expert, |expert, count| {
                share(part.weight[expert], count)
            });
        }
    }
}

/// The step that takes most from what ranks have above the target, for each move.
#[inline(always)]
fn best_step(
    part: &Part,
    home: &Ranks,
    ranks: &Ranks,
    heavy: usize,
    target: i32,
    recount: bool,
    search: &mut Search,
) -> Option<(Step, i32)> {
    let cost = |rank: usize, came: usize, left: usize| {
        i32::from(!home.holds(rank, came)) - i32::from(!home.holds(rank, left))
    };
    let over = |rank: usize, load: i32| i64::from((ranks.time(rank, load) - target).max(0));
    let mut best: Option<(i64, i32, Step)> = None;
    // Gain for each move; what moves nothing is as good as half a move.
    let better = |gain: i64, moves: i32, than: &Option<(i64, i32, Step)>| {
        let worth = |gain: i64, moves: i32| gain * 2 / i64::from((2 * moves).max(1));
        gain > 0
            && than
                .as_ref()
                .is_none_or(|&(g, m, _)| worth(gain, moves) > worth(g, m))
    };
    search.order.sort(ranks);
    let swap = ranks
        .shed_by_return(heavy, target, home)
        .or_else(|| ranks.shed(heavy, target, &search.order))
        .or_else(|| ranks.best_swap(heavy, usize::MAX, search));
    if let Some(swap) = swap {
        let light = swap.light.0;
        let ours = ranks.expert_in(heavy, swap.heavy.1);
        let theirs = ranks.expert_in(light, swap.light.1);
        let moved = ranks.share_in(heavy, swap.heavy.1) - ranks.share_in(light, swap.light.1);
        let gain = over(heavy, ranks.load(heavy)) + over(light, ranks.load(light))
            - over(heavy, ranks.load(heavy) - moved)
            - over(light, ranks.load(light) + moved);
        let moves = cost(heavy, theirs, ours) + cost(light, ours, theirs);
        if better(gain, moves, &best) {
            best = Some((gain, moves, Step::Swap(swap)));
        }
    }
    if !recount {
        return best.map(|(_, moves, step)| (step, moves));
    }
    let share_of = |expert: usize, count: u32| share(part.weight[expert], count);
    // An expert of the heaviest rank gets one more replica, in the place of another's.
    for slot in 0..ranks.filled(heavy) {
        let hot = ranks.expert_in(heavy, slot);
        let less = share_of(hot, ranks.count(hot) + 1);
        let relief = ranks.excess_if_shared(hot, ranks.share_in(heavy, slot), usize::MAX, target)
            - ranks.excess_if_shared(hot, less, usize::MAX, target);
        if relief <= 0 || best.as_ref().is_some_and(|&(gain, ..)| relief * 2 <= gain) {
            continue;
        }
        for rank in 0..ranks.num_ranks() {
            if ranks.holds(rank, hot) || !ranks.may_trade(rank, heavy) {
                continue;
            }
            let before = over(rank, ranks.load(rank));
            for place in 0..ranks.filled(rank) {
                let cold = ranks.expert_in(rank, place);
                let count = ranks.count(cold);
                if count == 1 {
                    continue;
                }
                let now = ranks.share_in(rank, place);
                let after = over(rank, ranks.load(rank) - now + less);
                let burden = ranks.excess_if_shared(cold, share_of(cold, count - 1), rank, target)
                    - ranks.excess_if_shared(cold, now, rank, target);
                let gain = relief + before - after - burden;
                let moves = cost(rank, hot, cold);
                if better(gain, moves, &best) {
                    best = Some((
                        gain,
                        moves,
                        Step::Recount {
                            rank,
                            slot: place,
                            expert: hot,
                        },
                    ));
                }
            }
        }
    }
    best.map(|(_, moves, step)| (step, moves))
}

/// How many replicas are on ranks that did not hold their expert before.
pub(crate) fn moves_from(home: &Ranks, ranks: &Ranks) -> u32 {
    let mut moves = 0;
    for rank in 0..ranks.num_ranks() {
        for slot in 0..ranks.filled(rank) {
            let arrived =
                !ranks.is_free(rank, slot) && !home.holds(rank, ranks.expert_in(rank, slot));
            moves += u32::from(arrived);
        }
    }
    moves
}

/// Keeps the lower convex hull, by moves.
fn hull(points: &mut Vec<Point>) {
    points.sort_by_key(|point| (point.moves, point.level));
    let mut kept = 0;
    for index in 0..points.len() {
        let next = points[index];
        if kept > 0 && next.level >= points[kept - 1].level {
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
        i64::from(c.level) - i64::from(a.level),
    );
    let (part, partial) = (
        i64::from(b.moves) - i64::from(a.moves),
        i64::from(b.level) - i64::from(a.level),
    );
    partial * run >= rise * part
}

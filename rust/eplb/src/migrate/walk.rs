//! From who holds what to a level that no rank is above, a step at a time.
//!
//! A step exchanges two replicas, which takes two moves at most, or gives a slot to another expert,
//! which takes one, or none where the rank holds that expert already. The heaviest rank is brought
//! below the level, then the next: what is taken from it goes where there is most room for it, and
//! first of all in exchange for a replica that has moved already, which is a move saved.

mod give;

use super::rows::{argmax, argmin, least_above, nearest};
use super::table::{BARRED, Ranks, Site, Table, renew};
use crate::balance::{Fuel, WHOLE};
use give::{Cold, Give, Hot};

/// What it is worth that one rank more is below the level, in mean rank loads: exchanges are counted
/// by the rank, however little it is above.
const PRIZE: f64 = 0.01;

/// How many of the first steps of a walk may give slots: looking for them takes long, and they help
/// most where ranks are far above the level.
const GIVES: u32 = 4;

/// One step of a walk.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    /// Two replicas change places.
    Exchange(Site, Site),
    /// A slot is given to another expert.
    Give(Site, u32),
}

impl Step {
    #[inline(always)]
    pub(crate) fn take(self, table: &mut Table, weight: &[i32]) {
        match self {
            Self::Exchange(a, b) => table.exchange(a, b),
            Self::Give(site, expert) => table.give(weight, site, expert as usize),
        }
    }
}

/// Scratch of walks.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// What each rank may carry, and how much more it does.
    cap: Vec<i32>,
    over: Vec<i32>,
    ours: Vec<i32>,
    goal: Vec<i32>,
    miss: Vec<i32>,
    /// Sites of experts that were not on their rank at home.
    arrived: Vec<Site>,
    hots: Vec<Hot>,
    colds: Vec<Cold>,
}

/// What a step does: how much it is worth, and the moves it takes.
#[derive(Debug, Clone, Copy)]
struct Offer {
    gain: i64,
    moves: i32,
    step: Step,
}

impl Offer {
    /// What it gains for each move; what moves nothing is as good as half a move.
    #[inline(always)]
    fn worth(&self) -> i64 {
        self.gain * 4 / i64::from((2 * self.moves).max(1))
    }
}

/// A layer on its way.
pub(crate) struct Walker<'a> {
    ranks: &'a Ranks,
    weight: &'a [i32],
    /// Who held what before any move.
    home: &'a [u64],
    table: &'a mut Table,
    scratch: &'a mut Scratch,
    /// What it is worth that one rank more is below its cap.
    prize: i32,
}

impl<'a> Walker<'a> {
    #[inline(always)]
    pub(crate) fn new(
        ranks: &'a Ranks,
        weight: &'a [i32],
        home: &'a [u64],
        table: &'a mut Table,
        scratch: &'a mut Scratch,
    ) -> Self {
        let mut walker = Self {
            ranks,
            weight,
            home,
            table,
            scratch,
            prize: 0,
        };
        walker.find_arrived();
        walker
    }

    /// Takes steps until no rank takes longer than `target` or no step helps. `visit` is told of
    /// each step, its moves and who holds what after it, and says whether to go on.
    #[inline(always)]
    pub(crate) fn walk_to(
        &mut self,
        target: i32,
        repeats: bool,
        fuel: &mut Fuel,
        mut visit: impl FnMut(Step, i32, &Table) -> bool,
    ) {
        self.aim(target);
        self.prize = (self.ranks.mean() * PRIZE) as i32;
        let kind = if repeats { Give::Any } else { Give::Newcomers };
        for step in 0.. {
            let heavy = self.heaviest();
            if self.scratch.over[heavy] <= 0 || !fuel.step() {
                return;
            }
            // Not `or_else`: closures are compiled without the vectors that this is compiled for.
            let mut best = self.exchange_back(heavy);
            if best.is_none() {
                best = self.exchange_new(heavy);
            }
            let stuck = best.is_none();
            if stuck {
                best = self.exchange_nearest(heavy);
            }
            if stuck || step < GIVES {
                best = self.best_give(heavy, kind, best).or(best);
            }
            let Some(offer) = best else { return };
            self.take(offer.step);
            if !visit(offer.step, offer.moves, self.table) {
                return;
            }
        }
    }

    /// Lightens the heaviest rank for as long as that is possible at no move.
    #[inline(always)]
    pub(crate) fn walk_for_nothing(
        &mut self,
        fuel: &mut Fuel,
        mut visit: impl FnMut(Step, i32, &Table),
    ) {
        let mut level = self.table.level(self.ranks);
        // No step is worth that another rank is as heavy then.
        self.prize = WHOLE;
        while fuel.step() {
            self.aim(level - 1);
            let heavy = self.heaviest();
            let Some(offer) = self.best_give(heavy, Give::Repeats, None) else {
                return;
            };
            self.take(offer.step);
            let after = self.table.level(self.ranks);
            if after >= level {
                return;
            }
            level = after;
            visit(offer.step, offer.moves, self.table);
        }
    }

    /// Sets what each rank may carry.
    #[inline(always)]
    fn aim(&mut self, target: i32) {
        let cap = &mut self.scratch.cap;
        cap.clear();
        cap.extend((0..self.ranks.len()).map(|rank| self.ranks.load_in(rank, target)));
        cap.resize(self.table.load.len(), 0);
    }

    /// The rank that carries most beyond what it may.
    #[inline(always)]
    fn heaviest(&mut self) -> usize {
        let Scratch { cap, over, .. } = &mut *self.scratch;
        over.clear();
        over.extend(
            self.table
                .load
                .iter()
                .zip(cap)
                .map(|(load, cap)| load - *cap),
        );
        argmax(over).0
    }

    #[inline(always)]
    fn find_arrived(&mut self) {
        self.scratch.arrived.clear();
        for rank in 0..self.ranks.len() {
            for slot in self.ranks.slots(rank) {
                let site = Site::new(rank, slot);
                if self.has_arrived(site) {
                    self.scratch.arrived.push(site);
                }
            }
        }
    }

    #[inline(always)]
    fn has_arrived(&self, site: Site) -> bool {
        let expert = self.table.expert_in(site);
        expert.is_some_and(|expert| !self.is_home(site.rank(), expert))
    }

    #[inline(always)]
    fn is_home(&self, rank: usize, expert: usize) -> bool {
        self.table.is_host(self.home, rank, expert)
    }

    #[inline(always)]
    fn take(&mut self, step: Step) {
        step.take(self.table, self.weight);
        let (a, b) = match step {
            Step::Exchange(a, b) => (a, Some(b)),
            Step::Give(site, _) => (site, None),
        };
        for site in [Some(a), b].into_iter().flatten() {
            self.scratch.arrived.retain(|&other| other != site);
            if self.has_arrived(site) {
                self.scratch.arrived.push(site);
            }
        }
    }

    /// What it is worth to bring a rank from one excess to another.
    #[inline(always)]
    fn relief(&self, before: i32, after: i32) -> i64 {
        let worth = |over: i32| {
            if over > 0 {
                i64::from(over) + i64::from(self.prize)
            } else {
                0
            }
        };
        worth(before) - worth(after)
    }

    #[inline(always)]
    fn moves_of_exchange(&self, a: (usize, usize), b: (usize, usize)) -> i32 {
        let away = |rank, expert| i32::from(!self.is_home(rank, expert));
        away(b.0, a.1) + away(a.0, b.1) - away(a.0, a.1) - away(b.0, b.1)
    }

    /// The exchange of a replica for one that has moved already that brings a rank below its cap:
    /// that costs one move less.
    #[inline(always)]
    fn exchange_back(&self, heavy: usize) -> Option<Offer> {
        let Scratch { over, arrived, .. } = &*self.scratch;
        let need = over[heavy];
        let mut best: Option<(i32, i32, Step)> = None;
        for &theirs in arrived {
            let light = theirs.rank();
            let room = -over[light];
            let share = self.table.share_in(theirs);
            if room < need || share == BARRED || !self.ranks.joined(light, heavy) {
                continue;
            }
            let Some(their) = self.table.expert_in(theirs) else {
                continue;
            };
            if self.table.holds(heavy, their) {
                continue;
            }
            for slot in self.ranks.slots(heavy) {
                let ours = Site::new(heavy, slot);
                let taken = self.table.share_in(ours).wrapping_sub(share);
                if !(need..=room).contains(&taken) {
                    continue;
                }
                let Some(our) = self.table.expert_in(ours) else {
                    continue;
                };
                if self.table.holds(light, our) {
                    continue;
                }
                let moves = self.moves_of_exchange((heavy, our), (light, their));
                if best.is_none_or(|(m, t, _)| (moves, taken) < (m, t)) {
                    best = Some((moves, taken, Step::Exchange(ours, theirs)));
                }
            }
        }
        best.map(|(moves, _, step)| Offer {
            gain: self.relief(need, 0),
            moves,
            step,
        })
    }

    /// The exchange that takes least from a rank for it to be below its cap, with the rank with
    /// most room that stays below its own.
    #[inline(always)]
    fn exchange_new(&mut self, heavy: usize) -> Option<Offer> {
        let Scratch {
            over, ours, miss, ..
        } = &mut *self.scratch;
        let need = over[heavy];
        ours.clear();
        for slot in self.ranks.slots(heavy) {
            let share = self.table.share_in(Site::new(heavy, slot));
            if share != BARRED {
                ours.push(share - need);
            }
        }
        // How much more than needed the nearest exchange with each rank takes; what takes less
        // than needed wraps around to more than anything.
        renew(miss, over.len(), -1);
        for row in self.table.share.chunks_exact(over.len()) {
            least_above(ours, row, miss);
        }
        for (miss, &over) in miss.iter_mut().zip(&*over) {
            let spare = (-over - need).max(-1);
            let fits = spare >= 0 && (*miss as u32) <= spare as u32;
            *miss = if fits { over } else { i32::MAX };
        }
        miss[self.ranks.len()..].fill(i32::MAX);
        miss[heavy] = i32::MAX;
        loop {
            let (light, over) = argmin(&self.scratch.miss);
            if over == i32::MAX {
                return None;
            }
            self.scratch.miss[light] = i32::MAX;
            if !self.ranks.joined(heavy, light) {
                continue;
            }
            if let Some((_, a, b)) = self.least_fit(heavy, light, need, -over) {
                return Some(self.offer_exchange(a, b, self.relief(need, 0)));
            }
        }
    }

    #[inline(always)]
    fn offer_exchange(&self, a: Site, b: Site, gain: i64) -> Offer {
        let expert = |site| self.table.expert_in(site).unwrap_or(0);
        let moves = self.moves_of_exchange((a.rank(), expert(a)), (b.rank(), expert(b)));
        Offer {
            gain,
            moves,
            step: Step::Exchange(a, b),
        }
    }

    /// Of the exchanges between two ranks that take from `need` to `room`, the one that takes least.
    #[inline(always)]
    fn least_fit(
        &self,
        heavy: usize,
        light: usize,
        need: i32,
        room: i32,
    ) -> Option<(i32, Site, Site)> {
        let mut best: Option<(i32, Site, Site)> = None;
        for slot in self.ranks.slots(light) {
            let theirs = Site::new(light, slot);
            let share = self.table.share_in(theirs);
            if share == BARRED || !self.may_go(theirs, heavy) {
                continue;
            }
            for slot in self.ranks.slots(heavy) {
                let ours = Site::new(heavy, slot);
                let taken = self.table.share_in(ours) - share;
                if (need..=room).contains(&taken)
                    && best.is_none_or(|best| taken < best.0)
                    && self.may_go(ours, light)
                {
                    best = Some((taken, ours, theirs));
                }
            }
        }
        best
    }

    #[inline(always)]
    fn may_go(&self, site: Site, to: usize) -> bool {
        self.table
            .expert_in(site)
            .is_some_and(|expert| !self.table.holds(to, expert))
    }

    /// Where nothing brings a rank below its cap: the exchange after which the two ranks are
    /// nearest to theirs.
    #[inline(always)]
    fn exchange_nearest(&mut self, heavy: usize) -> Option<Offer> {
        let Scratch {
            over,
            ours,
            goal,
            miss,
            ..
        } = &mut *self.scratch;
        let excess = over[heavy];
        ours.clear();
        for slot in self.ranks.slots(heavy) {
            let share = self.table.share_in(Site::new(heavy, slot));
            if share != BARRED {
                ours.push(share);
            }
        }
        renew(miss, over.len(), BARRED);
        renew(goal, over.len(), 0);
        for row in self.table.share.chunks_exact(over.len()) {
            for ((goal, &share), &over) in goal.iter_mut().zip(row).zip(&*over) {
                *goal = share + ((excess - over) >> 1);
            }
            nearest(ours, goal, miss);
        }
        for (light, (miss, &over)) in miss.iter_mut().zip(&*over).enumerate() {
            let open =
                light < self.ranks.len() && light != heavy && self.ranks.joined(heavy, light);
            *miss = if open {
                *miss + excess - ((excess - over) >> 1)
            } else {
                i32::MAX
            };
        }
        loop {
            let (light, after) = argmin(&self.scratch.miss);
            if after >= excess {
                return None;
            }
            let half = (excess - self.scratch.over[light]) >> 1;
            let mut best: Option<(i32, Site, Site)> = None;
            for slot in self.ranks.slots(light) {
                let theirs = Site::new(light, slot);
                let share = self.table.share_in(theirs);
                if share == BARRED || !self.may_go(theirs, heavy) {
                    continue;
                }
                for slot in self.ranks.slots(heavy) {
                    let ours = Site::new(heavy, slot);
                    let our = self.table.share_in(ours);
                    if our == BARRED {
                        continue;
                    }
                    let miss = (our - share - half).abs();
                    if best.is_none_or(|best| miss < best.0) && self.may_go(ours, light) {
                        best = Some((miss, ours, theirs));
                    }
                }
            }
            let exact = best.map_or(i32::MAX, |(miss, ..)| miss + excess - half);
            if let Some((_, a, b)) = best
                && exact == after
            {
                return Some(self.offer_exchange(a, b, self.relief(excess, after)));
            }
            self.scratch.miss[light] = exact;
        }
    }
}

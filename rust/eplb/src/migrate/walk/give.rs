//! Slots given to another expert: which can be done without, and who carries less with one more.

use super::{Offer, Scratch, Step, Walker};
use crate::balance::share;
use crate::migrate::table::Site;

/// To whom slots may be given.
#[derive(Debug, Clone, Copy)]
pub(super) enum Give {
    Any,
    /// To experts that the rank has held from the start: a second slot of a newcomer would be sent
    /// to it as well.
    Repeats,
    /// To experts that it lacks.
    Newcomers,
}

/// A slot that its expert can do without.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cold {
    site: Site,
    expert: u32,
    /// What its rank would carry without it.
    load: i32,
    /// What it costs the other ranks that hold the expert.
    burden: i64,
    /// What giving it away can gain at most, besides what the expert that gets it gains.
    most: i64,
    /// Whether its expert leaves the rank, and takes a move with it.
    unmoves: i32,
}

/// An expert that would carry less in each of its slots if it had one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hot {
    expert: u32,
    before: i32,
    after: i32,
    /// What that is worth to the ranks that hold it.
    relief: i64,
}

impl Walker<'_> {
    /// The best slot to give to an expert of a rank that is too heavy, so that its replicas carry
    /// less; worth more than what is at hand.
    #[inline(always)]
    pub(super) fn best_give(
        &mut self,
        heavy: usize,
        kind: Give,
        at_hand: Option<Offer>,
    ) -> Option<Offer> {
        let mut limit = at_hand.map_or(0, |offer| offer.worth());
        self.list_hots(heavy);
        let dearest = self.scratch.hots.iter().map(|hot| hot.relief).max()?;
        self.list_colds(limit / 4 - dearest);
        let Scratch {
            over,
            cap,
            hots,
            colds,
            ..
        } = &*self.scratch;
        let mut best: Option<Offer> = None;
        for hot in hots {
            let expert = hot.expert as usize;
            for cold in colds {
                let rank = cold.site.rank();
                if (hot.relief + cold.most) * 4 <= limit
                    || cold.expert == hot.expert
                    || !self.ranks.joined(rank, heavy)
                {
                    continue;
                }
                let times = self.table.times(rank, expert);
                let wanted = match kind {
                    Give::Any => times == 0 || self.is_home(rank, expert),
                    Give::Repeats => times > 0 && self.is_home(rank, expert),
                    Give::Newcomers => times == 0,
                };
                if !wanted {
                    continue;
                }
                let moves = i32::from(times == 0 && !self.is_home(rank, expert)) - cold.unmoves;
                // The relief of its rank is what both changes bring together.
                let alone = if times == 0 {
                    0
                } else {
                    self.relief(over[rank], over[rank] + times * (hot.after - hot.before))
                };
                let load = cold.load + (times + 1) * hot.after - times * hot.before;
                let together = self.relief(over[rank], load - cap[rank]);
                let offer = Offer {
                    gain: hot.relief - alone - cold.burden + together,
                    moves,
                    step: Step::Give(cold.site, hot.expert),
                };
                if offer.gain > 0 && offer.worth() > limit {
                    limit = offer.worth();
                    best = Some(offer);
                }
            }
        }
        best
    }

    /// Lists the experts of a rank that would take from it, and from others that are too heavy, if
    /// they had one slot more.
    #[inline(always)]
    fn list_hots(&mut self, heavy: usize) {
        let mut hots = std::mem::take(&mut self.scratch.hots);
        hots.clear();
        for slot in self.ranks.slots(heavy) {
            let site = Site::new(heavy, slot);
            let Some(expert) = self.table.expert_in(site) else {
                continue;
            };
            let before = self.table.carried_in(site, self.weight, expert);
            let after = share(self.weight[expert], self.table.count(expert) + 1);
            let over = &self.scratch.over;
            let mut relief = 0;
            self.table.each_host(expert, |rank, times| {
                relief += self.relief(over[rank], over[rank] + times * (after - before));
            });
            let hot = Hot {
                expert: expert as u32,
                before,
                after,
                relief,
            };
            if relief > 0 && !hots.contains(&hot) {
                hots.push(hot);
            }
        }
        self.scratch.hots = hots;
    }

    /// Lists the slots that their expert can do without, if what that gains at most is enough.
    #[inline(always)]
    fn list_colds(&mut self, enough: i64) {
        let mut colds = std::mem::take(&mut self.scratch.colds);
        colds.clear();
        let over = &self.scratch.over;
        for &site in self.table.shared() {
            let rank = site.rank();
            let Some(expert) = self.table.expert_in(site) else {
                continue;
            };
            let before = self.table.carried_in(site, self.weight, expert);
            let fewer = self.table.count(expert) - 1;
            let more = share(self.weight[expert], fewer) - before;
            let mut burden = 0;
            let mut times = 1;
            self.table.each_host(expert, |host, here| {
                if host == rank {
                    times = here;
                } else {
                    burden -= self.relief(over[host], over[host] + here * more);
                }
            });
            let most = self.relief(over[rank], 0) - burden;
            if most > enough {
                let leaves = times == 1 && !self.is_home(rank, expert);
                colds.push(Cold {
                    site,
                    expert: expert as u32,
                    load: self.table.load[rank] - before + (times - 1) * more,
                    burden,
                    most,
                    unmoves: i32::from(leaves),
                });
            }
        }
        self.scratch.colds = colds;
    }
}

//! An expert's tokens, poured over its slots in all scenarios side by side.

use super::Account;
use crate::scenario::layer::Layer;
use crate::scenario::rows::{Futures, LANES, Row};

impl<const SHARES: bool> Account<SHARES> {
    /// Takes an expert's tokens off its slots.
    #[inline(always)]
    pub(super) fn lift(&mut self, layer: &Layer, expert: usize) {
        for &slot in layer.places(expert) {
            self.set(layer, slot as usize, |_| [0.0; LANES]);
        }
    }

    /// Gives a slot other tokens, block by block.
    #[inline(always)]
    fn set(&mut self, layer: &Layer, slot: usize, tokens: impl Fn(usize) -> Row) {
        let rank = layer.rank(slot);
        for block in 0..self.num_blocks {
            let tokens = tokens(block);
            let part = &mut self.parts[slot * self.num_blocks + block];
            let whole = &mut self.ranks[rank * self.num_blocks + block];
            for lane in 0..LANES {
                whole[lane] += tokens[lane] - part[lane];
            }
            *part = tokens;
        }
    }

    /// Splits an expert's tokens over its slots, other experts as they are: evenly, or so that the
    /// ranks that get any are equally full and the others fuller.
    #[inline(always)]
    pub(super) fn pour(&mut self, layer: &Layer, futures: &Futures, expert: usize) {
        let places = layer.places(expert);
        if !SHARES {
            for &slot in places {
                self.fill(layer, futures, slot as usize);
            }
            return;
        }
        match *places {
            [slot] => self.set(layer, slot as usize, |block| *futures.load(block, expert)),
            [a, b] => self.pour_over(layer, futures, expert, [a as usize, b as usize]),
            [a, b, c] => {
                self.pour_over(layer, futures, expert, [a, b, c].map(|slot| slot as usize))
            }
            _ => self.pour_over_many(layer, futures, expert),
        }
    }

    /// Gives a slot an even share of its expert's tokens.
    #[inline(always)]
    pub(super) fn fill(&mut self, layer: &Layer, futures: &Futures, slot: usize) {
        let expert = layer.expert(slot as u32);
        let share = 1.0 / layer.count(expert) as f32;
        self.set(layer, slot, |block| {
            futures.load(block, expert).map(|load| load * share)
        });
    }

    #[inline(always)]
    fn pour_over<const C: usize>(
        &mut self,
        layer: &Layer,
        futures: &Futures,
        expert: usize,
        slots: [usize; C],
    ) {
        let ranks = slots.map(|slot| layer.rank(slot));
        if ranks
            .iter()
            .enumerate()
            .any(|(index, rank)| ranks[..index].contains(rank))
        {
            return self.pour_over_many(layer, futures, expert);
        }
        for block in 0..self.num_blocks {
            let load = futures.load(block, expert);
            let mut rest = [[0.0; LANES]; C];
            for one in 0..C {
                let part = &self.parts[slots[one] * self.num_blocks + block];
                let whole = &self.ranks[ranks[one] * self.num_blocks + block];
                for lane in 0..LANES {
                    rest[one][lane] = whole[lane] - part[lane];
                }
            }
            let level = level(load, &rest);
            for one in 0..C {
                let part = &mut self.parts[slots[one] * self.num_blocks + block];
                let whole = &mut self.ranks[ranks[one] * self.num_blocks + block];
                for lane in 0..LANES {
                    let more = level[lane] - rest[one][lane];
                    part[lane] = if more > 0.0 { more } else { 0.0 };
                    whole[lane] = rest[one][lane] + part[lane];
                }
            }
        }
    }

    /// The same for any number of slots. Of several on a rank, the first gets the tokens of all.
    #[inline(never)]
    fn pour_over_many(&mut self, layer: &Layer, futures: &Futures, expert: usize) {
        self.lift(layer, expert);
        let mut hosts = std::mem::take(&mut self.trial.hosts);
        hosts.clear();
        for &slot in layer.places(expert) {
            let rank = layer.rank(slot as usize) as u32;
            if hosts.iter().all(|&(_, other)| other != rank) {
                hosts.push((slot, rank));
            }
        }
        for block in 0..self.num_blocks {
            let load = futures.load(block, expert);
            let mut level = [f32::INFINITY; LANES];
            for _ in 0..hosts.len() {
                let before = level;
                let rest = hosts
                    .iter()
                    .map(|&(_, rank)| &self.ranks[rank as usize * self.num_blocks + block]);
                level = lowered(load, rest, &before);
                if level == before {
                    break;
                }
            }
            for &(slot, rank) in &hosts {
                let part = &mut self.parts[slot as usize * self.num_blocks + block];
                let whole = &mut self.ranks[rank as usize * self.num_blocks + block];
                for lane in 0..LANES {
                    let more = level[lane] - whole[lane];
                    part[lane] = if more > 0.0 { more } else { 0.0 };
                    whole[lane] += part[lane];
                }
            }
        }
        self.trial.hosts = hosts;
    }
}

/// How full ranks are when a load is poured over them.
///
/// It is the mean over those that get any, and these are the ones below it: without those above,
/// the mean over the others is lower, until none is above.
#[inline(always)]
fn level<const C: usize>(load: &Row, rest: &[Row; C]) -> Row {
    let mut level = *load;
    if C == 2 {
        for lane in 0..LANES {
            let (a, b) = (rest[0][lane], rest[1][lane]);
            let both = 0.5 * (load[lane] + a + b);
            let one = load[lane] + if a < b { a } else { b };
            level[lane] = if one < both { one } else { both };
        }
        return level;
    }
    for one in rest {
        for lane in 0..LANES {
            level[lane] += one[lane];
        }
    }
    level = level.map(|sum| sum * (1.0 / C as f32));
    for _ in 1..C {
        level = lowered(load, rest.iter(), &level);
    }
    level
}

/// The level of those alone that are below this one; the same where none is.
#[inline(always)]
fn lowered<'a>(load: &Row, rest: impl Iterator<Item = &'a Row>, level: &Row) -> Row {
    let mut sums = *load;
    let mut counts = [0.0f32; LANES];
    for one in rest {
        for lane in 0..LANES {
            let below = one[lane] < level[lane];
            sums[lane] += if below { one[lane] } else { 0.0 };
            counts[lane] += if below { 1.0 } else { 0.0 };
        }
    }
    let mut lower = *level;
    for lane in 0..LANES {
        let mean = sums[lane] / counts[lane];
        lower[lane] = if counts[lane] > 0.0 {
            mean
        } else {
            level[lane]
        };
    }
    lower
}

//! The best exchange of a layer where tokens are split anew, found exactly.
//!
//! The sets of ranks that were tight so far bound what each exchange could reach, and what any could
//! by which an expert goes elsewhere. What could reach most is looked at first: an expert's exchanges
//! are listed, an exchange is solved by a flow, which may find a set that was missing and so raises
//! the bounds. It ends when no bound is below the best found.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use multiversion::multiversion;

use super::layer::{Exchange, Layer};
use super::sets::Shift;
use super::worth::{Case, Worth};
use crate::balance::Fuel;

/// What an exchange must gain in any case, in parts of the mean rank load.
const LEAST_GAIN: f32 = 1e-5;

/// Looking at so many exchanges costs about as much as solving one.
const LOOKS_PER_STEP: u32 = 64;

/// Which exchanges are compared. Both relieve what is tight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An expert of the tight ranks gets a slot outside of them, too, in the place of one that
    /// keeps others: one move.
    Replace,
    /// It trades its slot for one outside of them: two moves.
    Swap,
}

impl Kind {
    pub(super) fn moves(self) -> usize {
        match self {
            Self::Replace => 1,
            Self::Swap => 2,
        }
    }
}

/// What finding an exchange takes, kept for the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// The slots that an expert may come to.
    slots: Vec<u32>,
    /// What may help: the least that could be worth first, then what was listed first.
    queue: BinaryHeap<Reverse<(u32, Choice)>>,
    /// The exchanges that were listed.
    exchanges: Vec<Exchange>,
    /// The bounds of one of them for each load, `[K]`.
    bounds: Vec<f32>,
    /// How many exchanges were looked at since a step was last taken for it.
    looks: u32,
}

/// One of the exchanges, or all by which an expert goes elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Choice {
    One(u32),
    Any(u32),
}

/// The exchange after which a layer is worth least, among those that gain more than `least_gain` and
/// with which no more than `max_moves` are made.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
pub(super) fn find(
    kind: Kind,
    layer: &mut Layer,
    worth: &mut Worth,
    max_moves: usize,
    least_gain: f32,
    fuel: &mut Fuel,
    scratch: &mut Scratch,
) -> Option<Exchange> {
    let mut search = Search {
        kind,
        max_moves,
        least: worth.value() - least_gain.max(LEAST_GAIN),
        found: None,
        layer,
        worth,
        fuel,
        scratch,
    };
    search.begin();
    while let Some(Reverse((bound, choice))) = search.scratch.queue.pop()
        && f32::from_bits(bound) < search.least
        && !search.fuel.is_empty()
    {
        search.follow(bound, choice);
    }
    search.found
}

/// A search for the best exchange.
struct Search<'a> {
    kind: Kind,
    max_moves: usize,
    /// What the layer has to be worth less than, and the exchange after which it is.
    least: f32,
    found: Option<Exchange>,
    layer: &'a mut Layer,
    worth: &'a mut Worth,
    fuel: &'a mut Fuel,
    scratch: &'a mut Scratch,
}

impl Search<'_> {
    /// Lists the slots outside of what is tight, and the experts that are nowhere else.
    #[inline(always)]
    fn begin(&mut self) {
        self.scratch.slots.clear();
        self.scratch.queue.clear();
        self.scratch.exchanges.clear();
        let (layer, cases) = (&*self.layer, &self.worth.cases);
        let is_free = |&slot: &u32| {
            let rank = layer.rank(slot as usize);
            (self.kind == Kind::Swap || layer.count(layer.expert(slot)) > 1)
                && cases.iter().any(|case| case.sets.is_outside(rank))
        };
        let slots = 0..layer.ranks().len() as u32;
        self.scratch.slots.extend(slots.filter(is_free));
        for expert in 0..self.layer.num_experts() {
            let mut cases = self.worth.cases.iter();
            if cases.any(|case| case.sets.suspects(expert)) {
                self.propose(Choice::Any(expert as u32));
            }
        }
    }

    /// Follows a choice, unless others have come to promise more.
    #[inline(always)]
    fn follow(&mut self, before: u32, choice: Choice) {
        let bound = self.bound(choice).to_bits().max(before);
        let next = self.scratch.queue.peek();
        if next.is_some_and(|next| next.0 < (bound, choice)) {
            self.scratch.queue.push(Reverse((bound, choice)));
            return;
        }
        match choice {
            Choice::Any(expert) => self.open(expert as usize),
            Choice::One(exchange) => self.solve(exchange as usize),
        }
    }

    /// Lists the exchanges by which an expert goes elsewhere.
    #[inline(always)]
    fn open(&mut self, expert: usize) {
        for index in 0..self.scratch.slots.len() {
            let slot = self.scratch.slots[index];
            match self.kind {
                Kind::Replace => {
                    let new = expert as u32;
                    self.consider(expert, slot, Exchange::Replace { slot, expert: new });
                }
                Kind::Swap => {
                    for place in 0..self.layer.count(expert) {
                        let a = self.layer.places(expert)[place];
                        self.consider(expert, slot, Exchange::Swap { a, b: slot });
                    }
                }
            }
        }
    }

    /// Lists an exchange by which an expert comes to a slot, if it may be made.
    #[inline(always)]
    fn consider(&mut self, expert: usize, slot: u32, exchange: Exchange) {
        let rank = self.layer.rank(slot as usize);
        let relieves = |case: &Case| case.sets.suspects(expert) && case.sets.is_outside(rank);
        if !self.layer.allows(exchange) || !self.worth.cases.iter().any(relieves) {
            return;
        }
        let moves = self.layer.num_moves() as i32 + self.layer.more_moves(exchange);
        if moves > self.max_moves as i32 {
            return;
        }
        self.scratch.looks += 1;
        if self.scratch.looks == LOOKS_PER_STEP {
            self.scratch.looks = 0;
            self.fuel.step();
        }
        self.scratch.exchanges.push(exchange);
        let number = self.scratch.exchanges.len() - 1;
        self.propose(Choice::One(number as u32));
    }

    /// Queues what may help, if the sets that are known leave it a chance.
    #[inline(always)]
    fn propose(&mut self, choice: Choice) {
        let bound = self.bound(choice);
        if bound < self.least {
            self.scratch.queue.push(Reverse((bound.to_bits(), choice)));
        }
    }

    /// The least that the layer could be worth after a choice.
    #[inline(always)]
    fn bound(&mut self, choice: Choice) -> f32 {
        let mut bound = 0.0;
        self.scratch.bounds.clear();
        for case in &self.worth.cases {
            let shifts = match choice {
                Choice::One(number) => self.shifts(case, self.scratch.exchanges[number as usize]),
                Choice::Any(expert) => self.shifts_of_any(case, expert as usize),
            };
            let largest = case.sets.largest(&shifts);
            self.scratch.bounds.push(largest);
            bound += case.weight * largest;
        }
        bound
    }

    /// What an exchange does to the sets of one load.
    #[inline(always)]
    fn shifts(&self, case: &Case, exchange: Exchange) -> [Shift; 2] {
        let (layer, sets) = (&*self.layer, &case.sets);
        let within = |slot: u32| sets.within(layer.rank(slot as usize));
        let experts = layer.concerned(exchange);
        let after = match exchange {
            Exchange::Replace { slot, .. } => [
                sets.leaving(layer, slot),
                sets.alone(experts[1]) & within(slot),
            ],
            Exchange::Swap { a, b } => [
                sets.leaving(layer, a) & within(b),
                sets.leaving(layer, b) & within(a),
            ],
        };
        [0, 1].map(|which| {
            let expert = experts[which];
            Shift::new(case.loads[expert], sets.alone(expert), after[which])
        })
    }

    /// What no exchange by which an expert goes elsewhere does more than.
    #[inline(always)]
    fn shifts_of_any(&self, case: &Case, expert: usize) -> [Shift; 2] {
        let alone = case.sets.alone(expert);
        let own = Shift::new(case.loads[expert], alone, 0);
        let other = match self.kind {
            Kind::Replace => Shift::default(),
            // What it trades places with may relieve other sets, of all the load there is at most.
            Kind::Swap => Shift::new(self.layer.num_ranks() as f32, !alone, 0),
        };
        [own, other]
    }

    /// Finds what the layer is worth after an exchange, and keeps it if that is least.
    #[inline(always)]
    fn solve(&mut self, number: usize) {
        self.fuel.step();
        let exchange = self.scratch.exchanges[number];
        let experts = self.layer.concerned(exchange);
        let back = self.layer.make(exchange);
        let bounds = &self.scratch.bounds;
        let value = self.worth.after(self.layer, &experts, bounds, self.least);
        self.layer.make(back);
        self.worth.keep_found(self.layer);
        if value < self.least {
            self.found = Some(exchange);
            self.least = value - LEAST_GAIN;
        }
    }
}

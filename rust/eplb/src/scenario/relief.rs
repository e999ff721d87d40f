//! Few moves where tokens are split anew: for each of them, the one that relieves a layer most.
//!
//! Ranks are relieved if an expert that they hold alone can go elsewhere, too. So a slot of another
//! rank takes that expert, in the place of one that keeps other slots. Of all such exchanges the
//! [best](best::find) is made; then the next, from there. Layers go on, those with most to gain
//! first, until no step could gain more than the moves that are handed out. If none helps and moves
//! are left over, two slots trade what they hold.

use std::time::Instant;

use rayon::prelude::*;

use super::best::{self, Kind, Scratch};
use super::layer::Layer;
use super::paths::{self, Made, Path};
use super::worth::Worth;
use super::{Scenarios, layer_of};
use crate::balance::{Budget, Fuel};
use crate::placement::Placement;
use crate::planner::Planner;

/// So many layers are taken a step further before moves are handed out anew.
const LAYERS_AT_ONCE: usize = 16;

/// What is to be relieved, and with how many moves.
pub(super) struct FewMoves<'a> {
    pub(super) planner: &'a Planner,
    pub(super) scenarios: &'a Scenarios<'a>,
    pub(super) weights: &'a [f64],
    pub(super) start: &'a Placement,
    /// The load of each layer, `[L]`.
    pub(super) layer_sums: &'a [f64],
    pub(super) max_moves: usize,
    pub(super) max_moves_per_layer: usize,
}

impl FewMoves<'_> {
    /// The path of each layer, as far as moves may lead it.
    pub(super) fn paths(&self) -> Vec<Path> {
        let num_layers = self.layer_sums.len();
        let mut paths = vec![Path::default(); num_layers];
        if self.max_moves == 0 {
            return paths;
        }
        let mut reliefs = self.reliefs();
        let mut scratch = Scratch::default();
        loop {
            let gain = paths::last_gain(&paths, self.layer_sums, self.max_moves);
            let mut next = self.hopeful(&reliefs, Kind::Replace, gain);
            if next.is_empty() && gain == 0.0 {
                next = self.hopeful(&reliefs, Kind::Swap, gain);
            }
            if next.is_empty() {
                return paths;
            }
            let mut is_next = vec![false; num_layers];
            next.iter().for_each(|&number| is_next[number] = true);
            let step = |scratch: &mut Scratch, (number, relief): (usize, &mut Relief)| {
                if is_next[number] {
                    // A step that gains less may still lead to one that gains more.
                    let gain = 0.5 * gain / self.layer_sums[number];
                    relief.step(gain as f32, self.max_moves_per_layer, scratch);
                }
            };
            match self.planner.pool() {
                None => {
                    let reliefs = reliefs.iter_mut().enumerate();
                    reliefs.for_each(|relief| step(&mut scratch, relief));
                }
                Some(pool) => pool.install(|| {
                    let reliefs = reliefs.par_iter_mut().enumerate();
                    reliefs.for_each_init(Scratch::default, step);
                }),
            }
            for number in next {
                paths[number].take(reliefs[number].first, &reliefs[number].path);
            }
        }
    }

    /// Some layers that could go on by such an exchange and gain more than so much: those with most
    /// to gain, first.
    fn hopeful(&self, reliefs: &[Relief], kind: Kind, gain: f64) -> Vec<usize> {
        let hope = |number: usize| f64::from(reliefs[number].hope(kind)) * self.layer_sums[number];
        let mut hopeful: Vec<_> = (0..reliefs.len()).filter(|&n| hope(n) > gain).collect();
        hopeful.sort_by(|&a, &b| hope(b).total_cmp(&hope(a)));
        hopeful.truncate(LAYERS_AT_ONCE);
        hopeful
    }

    /// The layers as they are at first.
    fn reliefs(&self) -> Vec<Relief> {
        let fuel = match self.planner.budget() {
            Budget::Iterations(steps) => Fuel::steps(steps),
            Budget::Time(time) => Fuel::until(Instant::now() + time),
        };
        let all: f64 = self.weights.iter().sum();
        let relief = |number: usize| {
            let layer = layer_of(self.planner, self.start, number);
            let loads = (0..self.scenarios.num_scenarios())
                .map(|index| self.scenarios.layer(index, number))
                .zip(self.weights.iter().map(|weight| weight / all));
            let worth = Worth::new(&layer, loads);
            Relief::new(layer, worth, fuel.clone())
        };
        let numbers = 0..self.layer_sums.len();
        match self.planner.pool() {
            None => numbers.map(relief).collect(),
            Some(pool) => pool.install(|| numbers.into_par_iter().map(relief).collect()),
        }
    }
}

/// A layer that is relieved, move by move.
#[derive(Debug)]
struct Relief {
    layer: Layer,
    worth: Worth,
    /// What it was worth at first, and every exchange since.
    first: f32,
    path: Vec<Made>,
    fuel: Fuel,
    /// What to try next, if anything may help.
    next: Option<Kind>,
}

impl Relief {
    /// A layer, what it is worth, and how many exchanges may be tried.
    fn new(layer: Layer, worth: Worth, fuel: Fuel) -> Self {
        Self {
            first: worth.value(),
            layer,
            worth,
            path: Vec::new(),
            fuel,
            next: Some(Kind::Replace),
        }
    }

    /// The most that a move can gain, if such an exchange is what to try next; else 0.
    fn hope(&self, kind: Kind) -> f32 {
        match self.next == Some(kind) {
            true => (self.worth.value() - 1.0).max(0.0) / kind.moves() as f32,
            false => 0.0,
        }
    }

    /// Makes the best exchange of the kind that is next, each of whose moves gains so much at least,
    /// and with which no more than `max_moves` are made in all. Where there is none, the next kind
    /// is tried another time.
    fn step(&mut self, gain_per_move: f32, max_moves: usize, scratch: &mut Scratch) {
        let Some(kind) = self.next else {
            return;
        };
        let (layer, worth, fuel) = (&mut self.layer, &mut self.worth, &mut self.fuel);
        let gain = gain_per_move * kind.moves() as f32;
        let found = best::find(kind, layer, worth, max_moves, gain, fuel, scratch);
        let Some(exchange) = found else {
            self.next = (kind == Kind::Replace).then_some(Kind::Swap);
            return;
        };
        let experts = layer.concerned(exchange);
        layer.make(exchange);
        worth.moved(layer, &experts);
        worth.solve(layer);
        self.next = Some(Kind::Replace);
        self.path.push(Made {
            exchange,
            num_moves: layer.num_moves(),
            value: worth.value(),
        });
    }
}

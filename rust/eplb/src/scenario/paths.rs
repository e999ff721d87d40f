//! Moves handed out over layers: each goes as far along its path as moves are worth it.

use super::layer::Exchange;
use super::search::Made;

/// The exchanges of a layer, each of which helps, and the points where moves are spent best.
#[derive(Debug, Clone, Default)]
pub(super) struct Path {
    pub(super) exchanges: Vec<Exchange>,
    points: Vec<Point>,
}

/// Where a path may end.
#[derive(Debug, Clone, Copy)]
struct Point {
    /// How many exchanges lead there.
    end: usize,
    num_moves: usize,
    /// The largest rank load, as a part of the mean one.
    value: f64,
}

impl Point {
    /// What a move gains on the way from another point.
    fn slope(&self, from: &Self) -> f64 {
        (from.value - self.value) / (self.num_moves - from.num_moves) as f64
    }
}

impl Path {
    /// Takes the exchanges that a search made, and what the layer was worth before them. Keeps
    /// the points of the convex hull: from each to the next, a move gains less.
    pub(super) fn take(&mut self, first: f32, made: &[Made]) {
        self.exchanges.clear();
        self.exchanges.extend(made.iter().map(|made| made.exchange));
        self.points.clear();
        self.points.push(Point {
            end: 0,
            num_moves: 0,
            value: f64::from(first),
        });
        for (index, made) in made.iter().enumerate() {
            let point = Point {
                end: index + 1,
                num_moves: made.num_moves,
                value: f64::from(made.value),
            };
            while self
                .points
                .last()
                .is_some_and(|last| last.num_moves >= point.num_moves)
            {
                self.points.pop();
            }
            while let [.., before, last] = self.points[..]
                && point.slope(&last) >= last.slope(&before)
            {
                self.points.pop();
            }
            self.points.push(point);
        }
    }
}

/// How far each layer goes along its path: how many of its exchanges are made.
pub(super) fn choose(paths: &[Path], means: &[f64], max_moves: usize) -> Vec<usize> {
    let mut pieces = Vec::new();
    for (layer, (path, mean)) in paths.iter().zip(means).enumerate() {
        for (index, pair) in path.points.windows(2).enumerate() {
            let moves = pair[1].num_moves - pair[0].num_moves;
            pieces.push((pair[1].slope(&pair[0]) * mean, layer, index + 1, moves));
        }
    }
    // Those of a layer are in this order already.
    pieces.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut chosen = vec![0; paths.len()];
    let mut left = max_moves;
    for (_, layer, point, moves) in pieces {
        if point == chosen[layer] + 1 && moves <= left {
            chosen[layer] = point;
            left -= moves;
        }
    }
    let ends = paths.iter().zip(chosen);
    ends.map(|(path, point)| path.points.get(point).map_or(0, |point| point.end))
        .collect()
}

//! Moves handed out over layers: each goes as far along its path as moves are worth it.

use super::layer::Exchange;

/// An exchange that was made: what the layer was worth afterwards, and in how many moves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Made {
    pub(super) exchange: Exchange,
    pub(super) num_moves: usize,
    pub(super) value: f32,
}

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

/// A piece of a path, from one point to the next.
struct Piece {
    /// What each of its moves gains, in the unit of the loads.
    gain: f64,
    layer: usize,
    /// The point that it leads to.
    point: usize,
    moves: usize,
}

/// How far each layer goes along its path: how many of its exchanges are made. `layer_sums` are
/// the loads of the layers.
pub(super) fn choose(paths: &[Path], layer_sums: &[f64], max_moves: usize) -> Vec<usize> {
    let mut chosen = vec![0; paths.len()];
    for piece in chosen_pieces(paths, layer_sums, max_moves) {
        chosen[piece.layer] = piece.point;
    }
    let ends = paths.iter().zip(chosen);
    ends.map(|(path, point)| path.points.get(point).map_or(0, |point| point.end))
        .collect()
}

/// What the last of so many moves gains; 0 if there are more than gain anything.
pub(super) fn last_gain(paths: &[Path], layer_sums: &[f64], max_moves: usize) -> f64 {
    let pieces = chosen_pieces(paths, layer_sums, max_moves);
    let moves: usize = pieces.iter().map(|piece| piece.moves).sum();
    match pieces.last() {
        Some(piece) if moves == max_moves => piece.gain,
        _ => 0.0,
    }
}

/// The pieces of paths that are followed: those that gain most first, as long as moves last.
fn chosen_pieces(paths: &[Path], layer_sums: &[f64], max_moves: usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (layer, (path, sum)) in paths.iter().zip(layer_sums).enumerate() {
        for (index, pair) in path.points.windows(2).enumerate() {
            pieces.push(Piece {
                gain: pair[1].slope(&pair[0]) * sum,
                layer,
                point: index + 1,
                moves: pair[1].num_moves - pair[0].num_moves,
            });
        }
    }
    // Those of a layer are in this order already.
    pieces.sort_by(|a, b| b.gain.total_cmp(&a.gain));
    let mut reached = vec![0; paths.len()];
    let mut left = max_moves;
    pieces.retain(|piece| {
        let follows = piece.point == reached[piece.layer] + 1 && piece.moves <= left;
        if follows {
            reached[piece.layer] = piece.point;
            left -= piece.moves;
        }
        follows
    });
    pieces
}

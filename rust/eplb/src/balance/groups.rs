//! Which node each group of experts goes to, where groups stay on one node.
//!
//! What a node has to carry is known exactly before its ranks are filled: its load over the speed
//! of its ranks. So groups are assigned first: exactly, by branch and bound, as long as that takes
//! few steps, and the best assignment found where it would take more.

/// How many assignments are looked at, at most. Eight groups on four nodes take fewer than a
/// thousand.
const MOST_STEPS: u32 = 20_000;

/// More groups than this are assigned greedily.
const MOST_GROUPS: usize = 256;

/// What a node offers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Node {
    /// How many groups fit in its slots.
    pub(crate) room: usize,
    /// How much load it serves in the time in which all nodes together serve a load of 1.
    pub(crate) speed: f64,
}

/// Scratch of [`assign`].
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Groups, heaviest first.
    order: Vec<u32>,
    room: Vec<usize>,
    load: Vec<f64>,
    node_of: Vec<u32>,
    pub(crate) best: Vec<u32>,
}

/// Assigns groups of these loads to nodes so that the largest load over speed is least; ties to
/// the first assignment found. Leaves the node of each group in `scratch.best` and returns whether
/// there is one.
pub(crate) fn assign(group_load: &[f64], nodes: &[Node], scratch: &mut Scratch) -> bool {
    let Scratch {
        order,
        room,
        load,
        node_of,
        best,
    } = scratch;
    order.clear();
    order.extend(0..group_load.len() as u32);
    order.sort_unstable_by(|&a, &b| {
        let by_load = group_load[b as usize].total_cmp(&group_load[a as usize]);
        by_load.then(a.cmp(&b))
    });
    room.clear();
    room.extend(nodes.iter().map(|node| node.room));
    load.clear();
    load.resize(nodes.len(), 0.0);
    node_of.clear();
    node_of.resize(group_load.len(), 0);
    best.clear();
    best.resize(group_load.len(), 0);
    if group_load.len() > MOST_GROUPS {
        return assign_greedily(group_load, nodes, order, room, load, best);
    }
    let mut search = Search {
        group_load,
        nodes,
        order,
        room,
        load,
        node_of,
        best,
        level: f64::INFINITY,
        steps: 0,
    };
    search.place(0, 0.0);
    search.level < f64::INFINITY
}

/// Each group, heaviest first, to the node that it makes least slow.
fn assign_greedily(
    group_load: &[f64],
    nodes: &[Node],
    order: &[u32],
    room: &mut [usize],
    load: &mut [f64],
    node_of: &mut [u32],
) -> bool {
    for &group in order {
        let more = group_load[group as usize];
        let time = |node: &usize| (load[*node] + more) / nodes[*node].speed;
        let open = (0..nodes.len()).filter(|&node| room[node] > 0);
        let Some(node) = open.min_by(|a, b| time(a).total_cmp(&time(b))) else {
            return false;
        };
        room[node] -= 1;
        load[node] += more;
        node_of[group as usize] = node as u32;
    }
    true
}

struct Search<'a> {
    group_load: &'a [f64],
    nodes: &'a [Node],
    order: &'a [u32],
    room: &'a mut [usize],
    load: &'a mut [f64],
    node_of: &'a mut [u32],
    best: &'a mut [u32],
    level: f64,
    steps: u32,
}

impl Search<'_> {
    /// Places the groups from the `depth`th on; those before it make the slowest node take `level`.
    /// Deep as there are groups, at most.
    fn place(&mut self, depth: usize, level: f64) {
        let Some(&group) = self.order.get(depth) else {
            self.level = level;
            self.best.copy_from_slice(self.node_of);
            return;
        };
        self.steps += 1;
        let more = self.group_load[group as usize];
        // Nodes by what they would take, lightest first: the first descent is the greedy one.
        let mut floor = (f64::NEG_INFINITY, 0);
        loop {
            let mut next: Option<(f64, usize)> = None;
            for node in 0..self.nodes.len() {
                let after = ((self.load[node] + more) / self.nodes[node].speed, node);
                if self.room[node] > 0 && after > floor && next.is_none_or(|next| after < next) {
                    next = Some(after);
                }
            }
            let Some(after) = next else { return };
            floor = after;
            let (time, node) = after;
            if time.max(level) >= self.level {
                return;
            }
            if self.has_twin(node) {
                continue;
            }
            self.room[node] -= 1;
            let before = self.load[node];
            self.load[node] = before + more;
            self.node_of[group as usize] = node as u32;
            self.place(depth + 1, level.max(time));
            self.load[node] = before;
            self.room[node] += 1;
            if self.steps > MOST_STEPS && self.level < f64::INFINITY {
                return;
            }
        }
    }

    /// Whether an earlier node is just like this one, so that what it leads to has been seen.
    fn has_twin(&self, node: usize) -> bool {
        (0..node).any(|other| {
            self.room[other] == self.room[node]
                && self.load[other] == self.load[node]
                && self.nodes[other].speed == self.nodes[node].speed
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assignment_is_the_best_of_all() {
        let loads = [7.0, 5.0, 4.0, 4.0, 3.0, 3.0, 2.0, 2.0];
        let nodes = [Node {
            room: 2,
            speed: 1.0,
        }; 4];
        let mut scratch = Scratch::default();
        assert!(assign(&loads, &nodes, &mut scratch));
        let mut load = [0.0; 4];
        let mut count = [0; 4];
        for (&group_load, &node) in loads.iter().zip(&scratch.best) {
            load[node as usize] += group_load;
            count[node as usize] += 1;
        }
        assert_eq!(count, [2; 4]);
        assert_eq!(load.into_iter().fold(0.0, f64::max), 9.0);
    }

    #[test]
    fn too_little_room_is_noticed() {
        let nodes = [Node {
            room: 1,
            speed: 1.0,
        }; 2];
        assert!(!assign(&[1.0; 3], &nodes, &mut Scratch::default()));
        let nodes = [Node {
            room: 130,
            speed: 1.0,
        }; 2];
        assert!(assign(&[1.0; 260], &nodes, &mut Scratch::default()));
        assert!(!assign(&[1.0; 261], &nodes, &mut Scratch::default()));
    }
}

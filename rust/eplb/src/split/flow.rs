//! The exact min-max flow of one layer: experts' tokens into the ranks that hold them.
//!
//! A split is a flow from experts into ranks, and the least possible largest rank load is, by
//! max-flow min-cut, the largest mean load of any set of ranks that holds some experts alone:
//! `max over S of (sum of the loads of experts whose ranks are all in S) / |S|`. The solver keeps
//! such a lower bound, the level, and a flow; it moves tokens from the ranks above the level to
//! ranks below it, along experts that they share. Where no such rank can be reached, the ranks that
//! can be hold their experts alone: their mean is the new level, and they are its certificate.
//! It ends when no rank is above the level.
//!
//! All loads are whole numbers, so every sum is exact; the level is rounded up, which is the
//! optimum among whole splits.

/// The experts of a layer that fill several slots, and the ranks that these are on.
///
/// Indices of entries and items count within the layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Graph<'a> {
    /// The experts that fill one slot, rank by rank.
    pub(crate) singles: &'a [u32],
    /// Where the singles of each rank end, `[num_ranks]`.
    pub(crate) single_ends: &'a [u32],
    /// The experts that fill several slots.
    pub(crate) items: &'a [Item],
    /// Where an item may go: a rank each, in the order of items, then ranks.
    pub(crate) entries: &'a [Entry],
    /// The entries of each rank, rank by rank.
    pub(crate) at_rank: &'a [AtRank],
    /// Where the entries of each rank end, `[num_ranks]`.
    pub(crate) at_rank_ends: &'a [u32],
    /// Ranks, one connected component after another.
    pub(crate) component_ranks: &'a [u32],
    /// Where each component ends.
    pub(crate) component_ends: &'a [u32],
}

impl<'a> Graph<'a> {
    fn entries_at(&self, rank: u32) -> &'a [AtRank] {
        let rank = rank as usize;
        let begin = rank
            .checked_sub(1)
            .map_or(0, |before| self.at_rank_ends[before]);
        &self.at_rank[begin as usize..self.at_rank_ends[rank] as usize]
    }
}

/// An expert that fills several slots.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Item {
    pub(crate) expert: u32,
    /// Its first entry, and the one after its last.
    pub(crate) begin: u32,
    pub(crate) end: u32,
}

/// An entry as its rank lists it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AtRank {
    pub(crate) entry: u32,
    pub(crate) item: u32,
}

/// An item on a rank.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) rank: u32,
}

/// The flow of a layer and what it takes to find it, kept between layers.
#[derive(Debug, Default, Clone)]
pub(crate) struct Flow {
    /// What each entry carries.
    pub(crate) flow: Vec<i64>,
    /// What each rank carries.
    pub(crate) rank_load: Vec<i64>,
    /// The ranks whose mean is the level.
    pub(crate) tight: Vec<u32>,
    /// When each rank and each item was reached last, as the number of a search.
    rank_seen: Vec<u32>,
    item_seen: Vec<u32>,
    search: u32,
    queue: Vec<u32>,
    /// The entry by which each rank was reached, and the one that the tokens leave.
    way: Vec<(u32, u32)>,
}

/// How often all items are filled anew before single paths are searched.
const PASSES: usize = 3;

/// How often components are evened out along trees before that.
const SWEEPS: usize = 2;

impl Flow {
    /// Makes room for layers of at most so many ranks, items and entries.
    pub(crate) fn with_capacity(num_ranks: usize, num_items: usize, num_entries: usize) -> Self {
        Self {
            flow: vec![0; num_entries],
            rank_load: vec![0; num_ranks],
            tight: Vec::with_capacity(num_ranks),
            rank_seen: vec![0; num_ranks],
            item_seen: vec![0; num_items],
            search: 0,
            queue: Vec::with_capacity(num_ranks),
            way: vec![(0, 0); num_ranks],
        }
    }

    /// Splits a layer's loads, whole numbers whose sum fits 53 bits, and returns the level: the
    /// largest rank load, which no split can make smaller.
    pub(crate) fn solve(&mut self, graph: &Graph<'_>, load: &[i64]) -> i64 {
        self.rank_load.fill(0);
        self.pour(graph, load, 0, i64::MAX)
    }

    /// The same on top of what ranks carry already, for a level that is known to be at least
    /// `level`; but it ends as soon as the level is known to be above `limit`: what it returns then
    /// is the mean of the tight ranks, and the flow none in particular.
    pub(crate) fn pour(
        &mut self,
        graph: &Graph<'_>,
        load: &[i64],
        mut level: i64,
        limit: i64,
    ) -> i64 {
        self.load_singles(graph, load);
        let (largest, hottest) = self.largest();
        if largest >= level {
            level = largest;
            self.tight.clear();
            self.tight.push(hottest as u32);
        }
        for item in graph.items {
            self.fill(graph, item, load[item.expert as usize]);
        }
        level = self.raise_to_components(graph, level);
        for _ in 1..PASSES {
            if self.largest().0 <= level || level > limit {
                return level;
            }
            for item in graph.items {
                self.take_out(graph, item);
                self.fill(graph, item, load[item.expert as usize]);
            }
        }
        for _ in 0..SWEEPS {
            if self.largest().0 <= level {
                return level;
            }
            self.sweep(graph);
        }
        while level <= limit && self.find_hot(level) {
            if !self.cool(graph, level) {
                let ranks = self.queue.iter();
                let sum: i64 = ranks.map(|&rank| self.rank_load[rank as usize]).sum();
                level = ceil_div(sum, self.queue.len() as i64);
                self.tight.clone_from(&self.queue);
            }
        }
        level
    }

    /// Adds what ranks carry without a choice.
    pub(super) fn load_singles(&mut self, graph: &Graph<'_>, load: &[i64]) {
        let mut begin = 0;
        for (sum, &end) in self.rank_load.iter_mut().zip(graph.single_ends) {
            let singles = &graph.singles[begin..end as usize];
            *sum += singles
                .iter()
                .map(|&expert| load[expert as usize])
                .sum::<i64>();
            begin = end as usize;
        }
    }

    /// The largest rank load and its rank, the lowest of several.
    fn largest(&self) -> (i64, usize) {
        let largest = self.rank_load.iter().fold(0, |a, &b| a.max(b));
        let rank = self.rank_load.iter().position(|&load| load == largest);
        (largest, rank.unwrap_or(0))
    }

    /// Raises the level to the mean of each component of ranks.
    fn raise_to_components(&mut self, graph: &Graph<'_>, mut level: i64) -> i64 {
        let mut begin = 0;
        for &end in graph.component_ends {
            let ranks = &graph.component_ranks[begin..end as usize];
            let loads = ranks.iter().map(|&rank| self.rank_load[rank as usize]);
            let mean = ceil_div(loads.sum(), ranks.len() as i64);
            if mean > level {
                level = mean;
                self.tight.clear();
                self.tight.extend_from_slice(ranks);
            }
            begin = end as usize;
        }
        level
    }

    fn take_out(&mut self, graph: &Graph<'_>, item: &Item) {
        for index in item.begin as usize..item.end as usize {
            self.rank_load[graph.entries[index].rank as usize] -= self.flow[index];
        }
    }

    /// Pours an item over its ranks as water, so that those which get any stand equally high.
    /// What does not divide goes to the lowest ranks.
    fn fill(&mut self, graph: &Graph<'_>, item: &Item, load: i64) {
        let range = item.begin as usize..item.end as usize;
        let entries = &graph.entries[range.clone()];
        let flow = &mut self.flow[range];
        if let ([a, b], [to_a, to_b]) = (entries, &mut *flow) {
            let (a, b) = (a.rank as usize, b.rank as usize);
            let above = self.rank_load[b] - self.rank_load[a];
            *to_a = ((load + above + 1) >> 1).clamp(0, load);
            *to_b = load - *to_a;
            self.rank_load[a] += *to_a;
            self.rank_load[b] += *to_b;
            return;
        }
        // The surface sinks as ranks that stand above it are left out, and stays where none is.
        let mut surface = i64::MAX;
        let remainder = loop {
            let (mut sum, mut count) = (load, 0);
            for entry in entries {
                let height = self.rank_load[entry.rank as usize];
                if height <= surface {
                    sum += height;
                    count += 1;
                }
            }
            let (next, remainder) = (sum / count, sum % count);
            if next == surface {
                break remainder;
            }
            surface = next;
        };
        let mut more = remainder;
        for (entry, flow) in entries.iter().zip(flow) {
            let height = &mut self.rank_load[entry.rank as usize];
            *flow = 0;
            if *height <= surface {
                *flow = surface - *height + i64::from(more > 0);
                more -= 1;
                *height += *flow;
            }
        }
    }

    /// Evens each component out along a tree of its items, from the leaves to the root: each rank
    /// hands what it has above the mean to the rank before it, or takes what it lacks, as far as
    /// their item goes.
    fn sweep(&mut self, graph: &Graph<'_>) {
        self.next_search();
        let mut begin = 0;
        for &end in graph.component_ends {
            let ranks = &graph.component_ranks[begin..end as usize];
            begin = end as usize;
            if ranks.len() == 1 {
                continue;
            }
            let loads = ranks.iter().map(|&rank| self.rank_load[rank as usize]);
            let mean = ceil_div(loads.sum(), ranks.len() as i64);
            self.grow_tree(graph, ranks[0], ranks.len());
            for place in (1..self.queue.len()).rev() {
                let rank = self.queue[place] as usize;
                let (own, other) = self.way[rank];
                let (own, other) = (own as usize, other as usize);
                let above = self.rank_load[rank] - mean;
                let moved = above.clamp(-self.flow[other], self.flow[own]);
                self.flow[own] -= moved;
                self.flow[other] += moved;
                self.rank_load[rank] -= moved;
                self.rank_load[graph.entries[other].rank as usize] += moved;
            }
        }
    }

    /// Queues the ranks that items which are on both sides link to a rank, breadth first, until
    /// there are so many.
    fn grow_tree(&mut self, graph: &Graph<'_>, root: u32, all: usize) {
        self.queue.clear();
        self.queue.push(root);
        self.rank_seen[root as usize] = self.search;
        let mut next = 0;
        while let Some(&rank) = self.queue.get(next) {
            next += 1;
            for &AtRank { entry: from, item } in graph.entries_at(rank) {
                let item = item as usize;
                if self.item_seen[item] == self.search || self.flow[from as usize] == 0 {
                    continue;
                }
                self.item_seen[item] = self.search;
                let item = graph.items[item];
                for to in item.begin..item.end {
                    let rank = graph.entries[to as usize].rank;
                    if self.rank_seen[rank as usize] != self.search && self.flow[to as usize] > 0 {
                        self.rank_seen[rank as usize] = self.search;
                        self.way[rank as usize] = (to, from);
                        self.queue.push(rank);
                    }
                }
                if self.queue.len() == all {
                    return;
                }
            }
        }
    }

    /// Forgets what was seen.
    fn next_search(&mut self) {
        if self.search == u32::MAX {
            self.rank_seen.fill(0);
            self.item_seen.fill(0);
            self.search = 0;
        }
        self.search += 1;
    }

    /// Begins a search from the ranks above the level; whether there are any.
    fn find_hot(&mut self, level: i64) -> bool {
        self.queue.clear();
        for (rank, &load) in (0..).zip(&self.rank_load) {
            if load > level {
                self.queue.push(rank);
            }
        }
        !self.queue.is_empty()
    }

    /// Searches, breadth first from the ranks in the queue, for ranks below the level that their
    /// tokens can reach, and moves tokens to each on the way. Returns whether any were moved; if
    /// not, the queue holds all ranks that can be reached.
    fn cool(&mut self, graph: &Graph<'_>, level: i64) -> bool {
        self.next_search();
        let mut excess = 0;
        for &rank in &self.queue {
            let rank = rank as usize;
            self.rank_seen[rank] = self.search;
            self.way[rank] = (NO_ENTRY, NO_ENTRY);
            excess += self.rank_load[rank] - level;
        }
        let mut moved = false;
        let mut next = 0;
        while let Some(&rank) = self.queue.get(next) {
            next += 1;
            for &AtRank { entry: from, item } in graph.entries_at(rank) {
                let item = item as usize;
                if self.item_seen[item] == self.search || self.flow[from as usize] == 0 {
                    continue;
                }
                self.item_seen[item] = self.search;
                let item = graph.items[item];
                for to in item.begin..item.end {
                    let rank = graph.entries[to as usize].rank as usize;
                    if self.rank_seen[rank] == self.search {
                        continue;
                    }
                    self.rank_seen[rank] = self.search;
                    self.way[rank] = (to, from);
                    self.queue.push(rank as u32);
                    if self.rank_load[rank] < level {
                        let amount = self.push(graph, rank, level);
                        moved |= amount > 0;
                        excess -= amount;
                        if excess == 0 {
                            return true;
                        }
                    }
                }
            }
        }
        moved
    }

    /// By which entry a rank was reached, and which one the tokens leave; none where a search began.
    fn way(&self, rank: usize) -> Option<(u32, u32)> {
        Some(self.way[rank]).filter(|&(_, from)| from != NO_ENTRY)
    }

    /// Moves tokens along the way to a cold rank: as many as its entries carry, the hot rank at
    /// its begin has above the level and the cold one below. Returns how many.
    fn push(&mut self, graph: &Graph<'_>, cold: usize, level: i64) -> i64 {
        let mut amount = level - self.rank_load[cold];
        let mut hot = cold;
        while let Some((_, from)) = self.way(hot) {
            amount = amount.min(self.flow[from as usize]);
            hot = graph.entries[from as usize].rank as usize;
        }
        amount = amount.min(self.rank_load[hot] - level);
        if amount == 0 {
            return 0;
        }
        let mut rank = cold;
        while let Some((to, from)) = self.way(rank) {
            self.flow[to as usize] += amount;
            self.flow[from as usize] -= amount;
            rank = graph.entries[from as usize].rank as usize;
        }
        self.rank_load[hot] -= amount;
        self.rank_load[cold] += amount;
        amount
    }
}

/// Where a way begins.
const NO_ENTRY: u32 = u32::MAX;

fn ceil_div(sum: i64, count: i64) -> i64 {
    (sum + count - 1) / count
}

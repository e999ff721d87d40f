//! A placement as the solver walks it: which experts ranks share, layer by layer.

use super::flow::{AtRank, Entry, Graph, Item};
use crate::placement::Placement;

/// The graphs of all layers, in flat arrays.
#[derive(Debug, Default, Clone)]
pub(super) struct Graphs {
    num_ranks: usize,
    singles: Vec<u32>,
    single_ends: Vec<u32>,
    items: Vec<Item>,
    entries: Vec<Entry>,
    at_rank: Vec<AtRank>,
    at_rank_ends: Vec<u32>,
    component_ranks: Vec<u32>,
    component_ends: Vec<u32>,
    slots: Vec<SharedSlot>,
    /// Where each layer ends in `singles`, `items`, `entries`, `component_ends` and `slots`.
    ends: Vec<[usize; 5]>,
}

/// A slot of an expert that fills several.
#[derive(Debug, Clone, Copy)]
pub(super) struct SharedSlot {
    pub(super) slot: u32,
    /// The entry of its expert and rank.
    pub(super) entry: u32,
    pub(super) item: u32,
    /// How many slots of the rank hold the expert, and which of them this is.
    pub(super) parts: u32,
    pub(super) number: u32,
    /// How many slots hold the expert anywhere.
    pub(super) count: u32,
}

impl Graphs {
    pub(super) fn new(placement: &Placement) -> Self {
        let topology = placement.topology();
        let (num_slots, num_ranks) = (topology.num_slots(), topology.num_gpus());
        let num_experts = placement.num_experts();
        let layers = placement.num_layers();
        // Each spare slot adds a shared slot, and at most makes its expert's first slot another.
        let spare = num_slots - num_experts;
        let shared = layers * num_slots.min(2 * spare);
        let mut graphs = Self {
            num_ranks,
            singles: Vec::with_capacity(layers * num_slots.min(num_experts)),
            single_ends: Vec::with_capacity(layers * num_ranks),
            items: Vec::with_capacity(layers * spare.min(num_experts)),
            entries: Vec::with_capacity(shared),
            at_rank: Vec::with_capacity(shared),
            at_rank_ends: Vec::with_capacity(layers * num_ranks),
            component_ranks: Vec::with_capacity(layers * num_ranks),
            component_ends: Vec::with_capacity(layers * num_ranks),
            slots: Vec::with_capacity(shared),
            ends: Vec::with_capacity(layers),
        };
        let mut scratch = Scratch {
            item_of: vec![NONE; num_experts],
            begins: Vec::new(),
            ranks: vec![0; num_slots],
            fill: Vec::new(),
            component: vec![0; num_ranks],
        };
        for (gpu, rank) in (0..num_ranks).map(|gpu| (topology.slots_of(gpu), gpu as u32)) {
            scratch.ranks[gpu].fill(rank);
        }
        let counts = placement.logcnt().chunks_exact(num_experts);
        for (phy2log, counts) in placement.phy2log().chunks_exact(num_slots).zip(counts) {
            graphs.add_layer(phy2log, counts, &mut scratch);
        }
        graphs
    }

    /// Appends a layer. Items are numbered by their first slot, entries by item and rank.
    fn add_layer(&mut self, phy2log: &[i64], counts: &[i64], scratch: &mut Scratch) {
        let [_, first_item, first_entry, _, first_slot] =
            self.ends.last().copied().unwrap_or_default();
        let first_single = self.singles.len();
        let Scratch {
            item_of,
            begins,
            ranks,
            fill,
            component,
        } = scratch;
        item_of.fill(NONE);
        // Slots of an item are as many as its entries at most: lay out that many, then close up.
        begins.clear();
        let mut begin = 0;
        let mut rank_before = 0;
        for (slot, &expert) in phy2log.iter().enumerate() {
            while rank_before != ranks[slot] {
                self.single_ends
                    .push((self.singles.len() - first_single) as u32);
                rank_before += 1;
            }
            // Slots of dead ranks hold nothing.
            let Ok(expert) = usize::try_from(expert) else {
                continue;
            };
            if counts[expert] == 1 {
                self.singles.push(expert as u32);
                continue;
            }
            if item_of[expert] == NONE {
                item_of[expert] = begins.len() as u32;
                begins.push(begin);
                self.items.push(Item {
                    expert: expert as u32,
                    begin: 0,
                    end: 0,
                });
                begin += counts[expert] as u32;
            }
        }
        self.single_ends
            .push((self.singles.len() - first_single) as u32);

        // The slots of each item, in order: those of one rank are neighbours.
        let empty = SharedSlot {
            slot: 0,
            entry: 0,
            item: 0,
            parts: 0,
            number: 0,
            count: 0,
        };
        self.slots.resize(first_slot + begin as usize, empty);
        fill.clear();
        fill.extend_from_slice(begins);
        for (slot, &expert) in phy2log.iter().enumerate() {
            let item = usize::try_from(expert).map_or(NONE, |expert| item_of[expert]);
            if item != NONE {
                let place = &mut fill[item as usize];
                self.slots[first_slot + *place as usize] = SharedSlot {
                    slot: slot as u32,
                    item,
                    count: counts[expert as usize] as u32,
                    ..empty
                };
                *place += 1;
            }
        }
        let mut place = first_slot;
        for number in 0..begins.len() {
            let item = &mut self.items[first_item + number];
            item.begin = (self.entries.len() - first_entry) as u32;
            let end = place + counts[item.expert as usize] as usize;
            while place < end {
                let rank = ranks[self.slots[place].slot as usize];
                let same = self.slots[place..end]
                    .iter()
                    .take_while(|shared| ranks[shared.slot as usize] == rank)
                    .count();
                let entry = (self.entries.len() - first_entry) as u32;
                for (number, shared) in (0..).zip(&mut self.slots[place..place + same]) {
                    (shared.entry, shared.parts, shared.number) = (entry, same as u32, number);
                }
                self.entries.push(Entry { rank });
                place += same;
            }
            item.end = (self.entries.len() - first_entry) as u32;
        }
        self.index_ranks(first_item, first_entry, fill);
        let components = self.join_components(first_item, first_entry, component, fill);
        self.ends.push([
            self.singles.len(),
            self.items.len(),
            self.entries.len(),
            components,
            self.slots.len(),
        ]);
    }

    /// Sorts a layer's entries by rank.
    fn index_ranks(&mut self, first_item: usize, first_entry: usize, fill: &mut Vec<u32>) {
        let entries = &self.entries[first_entry..];
        fill.clear();
        fill.resize(self.num_ranks + 1, 0);
        for entry in entries {
            fill[entry.rank as usize + 1] += 1;
        }
        for rank in 0..self.num_ranks {
            fill[rank + 1] += fill[rank];
        }
        self.at_rank_ends.extend_from_slice(&fill[1..]);
        let nothing = AtRank { entry: 0, item: 0 };
        self.at_rank.resize(self.entries.len(), nothing);
        for (item, of_item) in (0..).zip(&self.items[first_item..]) {
            for entry in of_item.begin..of_item.end {
                let place = &mut fill[entries[entry as usize].rank as usize];
                self.at_rank[first_entry + *place as usize] = AtRank { entry, item };
                *place += 1;
            }
        }
    }

    /// Lists the ranks of a layer by component: those that experts link, whatever their tokens.
    fn join_components(
        &mut self,
        first_item: usize,
        first_entry: usize,
        parent: &mut [u32],
        fill: &mut Vec<u32>,
    ) -> usize {
        for (rank, parent) in (0..).zip(parent.iter_mut()) {
            *parent = rank;
        }
        for item in &self.items[first_item..] {
            let entries = &self.entries[first_entry..][item.begin as usize..item.end as usize];
            for pair in entries.windows(2) {
                let a = root(parent, pair[0].rank);
                let b = root(parent, pair[1].rank);
                parent[a.max(b) as usize] = a.min(b);
            }
        }
        // A root is the lowest rank of its component: count them, then list them by root.
        let begin = self.component_ranks.len();
        self.component_ranks.resize(begin + self.num_ranks, 0);
        fill.clear();
        fill.resize(self.num_ranks, 0);
        for rank in 0..self.num_ranks as u32 {
            fill[root(parent, rank) as usize] += 1;
        }
        let mut end = 0;
        for count in fill.iter_mut() {
            let begin = end;
            end += *count;
            if *count > 0 {
                self.component_ends.push(end);
            }
            *count = begin;
        }
        for rank in 0..self.num_ranks as u32 {
            let place = &mut fill[parent[rank as usize] as usize];
            self.component_ranks[begin + *place as usize] = rank;
            *place += 1;
        }
        self.component_ends.len()
    }

    pub(super) fn layer(&self, layer: usize) -> Graph<'_> {
        let begin = self.begin(layer);
        let end = self.ends[layer];
        let of_ranks = layer * self.num_ranks..(layer + 1) * self.num_ranks;
        Graph {
            singles: &self.singles[begin[0]..end[0]],
            single_ends: &self.single_ends[of_ranks.clone()],
            items: &self.items[begin[1]..end[1]],
            entries: &self.entries[begin[2]..end[2]],
            at_rank: &self.at_rank[begin[2]..end[2]],
            at_rank_ends: &self.at_rank_ends[of_ranks.clone()],
            component_ranks: &self.component_ranks[of_ranks],
            component_ends: &self.component_ends[begin[3]..end[3]],
        }
    }

    /// The slots of a layer whose experts fill several.
    pub(super) fn shared_slots(&self, layer: usize) -> &[SharedSlot] {
        &self.slots[self.begin(layer)[4]..self.ends[layer][4]]
    }

    /// The most items of any layer.
    pub(super) fn max_items(&self) -> usize {
        self.widest(1)
    }

    /// The most entries of any layer.
    pub(super) fn max_entries(&self) -> usize {
        self.widest(2)
    }

    fn widest(&self, part: usize) -> usize {
        let sizes =
            (0..self.ends.len()).map(|layer| self.ends[layer][part] - self.begin(layer)[part]);
        sizes.max().unwrap_or(0)
    }

    fn begin(&self, layer: usize) -> [usize; 5] {
        layer
            .checked_sub(1)
            .map_or([0; 5], |before| self.ends[before])
    }
}

/// The graph of one layer whose slots change, without the experts that fill one.
#[derive(Debug)]
pub(crate) struct LayerGraph {
    graphs: Graphs,
    fill: Vec<u32>,
    component: Vec<u32>,
}

impl LayerGraph {
    pub(crate) fn new(num_ranks: usize) -> Self {
        Self {
            graphs: Graphs {
                num_ranks,
                single_ends: vec![0; num_ranks],
                ..Graphs::default()
            },
            fill: Vec::new(),
            component: vec![0; num_ranks],
        }
    }

    /// Takes the experts that fill several slots, and the ranks of these.
    pub(crate) fn take(&mut self, experts: impl Iterator<Item = (u32, impl Iterator<Item = u32>)>) {
        let graphs = &mut self.graphs;
        graphs.items.clear();
        graphs.entries.clear();
        graphs.at_rank.clear();
        graphs.at_rank_ends.clear();
        graphs.component_ranks.clear();
        graphs.component_ends.clear();
        graphs.ends.clear();
        for (expert, ranks) in experts {
            let begin = graphs.entries.len();
            for rank in ranks {
                let known = graphs.entries[begin..]
                    .iter()
                    .any(|entry| entry.rank == rank);
                if !known {
                    graphs.entries.push(Entry { rank });
                }
            }
            graphs.items.push(Item {
                expert,
                begin: begin as u32,
                end: graphs.entries.len() as u32,
            });
        }
        graphs.index_ranks(0, 0, &mut self.fill);
        let components = graphs.join_components(0, 0, &mut self.component, &mut self.fill);
        let (items, entries) = (graphs.items.len(), graphs.entries.len());
        graphs.ends.push([0, items, entries, components, 0]);
    }

    pub(crate) fn graph(&self) -> Graph<'_> {
        self.graphs.layer(0)
    }
}

const NONE: u32 = u32::MAX;

/// What layers reuse while they are added.
#[derive(Debug)]
struct Scratch {
    /// The item of each expert, or `NONE`.
    item_of: Vec<u32>,
    /// Where the slots of each item begin.
    begins: Vec<u32>,
    /// The rank of each slot.
    ranks: Vec<u32>,
    fill: Vec<u32>,
    component: Vec<u32>,
}

/// The root of a rank's component; ranks on the way are linked to it.
fn root(parent: &mut [u32], rank: u32) -> u32 {
    let top = root_of(parent, rank);
    let mut rank = rank;
    while parent[rank as usize] != top {
        rank = std::mem::replace(&mut parent[rank as usize], top);
    }
    top
}

fn root_of(parent: &[u32], mut rank: u32) -> u32 {
    while parent[rank as usize] != rank {
        rank = parent[rank as usize];
    }
    rank
}

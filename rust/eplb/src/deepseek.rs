//! The reference policy: DeepSeek's EPLB, to the last slot.
//!
//! Source: <https://github.com/deepseek-ai/EPLB>, `rebalance_experts`, with its sorts made
//! stable. All sums are `f32`, in a stated order, so that the answer is the published one.
//!
//! 1. Groups to nodes: the load of each group is summed by expert index, and groups are
//!    [packed](crate::pack) onto nodes. A node lists its experts group by group, in the order in
//!    which the groups came.
//! 2. Replicas in each node: spare slots go, one at a time, to the expert with the largest load
//!    per replica, ties to the first in the list.
//! 3. Replicas to ranks: packed onto the node's ranks, heaviest first, ties to the earlier
//!    replica.
//!
//! Where groups do not divide over nodes, all is one group on one node: the global policy.
//!
//! Only the first few experts of the sorted list ever get replicas, since the largest load per
//! replica is either the first one not replicated yet or one replicated before. So each node's
//! list is sorted once; the replicas of its head are sorted apart and put between the rest.

use multiversion::multiversion;

use crate::error::{Result, require_multiple};
use crate::order::{self, index_of, key, load_of, sort_keys};
use crate::pack::{self, Place, pack};
use crate::placement::Replica;
use crate::planner::check_slots;
use crate::topology::Topology;

/// How many nodes' replicas are packed side by side.
const ABREAST: usize = 4;

/// The sizes of the problem of one node; all nodes of all layers have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    num_experts: usize,
    num_groups: usize,
    num_nodes: usize,
    /// Of one node.
    num_gpus: usize,
    slots_per_gpu: usize,
}

impl Shape {
    /// Checks that the policy can serve these sizes.
    ///
    /// # Errors
    /// `TooSmall` for fewer slots than experts, `NotMultiple` for experts that do not divide into
    /// groups.
    pub(crate) fn new(topology: &Topology, num_experts: usize, num_groups: usize) -> Result<Self> {
        require_multiple("num_experts", num_experts, "num_groups", num_groups)?;
        check_slots(num_experts, topology)?;
        let hierarchical = is_hierarchical(topology, num_groups);
        let (num_groups, num_nodes) = if hierarchical {
            (num_groups, topology.num_nodes())
        } else {
            (1, 1)
        };
        Ok(Self {
            num_experts,
            num_groups,
            num_nodes,
            num_gpus: topology.num_gpus() / num_nodes,
            slots_per_gpu: topology.slots_per_gpu(),
        })
    }

    fn node_slots(&self) -> usize {
        self.num_gpus * self.slots_per_gpu
    }
}

/// Whether groups divide over nodes, so that they stay on one.
pub(crate) fn is_hierarchical(topology: &Topology, num_groups: usize) -> bool {
    num_groups.is_multiple_of(topology.num_nodes())
}

/// Scratch of the policy, kept between calls: nothing is allocated once it is warm.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    order: order::Scratch,
    pack: pack::Scratch,
    groups: Groups,
    nodes: [Node; ABREAST],
}

/// The packing of one layer's groups onto nodes.
#[derive(Debug, Default)]
struct Groups {
    loads: Vec<f32>,
    keys: Vec<u64>,
    sorted: Vec<f32>,
    places: Vec<Place>,
    /// The groups, node by node, in the order in which they were packed.
    by_node: Vec<u32>,
}

/// One node's problem, and its answer. An expert goes by its place in the node's list; a replica
/// by its item number: the list's experts first, then their further replicas as they were made.
#[derive(Debug, Default)]
struct Node {
    /// The list: experts, their loads and how many replicas they have.
    experts: Vec<u32>,
    loads: Vec<f32>,
    counts: Vec<u32>,
    /// The list, heaviest first.
    keys: Vec<u64>,
    /// The experts with further replicas by load per replica, largest last.
    head: Vec<u64>,
    /// The further replicas, in the order in which they were made.
    extras: Vec<Replica>,
    /// All replicas of the head by load, heaviest first.
    head_items: Vec<u64>,
    /// How many replicas of the head come just before each expert of the rest.
    inserted: Vec<u32>,
    /// All replicas in packing order, their loads, and where they went.
    replicas: Vec<Replica>,
    shares: Vec<f32>,
    places: Vec<Place>,
}

/// Plans layers: `[layers, num_experts]` loads to `[layers, num_slots]` replicas by slot.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt"
))]
pub(crate) fn plan_layers(
    shape: &Shape,
    loads: &[f32],
    replicas: &mut [Replica],
    scratch: &mut Scratch,
) {
    let mut layers = loads.chunks_exact(shape.num_experts);
    let mut layer: &[f32] = &[];
    let mut slots = replicas.chunks_exact_mut(shape.node_slots());
    let num_problems = slots.len();
    let Scratch {
        order,
        pack,
        groups,
        nodes,
    } = scratch;
    let mut problem = 0;
    while problem < num_problems {
        let abreast = ABREAST.min(num_problems - problem);
        for node in &mut nodes[..abreast] {
            let index = problem % shape.num_nodes;
            if index == 0 {
                layer = layers.next().unwrap_or_default();
                groups.pack_onto_nodes(shape, layer, order, pack);
            }
            node.list_experts(shape, layer, groups.of(shape, index));
            node.replicate(shape, order);
            if shape.slots_per_gpu == 1 {
                node.place_in_turn();
            } else {
                node.arrange_by_load();
            }
            problem += 1;
        }
        if shape.slots_per_gpu > 1 {
            if let Ok(nodes) = <&mut [Node; ABREAST]>::try_from(&mut nodes[..abreast]) {
                pack_onto_ranks(shape, nodes, pack);
            } else {
                for node in &mut nodes[..abreast] {
                    pack_onto_ranks(shape, std::array::from_mut(node), pack);
                }
            }
        }
        for (node, slots) in nodes[..abreast].iter().zip(&mut slots) {
            node.write_slots(shape, slots);
        }
    }
}

#[inline(always)]
fn pack_onto_ranks<const K: usize>(
    shape: &Shape,
    nodes: &mut [Node; K],
    scratch: &mut pack::Scratch,
) {
    let mut items: [&[f32]; K] = [&[]; K];
    let mut places: [&mut [Place]; K] = std::array::from_fn(|_| Default::default());
    for ((node, items), places) in nodes.iter_mut().zip(&mut items).zip(&mut places) {
        *items = &node.shares;
        *places = &mut node.places;
    }
    pack(items, shape.num_gpus, shape.slots_per_gpu, places, scratch);
}

impl Groups {
    /// Sums the layer's load by group and packs the groups onto nodes.
    #[inline(always)]
    fn pack_onto_nodes(
        &mut self,
        shape: &Shape,
        layer: &[f32],
        order: &mut order::Scratch,
        scratch: &mut pack::Scratch,
    ) {
        let num_groups = shape.num_groups;
        let per_node = num_groups / shape.num_nodes;
        if per_node == 1 {
            self.by_node.clear();
            self.by_node.extend(0..num_groups as u32);
            return;
        }
        let size = shape.num_experts / num_groups;
        self.loads.clear();
        self.loads.resize(num_groups, 0.0);
        for expert in 0..size {
            for (group, sum) in self.loads.iter_mut().enumerate() {
                *sum += layer[group * size + expert];
            }
        }
        self.keys.resize(num_groups, 0);
        sort_keys(&self.loads, &mut self.keys, order);
        self.sorted.clear();
        self.sorted
            .extend(self.keys.iter().map(|&key| load_of(key)));
        self.places.resize(num_groups, Place::default());
        let places = [&mut self.places[..]];
        pack([&self.sorted], shape.num_nodes, per_node, places, scratch);
        self.by_node.resize(num_groups, 0);
        for (&key, place) in self.keys.iter().zip(&self.places) {
            self.by_node[place.pack as usize * per_node + place.arrival as usize] = index_of(key);
        }
    }

    /// The groups of a node, in the order in which they were packed.
    #[inline(always)]
    fn of(&self, shape: &Shape, node: usize) -> &[u32] {
        let per_node = shape.num_groups / shape.num_nodes;
        &self.by_node[node * per_node..(node + 1) * per_node]
    }
}

impl Node {
    /// Lists the experts of the node's groups, group by group.
    #[inline(always)]
    fn list_experts(&mut self, shape: &Shape, layer: &[f32], groups: &[u32]) {
        let size = shape.num_experts / shape.num_groups;
        self.experts.clear();
        self.loads.clear();
        for &group in groups {
            let first = group as usize * size;
            self.experts.extend(first as u32..(first + size) as u32);
            self.loads.extend_from_slice(&layer[first..first + size]);
        }
    }

    /// Gives each spare slot to the expert with the largest load per replica.
    #[inline(always)]
    fn replicate(&mut self, shape: &Shape, order: &mut order::Scratch) {
        let num_experts = self.loads.len();
        self.keys.resize(num_experts, 0);
        sort_keys(&self.loads, &mut self.keys, order);
        self.counts.clear();
        self.counts.resize(num_experts, 1);
        self.head.clear();
        self.extras.clear();
        let mut rest = self.keys.iter().copied().peekable();
        for _ in num_experts..shape.node_slots() {
            let hottest = match (self.head.last(), rest.peek()) {
                (Some(&of_head), Some(&of_rest)) if of_head < of_rest => self.head.pop(),
                (_, Some(_)) => rest.next(),
                (_, None) => self.head.pop(),
            };
            let Some(hottest) = hottest else { return };
            let expert = index_of(hottest);
            let count = &mut self.counts[expert as usize];
            self.extras.push(Replica {
                expert,
                number: *count,
            });
            *count += 1;
            let share = key(self.loads[expert as usize] / *count as f32, expert);
            let place = self.head.partition_point(|&other| other > share);
            self.head.insert(place, share);
        }
    }

    /// Puts the replicas in the order of their numbers, one to a rank.
    #[inline(always)]
    fn place_in_turn(&mut self) {
        self.replicas.clear();
        let firsts = 0..self.experts.len() as u32;
        self.replicas
            .extend(firsts.map(|expert| Replica { expert, number: 0 }));
        self.replicas.extend_from_slice(&self.extras);
        self.places.clear();
        let ranks = 0..self.replicas.len() as u32;
        self.places
            .extend(ranks.map(|pack| Place { pack, arrival: 0 }));
    }

    /// Puts the replicas in the order of their loads, heaviest first.
    #[inline(always)]
    fn arrange_by_load(&mut self) {
        let num_experts = self.experts.len();
        let (head, rest) = self.keys.split_at(self.head.len());
        self.head_items.clear();
        self.head_items.extend_from_slice(&self.head);
        for (number, extra) in self.extras.iter().enumerate() {
            let expert = extra.expert as usize;
            let share = self.loads[expert] / self.counts[expert] as f32;
            self.head_items
                .push(key(share, (num_experts + number) as u32));
        }
        self.head_items.sort_unstable();
        debug_assert_eq!(head.len(), self.head.len());

        let num_items = num_experts + self.extras.len();
        self.replicas.resize(num_items, Replica::default());
        self.shares.resize(num_items, 0.0);
        self.places.resize(num_items, Place::default());
        self.inserted.clear();
        self.inserted.resize(rest.len() + 1, 0);
        for (earlier, &item) in self.head_items.iter().enumerate() {
            let lighter = rest.partition_point(|&other| other < item);
            self.inserted[lighter] += 1;
            let index = index_of(item);
            self.replicas[earlier + lighter] = match (index as usize).checked_sub(num_experts) {
                None => Replica {
                    expert: index,
                    number: 0,
                },
                Some(extra) => self.extras[extra],
            };
            self.shares[earlier + lighter] = load_of(item);
        }
        let mut place = 0;
        for (&item, &inserted) in rest.iter().zip(&self.inserted) {
            place += inserted as usize;
            self.replicas[place] = Replica {
                expert: index_of(item),
                number: 0,
            };
            self.shares[place] = load_of(item);
            place += 1;
        }
    }

    /// Writes what each slot of the node holds.
    #[inline(always)]
    fn write_slots(&self, shape: &Shape, slots: &mut [Replica]) {
        for (replica, place) in self.replicas.iter().zip(&self.places) {
            let slot = place.pack as usize * shape.slots_per_gpu + place.arrival as usize;
            slots[slot] = Replica {
                expert: self.experts[replica.expert as usize],
                number: replica.number,
            };
        }
    }
}

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
//! Layers are independent and nodes alike, so eight layers run in step, one in each
//! [lane](crate::lanes).

use multiversion::multiversion;

use std::collections::BinaryHeap;

use crate::error::{Result, require_groups};
use crate::lanes::{LANES, Row, TAG, key, tag, value};
use crate::order::{self, sort_descending};
use crate::pack::{self, Places, pack};
use crate::placement::Replica;
use crate::planner::check_slots;
use crate::topology::Topology;

/// The most comparisons, experts times spare slots, by which a node's spare slots are given away
/// in passes over all experts; above it a heap is faster.
const PASS_LIMIT: usize = 1 << 17;

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
    /// `TooSmall` for fewer slots than experts, `NotDivisor` for experts that do not divide into
    /// groups.
    pub(crate) fn new(topology: &Topology, num_experts: usize, num_groups: usize) -> Result<Self> {
        require_groups(num_groups, num_experts)?;
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
    groups: Groups,
    node: Node,
    places: Vec<Places>,
    order: order::Scratch,
    pack: pack::Scratch,
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
    let num_slots = shape.node_slots() * shape.num_nodes;
    let blocks = loads
        .chunks(LANES * shape.num_experts)
        .zip(replicas.chunks_mut(LANES * num_slots));
    for (loads, replicas) in blocks {
        let mut layers = [&loads[..shape.num_experts]; LANES];
        for (lane, layer) in layers.iter_mut().zip(loads.chunks_exact(shape.num_experts)) {
            *lane = layer;
        }
        let Scratch {
            groups,
            node,
            places,
            order: keys,
            pack: packs,
        } = scratch;
        groups.pack_onto_nodes(shape, &layers, places, keys, packs);
        for index in 0..shape.num_nodes {
            node.list_experts(shape, &layers, groups.of(shape, index));
            node.replicate(shape.node_slots());
            if shape.slots_per_gpu == 1 {
                place_in_turn(shape.node_slots(), places);
            } else {
                sort_descending(&mut node.shares, keys);
                pack(
                    &node.shares,
                    shape.num_gpus,
                    shape.slots_per_gpu,
                    places,
                    packs,
                );
            }
            let first = index * shape.node_slots();
            for (lane, layer) in replicas.chunks_exact_mut(num_slots).enumerate() {
                let slots = &mut layer[first..first + shape.node_slots()];
                node.write_slots(lane, places, slots);
            }
        }
    }
}

/// The packing of groups onto nodes.
#[derive(Debug, Default)]
struct Groups {
    loads: Vec<Row>,
    /// The groups, node by node, in the order in which they were packed.
    by_node: Vec<[u32; LANES]>,
}

impl Groups {
    /// Sums the layers' loads by group and packs the groups onto nodes.
    #[inline(always)]
    fn pack_onto_nodes(
        &mut self,
        shape: &Shape,
        layers: &[&[f32]; LANES],
        places: &mut Vec<Places>,
        keys: &mut order::Scratch,
        packs: &mut pack::Scratch,
    ) {
        let num_groups = shape.num_groups;
        let per_node = num_groups / shape.num_nodes;
        self.by_node.clear();
        if per_node == 1 {
            self.by_node
                .extend((0..num_groups as u32).map(|group| [group; LANES]));
            return;
        }
        let size = shape.num_experts / num_groups;
        self.loads.clear();
        self.loads.extend((0..num_groups).map(|group| {
            let mut sums = [0.0f32; LANES];
            for expert in group * size..(group + 1) * size {
                for (sum, layer) in sums.iter_mut().zip(layers) {
                    *sum += layer[expert];
                }
            }
            Row(sums.map(|sum| key(f64::from(sum), TAG - group as u64)))
        }));
        sort_descending(&mut self.loads, keys);
        pack(&self.loads, shape.num_nodes, per_node, places, packs);
        self.by_node.resize(num_groups, [0; LANES]);
        for (group, place) in self.loads.iter().zip(places) {
            for lane in 0..LANES {
                self.by_node[place[lane] as usize][lane] = (TAG - tag(group.0[lane])) as u32;
            }
        }
    }

    /// The groups of a node, in the order in which they were packed.
    #[inline(always)]
    fn of(&self, shape: &Shape, node: usize) -> &[[u32; LANES]] {
        let per_node = shape.num_groups / shape.num_nodes;
        &self.by_node[node * per_node..(node + 1) * per_node]
    }
}

/// One node's experts and their replicas. Replicas are numbered as they come to be: first one of
/// each expert in the list, then the spare slots'.
#[derive(Debug, Default)]
struct Node {
    /// What each replica is, by number.
    replicas: Vec<[Replica; LANES]>,
    /// The loads of the experts in the list, and how many replicas each has.
    loads: Vec<[f32; LANES]>,
    counts: Vec<[u32; LANES]>,
    /// The load of each replica, tagged so that the one with the lowest number is the largest
    /// among equals: `TAG` minus its number.
    shares: Vec<Row>,
    /// Whose replica is in each spare slot, as a place in the list.
    owners: Vec<[u32; LANES]>,
    /// The bits of the experts' shares, where there are too many for passes.
    heaps: [BinaryHeap<u64>; LANES],
}

impl Node {
    /// Lists the experts of the node's groups, group by group, each with one replica.
    #[inline(always)]
    fn list_experts(&mut self, shape: &Shape, layers: &[&[f32]; LANES], groups: &[[u32; LANES]]) {
        let size = shape.num_experts / shape.num_groups;
        let length = groups.len() * size;
        self.loads.resize(length, [0.0; LANES]);
        self.replicas.resize(length, [Replica::default(); LANES]);
        let rows = self.loads.chunks_exact_mut(size);
        for (group, (loads, replicas)) in groups
            .iter()
            .zip(rows.zip(self.replicas.chunks_exact_mut(size)))
        {
            let first = group.map(|group| group * size as u32);
            let mut sources = [&layers[0][..0]; LANES];
            for lane in 0..LANES {
                sources[lane] = &layers[lane][first[lane] as usize..][..size];
            }
            for (place, (loads, replicas)) in loads.iter_mut().zip(replicas).enumerate() {
                for lane in 0..LANES {
                    loads[lane] = sources[lane][place];
                    replicas[lane] = Replica {
                        expert: first[lane] + place as u32,
                        number: 0,
                    };
                }
            }
        }
        self.counts.clear();
        self.counts.resize(length, [1; LANES]);
        self.shares.clear();
        self.shares
            .extend(self.loads.iter().zip(0..).map(|(loads, place)| {
                Row(std::array::from_fn(|lane| {
                    key(f64::from(loads[lane]), TAG - place)
                }))
            }));
    }

    /// Gives each spare slot to the expert with the largest load per replica.
    #[inline(always)]
    fn replicate(&mut self, num_slots: usize) {
        let num_experts = self.loads.len();
        let num_spare = num_slots - num_experts;
        self.replicas.resize(num_slots, [Replica::default(); LANES]);
        self.owners.clear();
        if num_spare * num_experts > PASS_LIMIT {
            self.replicate_from_heaps(num_slots);
        } else {
            for number in num_experts..num_slots {
                let hottest = largest(&self.shares);
                self.add_replicas(hottest.0.map(|key| TAG - tag(key)), number);
            }
        }
        // A replica in a spare slot carries what its expert's first one does.
        for (number, owners) in self.owners.iter().enumerate() {
            let number = TAG - (num_experts + number) as u64;
            self.shares.push(Row(std::array::from_fn(|lane| {
                key(value(self.shares[owners[lane] as usize].0[lane]), number)
            })));
        }
    }

    fn replicate_from_heaps(&mut self, num_slots: usize) {
        for (lane, heap) in self.heaps.iter_mut().enumerate() {
            heap.clear();
            // The bits of floats that are not negative are in their order.
            heap.extend(self.shares.iter().map(|share| share.0[lane].to_bits()));
        }
        for number in self.loads.len()..num_slots {
            let hottest = self.heaps.each_ref().map(|heap| {
                let bits = heap.peek().copied().unwrap_or_default();
                TAG - tag(f64::from_bits(bits))
            });
            self.add_replicas(hottest, number);
            for (lane, heap) in self.heaps.iter_mut().enumerate() {
                if let Some(mut top) = heap.peek_mut() {
                    *top = self.shares[hottest[lane] as usize].0[lane].to_bits();
                }
            }
        }
    }

    /// Makes replica `number` of each lane one more of the expert at `places` in its list.
    #[inline(always)]
    fn add_replicas(&mut self, places: [u64; LANES], number: usize) {
        let mut loads = [0.0; LANES];
        let mut counts = [0; LANES];
        for lane in 0..LANES {
            let place = places[lane] as usize;
            let count = &mut self.counts[place][lane];
            self.replicas[number][lane] = Replica {
                expert: self.replicas[place][lane].expert,
                number: *count,
            };
            *count += 1;
            counts[lane] = *count;
            loads[lane] = self.loads[place][lane];
        }
        let shares: [f64; LANES] =
            std::array::from_fn(|lane| f64::from(loads[lane] / counts[lane] as f32));
        for lane in 0..LANES {
            self.shares[places[lane] as usize].0[lane] = key(shares[lane], TAG - places[lane]);
        }
        self.owners.push(places.map(|place| place as u32));
    }

    /// Writes what each slot of the node holds in one lane's layer.
    #[inline(always)]
    fn write_slots(&self, lane: usize, places: &[Places], slots: &mut [Replica]) {
        for (share, place) in self.shares.iter().zip(places) {
            let number = (TAG - tag(share.0[lane])) as usize;
            slots[place[lane] as usize] = self.replicas[number][lane];
        }
    }
}

/// The largest key of each lane.
#[inline(always)]
fn largest(rows: &[Row]) -> Row {
    let mut best = [Row::default(); 2];
    for pair in rows.chunks(2) {
        best[0] = best[0].larger(&pair[0]);
        if let Some(second) = pair.get(1) {
            best[1] = best[1].larger(second);
        }
    }
    best[0].larger(&best[1])
}

/// One replica a rank: the first goes to the first, whatever its load.
#[inline(always)]
fn place_in_turn(num_slots: usize, places: &mut Vec<Places>) {
    places.clear();
    places.extend((0..num_slots as u32).map(|slot| [slot; LANES]));
}

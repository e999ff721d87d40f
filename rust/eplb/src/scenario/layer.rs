//! One layer while it is being planned: which expert each slot holds, and what may change.

use std::ops::Range;

/// An exchange of what slots hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exchange {
    /// A slot takes an expert in the place of its own, which keeps other slots.
    Replace { slot: u32, expert: u32 },
    /// Two slots of different ranks trade what they hold.
    Swap { a: u32, b: u32 },
}

/// Which expert each slot of a layer holds, and how far that is from the placement in force.
///
/// R slots, E experts, D ranks.
#[derive(Debug)]
pub(super) struct Layer {
    num_ranks: usize,
    num_experts: usize,
    /// The rank of each slot, `[R]`, and where the slots of each rank begin, `[D + 1]`.
    rank_of: Vec<u32>,
    begins: Vec<u32>,
    /// The expert in each slot, `[R]`, and how many slots each expert has, `[E]`: as a placement
    /// has them.
    experts: Vec<i64>,
    counts: Vec<i64>,
    /// The slots of each expert, `[E, most]`, in no order.
    places: Vec<u32>,
    most: usize,
    /// How many slots of each rank hold each expert, `[D, E]`, and whether one did at first.
    held: Vec<u16>,
    before: Vec<bool>,
    /// The first placement.
    first: Vec<i64>,
    /// Experts on a rank that did not hold them at first.
    num_moves: usize,
    /// The node of each rank and of each expert, where experts stay on their node; else empty.
    node_of_rank: Vec<u32>,
    node_of_expert: Vec<u32>,
}

impl Layer {
    /// Takes a layer of a placement whose slots are all filled. With `node_of_rank`, experts stay
    /// on the node of their last slot.
    pub(super) fn new(
        num_experts: usize,
        rank_of: Vec<u32>,
        experts: &[i64],
        node_of_rank: Vec<u32>,
    ) -> Self {
        let num_ranks = rank_of.last().map_or(0, |&rank| rank as usize + 1);
        let most = experts.len() - num_experts + 1;
        let begin = |rank| rank_of.partition_point(|&other| other < rank) as u32;
        let begins = (0..=num_ranks as u32).map(begin).collect();
        let mut layer = Self {
            num_ranks,
            num_experts,
            rank_of,
            begins,
            experts: experts.to_vec(),
            counts: vec![0; num_experts],
            places: vec![0; num_experts * most],
            most,
            held: vec![0; num_ranks * num_experts],
            before: vec![false; num_ranks * num_experts],
            first: experts.to_vec(),
            num_moves: 0,
            node_of_expert: vec![
                0;
                if node_of_rank.is_empty() {
                    0
                } else {
                    num_experts
                }
            ],
            node_of_rank,
        };
        for (slot, &expert) in experts.iter().enumerate() {
            let expert = expert as usize;
            layer.enter(slot, expert);
            let rank = layer.rank(slot);
            layer.before[rank * num_experts + expert] = true;
            layer.settle(slot);
        }
        layer.num_moves = 0;
        layer
    }

    pub(super) fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    pub(super) fn num_experts(&self) -> usize {
        self.num_experts
    }

    pub(super) fn num_moves(&self) -> usize {
        self.num_moves
    }

    /// The expert in each slot, `[R]`.
    pub(super) fn experts(&self) -> &[i64] {
        &self.experts
    }

    /// The rank of each slot, `[R]`.
    pub(super) fn ranks(&self) -> &[u32] {
        &self.rank_of
    }

    #[inline(always)]
    pub(super) fn expert(&self, slot: u32) -> usize {
        self.experts[slot as usize] as usize
    }

    #[inline(always)]
    pub(super) fn count(&self, expert: usize) -> usize {
        self.counts[expert] as usize
    }

    /// The rank of a slot.
    #[inline(always)]
    pub(super) fn rank(&self, slot: usize) -> usize {
        self.rank_of[slot] as usize
    }

    /// The slots of a rank.
    #[inline(always)]
    pub(super) fn slots(&self, rank: usize) -> Range<u32> {
        self.begins[rank]..self.begins[rank + 1]
    }

    /// The rank of an expert that has one slot.
    #[inline(always)]
    pub(super) fn only_rank(&self, expert: usize) -> Option<usize> {
        match *self.places(expert) {
            [slot] => Some(self.rank(slot as usize)),
            _ => None,
        }
    }

    /// The slots of an expert.
    #[inline(always)]
    pub(super) fn places(&self, expert: usize) -> &[u32] {
        &self.places[expert * self.most..][..self.count(expert)]
    }

    #[inline(always)]
    fn holds(&self, rank: usize, expert: usize) -> bool {
        self.held[rank * self.num_experts + expert] > 0
    }

    /// Whether a rank may take an expert that it does not hold.
    #[inline(always)]
    fn takes(&self, rank: usize, expert: usize) -> bool {
        !self.holds(rank, expert)
            && (self.node_of_rank.is_empty()
                || self.node_of_rank[rank] == self.node_of_expert[expert])
    }

    /// Whether an exchange can be made.
    #[inline(always)]
    pub(super) fn allows(&self, exchange: Exchange) -> bool {
        match exchange {
            Exchange::Replace { slot, expert } => {
                self.count(self.expert(slot)) > 1
                    && self.takes(self.rank(slot as usize), expert as usize)
            }
            Exchange::Swap { a, b } => {
                let (rank_a, rank_b) = (self.rank(a as usize), self.rank(b as usize));
                rank_a != rank_b
                    && self.takes(rank_a, self.expert(b))
                    && self.takes(rank_b, self.expert(a))
            }
        }
    }

    /// How many moves more an exchange takes; negative if it takes some back.
    #[inline(always)]
    pub(super) fn more_moves(&self, exchange: Exchange) -> i32 {
        let arrives = |slot: u32, expert: usize| {
            let at = self.rank(slot as usize) * self.num_experts + expert;
            i32::from(self.held[at] == 0 && !self.before[at])
        };
        let leaves = |slot: u32| {
            let at = self.rank(slot as usize) * self.num_experts + self.expert(slot);
            i32::from(self.held[at] == 1 && !self.before[at])
        };
        match exchange {
            Exchange::Replace { slot, expert } => arrives(slot, expert as usize) - leaves(slot),
            Exchange::Swap { a, b } => {
                arrives(a, self.expert(b)) + arrives(b, self.expert(a)) - leaves(a) - leaves(b)
            }
        }
    }

    /// The experts that an exchange concerns.
    #[inline(always)]
    pub(super) fn concerned(&self, exchange: Exchange) -> [usize; 2] {
        match exchange {
            Exchange::Replace { slot, expert } => [self.expert(slot), expert as usize],
            Exchange::Swap { a, b } => [self.expert(a), self.expert(b)],
        }
    }

    /// Makes an exchange; returns the one that takes it back.
    pub(super) fn make(&mut self, exchange: Exchange) -> Exchange {
        match exchange {
            Exchange::Replace { slot, expert } => {
                let old = self.leave(slot as usize);
                self.enter(slot as usize, expert as usize);
                Exchange::Replace {
                    slot,
                    expert: old as u32,
                }
            }
            Exchange::Swap { a, b } => {
                let (from_a, from_b) = (self.leave(a as usize), self.leave(b as usize));
                self.enter(a as usize, from_b);
                self.enter(b as usize, from_a);
                exchange
            }
        }
    }

    /// Gives all slots other experts, `[R]`, of which each has a slot.
    pub(super) fn hold(&mut self, experts: &[i64]) {
        let differ = |layer: &Self, slot: usize| layer.experts[slot] != experts[slot];
        let slots: Vec<usize> = (0..experts.len())
            .filter(|&slot| differ(self, slot))
            .collect();
        for &slot in &slots {
            self.leave(slot);
        }
        for &slot in &slots {
            self.enter(slot, experts[slot] as usize);
            self.settle(slot);
        }
    }

    /// Empties a slot; returns what it held.
    fn leave(&mut self, slot: usize) -> usize {
        let expert = self.expert(slot as u32);
        let count = self.count(expert);
        let places = &mut self.places[expert * self.most..][..count];
        if let Some(place) = places.iter().position(|&place| place as usize == slot) {
            places.swap(place, count - 1);
        }
        self.counts[expert] -= 1;
        let at = self.rank(slot) * self.num_experts + expert;
        self.held[at] -= 1;
        self.num_moves -= usize::from(self.held[at] == 0 && !self.before[at]);
        expert
    }

    fn enter(&mut self, slot: usize, expert: usize) {
        self.experts[slot] = expert as i64;
        let count = self.count(expert);
        self.places[expert * self.most + count] = slot as u32;
        self.counts[expert] += 1;
        let at = self.rank(slot) * self.num_experts + expert;
        self.num_moves += usize::from(self.held[at] == 0 && !self.before[at]);
        self.held[at] += 1;
    }

    /// Where groups are kept on nodes, takes the node of a slot for that of its expert.
    fn settle(&mut self, slot: usize) {
        if let Some(&node) = self.node_of_rank.get(self.rank(slot)) {
            self.node_of_expert[self.experts[slot] as usize] = node;
        }
    }

    /// Writes which expert each slot holds, `[R]`. What stayed on a rank has the slot it had at
    /// first.
    pub(super) fn write(&self, slots: &mut [u32]) {
        let mut left: Vec<i64> = Vec::new();
        for rank in 0..self.num_ranks {
            let Range { start, end } = self.slots(rank);
            let (begin, end) = (start as usize, end as usize);
            left.clear();
            left.extend_from_slice(&self.experts[begin..end]);
            for (slot, first) in slots[begin..end].iter_mut().zip(&self.first[begin..end]) {
                *slot = u32::MAX;
                if let Some(place) = left.iter().position(|expert| expert == first) {
                    *slot = left.remove(place) as u32;
                }
            }
            let mut left = left.iter();
            for slot in slots[begin..end]
                .iter_mut()
                .filter(|slot| **slot == u32::MAX)
            {
                *slot = left.next().map_or(0, |&expert| expert as u32);
            }
        }
    }
}

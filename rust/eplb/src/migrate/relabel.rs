//! Which rank takes over what a plan from scratch gives to which.
//!
//! Where ranks are alike, a plan is as even whoever of them holds what. Each of its ranks bids for the
//! rank that holds most of its experts already, and the best bids together leave fewest to arrive: an
//! auction in whole numbers ends at the best assignment there is.
//!
//! Source: D. P. Bertsekas, "The auction algorithm: a distributed relaxation method for the assignment
//! problem", 1988.

use super::table::{Ranks, each_bit, renew};
use crate::placement::Replica;
use crate::topology::Topology;

/// Stands for a rank that nobody has bought, or that has bought none.
const NOBODY: u32 = u32::MAX;

/// Scratch of [`relabel`].
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    auction: Auction,
    /// The island that takes over each island, where groups of experts stay on theirs.
    heir: Vec<u32>,
    /// How many experts of one bidder each rank, or island, holds; and which hold any.
    held: Vec<i64>,
    holders: Vec<u32>,
    seen: Vec<bool>,
    origin: Vec<u32>,
}

impl Scratch {
    /// The rank of the plan whose experts each rank takes.
    pub(crate) fn origin(&self) -> &[u32] {
        &self.origin
    }
}

/// Finds the rank of a plan whose experts each rank takes, so that as few as possible arrive: `home`
/// has bits of the ranks that hold each expert. Only ranks with as many slots and the same speed take
/// each other's place.
pub(crate) fn relabel(
    ranks: &Ranks,
    topology: &Topology,
    home: &[u64],
    plan: &[Replica],
    scratch: &mut Scratch,
) {
    let Scratch {
        auction,
        heir,
        held,
        holders,
        seen,
        origin,
    } = scratch;
    let experts_of = |rank: usize| {
        let slots = topology.slots_of(ranks.gpus[rank] as usize);
        let replicas = plan[slots].iter();
        let filled = replicas.filter(|&&replica| replica != Replica::NONE);
        filled.map(|replica| replica.expert as usize)
    };
    let num_words = ranks.num_words();
    let hosts_of = |expert: usize| &home[expert * num_words..][..num_words];
    let num_islands = ranks.num_islands();
    heir.clear();
    heir.extend(0..num_islands as u32);
    if num_islands > 1 {
        let alike = |a: usize, b: usize| ranks.islands_are_alike(a, b);
        auction.open(num_islands);
        for island in 0..num_islands {
            renew(held, num_islands, 0);
            renew(seen, home.len() / num_words, false);
            for rank in (0..ranks.len()).filter(|&rank| ranks.island_of(rank) == island) {
                for expert in experts_of(rank) {
                    if !std::mem::replace(&mut seen[expert], true) {
                        each_bit(hosts_of(expert), |host| held[ranks.island_of(host)] += 1);
                    }
                }
            }
            let bids = held.iter().enumerate();
            auction.bid(bids.filter(|&(other, _)| alike(island, other)));
        }
        auction.settle();
        auction.write(heir, alike);
    }
    let alike = |bidder: usize, rank: usize| {
        ranks.are_alike(bidder, rank)
            && heir[ranks.island_of(rank)] as usize == ranks.island_of(bidder)
    };
    auction.open(ranks.len());
    renew(held, ranks.len(), 0);
    for bidder in 0..ranks.len() {
        holders.clear();
        for expert in experts_of(bidder) {
            each_bit(hosts_of(expert), |host| {
                if alike(bidder, host) {
                    if held[host] == 0 {
                        holders.push(host as u32);
                    }
                    held[host] += 1;
                }
            });
        }
        holders.sort_unstable();
        auction.bid(
            holders
                .iter()
                .map(|&host| (host as usize, &held[host as usize])),
        );
        for &host in &*holders {
            held[host as usize] = 0;
        }
    }
    auction.settle();
    renew(origin, ranks.len(), 0);
    auction.write(origin, alike);
}

/// As many bidders as there are goods, each of which wants one.
#[derive(Debug, Default)]
struct Auction {
    num_goods: usize,
    /// The bids of all bidders, one after the other, and where those of each begin.
    bids: Vec<(u32, i64)>,
    first: Vec<u32>,
    price: Vec<i64>,
    owner: Vec<u32>,
    waiting: Vec<u32>,
}

impl Auction {
    /// Starts without any bids.
    fn open(&mut self, num_goods: usize) {
        self.num_goods = num_goods;
        self.bids.clear();
        self.first.clear();
        self.first.push(0);
    }

    /// What the next bidder would give for some of the goods.
    fn bid<'a>(&mut self, worth: impl Iterator<Item = (usize, &'a i64)>) {
        // A raise of one is then less than what any exchange of goods gains, over all bidders.
        let scale = self.num_goods as i64 + 1;
        let worth = worth.filter(|&(_, &worth)| worth > 0);
        self.bids
            .extend(worth.map(|(good, &worth)| (good as u32, worth * scale)));
        self.first.push(self.bids.len() as u32);
    }

    /// Sells what is bid for, so that it is worth most over all bidders. Each who has nothing outbids
    /// the owner of what pays best, by as much as it pays more than the next best, and by one.
    fn settle(&mut self) {
        renew(&mut self.price, self.num_goods, 0);
        renew(&mut self.owner, self.num_goods, NOBODY);
        self.waiting.clear();
        self.waiting.extend((0..self.first.len() as u32 - 1).rev());
        while let Some(bidder) = self.waiting.pop() {
            let first = self.first[bidder as usize] as usize;
            let end = self.first[bidder as usize + 1] as usize;
            let (mut best, mut next, mut choice) = (0, 0, None);
            for &(good, worth) in &self.bids[first..end] {
                let gain = worth - self.price[good as usize];
                if gain > best {
                    (best, next, choice) = (gain, best, Some(good as usize));
                } else {
                    next = next.max(gain);
                }
            }
            if let Some(good) = choice {
                self.price[good] += best - next + 1;
                let loser = std::mem::replace(&mut self.owner[good], bidder);
                if loser != NOBODY {
                    self.waiting.push(loser);
                }
            }
        }
    }

    /// Writes the buyer of each of the goods. What nobody bought goes to those who bought nothing, in
    /// order, where they may have it: being alike must be an equivalence.
    fn write(&mut self, buyers: &mut [u32], alike: impl Fn(usize, usize) -> bool) {
        buyers.copy_from_slice(&self.owner);
        let served = &mut self.price;
        served.fill(0);
        for &owner in &self.owner {
            if owner != NOBODY {
                served[owner as usize] = 1;
            }
        }
        for bidder in (0..self.num_goods).filter(|&bidder| served[bidder] == 0) {
            let mut goods = buyers.iter_mut().enumerate();
            let left = goods.find(|(good, buyer)| **buyer == NOBODY && alike(bidder, *good));
            if let Some((_, buyer)) = left {
                *buyer = bidder as u32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the best assignment is worth, by trying all.
    fn best(worth: &[[i64; 5]], taken: u32) -> i64 {
        let Some((row, rest)) = worth.split_first() else {
            return 0;
        };
        let free = (0..5).filter(|good| taken >> good & 1 == 0);
        free.map(|good| row[good] + best(rest, taken | 1 << good))
            .max()
            .unwrap_or(0)
    }

    #[test]
    fn no_assignment_is_worth_more() {
        let mut random = crate::balance::Random::new();
        let mut auction = Auction::default();
        for _ in 0..500 {
            let mut worth = [[0; 5]; 5];
            for worth in worth.iter_mut().flatten() {
                *worth = (random.below(10) as i64 - 4).max(0);
            }
            auction.open(5);
            for row in &worth {
                auction.bid(row.iter().enumerate());
            }
            auction.settle();
            let mut buyers = [0; 5];
            auction.write(&mut buyers, |_, _| true);
            let mut sorted = buyers;
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
            let pairs = buyers.iter().enumerate();
            let got: i64 = pairs
                .map(|(good, &buyer)| worth[buyer as usize][good])
                .sum();
            assert_eq!(got, best(&worth, 0), "{worth:?}");
        }
    }
}

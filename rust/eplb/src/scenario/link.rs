//! Replicas that link ranks, so that shares have room to work.
//!
//! Tokens of an expert can flow between the ranks that hold it, and so between all ranks that
//! experts link, one by one. Where spare slots all went to a few hot experts, most ranks are
//! islands. Swaps of slots of nearly the same load link them, and leave the balance nearly as it
//! was.

use super::layer::{Exchange, Layer};

/// Swaps slots of a layer until its ranks hang together or no swap links more of them, with no
/// rank above `most`, or above what the heaviest was. `load` is that of each expert, `[E]`.
pub(super) fn link(layer: &mut Layer, load: &[f64], most: f64) {
    let num_slots = layer.ranks().len() as u32;
    let mut carried = vec![0.0; layer.num_ranks()];
    let share = |layer: &Layer, slot: u32| {
        let expert = layer.expert(slot);
        load[expert] / layer.count(expert) as f64
    };
    for slot in 0..num_slots {
        carried[layer.rank(slot as usize)] += share(layer, slot);
    }
    let most = carried.iter().fold(most, |most, &load| most.max(load));
    let mut parent = Vec::new();
    let mut islands = count(layer, &mut parent);
    loop {
        // Of the swaps that leave fewest islands, the one that shifts least load.
        let mut best: Option<(usize, f64, Exchange)> = None;
        for a in 0..num_slots {
            if layer.count(layer.expert(a)) == 1 {
                continue;
            }
            for b in 0..num_slots {
                let (from, to) = (layer.rank(a as usize), layer.rank(b as usize));
                let exchange = Exchange::Swap { a, b };
                let shift = share(layer, a) - share(layer, b);
                if carried[to] + shift > most || carried[from] - shift > most {
                    continue;
                }
                let fewest = best.map_or(islands, |(fewest, ..)| fewest + 1);
                let least = |fewer| match best {
                    Some((fewest, least, _)) if fewest == fewer => shift.abs() < least,
                    _ => true,
                };
                if !layer.allows(exchange) {
                    continue;
                }
                layer.make(exchange);
                let fewer = count(layer, &mut parent);
                layer.make(exchange);
                if fewer < fewest && least(fewer) {
                    best = Some((fewer, shift.abs(), exchange));
                }
            }
        }
        let Some((fewest, _, exchange)) = best else {
            return;
        };
        if let Exchange::Swap { a, b } = exchange {
            let shift = share(layer, a) - share(layer, b);
            carried[layer.rank(b as usize)] += shift;
            carried[layer.rank(a as usize)] -= shift;
        }
        layer.make(exchange);
        islands = fewest;
        if islands == 1 {
            return;
        }
    }
}

/// How many sets of ranks there are between which no expert is shared.
fn count(layer: &Layer, parent: &mut Vec<u32>) -> usize {
    parent.clear();
    parent.extend(0..layer.num_ranks() as u32);
    let mut islands = layer.num_ranks();
    for expert in (0..layer.num_experts()).filter(|&expert| layer.count(expert) > 1) {
        let mut places = layer.places(expert).iter();
        let Some(&first) = places.next() else {
            continue;
        };
        for &place in places {
            let a = root(parent, layer.rank(first as usize) as u32);
            let b = root(parent, layer.rank(place as usize) as u32);
            islands -= usize::from(a != b);
            parent[a.max(b) as usize] = a.min(b);
        }
    }
    islands
}

fn root(parent: &mut [u32], mut rank: u32) -> u32 {
    while parent[rank as usize] != rank {
        parent[rank as usize] = parent[parent[rank as usize] as usize];
        rank = parent[rank as usize];
    }
    rank
}

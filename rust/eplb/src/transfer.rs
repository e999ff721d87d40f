//! Who sends which expert to whom, and in which round.
//!
//! In a round each rank sends at most one expert and receives at most one. The fewest rounds are
//! then as many as the busiest rank has to send or to receive, and that many always suffice:
//! transfers are the edges of a bipartite graph of senders and receivers, rounds its colours.
//!
//! Source: D. König, "Über Graphen und ihre Anwendung auf Determinantentheorie und Mengenlehre",
//! 1916; colours are exchanged along alternating paths.

use crate::error::{Code, Error, Result};
use crate::placement::Placement;
use crate::topology::Topology;

/// One expert that has to get to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// The layer.
    pub layer: u32,
    /// The expert.
    pub expert: u32,
    /// The slot it comes from, or `None` if no rank that is left holds it: then it has to be
    /// loaded from storage. What a rank gets for several slots comes to the first of them, and
    /// from there to the others, once it has arrived.
    pub source_slot: Option<u32>,
    /// The rank of that slot. The target rank itself, for a copy on the rank.
    pub source: Option<u32>,
    /// The slot it goes to.
    pub slot: u32,
    /// The rank of that slot.
    pub target: u32,
    /// The round, from 0; `None` for what no other rank sends.
    pub round: Option<u32>,
}

/// What has to be sent for `next` to take the place of `previous`: in the order of layers and
/// slots, with rounds numbered through, or anew for each layer if `by_layer`.
///
/// Sources are chosen from the same rank, then the same node, then anywhere; of those, the rank
/// that has least to send so far, ties to the lowest. No expert of a layer comes to a rank twice.
///
/// O(T (D + R)) for T transfers, D ranks and R rounds.
///
/// # Errors
/// [`Code::Inconsistent`] if the placements have other slots, layers or experts.
pub fn transfers(previous: &Placement, next: &Placement, by_layer: bool) -> Result<Vec<Transfer>> {
    check_alike(previous, next)?;
    let mut list = choose_sources(previous, next, by_layer);
    let num_ranks = next.topology().num_gpus();
    if by_layer {
        for layer in list.chunk_by_mut(|a, b| a.layer == b.layer) {
            assign_rounds(layer, num_ranks);
        }
    } else {
        assign_rounds(&mut list, num_ranks);
    }
    Ok(list)
}

/// How fast experts go from rank to rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Links {
    /// What a rank sends to another of its node, in 1e9 bytes a second.
    pub intra_node_gb_s: f64,
    /// What it sends to one of another node.
    pub inter_node_gb_s: f64,
    /// What each round takes besides, in microseconds.
    pub latency_us: f64,
}

impl Links {
    /// # Errors
    /// [`Code::OutOfRange`] unless the speeds are above 0 and the latency is 0 or more.
    fn check(&self) -> Result<()> {
        for (name, speed) in [
            ("intra_node_gb_s", self.intra_node_gb_s),
            ("inter_node_gb_s", self.inter_node_gb_s),
        ] {
            if !(speed > 0.0 && speed < f64::INFINITY) {
                return Err(out_of_range(name, speed, "finite and above 0"));
            }
        }
        if !(self.latency_us >= 0.0 && self.latency_us < f64::INFINITY) {
            let name = "latency_us";
            return Err(out_of_range(name, self.latency_us, "finite and 0 or more"));
        }
        Ok(())
    }
}

fn out_of_range(argument: &'static str, got: f64, expected: &str) -> Error {
    Error::invalid(Code::OutOfRange, argument, got, expected, "")
}

/// How long transfers take, in seconds: their rounds one after the other, each as long as its slowest
/// transfer. `expert_bytes[layer]` is the size of an expert. Copies on a rank and loads from storage
/// are left out. O(T) for T transfers.
///
/// # Errors
/// [`Code::OutOfRange`] for the links or the bytes; [`Code::WrongShape`] if a transfer is of a layer
/// beyond them.
pub fn predicted_s(
    transfers: &[Transfer],
    topology: &Topology,
    by_layer: bool,
    expert_bytes: &[f64],
    links: &Links,
) -> Result<f64> {
    links.check()?;
    check_bytes(expert_bytes)?;
    // The slowest of each round, of the layers there are.
    let mut slowest: Vec<f64> = Vec::new();
    let mut total = 0.0;
    let mut layer = None;
    let finish = |slowest: &mut Vec<f64>| {
        let seconds = slowest.iter().sum::<f64>() + slowest.len() as f64 * links.latency_us * 1e-6;
        slowest.clear();
        seconds
    };
    for transfer in transfers {
        let (Some(source), Some(round)) = (transfer.source, transfer.round) else {
            continue;
        };
        if by_layer && layer != Some(transfer.layer) {
            total += finish(&mut slowest);
            layer = Some(transfer.layer);
        }
        let Some(bytes) = expert_bytes.get(transfer.layer as usize) else {
            return Err(wrong_layers(
                expert_bytes.len(),
                transfer.layer as usize + 1,
            ));
        };
        let node = |gpu: u32| topology.node_of(gpu as usize);
        let speed = if node(source) == node(transfer.target) {
            links.intra_node_gb_s
        } else {
            links.inter_node_gb_s
        };
        let round = round as usize;
        if slowest.len() <= round {
            slowest.resize(round + 1, 0.0);
        }
        slowest[round] = slowest[round].max(bytes / speed / 1e9);
    }
    Ok(total + finish(&mut slowest))
}

fn check_bytes(expert_bytes: &[f64]) -> Result<()> {
    let sound = |bytes: &&f64| !(**bytes > 0.0 && **bytes < f64::INFINITY);
    match expert_bytes.iter().find(sound) {
        Some(&bytes) => Err(out_of_range("expert_bytes", bytes, "finite and above 0")),
        None => Ok(()),
    }
}

fn wrong_layers(got: usize, wanted: usize) -> Error {
    Error::invalid(
        Code::WrongShape,
        "expert_bytes",
        format!("{got} numbers"),
        format!("one for each of {wanted} layers"),
        "",
    )
}

/// Limits on what has to be sent for a placement to take the place of another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TransferLimits<'a> {
    /// The bytes of an expert of each layer.
    pub expert_bytes: &'a [f64],
    /// The most bytes that any rank sends, and that any receives, over all layers.
    pub max_bytes_per_rank: Option<f64>,
    /// The longest that the rounds may take, in seconds, and over what links.
    pub max_seconds: Option<(f64, Links)>,
    /// Whether each layer has rounds of its own.
    pub by_layer: bool,
}

impl TransferLimits<'_> {
    pub(crate) fn check(&self, num_layers: usize) -> Result<()> {
        check_bytes(self.expert_bytes)?;
        if self.expert_bytes.len() != num_layers {
            return Err(wrong_layers(self.expert_bytes.len(), num_layers));
        }
        let seconds = self.max_seconds.map(|(seconds, _)| seconds);
        for (name, limit) in [
            ("max_bytes_per_rank", self.max_bytes_per_rank),
            ("max_seconds", seconds),
        ] {
            if let Some(limit) = limit.filter(|limit| limit.is_nan() || *limit < 0.0) {
                return Err(out_of_range(name, limit, "0 or more"));
            }
        }
        self.max_seconds.map_or(Ok(()), |(_, links)| links.check())
    }

    /// Whether what has to be sent keeps to the limits.
    pub(crate) fn allow(&self, previous: &Placement, next: &Placement) -> Result<bool> {
        let list = transfers(previous, next, self.by_layer)?;
        let topology = next.topology();
        if let Some(most) = self.max_bytes_per_rank
            && busiest_bytes(&list, topology, self.expert_bytes) > most
        {
            return Ok(false);
        }
        let Some((most, links)) = self.max_seconds else {
            return Ok(true);
        };
        Ok(predicted_s(&list, topology, self.by_layer, self.expert_bytes, &links)? <= most)
    }
}

/// The most bytes that any rank sends to others or receives, from storage too.
fn busiest_bytes(list: &[Transfer], topology: &Topology, expert_bytes: &[f64]) -> f64 {
    let mut bytes = vec![0.0; 2 * topology.num_gpus()];
    for transfer in list {
        if transfer.source != Some(transfer.target) {
            let more = expert_bytes[transfer.layer as usize];
            bytes[2 * transfer.target as usize] += more;
            if let Some(source) = transfer.source {
                bytes[2 * source as usize + 1] += more;
            }
        }
    }
    bytes.into_iter().fold(0.0, f64::max)
}

fn check_alike(previous: &Placement, next: &Placement) -> Result<()> {
    let sizes = |placement: &Placement| {
        let topology = placement.topology();
        let slots = (0..topology.num_gpus()).map(|gpu| topology.slots_of(gpu));
        (
            placement.num_layers(),
            placement.num_experts(),
            slots.collect::<Vec<_>>(),
        )
    };
    if sizes(previous) == sizes(next) {
        return Ok(());
    }
    Err(Error::invalid(
        Code::Inconsistent,
        "previous",
        format!(
            "{} layers of {} experts on {} slots",
            previous.num_layers(),
            previous.num_experts(),
            previous.topology().num_slots()
        ),
        format!(
            "of as many layers, experts and slots as the plan: {}, {}, {}",
            next.num_layers(),
            next.num_experts(),
            next.topology().num_slots()
        ),
        "",
    ))
}

fn choose_sources(previous: &Placement, next: &Placement, by_layer: bool) -> Vec<Transfer> {
    let topology = next.topology();
    let num_slots = topology.num_slots();
    let gpu_of: Vec<usize> = (0..num_slots).map(|slot| topology.gpu_of(slot)).collect();
    let mut sent = vec![0u32; topology.num_gpus()];
    let mut list: Vec<Transfer> = Vec::new();
    let width = previous.max_replicas();
    let rows = previous
        .phy2log()
        .chunks_exact(num_slots)
        .zip(next.phy2log().chunks_exact(num_slots));
    let holders = previous
        .log2phy()
        .chunks_exact(previous.num_experts() * width);
    for (layer, ((before, after), holders)) in rows.zip(holders).enumerate() {
        if by_layer {
            sent.fill(0);
        }
        for (slot, (&before, &after)) in before.iter().zip(after).enumerate() {
            let Ok(expert) = usize::try_from(after) else {
                continue;
            };
            if before == after {
                continue;
            }
            let target = gpu_of[slot];
            let node = topology.node_of(target);
            let held = holders[expert * width..(expert + 1) * width]
                .iter()
                .filter_map(|&slot| usize::try_from(slot).ok())
                .filter(|&slot| !topology.is_dead(gpu_of[slot]))
                .min_by_key(|&slot| {
                    let gpu = gpu_of[slot];
                    let near = (gpu != target, topology.node_of(gpu) != node);
                    (near, sent[gpu], gpu, slot)
                });
            let arrived =
                arrivals_of(&list, layer, target).find(|other| other.expert == after as u32);
            let source = arrived.map_or(held, |arrived| Some(arrived.slot as usize));
            if let Some(source) = source
                && gpu_of[source] != target
            {
                sent[gpu_of[source]] += 1;
            }
            list.push(Transfer {
                layer: layer as u32,
                expert: expert as u32,
                source_slot: source.map(|slot| slot as u32),
                source: source.map(|slot| gpu_of[slot] as u32),
                slot: slot as u32,
                target: target as u32,
                round: None,
            });
        }
    }
    list
}

/// What comes to a rank from elsewhere, of those listed last.
fn arrivals_of(list: &[Transfer], layer: usize, rank: usize) -> impl Iterator<Item = &Transfer> {
    let of_rank = move |transfer: &&Transfer| {
        transfer.layer as usize == layer && transfer.target as usize == rank
    };
    let listed = list.iter().rev().take_while(of_rank);
    listed.filter(|transfer| transfer.source != Some(transfer.target))
}

/// Colours the transfers between ranks, with as few colours as the busiest rank has transfers.
fn assign_rounds(list: &mut [Transfer], num_ranks: usize) {
    // Senders come first, then receivers.
    let ends = |transfer: &Transfer| {
        let source = transfer
            .source
            .filter(|&source| source != transfer.target)?;
        Some((source as usize, num_ranks + transfer.target as usize))
    };
    let mut degree = vec![0usize; 2 * num_ranks];
    for (sender, receiver) in list.iter().filter_map(ends) {
        degree[sender] += 1;
        degree[receiver] += 1;
    }
    let num_rounds = degree.iter().copied().max().unwrap_or(0);
    // The transfer of each end in each round.
    const NONE: u32 = u32::MAX;
    let mut path = Vec::new();
    let mut at = vec![NONE; 2 * num_ranks * num_rounds];
    for index in 0..list.len() {
        let Some((sender, receiver)) = ends(&list[index]) else {
            continue;
        };
        let free = |end: usize, at: &[u32]| {
            let rounds = &at[end * num_rounds..(end + 1) * num_rounds];
            rounds
                .iter()
                .position(|&transfer| transfer == NONE)
                .unwrap_or(0)
        };
        let (ours, theirs) = (free(sender, &at), free(receiver, &at));
        // The receiver may be busy in our round. On the path of transfers that starts there, in
        // rounds `ours` and `theirs` in turn, each takes the other round. The path cannot reach the
        // sender, where it would have to arrive in round `ours`.
        path.clear();
        let (mut end, mut round) = (receiver, ours);
        while ours != theirs && at[end * num_rounds + round] != NONE {
            let found = at[end * num_rounds + round];
            path.push(found);
            let Some((a, b)) = ends(&list[found as usize]) else {
                break;
            };
            end = if a == end { b } else { a };
            round = if round == ours { theirs } else { ours };
        }
        for &found in &path {
            if let Some((a, b)) = ends(&list[found as usize]) {
                for end in [a, b] {
                    for round in [ours, theirs] {
                        let entry = &mut at[end * num_rounds + round];
                        *entry = if *entry == found { NONE } else { *entry };
                    }
                }
            }
        }
        for &found in &path {
            let transfer = &mut list[found as usize];
            let round = if transfer.round == Some(ours as u32) {
                theirs
            } else {
                ours
            };
            transfer.round = Some(round as u32);
            if let Some((a, b)) = ends(transfer) {
                at[a * num_rounds + round] = found;
                at[b * num_rounds + round] = found;
            }
        }
        list[index].round = Some(ours as u32);
        at[sender * num_rounds + ours] = index as u32;
        at[receiver * num_rounds + ours] = index as u32;
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may fail")]
    use super::*;
    use proptest::prelude::*;

    fn placement(phy2log: Vec<i64>) -> Placement {
        Placement::from_phy2log(Topology::new(2, 4, 4).unwrap(), 16, phy2log).unwrap()
    }

    prop_compose! {
        fn any_placement()(
            layers in prop::collection::vec(
                (
                    Just((0..16).collect::<Vec<i64>>()).prop_shuffle(),
                    prop::collection::vec(0i64..16, 16),
                ),
                3,
            )
        ) -> Placement {
            placement(layers.into_iter().flat_map(|(a, b)| a.into_iter().chain(b)).collect())
        }
    }

    proptest! {
        #[test]
        fn rounds_are_as_few_as_the_busiest_rank_allows(
            previous in any_placement(),
            next in any_placement(),
            by_layer: bool,
        ) {
            let list = transfers(&previous, &next, by_layer).unwrap();
            for layer in 0..3 {
                let of_layer = |transfer: &&Transfer| !by_layer || transfer.layer == layer;
                let sent: Vec<_> = list.iter().filter(of_layer).filter(|t| t.round.is_some()).collect();
                let mut degree = [0u32; 16];
                let mut seen = std::collections::HashSet::new();
                for transfer in &sent {
                    degree[transfer.source.unwrap() as usize] += 1;
                    degree[8 + transfer.target as usize] += 1;
                    prop_assert!(seen.insert((transfer.round, "sends", transfer.source.unwrap())));
                    prop_assert!(seen.insert((transfer.round, "receives", transfer.target)));
                }
                let rounds = sent.iter().map(|t| t.round.unwrap() + 1).max().unwrap_or(0);
                prop_assert_eq!(rounds, degree.into_iter().max().unwrap());
            }
        }

        #[test]
        fn every_new_expert_comes_from_where_it_is(
            previous in any_placement(),
            next in any_placement(),
        ) {
            let mut slots = previous.phy2log().to_vec();
            let mut came = std::collections::HashSet::new();
            for transfer in transfers(&previous, &next, true).unwrap() {
                let first = transfer.layer as usize * 32;
                let source = transfer.source_slot.unwrap() as usize;
                let expert = i64::from(transfer.expert);
                let arrival = (transfer.layer, transfer.expert, transfer.target);
                if transfer.source == Some(transfer.target) {
                    let holder = if came.contains(&arrival) { &slots } else { previous.phy2log() };
                    prop_assert_eq!(holder[first + source], expert);
                } else {
                    prop_assert_eq!(previous.phy2log()[first + source], expert);
                    prop_assert!(came.insert(arrival), "sent twice");
                }
                slots[first + transfer.slot as usize] = expert;
            }
            prop_assert_eq!(&slots[..], next.phy2log());
        }
    }
}

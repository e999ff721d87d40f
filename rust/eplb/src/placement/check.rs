//! Whether what each slot is said to hold is a placement.

use crate::error::{Code, Error, Result};
use crate::topology::Topology;

use super::EMPTY;

/// How many layers of `size` values there are in `length`: at least one, and nothing over.
pub(super) fn whole_layers(argument: &'static str, length: usize, size: usize) -> Result<usize> {
    if length == 0 || !length.is_multiple_of(size) {
        return Err(wrong_length(argument, length, size));
    }
    Ok(length / size)
}

/// Checks one layer; `listed` has a `false` for each slot.
pub(super) fn check_layer(
    topology: &Topology,
    layer: usize,
    phy2log: &[i64],
    log2phy: &[i64],
    logcnt: &[i64],
    listed: &mut [bool],
) -> Result<()> {
    let num_experts = logcnt.len();
    let width = log2phy.len() / num_experts;
    for (slot, &expert) in phy2log.iter().enumerate() {
        if expert == EMPTY && topology.is_dead(topology.gpu_of(slot)) {
            listed[slot] = true;
            continue;
        }
        if usize::try_from(expert).map_or(true, |expert| expert >= num_experts) {
            return Err(no_such_expert(layer, slot, expert, num_experts));
        }
    }
    for (expert, (slots, &count)) in log2phy.chunks_exact(width).zip(logcnt).enumerate() {
        if count == 0 {
            return Err(without_slot(layer, expert));
        }
        let used = usize::try_from(count).map_or(0, |count| count.min(width));
        let (used, padding) = slots.split_at(used);
        let mut takes = |&slot: &i64| {
            let Some(slot) = usize::try_from(slot).ok().filter(|&s| s < phy2log.len()) else {
                return false;
            };
            phy2log[slot] == expert as i64 && !std::mem::replace(&mut listed[slot], true)
        };
        let fits = used.len() as i64 == count && used.iter().all(&mut takes);
        if !fits || padding.iter().any(|&slot| slot != -1) {
            let shown = &slots[..width.min(8)];
            return Err(Error::invalid(
                Code::Inconsistent,
                "log2phy",
                format!("{shown:?} at layer {layer}, expert {expert}"),
                format!("the {count} slots (`logcnt`) that hold the expert in `phy2log`, then -1"),
                "",
            ));
        }
    }
    if let Some(slot) = listed.iter().position(|&listed| !listed) {
        return Err(Error::invalid(
            Code::Inconsistent,
            "log2phy",
            format!("without slot {slot} of layer {layer}"),
            "a list of every slot in `phy2log`",
            "",
        ));
    }
    Ok(())
}

/// Refuses experts on dead GPUs.
pub(super) fn check_dead_slots(topology: &Topology, phy2log: &[i64]) -> Result<()> {
    if topology.is_even() {
        return Ok(());
    }
    for (layer, row) in phy2log.chunks_exact(topology.num_slots()).enumerate() {
        for gpu in (0..topology.num_gpus()).filter(|&gpu| topology.is_dead(gpu)) {
            for slot in topology.slots_of(gpu) {
                if row[slot] != EMPTY {
                    return Err(Error::invalid(
                        Code::OutOfRange,
                        "phy2log",
                        format!("{} at layer {layer}, slot {slot}", row[slot]),
                        format!("-1, since GPU {gpu} is dead"),
                        "",
                    ));
                }
            }
        }
    }
    Ok(())
}

pub(super) fn no_such_expert(layer: usize, slot: usize, expert: i64, num_experts: usize) -> Error {
    Error::invalid(
        Code::OutOfRange,
        "phy2log",
        format!("{expert} at layer {layer}, slot {slot}"),
        format!("an expert from 0 to {}", num_experts - 1),
        "",
    )
}

pub(super) fn without_slot(layer: usize, expert: usize) -> Error {
    Error::invalid(
        Code::TooSmall,
        "logcnt",
        format!("0 at layer {layer}, expert {expert}"),
        "at least 1",
        "every expert needs a slot",
    )
}

pub(super) fn wrong_length(argument: &'static str, length: usize, divisor: usize) -> Error {
    Error::invalid(
        Code::WrongShape,
        argument,
        format!("{length} values"),
        format!("one or more layers of {divisor} values"),
        "",
    )
}

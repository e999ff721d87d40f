//! Replicas written into the three forms that engines read.

use crate::error::{Code, Error, Result, require_length};

use super::{EMPTY, Replica};

/// Buffers for a placement that the caller keeps, for planning in a loop without allocating.
///
/// Letters as in [`Placement`](super::Placement).
#[derive(Debug)]
pub struct PlacementMut<'a> {
    /// The expert in each slot, `[L, R]`.
    pub phy2log: &'a mut [i64],
    /// The slots of each expert, `[L, E, width]`, -1 pads; or `None` where nobody reads it,
    /// which saves most of the writing.
    pub log2phy: Option<&'a mut [i64]>,
    /// How many replicas each expert has, `[L, E]`.
    pub logcnt: &'a mut [i64],
}

impl PlacementMut<'_> {
    /// Writes valid replicas, `[num_layers, num_slots]` by slot. Checks all sizes first, so that
    /// a refusal leaves the buffers as they were.
    pub(crate) fn write(
        &mut self,
        num_layers: usize,
        num_experts: usize,
        replicas: &[Replica],
    ) -> Result<()> {
        let num_slots = replicas.len() / num_layers;
        require_length("phy2log", self.phy2log.len(), replicas.len())?;
        let counts = num_layers * num_experts;
        require_length("logcnt", self.logcnt.len(), counts)?;
        let widest = max_replicas(replicas);
        let mut width = 0;
        if let Some(log2phy) = &self.log2phy {
            width = log2phy.len() / counts;
            if width < widest || log2phy.len() != counts * width {
                return Err(Error::invalid(
                    Code::TooSmall,
                    "log2phy",
                    format!("{} values", log2phy.len()),
                    format!("{num_layers} x {num_experts} x {widest} values or wider"),
                    "num_slots - num_experts + 1 is always wide enough",
                ));
            }
        }
        for (layer, row) in replicas.chunks_exact(num_slots).enumerate() {
            let experts = layer * num_experts..(layer + 1) * num_experts;
            let phy2log = &mut self.phy2log[layer * num_slots..(layer + 1) * num_slots];
            let logcnt = &mut self.logcnt[experts.clone()];
            logcnt.fill(0);
            let log2phy = match &mut self.log2phy {
                Some(log2phy) => {
                    let rows = &mut log2phy[experts.start * width..experts.end * width];
                    rows.fill(-1);
                    rows
                }
                None => &mut [],
            };
            write_layer(row, phy2log, log2phy, width, logcnt);
        }
        Ok(())
    }
}

/// Writes one layer. `log2phy` is filled with -1 and `logcnt` with 0; `width` 0 leaves `log2phy`
/// out.
pub(super) fn write_layer(
    replicas: &[Replica],
    phy2log: &mut [i64],
    log2phy: &mut [i64],
    width: usize,
    logcnt: &mut [i64],
) {
    for (slot, (replica, phy2log)) in replicas.iter().zip(phy2log).enumerate() {
        if *replica == Replica::NONE {
            *phy2log = EMPTY;
            continue;
        }
        let expert = replica.expert as usize;
        *phy2log = expert as i64;
        logcnt[expert] += 1;
        if width > 0 {
            log2phy[expert * width + replica.number as usize] = slot as i64;
        }
    }
}

/// The largest number of replicas of any expert.
pub(super) fn max_replicas(replicas: &[Replica]) -> usize {
    let mut largest = 0;
    for replica in replicas {
        largest = largest.max(replica.number);
    }
    largest as usize + 1
}

//! What no cut can beat, and the cuts that are best for such bounds.

use super::Search;
use crate::op::Kind;

impl Search<'_> {
    /// F + I + W of the layers from `begin` to `end`.
    pub(super) fn work(&self, begin: usize, end: usize) -> f64 {
        (self.forward_before[end] - self.forward_before[begin])
            + (self.input_before[end] - self.input_before[begin])
            + (self.weight_before[end] - self.weight_before[begin])
    }

    /// What a stage of these layers costs the step at least: all of its micro-batches, and with
    /// `fill` the way of the first one down to it and of the last one back from it.
    pub(super) fn stage_time(&self, stage: usize, begin: usize, end: usize, fill: bool) -> f64 {
        let layout = self.schedule.layout();
        // With copies every rank runs two stages, each half of the micro-batches.
        let micro_batches = f64::from(layout.num_micro_batches()) / layout.num_copies() as f64;
        let factor = self.stage_factor[stage];
        let whole = micro_batches * self.work(begin, end) * factor;
        if !fill {
            return whole;
        }
        let fastest = self
            .stage_factor
            .iter()
            .copied()
            .fold(f64::INFINITY, f64::min);
        let down = fastest * self.forward_before[begin];
        let back = if self.splits {
            // The last input part may be followed by all weight parts, while others go back.
            let weights = micro_batches * (self.weight_before[end] - self.weight_before[begin]);
            (fastest * self.input_before[begin] - factor * weights).max(0.0)
        } else {
            fastest * (self.input_before[begin] + self.weight_before[begin])
        };
        down + whole + back
    }

    /// The cut whose worst stage is best, by dynamic programming over stages and layers.
    pub(super) fn bottleneck(&self, fill: bool) -> Vec<usize> {
        let (stages, layers) = (self.num_stages(), self.layers.len());
        let mut best = vec![f64::INFINITY; layers + 1];
        best[0] = 0.0;
        let mut choices = Vec::with_capacity(stages);
        for stage in 0..stages {
            let mut next = vec![f64::INFINITY; layers + 1];
            let mut choice = vec![0; layers + 1];
            for end in stage + 1..=layers - (stages - stage - 1) {
                for begin in stage..end {
                    let worst = best[begin].max(self.stage_time(stage, begin, end, fill));
                    if worst < next[end] {
                        next[end] = worst;
                        choice[end] = begin;
                    }
                }
            }
            best = next;
            choices.push(choice);
        }
        let mut bounds = vec![layers; stages + 1];
        for stage in (0..stages).rev() {
            bounds[stage] = choices[stage][bounds[stage + 1]];
        }
        bounds
    }

    /// Below this no cut can come: perfectly spread work, the largest layer, and, where every
    /// rank has one stage, the best cut's worst stage with the way to it.
    pub(in crate::partition) fn lower_bound(&self) -> f64 {
        let layout = self.schedule.layout();
        // Overlapped pairs may shorten everything but the single instructions.
        let overlap = self.options.overlap_factor.min(1.0);
        let pairs = if self
            .schedule
            .ops()
            .iter()
            .any(|op| op.kind == Kind::OverlapForward)
        {
            overlap
        } else {
            1.0
        };
        let factor = |rank: usize| self.options.rank_factor.get(rank).copied().unwrap_or(1.0);
        let speed: f64 = (0..layout.num_ranks()).map(|rank| 1.0 / factor(rank)).sum();
        let all = f64::from(layout.num_micro_batches()) * self.work(0, self.layers.len());
        let spread = pairs * all / speed;
        if !self.stage_time_bounds() {
            return spread;
        }
        let cut = self.bottleneck(true);
        let worst = cut
            .windows(2)
            .enumerate()
            .map(|(stage, cut)| self.stage_time(stage, cut[0], cut[1], true))
            .fold(0.0, f64::max);
        spread.max(worst)
    }
}

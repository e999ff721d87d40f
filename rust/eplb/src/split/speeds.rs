//! The best split where ranks differ in speed: the longest rank time is least.

use super::flow::{Flow, Graph};
use crate::topology::Topology;

/// How fast ranks are, and what they may carry in a given time.
///
/// In a time, a rank can carry so much load. Where each is filled up by what it could carry less
/// than the one that can carry most, all ranks are alike, and the flow of equal ranks says whether
/// the time is enough; if not, it names ranks that cannot carry what they hold alone, and the time
/// they need for it is the next to try. It ends with the least time there is.
#[derive(Debug, Clone)]
pub(super) struct Speeds {
    /// What each rank carries in a unit of time, `[D]`; 0 for dead ranks, 1 in the mean over others.
    speeds: Vec<f64>,
    /// What each rank is filled up by, `[D]`.
    filling: Vec<i64>,
    /// The ranks that need the time.
    tight: Vec<u32>,
}

impl Speeds {
    /// The speeds of ranks, if they are not all alike.
    pub(super) fn new(topology: &Topology) -> Option<Self> {
        let live = || topology.live_gpus().map(|(.., speed)| speed);
        let first = live().next()?;
        if live().all(|speed| speed == first) {
            return None;
        }
        let mean = live().sum::<f64>() / topology.num_live_gpus() as f64;
        let mut speeds = vec![0.0; topology.num_gpus()];
        for (gpu, _, speed) in topology.live_gpus() {
            speeds[gpu] = speed / mean;
        }
        Some(Self {
            filling: vec![0; speeds.len()],
            tight: Vec::with_capacity(speeds.len()),
            speeds,
        })
    }

    /// Of a layer's whole numbers, at most so many bits may be in use: sums of what ranks are filled
    /// up to stay below 2^62.
    pub(super) fn bits(&self) -> u32 {
        let live = self.speeds.iter().filter(|&&speed| speed > 0.0);
        let (least, most) = live.fold((f64::INFINITY, 0.0f64), |(least, most), &speed| {
            (least.min(speed), most.max(speed))
        });
        let ratio = (most / least).ceil() as u64 * self.speeds.len() as u64;
        61 - ratio.next_power_of_two().ilog2()
    }

    /// Splits a layer's loads, whole numbers, and returns the longest rank time, which no split can
    /// make shorter.
    pub(super) fn solve(&mut self, flow: &mut Flow, graph: &Graph<'_>, load: &[i64]) -> f64 {
        let mut time = self.start(flow, graph, load);
        loop {
            let carried = |speed: &f64| (time * speed) as i64;
            let most = self.speeds.iter().map(carried).fold(0, i64::max);
            for (filling, speed) in self.filling.iter_mut().zip(&self.speeds) {
                *filling = most - carried(speed);
            }
            flow.rank_load.copy_from_slice(&self.filling);
            let level = flow.pour(graph, load, most, most);
            let unfilled = flow.rank_load.iter_mut().zip(&self.filling);
            unfilled.for_each(|(load, filling)| *load -= filling);
            if level <= most {
                break;
            }
            self.tight.clone_from(&flow.tight);
            let held = self.tight.iter();
            let held = held.map(|&rank| flow.rank_load[rank as usize]).sum();
            time = self.time_for(held, time);
        }
        flow.tight.clone_from(&self.tight);
        time
    }

    /// A time that no split can be faster than: what ranks hold alone takes so long, and all loads
    /// together.
    fn start(&mut self, flow: &mut Flow, graph: &Graph<'_>, load: &[i64]) -> f64 {
        flow.rank_load.fill(0);
        flow.load_singles(graph, load);
        let live = (0..).zip(&self.speeds).filter(|(_, speed)| **speed > 0.0);
        self.tight.clear();
        self.tight.extend(live.map(|(rank, _): (u32, _)| rank));
        let shared = graph.items.iter().map(|item| load[item.expert as usize]);
        let all = flow.rank_load.iter().sum::<i64>() + shared.sum::<i64>();
        let mut time = self.time_for(all, 0.0);
        for (rank, &held) in (0..).zip(&flow.rank_load) {
            if held > (time * self.speeds[rank as usize]) as i64 {
                self.tight.clear();
                self.tight.push(rank);
                time = self.time_for(held, time);
            }
        }
        time
    }

    /// The least time, from `time` on, in which the tight ranks can carry so much, each in whole
    /// numbers.
    fn time_for(&self, load: i64, time: f64) -> f64 {
        let speeds = || self.tight.iter().map(|&rank| self.speeds[rank as usize]);
        let mut time = time.max(load as f64 / speeds().sum::<f64>());
        while speeds().map(|speed| (time * speed) as i64).sum::<i64>() < load {
            // When the next of them can carry one more.
            let more = speeds().map(|speed| ((time * speed).floor() + 1.0) / speed);
            time = more.fold(f64::INFINITY, f64::min).max(time.next_up());
        }
        time
    }
}

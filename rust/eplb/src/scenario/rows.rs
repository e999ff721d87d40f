//! A layer's loads in several scenarios, side by side.

/// How many scenarios a vector holds.
pub(super) const LANES: usize = 16;

/// A number for each of so many scenarios.
pub(super) type Row = [f32; LANES];

/// Tokens are whole numbers where flows are computed: the mean load of a rank is so many.
pub(super) const WHOLE: f64 = (1u64 << 32) as f64;

/// What each expert of a layer may carry: K scenarios of E experts, in units of the mean load of
/// a rank.
#[derive(Debug, Default)]
pub(super) struct Futures {
    pub(super) num_scenarios: usize,
    num_experts: usize,
    /// How much each scenario counts, `[K]` in rows; they add up to 1, and lanes beyond K are 0.
    pub(super) weights: Vec<Row>,
    /// The load of each expert, `[blocks of K, E]`.
    loads: Vec<Row>,
}

impl Futures {
    /// Takes the loads of a layer, one slice of `[E]` for each scenario and weight.
    pub(super) fn take<'a>(
        &mut self,
        scenarios: impl Iterator<Item = (&'a [f32], f64)> + Clone,
        num_experts: usize,
        num_ranks: usize,
    ) {
        let num_scenarios = scenarios.clone().count();
        let blocks = num_scenarios.div_ceil(LANES);
        self.num_scenarios = num_scenarios;
        self.num_experts = num_experts;
        self.weights.clear();
        self.weights.resize(blocks, [0.0; LANES]);
        self.loads.clear();
        self.loads.resize(blocks * num_experts, [0.0; LANES]);
        let all: f64 = scenarios.clone().map(|(_, weight)| weight).sum();
        for (scenario, (row, weight)) in scenarios.enumerate() {
            let (block, lane) = (scenario / LANES, scenario % LANES);
            let total: f64 = row.iter().map(|&load| f64::from(load)).sum();
            let scale = if total > 0.0 {
                num_ranks as f64 / total
            } else {
                0.0
            };
            self.weights[block][lane] = (weight / all) as f32;
            for (expert, &load) in row.iter().enumerate() {
                let load = f64::from(load) * scale;
                self.loads[block * num_experts + expert][lane] = load as f32;
            }
        }
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.weights.len()
    }

    /// The load of an expert in a block of scenarios.
    #[inline(always)]
    pub(super) fn load(&self, block: usize, expert: usize) -> &Row {
        &self.loads[block * self.num_experts + expert]
    }
}

/// The sum over lanes, always in the same order.
#[inline(always)]
pub(super) fn total(row: &Row) -> f32 {
    let mut sums = *row;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// The weighted sum of squares of what is above the mean.
#[inline(always)]
pub(super) fn squares(row: &Row, weights: &Row) -> f32 {
    let mut squares = [0.0f32; LANES];
    for lane in 0..LANES {
        let over = if row[lane] > 1.0 {
            row[lane] - 1.0
        } else {
            0.0
        };
        squares[lane] = weights[lane] * over * over;
    }
    total(&squares)
}

//! A layer's loads in several scenarios, side by side, and tables of what follows from them.

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

/// Numbers that depend on the scenario: a row of them for each rank, or each set of ranks.
#[derive(Debug)]
pub(super) struct Table {
    /// `[blocks, capacity]`
    rows: Vec<Row>,
    capacity: usize,
    pub(super) len: usize,
}

impl Table {
    pub(super) fn new(num_blocks: usize, capacity: usize) -> Self {
        Self {
            rows: vec![[0.0; LANES]; num_blocks * capacity],
            capacity,
            len: 0,
        }
    }

    /// The rows in use for a block of scenarios.
    #[inline(always)]
    pub(super) fn block(&self, block: usize) -> &[Row] {
        &self.rows[block * self.capacity..][..self.len]
    }

    #[inline(always)]
    pub(super) fn row_mut(&mut self, block: usize, row: usize) -> &mut Row {
        &mut self.rows[block * self.capacity + row]
    }

    /// Sets all rows to zero.
    pub(super) fn clear(&mut self) {
        self.rows.fill([0.0; LANES]);
    }

    /// Calls `mark` with the row that is largest in each scenario.
    pub(super) fn for_largest(&self, futures: &Futures, mut mark: impl FnMut(usize)) {
        for scenario in 0..futures.num_scenarios {
            let (block, lane) = (scenario / LANES, scenario % LANES);
            let mut largest = (0.0, 0);
            for (index, row) in self.block(block).iter().enumerate() {
                if row[lane] > largest.0 {
                    largest = (row[lane], index);
                }
            }
            mark(largest.1);
        }
    }
}

/// `row += factor * other`, lane by lane.
#[inline(always)]
pub(super) fn add(row: &mut Row, factor: f32, other: &Row) {
    for lane in 0..LANES {
        row[lane] += factor * other[lane];
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

/// What an exchange does to the rows of a table: for each of the two experts it concerns, how much
/// of the expert's load each row gains.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) experts: [usize; 2],
    gains: Vec<[f32; 2]>,
    marked: Vec<bool>,
    /// The rows that gain or lose anything.
    pub(super) rows: Vec<u32>,
}

impl Change {
    /// No change to so many rows.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self {
            experts: [0; 2],
            gains: vec![[0.0; 2]; capacity],
            marked: vec![false; capacity],
            rows: Vec::with_capacity(capacity),
        }
    }

    /// What a row gains of each expert's load.
    #[inline(always)]
    pub(super) fn of(&self, row: u32) -> [f32; 2] {
        self.gains[row as usize]
    }

    #[inline(always)]
    pub(super) fn gain(&mut self, which: usize, row: usize, more: f32) {
        self.gains[row][which] += more;
        if !self.marked[row] {
            self.marked[row] = true;
            self.rows.push(row as u32);
        }
    }

    #[inline(always)]
    pub(super) fn clear(&mut self) {
        for &row in &self.rows {
            self.gains[row as usize] = [0.0; 2];
            self.marked[row as usize] = false;
        }
        self.rows.clear();
    }
}

//! Two slots a rank: a bound from the sizes of replicas and the partners they need.
//!
//! A rank that carries at most a level `T` and holds a replica above `T / 2` holds another of at
//! most the rest. So for every size `v` above `T / 2` the replicas of at least `v` are no more than
//! those of at most `T - v`. How many there are of each follows from the counts; if no counts, not
//! even fractions of them, meet these conditions and fill the slots, then no placement reaches `T`.
//!
//! Whether there are such counts is a linear program. That there are none is proved by a price for
//! each condition: a replica pays the prices of the sizes it reaches, or earns those of the sizes
//! it is a partner for, and everyone pays for slots. If the experts, each with the count that is
//! cheapest for it, still pay more than the slots cost, no counts meet the conditions. Prices that
//! are no good prove nothing, but nothing false either.
//!
//! Prices are found by the method of multipliers: fractions of counts lessen the squares of what
//! is missing, one expert at a time; what is still missing then is added to the prices.
//!
//! Sources: M. R. Hestenes, "Multiplier and gradient methods", 1969; prices as sums over sizes are
//! the dual feasible functions of bin packing, G. S. Lueker, "Bin packing with items uniformly
//! distributed over intervals \[a,b\]", 1983.

use multiversion::multiversion;

/// Sizes above half of the level for which there is a price.
const SIZES: usize = 96;

/// Which counts of an expert are tried at first while prices are looked for: so many above the
/// fewest. Where a proof fails, others that spoil it take the place of some.
const TRIED: [f64; 8] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0, f64::INFINITY];
const FEW: usize = TRIED.len();

/// How often all experts are gone through for one level.
const PASSES: usize = 60;

/// How near the highest level that is proved too low and the lowest that is not come.
const NEAR: f64 = 5e-4;

/// How much a missing slot weighs beside a missing partner, of which there are many sizes.
const SLOT_WEIGHT: f64 = 10.0;

/// Below this, all that is missing is a matter of convergence.
const MET: f64 = 0.01;

/// Steps of Newton's method on the squares along a line; they have few pieces.
const LINE_STEPS: usize = 2;

/// What the sum of all prices is scaled to where they become whole numbers.
const WHOLE: f64 = (1 << 24) as f64;

/// How many counts a proof may have to look at.
const MOST_COUNTS: usize = 1 << 22;

/// How far below a level that is proved too low the bound stays: shares are rounded before they are
/// compared with sizes.
const ROUNDING: f64 = 1e-9;

/// Ranks of one or two slots, all equally fast.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ranks {
    pub(super) num_ranks: usize,
    pub(super) num_slots: usize,
}

impl Ranks {
    /// Ranks with one slot. What they lack counts as a replica without load.
    fn singles(self) -> usize {
        2 * self.num_ranks - self.num_slots
    }
}

/// What replicas of one share pay: the price of `count` replicas that reach, or are partners for,
/// the first so many sizes.
#[derive(Debug, Clone, Copy, Default)]
struct Part {
    /// How many sizes a replica reaches; negative if it is a partner instead.
    sizes: i32,
    count: f64,
}

impl Part {
    fn of(load: f64, count: f64, level: f64) -> Self {
        // The sizes are `level / 2 * (1 + (k + 1) / SIZES)`, none of them half the level.
        let above_half = |size: f64| {
            let sizes = (2.0 * size / level - 1.0) * SIZES as f64;
            (sizes.max(0.0) as i32).min(SIZES as i32)
        };
        let share = load / count;
        let sizes = if 2.0 * share > level {
            above_half(share)
        } else {
            -above_half(level - share)
        };
        Self { sizes, count }
    }

    fn length(self) -> usize {
        self.sizes.unsigned_abs() as usize
    }

    /// What it adds to what is missing of each size it has to do with.
    fn missing(self) -> f64 {
        if self.sizes > 0 {
            self.count
        } else {
            -self.count
        }
    }
}

/// Scratch of [`raise`].
#[derive(Debug)]
pub(super) struct Scratch {
    /// For each expert, what it pays with each of a few counts, and how much of it has that count.
    parts: Vec<[Part; FEW]>,
    fractions: Vec<[f64; FEW]>,
    /// What is missing of each size and of slots, and the prices that have been added to it.
    missing: [f64; SIZES],
    price: [f64; SIZES],
    missing_slots: f64,
    slot_price: f64,
    /// Sums of what is above zero in `missing`: of the first sizes.
    charge: [f64; SIZES + 1],
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            parts: Vec::new(),
            fractions: Vec::new(),
            missing: [0.0; SIZES],
            price: [0.0; SIZES],
            missing_slots: 0.0,
            slot_price: 0.0,
            charge: [0.0; SIZES + 1],
        }
    }
}

/// The highest level between two that is proved too low, or the lower; `upper` is what a placement
/// reaches.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
pub(super) fn raise(
    row: &[f32],
    ranks: Ranks,
    lower: f64,
    upper: f64,
    scratch: &mut Scratch,
) -> f64 {
    let (mut low, mut high) = (lower, upper);
    scratch.parts.clear();
    while high > low * (1.0 + NEAR) {
        let level = 0.5 * (low + high);
        if scratch.prove_too_low(row, ranks, level) {
            low = level;
        } else {
            high = level;
        }
    }
    if low > lower {
        lower.max(low * (1.0 - ROUNDING))
    } else {
        lower
    }
}

impl Scratch {
    /// Looks for prices that no counts can pay at a level.
    #[inline(always)]
    fn prove_too_low(&mut self, row: &[f32], ranks: Ranks, level: f64) -> bool {
        if !self.start(row, ranks, level) {
            return true;
        }
        for _ in 0..PASSES {
            self.sum_up();
            if self.is_promising(ranks) && self.holds(row, ranks, level) {
                return true;
            }
            let over = |(missing, price): (&f64, &f64)| (missing - price).max(0.0).powi(2);
            let slots = self.missing_slots - self.slot_price;
            let missing = self.missing.iter().zip(&self.price).map(over).sum::<f64>();
            if missing + slots * slots < MET {
                return false;
            }
            for (price, missing) in self.price.iter_mut().zip(&mut self.missing) {
                let more = *missing - *price;
                *price = missing.max(0.0);
                *missing = *price + more;
            }
            self.slot_price = self.missing_slots;
            self.missing_slots += slots;
            self.sum_up();
            for expert in 0..row.len() {
                self.improve(expert);
            }
        }
        false
    }

    /// Prepares for another level, from the fractions of the last. False if some expert is too hot
    /// for the level whatever its count.
    #[inline(always)]
    fn start(&mut self, row: &[f32], ranks: Ranks, level: f64) -> bool {
        let most = most_replicas(row, ranks);
        if self.parts.len() != row.len() {
            let mut first = [0.0; FEW];
            first[0] = 1.0;
            self.fractions.clear();
            self.fractions.resize(row.len(), first);
            for &load in row {
                let first = fewest_replicas(f64::from(load), level);
                let tried = TRIED.map(|more| Part {
                    count: (first + more).min(most),
                    ..Part::default()
                });
                self.parts.push(tried);
            }
        }
        for (&load, parts) in row.iter().zip(&mut self.parts) {
            let load = f64::from(load);
            let first = fewest_replicas(load, level);
            if first > most {
                return false;
            }
            for part in parts {
                *part = Part::of(load, part.count.max(first), level);
            }
        }
        self.price = [0.0; SIZES];
        self.slot_price = 0.0;
        self.missing = [-(ranks.singles() as f64); SIZES];
        self.missing_slots = -(ranks.num_slots as f64);
        for expert in 0..row.len() {
            for option in 0..FEW {
                let fraction = self.fractions[expert][option];
                if fraction > 0.0 {
                    self.add(self.parts[expert][option], fraction);
                }
            }
        }
        true
    }

    #[inline(always)]
    fn add(&mut self, part: Part, fraction: f64) {
        let more = part.missing() * fraction;
        for missing in &mut self.missing[..part.length()] {
            *missing += more;
        }
        self.missing_slots += part.count * fraction;
    }

    #[inline(always)]
    fn sum_up(&mut self) {
        let mut sum = 0.0;
        for (charge, missing) in self.charge[1..].iter_mut().zip(&self.missing) {
            sum += missing.max(0.0);
            *charge = sum;
        }
    }

    /// What a part pays at the prices in force: those that have been added, and what is missing.
    #[inline(always)]
    fn cost(&self, part: Part) -> f64 {
        part.missing() * self.charge[part.length()] + part.count * self.missing_slots * SLOT_WEIGHT
    }

    /// Moves as much of an expert from the dearest count it has to the cheapest as lessens the
    /// squares most.
    #[inline(always)]
    fn improve(&mut self, expert: usize) {
        let (mut cheap, mut dear) = ((f64::INFINITY, 0), (f64::NEG_INFINITY, 0));
        for option in 0..FEW {
            let cost = self.cost(self.parts[expert][option]);
            if cost < cheap.0 {
                cheap = (cost, option);
            }
            if self.fractions[expert][option] > 0.0 && cost > dear.0 {
                dear = (cost, option);
            }
        }
        if dear.0 <= cheap.0 {
            return;
        }
        let to = self.parts[expert][cheap.1];
        let from = self.parts[expert][dear.1];
        let most = self.fractions[expert][dear.1];
        let fraction = self.best_fraction(to, from, most);
        self.fractions[expert][dear.1] -= fraction;
        self.fractions[expert][cheap.1] += fraction;
        self.add(to, fraction);
        self.add(from, -fraction);
        self.sum_up();
    }

    /// How much to move from one count to another, by Newton's method from none.
    #[inline(always)]
    fn best_fraction(&self, to: Part, from: Part, most: f64) -> f64 {
        let (short, long) = (
            to.length().min(from.length()),
            to.length().max(from.length()),
        );
        let in_both = to.missing() - from.missing();
        let in_one = if to.length() > from.length() {
            to.missing()
        } else {
            -from.missing()
        };
        let slots = to.count - from.count;
        let mut fraction = 0.0;
        for _ in 0..LINE_STEPS {
            let mut slope = SLOT_WEIGHT * slots * (self.missing_slots + fraction * slots);
            let mut bend = SLOT_WEIGHT * slots * slots;
            for (range, more) in [(0..short, in_both), (short..long, in_one)] {
                let (mut sum, mut above) = (0.0, 0.0);
                for &missing in &self.missing[range] {
                    let missing = missing + fraction * more;
                    sum += missing.max(0.0);
                    above += if missing > 0.0 { 1.0 } else { 0.0 };
                }
                slope += more * sum;
                bend += more * more * above;
            }
            if bend <= 0.0 {
                break;
            }
            fraction = (fraction - slope / bend).clamp(0.0, most);
        }
        fraction
    }

    /// Whether the prices would prove the level too low if there were no other counts.
    #[inline(always)]
    fn is_promising(&self, ranks: Ranks) -> bool {
        let mut value = -(ranks.singles() as f64) * self.charge[SIZES]
            - self.missing_slots * SLOT_WEIGHT * ranks.num_slots as f64;
        for parts in &self.parts {
            let costs = parts.iter().map(|&part| self.cost(part));
            value += costs.fold(f64::INFINITY, f64::min);
        }
        value > 0.0
    }

    /// Whether the prices, rounded to whole numbers, prove the level too low, all counts
    /// considered. Nothing is rounded in the proof but the sizes of shares. If they do not, the
    /// counts that spoil it are tried from now on.
    #[inline(always)]
    fn holds(&mut self, row: &[f32], ranks: Ranks, level: f64) -> bool {
        let most = most_replicas(row, ranks);
        let scale = WHOLE / (self.charge[SIZES] + self.missing_slots.abs() * SLOT_WEIGHT);
        if !scale.is_finite() || most * row.len() as f64 > MOST_COUNTS as f64 {
            return false;
        }
        // Whole sums of prices that grow with the size, as sums of prices do.
        let charge = self.charge.map(|charge| (charge * scale).round() as i64);
        let slot = (self.missing_slots * SLOT_WEIGHT * scale).round() as i64;
        let cost = |part: Part| {
            let charge = charge[part.length()];
            let of_one = slot + if part.sizes > 0 { charge } else { -charge };
            of_one * part.count as i64
        };
        let mut value = -i128::from(slot) * ranks.num_slots as i128
            - i128::from(charge[SIZES]) * ranks.singles() as i128;
        for (expert, &load) in row.iter().enumerate() {
            let load = f64::from(load);
            let mut count = fewest_replicas(load, level);
            let mut least = (i64::MAX, Part::default());
            while count <= most {
                let part = Part::of(load, count, level);
                let cost = cost(part);
                if cost < least.0 {
                    least = (cost, part);
                }
                count += 1.0;
            }
            value += i128::from(least.0);
            let fractions = &self.fractions[expert];
            let unused = |option: &usize| fractions[*option] == 0.0;
            let parts = &mut self.parts[expert];
            if parts.iter().all(|&part| cost(part) > least.0)
                && let Some(option) = (0..FEW).filter(unused).max_by_key(|&k| cost(parts[k]))
            {
                parts[option] = least.1;
            }
        }
        value > 0
    }
}

/// How many replicas an expert can have where every other has one.
fn most_replicas(row: &[f32], ranks: Ranks) -> f64 {
    (ranks.num_slots + 1 - row.len()) as f64
}

/// How many replicas an expert has at least where each carries at most the level.
fn fewest_replicas(load: f64, level: f64) -> f64 {
    (load / level).ceil().max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The least level of all counts, each paired as well as can be: heaviest with lightest.
    fn optimum(row: &[f32], ranks: Ranks) -> f64 {
        fn visit(row: &[f32], slots: usize, shares: &mut Vec<f64>, best: &mut f64) {
            let Some((&load, rest)) = row.split_first() else {
                let mut sorted = shares.clone();
                sorted.resize(shares.len() + slots, 0.0);
                sorted.sort_unstable_by(f64::total_cmp);
                let pairs = sorted.iter().zip(sorted.iter().rev()).map(|(a, b)| a + b);
                *best = best.min(pairs.fold(0.0, f64::max));
                return;
            };
            let most = slots - rest.len();
            for count in if rest.is_empty() {
                most..=most
            } else {
                1..=most
            } {
                let before = shares.len();
                shares.resize(before + count, f64::from(load) / count as f64);
                visit(rest, slots - count, shares, best);
                shares.truncate(before);
            }
        }
        let mut best = f64::INFINITY;
        let mut shares = vec![0.0; ranks.singles()];
        visit(row, ranks.num_slots, &mut shares, &mut best);
        best
    }

    #[test]
    fn the_bound_is_below_the_best_and_near_it() {
        let mut scratch = Scratch::default();
        let mut state = 7u64;
        let mut draw = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / 16_777_216.0
        };
        let (mut before, mut after, mut proved) = (0.0, 0.0, 0);
        for case in 0..400 {
            let ranks = Ranks {
                num_ranks: 4 + case % 2,
                num_slots: 8,
            };
            let row: Vec<f32> = (0..4 + case % 4)
                .map(|_| (8.0 * draw() - 4.0).exp2() * 1000.0)
                .collect();
            let best = optimum(&row, ranks);
            let total: f64 = row.iter().map(|&load| f64::from(load)).sum();
            let mean = total / ranks.num_ranks as f64;
            for upper in [best, best * 1.5, best * 10.0] {
                let bound = raise(&row, ranks, mean, upper, &mut scratch);
                assert!(bound >= mean && bound <= best, "{bound} {best} {row:?}");
                proved += usize::from(bound > mean);
                (before, after) = (before + best / mean - 1.0, after + best / bound - 1.0);
            }
        }
        assert!(
            proved > 300 && after < 0.6 * before,
            "{proved} {before} {after}"
        );
    }

    #[test]
    fn nothing_is_proved_of_layers_without_load() {
        let ranks = Ranks {
            num_ranks: 2,
            num_slots: 4,
        };
        assert_eq!(
            raise(&[0.0; 3], ranks, 0.0, 0.0, &mut Scratch::default()),
            0.0
        );
    }
}

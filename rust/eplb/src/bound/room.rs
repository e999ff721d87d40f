//! Ranks that are not alike: a bound from what fits on each.

/// Ranks that are alike.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Class {
    num_ranks: usize,
    slots: usize,
    /// Where the mean of all ranks is 1.
    speed: f64,
}

/// How often the interval of levels is halved.
const HALVINGS: u32 = 30;

/// Scratch of [`raise`], and the ranks by class, fastest first.
#[derive(Debug, Default)]
pub(super) struct Room {
    classes: Vec<Class>,
    num_slots: usize,
    sorted: Vec<f64>,
}

impl Room {
    /// Takes the ranks: slots and speed of each, where the mean speed is 1.
    pub(super) fn new(ranks: impl Iterator<Item = (usize, f64)>) -> Self {
        let mut room = Self::default();
        for (slots, speed) in ranks {
            room.num_slots += slots;
            let class = |class: &&mut Class| class.slots == slots && class.speed == speed;
            match room.classes.iter_mut().find(class) {
                Some(class) => class.num_ranks += 1,
                None => room.classes.push(Class {
                    num_ranks: 1,
                    slots,
                    speed,
                }),
            }
        }
        room
    }

    /// Whether all ranks are alike, so that this bound says nothing new.
    pub(super) fn is_even(&self) -> bool {
        self.classes.len() <= 1
    }

    /// The least level, at or above `lower`, that is not ruled out. At a level, an expert has at
    /// least so many replicas that these fit on ranks fast enough for them, all experts together
    /// have no more than there are slots, and the ranks, each filled with the largest shares that
    /// fit on it, carry the whole load.
    pub(super) fn raise(&mut self, row: &[f32], lower: f64) -> f64 {
        self.sorted.clear();
        self.sorted.extend(row.iter().map(|&load| f64::from(load)));
        self.sorted.sort_unstable_by(|a, b| b.total_cmp(a));
        if lower <= 0.0 || self.is_possible(lower) {
            return lower;
        }
        let (mut low, mut high) = (lower, 2.0 * lower);
        while !self.is_possible(high) {
            (low, high) = (high, 2.0 * high);
        }
        for _ in 0..HALVINGS {
            let level = 0.5 * (low + high);
            if self.is_possible(level) {
                high = level;
            } else {
                low = level;
            }
        }
        low
    }

    fn is_possible(&self, level: f64) -> bool {
        let total: f64 = self.sorted.iter().sum();
        // A little to spare, for the rounding of sums.
        let level = level * (1.0 + 1e-9);
        let mut slots = 0;
        for &load in &self.sorted {
            slots += self.fewest_replicas(load, level);
            if slots > self.num_slots {
                return false;
            }
        }
        let mut carried = 0.0;
        for class in &self.classes {
            let most = level * class.speed;
            let largest = self.sorted.iter().take(class.slots);
            let filled: f64 = largest.map(|&load| load.min(most)).sum();
            carried += class.num_ranks as f64 * filled.min(most);
        }
        carried >= total
    }

    /// How many replicas an expert has at least, so that all of them find a place; more than there
    /// are slots if none will do.
    fn fewest_replicas(&self, load: f64, level: f64) -> usize {
        (1..=self.num_slots)
            .find(|&count| {
                let share = load / count as f64;
                let fit = |class: &Class| {
                    let on_each = (level * class.speed / share) as usize;
                    class.num_ranks * class.slots.min(on_each)
                };
                self.classes.iter().map(fit).sum::<usize>() >= count
            })
            .unwrap_or(self.num_slots + 1)
    }
}

//! How much searching a plan may cost.

use std::time::{Duration, Instant};

/// What a search may use up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Budget {
    /// So many steps for each layer: the same plan on every machine, on any number of threads. A
    /// layer that is even enough stops sooner; how even that is depends on the number, so that
    /// easy layers cost little.
    Iterations(u32),
    /// So much time for all layers: a plan that depends on how fast the machine happens to be.
    Time(Duration),
}

impl Budget {
    /// What a planner uses unless it is told otherwise.
    pub const DEFAULT: Self = Self::Iterations(1000);
}

impl Budget {
    /// The same, or half of the time: for the first of two searches.
    pub(crate) fn halved(self) -> Self {
        match self {
            Self::Time(time) => Self::Time(time / 2),
            steps => steps,
        }
    }

    /// The same, or a quarter of the time: for a start.
    pub(crate) fn quartered(self) -> Self {
        self.halved().halved()
    }

    /// The same, or what is left of the time.
    pub(crate) fn since(self, start: Instant) -> Self {
        match self {
            Self::Time(time) => Self::Time(time.saturating_sub(start.elapsed())),
            steps => steps,
        }
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// How many steps are taken between two looks at the clock.
const STEPS_PER_LOOK: u32 = 8;

/// What is left of a budget for one layer.
#[derive(Debug, Clone)]
pub(crate) struct Fuel {
    /// What it held at first; the measure of how much patience a search may have.
    pub(crate) capacity: u32,
    left: u32,
    began: Instant,
    deadline: Option<Instant>,
}

impl Fuel {
    pub(crate) fn steps(capacity: u32) -> Self {
        Self {
            capacity,
            left: capacity,
            began: Instant::now(),
            deadline: None,
        }
    }

    pub(crate) fn until(deadline: Instant) -> Self {
        let capacity = u32::MAX;
        Self {
            capacity,
            left: capacity,
            began: Instant::now(),
            deadline: Some(deadline),
        }
    }

    /// As much as there was at first; a deadline stays.
    pub(crate) fn refilled(&self) -> Self {
        Self {
            left: self.capacity,
            ..self.clone()
        }
    }

    /// Which part of it is spent, 0 to 1.
    pub(crate) fn spent(&self) -> f32 {
        match self.deadline {
            None => 1.0 - self.left as f32 / self.capacity.max(1) as f32,
            Some(deadline) => {
                let all = deadline.saturating_duration_since(self.began).as_secs_f32();
                (self.began.elapsed().as_secs_f32() / all.max(1e-9)).min(1.0)
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Takes a step; false if there is none to take.
    #[inline(always)]
    pub(crate) fn step(&mut self) -> bool {
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        if self.left.is_multiple_of(STEPS_PER_LOOK)
            && self
                .deadline
                .is_some_and(|deadline| Instant::now() >= deadline)
        {
            self.left = 0;
        }
        true
    }

    /// Lets a search use no more than so many steps.
    #[inline(always)]
    pub(crate) fn spend<T>(&mut self, most: u32, search: impl FnOnce(&mut Self) -> T) -> T {
        let kept = self.left.saturating_sub(most);
        self.left -= kept;
        let result = search(self);
        // A clock that has run out takes what was kept, too.
        let out = self
            .deadline
            .is_some_and(|deadline| self.left == 0 && Instant::now() >= deadline);
        self.left = if out { 0 } else { self.left + kept };
        result
    }
}

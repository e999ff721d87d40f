//! The planner: a topology, a policy and the scratch they need, for those who replan in a loop.

mod draft;
mod policy;
mod replan;

use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::balance::{self, Budget};
use crate::deepseek;
use crate::error::{Code, Error, Result, require_groups, require_positive};
use crate::load::Load;
use crate::migrate;
use crate::placement::{Placement, PlacementMut, Replica};
use crate::topology::Topology;
use crate::trivial;

pub use draft::Draft;
pub use policy::{GroupRule, Policy};

/// The most threads a planner may own.
pub const MAX_THREADS: usize = 256;

/// Plans placements on one topology. May be used from many threads at once; the answer is the
/// same bytes on any number of threads.
#[derive(Debug)]
pub struct Planner {
    topology: Topology,
    num_groups: usize,
    policy: Policy,
    budget: Budget,
    group_rule: GroupRule,
    crossing_cost: f64,
    num_threads: usize,
    threads: Option<ThreadPool>,
    /// The process whose threads these are.
    process: u32,
    /// Scratch of calls that have ended, for those to come.
    idle: Mutex<Vec<Scratch>>,
}

#[derive(Debug, Default)]
struct Scratch {
    replicas: Vec<Replica>,
    deepseek: Vec<deepseek::Scratch>,
    balance: Vec<balance::Scratch>,
    migrate: migrate::Scratch,
    /// Loads of some layers of a load.
    loads: Vec<f32>,
}

impl Planner {
    /// A planner for experts in `num_groups` groups, which computes on `num_threads` threads: on
    /// the caller's alone if that is 1, else on a pool of its own.
    ///
    /// # Errors
    /// [`Code::NotPositive`] or [`Code::TooLarge`] for `num_groups` and `num_threads`.
    pub fn new(
        topology: Topology,
        num_groups: usize,
        policy: Policy,
        num_threads: usize,
    ) -> Result<Self> {
        require_positive("num_groups", num_groups)?;
        require_positive("threads", num_threads)?;
        if num_threads > MAX_THREADS {
            return Err(Error::invalid(
                Code::TooLarge,
                "threads",
                num_threads,
                format!("at most {MAX_THREADS}"),
                "one thread plans a whole model in milliseconds",
            ));
        }
        let threads = match num_threads {
            1 => None,
            _ => Some(
                ThreadPoolBuilder::new()
                    .num_threads(num_threads)
                    .thread_name(|index| format!("eplb-{index}"))
                    .build()
                    .map_err(|error| {
                        Error::invalid(
                            Code::TooLarge,
                            "threads",
                            num_threads,
                            "as many as the system lets this process start",
                            error.to_string(),
                        )
                    })?,
            ),
        };
        Ok(Self {
            topology,
            num_groups,
            policy,
            budget: Budget::DEFAULT,
            group_rule: GroupRule::default(),
            crossing_cost: 1.0,
            num_threads,
            threads,
            process: std::process::id(),
            idle: Mutex::default(),
        })
    }

    /// The machines it plans for.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// How many groups the model's experts are in.
    #[must_use]
    pub fn num_groups(&self) -> usize {
        self.num_groups
    }

    /// How it plans.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// On how many threads it computes.
    #[must_use]
    pub fn num_threads(&self) -> usize {
        self.num_threads
    }

    /// The threads it owns, if it computes on more than the caller's. A process that was forked
    /// has none of them, and would wait for ever.
    pub(crate) fn pool(&self) -> Option<&ThreadPool> {
        let threads = self.threads.as_ref();
        threads.filter(|_| self.process == std::process::id())
    }

    /// The same planner with a budget for the search of [`Policy::Balanced`].
    #[must_use]
    pub fn with_budget(self, budget: Budget) -> Self {
        Self { budget, ..self }
    }

    /// The same planner with a rule for groups under [`Policy::Balanced`].
    #[must_use]
    pub fn with_group_rule(self, group_rule: GroupRule) -> Self {
        Self { group_rule, ..self }
    }

    /// The same planner with another price under [`GroupRule::Priced`]; 1 unless told.
    ///
    /// A token crosses if it is served off the home of its expert's group. What is made least is
    /// the load of the heaviest rank plus this price times the tokens that cross, as a mean over
    /// ranks. So 0 is [`GroupRule::Free`], and a high price is [`GroupRule::Strict`].
    ///
    /// # Errors
    /// [`Code::OutOfRange`] unless it is finite and at least 0.
    pub fn with_crossing_cost(self, crossing_cost: f64) -> Result<Self> {
        if !crossing_cost.is_finite() || crossing_cost < 0.0 {
            return Err(Error::invalid(
                Code::OutOfRange,
                "crossing_cost",
                crossing_cost,
                "finite and at least 0",
                "0 is group_rule=\"free\", and no price at all is \"strict\"",
            ));
        }
        Ok(Self {
            crossing_cost,
            ..self
        })
    }

    /// What a token that crosses costs under [`GroupRule::Priced`].
    #[must_use]
    pub fn crossing_cost(&self) -> f64 {
        self.crossing_cost
    }

    /// How much its search may cost.
    #[must_use]
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// What it makes of groups.
    #[must_use]
    pub fn group_rule(&self) -> GroupRule {
        self.group_rule
    }

    /// Whether its plans keep each group on one node. Under [`Policy::DeepSeek`] they do if groups
    /// divide over nodes; otherwise groups and nodes are ignored. Under [`Policy::Balanced`] the
    /// [rule](GroupRule) says so.
    #[must_use]
    pub fn keeps_groups(&self) -> bool {
        if self.topology.num_nodes() == 1 {
            return false;
        }
        match self.policy {
            Policy::Balanced => self.num_groups > 1 && self.group_rule == GroupRule::Strict,
            Policy::DeepSeek => deepseek::is_hierarchical(&self.topology, self.num_groups),
            Policy::Trivial => false,
        }
    }

    /// Plans a placement for a load.
    ///
    /// # Errors
    /// As [`draft`](Self::draft), and [`Code::TooLarge`] if the answer does not fit in memory.
    pub fn plan(&self, load: &Load<'_>) -> Result<Placement> {
        self.draft(load)?.to_placement()
    }

    /// Plans a placement into buffers that are given. Allocates nothing once it has planned as
    /// many layers and experts before, as many times at once.
    ///
    /// # Errors
    /// As [`draft`](Self::draft), and [`Code::WrongShape`] or [`Code::TooSmall`] for the buffers,
    /// which are then left as they were.
    pub fn plan_into(&self, load: &Load<'_>, out: &mut PlacementMut<'_>) -> Result<()> {
        self.draft(load)?.write_into(out)
    }

    /// Plans a placement and leaves it in the planner's own memory, for the caller to decide
    /// where it goes. This is the whole computation; what is left is writing.
    ///
    /// # Errors
    /// [`Code::TooSmall`] if there are fewer slots than experts, [`Code::NotDivisor`] if experts
    /// do not divide into groups, [`Code::TooLarge`] if the scratch does not fit in memory.
    pub fn draft(&self, load: &Load<'_>) -> Result<Draft<'_>> {
        self.draft_at(self.budget, load)
    }

    /// The same with another budget.
    pub(crate) fn draft_at(&self, budget: Budget, load: &Load<'_>) -> Result<Draft<'_>> {
        let scratch = self.take_scratch();
        let mut draft = Draft {
            planner: self,
            num_layers: load.num_layers(),
            num_experts: load.num_experts(),
            scratch,
        };
        self.compute(budget, load, &mut draft.scratch)?;
        Ok(draft)
    }

    fn idle_scratch(&self) -> MutexGuard<'_, Vec<Scratch>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_scratch(&self) -> Scratch {
        self.idle_scratch().pop().unwrap_or_default()
    }

    fn compute(&self, budget: Budget, load: &Load<'_>, scratch: &mut Scratch) -> Result<()> {
        match self.policy {
            Policy::Balanced => {
                let shape = self.fresh_shape(load.num_experts())?;
                self.compute_balanced(&shape, budget, load, scratch)
            }
            Policy::DeepSeek => {
                let shape = self.reference_shape(load.num_experts())?;
                let Scratch {
                    replicas, deepseek, ..
                } = scratch;
                self.make_room(load, replicas)?;
                let plan =
                    |loads: &[f32], slots: &mut [Replica], scratch: &mut deepseek::Scratch| {
                        deepseek::plan_layers(&shape, loads, slots, scratch);
                    };
                self.share_out(load, replicas, deepseek, plan);
                Ok(())
            }
            Policy::Trivial => {
                self.reference_shape(load.num_experts())?;
                self.make_room(load, &mut scratch.replicas)?;
                for layer in scratch.replicas.chunks_exact_mut(self.topology.num_slots()) {
                    trivial::plan_layer(load.num_experts(), layer);
                }
                Ok(())
            }
        }
    }

    /// Plans with the balanced policy, whatever placement is in force.
    fn compute_balanced(
        &self,
        shape: &balance::Shape,
        budget: Budget,
        load: &Load<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Scratch {
            replicas, balance, ..
        } = scratch;
        self.make_room(load, replicas)?;
        let plan = |loads: &[f32], slots: &mut [Replica], scratch: &mut balance::Scratch| {
            balance::plan_layers(&self.topology, shape, budget, loads, slots, scratch);
        };
        self.share_out(load, replicas, balance, plan);
        Ok(())
    }

    /// Makes room for what the slots of all layers hold.
    fn make_room(&self, load: &Load<'_>, replicas: &mut Vec<Replica>) -> Result<()> {
        let num_slots = self.topology.num_slots();
        let length = load.num_layers().checked_mul(num_slots);
        let more = length.map(|length| length.saturating_sub(replicas.len()));
        if let (Some(length), Some(Ok(()))) =
            (length, more.map(|more| replicas.try_reserve_exact(more)))
        {
            replicas.resize(length, Replica::default());
            return Ok(());
        }
        Err(Error::invalid(
            Code::TooLarge,
            "num_layers",
            load.num_layers(),
            format!("small enough for {num_slots} slots a layer to fit in memory"),
            "plan fewer layers at a time",
        ))
    }

    /// Plans the layers on as many threads as there are, each with scratch of its own.
    fn share_out<S: Default + Send>(
        &self,
        load: &Load<'_>,
        replicas: &mut [Replica],
        scratch: &mut Vec<S>,
        plan: impl Fn(&[f32], &mut [Replica], &mut S) + Sync,
    ) {
        scratch.resize_with(self.num_threads, S::default);
        let per_thread = load.num_layers().div_ceil(self.num_threads);
        match self.pool() {
            None => plan(load.values(), replicas, &mut scratch[0]),
            Some(threads) => threads.install(|| {
                let loads = load.values().par_chunks(per_thread * load.num_experts());
                let slots = per_thread * self.topology.num_slots();
                loads
                    .zip(replicas.par_chunks_mut(slots))
                    .zip(scratch)
                    .for_each(|((loads, replicas), scratch)| plan(loads, replicas, scratch));
            }),
        }
    }

    fn balanced_shape(&self, num_experts: usize) -> Result<balance::Shape> {
        let groups = if self.keeps_groups() {
            self.num_groups
        } else {
            1
        };
        balance::Shape::new(&self.topology, num_experts, groups)
    }

    /// As [`balanced_shape`](Self::balanced_shape), for plans from scratch: with the price of
    /// leaving a node, and no node without a group.
    fn fresh_shape(&self, num_experts: usize) -> Result<balance::Shape> {
        let nodes = self.topology.num_nodes();
        if self.group_rule != GroupRule::Priced || self.num_groups == 1 || nodes == 1 {
            let shape = self.balanced_shape(num_experts)?;
            shape.check_no_idle_node(&self.topology)?;
            return Ok(shape);
        }
        balance::Shape::priced(
            &self.topology,
            num_experts,
            self.num_groups,
            self.crossing_cost,
        )
    }

    fn reference_shape(&self, num_experts: usize) -> Result<deepseek::Shape> {
        if !self.topology.is_even() {
            return Err(Error::invalid(
                Code::Inconsistent,
                "topology",
                "GPUs of unequal slots or speed, or dead ones",
                format!(
                    "GPUs that are all alike for policy \"{}\"",
                    self.policy.name()
                ),
                "policy \"balanced\" plans for any",
            ));
        }
        deepseek::Shape::new(&self.topology, num_experts, self.num_groups)
    }
}

/// Refuses a number of groups that experts do not divide into.
///
/// # Errors
/// [`Code::NotPositive`] for a zero, [`Code::NotDivisor`] with the nearest that would do.
pub fn check_groups(num_groups: usize, num_experts: usize) -> Result<()> {
    require_positive("num_groups", num_groups)?;
    require_positive("num_experts", num_experts)?;
    require_groups(num_groups, num_experts)
}

/// Refuses fewer slots than experts.
pub(crate) fn check_slots(num_experts: usize, topology: &Topology) -> Result<()> {
    let num_slots = topology.num_slots();
    if num_slots >= num_experts {
        return Ok(());
    }
    let num_gpus = topology.num_gpus();
    Err(Error::invalid(
        Code::TooSmall,
        "num_replicas",
        num_slots,
        format!("at least the number of experts ({num_experts})"),
        format!(
            "nearest multiple of {num_gpus} GPUs: {}",
            num_experts.next_multiple_of(num_gpus)
        ),
    ))
}

//! The planner: a topology, a policy and the scratch they need, for those who replan in a loop.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::balance::{self, Budget};
use crate::deepseek;
use crate::error::{Code, Error, Result, require_groups, require_positive};
use crate::load::Load;
use crate::migrate::{self, Milestone, Reach};
use crate::placement::{Placement, PlacementMut, Replica};
use crate::topology::Topology;
use crate::transfer::TransferLimits;
use crate::trivial;

/// The most threads a planner may own.
pub const MAX_THREADS: usize = 256;

/// How a placement is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Policy {
    /// DeepSeek's EPLB, exactly: greedy replication and packing, `f32` sums, stable sorts.
    DeepSeek,
    /// Replica counts and packing improved together by local search.
    #[default]
    Balanced,
    /// What engines start from: slot `i` holds expert `i mod num_experts`, whatever the load.
    Trivial,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 3] = [Self::Balanced, Self::DeepSeek, Self::Trivial];

    /// The name it goes by in Python and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::DeepSeek => "deepseek",
            Self::Trivial => "trivial",
        }
    }

    /// The policy of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// What [`Policy::Balanced`] makes of groups of experts. A model with one group has no rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GroupRule {
    /// All replicas of a group stay on one node.
    #[default]
    Strict,
    /// A group has a home, the node that serves most of its tokens, and may leave it at a
    /// [price](Planner::with_crossing_cost).
    Priced,
    /// Any expert may be anywhere.
    Free,
}

impl GroupRule {
    /// All rules.
    pub const ALL: [Self; 3] = [Self::Strict, Self::Priced, Self::Free];

    /// The name it goes by in Python and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Priced => "priced",
            Self::Free => "free",
        }
    }

    /// The rule of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| rule.name() == name)
    }
}

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
    /// Scratch of calls that have ended, for those to come.
    idle: Mutex<Vec<Scratch>>,
}

#[derive(Debug, Default)]
struct Scratch {
    replicas: Vec<Replica>,
    deepseek: Vec<deepseek::Scratch>,
    balance: Vec<balance::Scratch>,
    migrate: migrate::Scratch,
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
                "one thread plans 58 layers in a fraction of a millisecond",
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

    /// The threads it owns, if it computes on more than the caller's.
    pub(crate) fn pool(&self) -> Option<&ThreadPool> {
        self.threads.as_ref()
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
        let scratch = self.take_scratch();
        let mut draft = Draft {
            planner: self,
            num_layers: load.num_layers(),
            num_experts: load.num_experts(),
            scratch,
        };
        self.compute(load, &mut draft.scratch)?;
        Ok(draft)
    }

    /// Plans the best placement within reach of the one in force. A move is an expert that arrives
    /// on a rank that did not hold it. Experts that stay on their rank keep their slot.
    ///
    /// Where GPUs have died or joined since, some moves cannot be avoided: an expert that lost its
    /// last replica gets one, and a rank that holds nothing gets an expert; if no slot may repeat an
    /// expert, every slot that came free gets one. These are made whatever the limits.
    ///
    /// # Errors
    /// As [`draft`](Self::draft); [`Code::Inconsistent`] or [`Code::WrongShape`] for a previous
    /// placement of other machines, layers or experts.
    pub fn plan_from(
        &self,
        load: &Load<'_>,
        previous: &Placement,
        reach: &Reach,
    ) -> Result<Placement> {
        self.migrate(load, previous, reach, |scratch| {
            scratch.migrate.choose(reach, usize::MAX);
            self.write_moved(scratch, load, previous)
        })
    }

    /// Like [`plan_from`](Self::plan_from), within limits on what has to be sent as well: of the
    /// plans on the [frontier](Self::frontier), the furthest whose transfers keep to them.
    ///
    /// O(log M) times what [`transfers`](crate::transfers) takes, for M milestones.
    ///
    /// # Errors
    /// As [`plan_from`](Self::plan_from), and [`Code::WrongShape`] for other layers in the limits.
    pub fn plan_within(
        &self,
        load: &Load<'_>,
        previous: &Placement,
        reach: &Reach,
        limits: &TransferLimits<'_>,
    ) -> Result<Placement> {
        limits.check(load.num_layers())?;
        self.migrate(load, previous, reach, |scratch| {
            scratch.migrate.choose(reach, 0);
            let mut best = self.write_moved(scratch, load, previous)?;
            // All up to `fits` pieces keep to the limits, as far as is known; `beyond` do not.
            let (mut fits, mut beyond) = (0, scratch.migrate.num_pieces() + 1);
            while fits + 1 < beyond {
                let middle = if fits == 0 && beyond > scratch.migrate.num_pieces() {
                    beyond - 1
                } else {
                    fits.midpoint(beyond)
                };
                scratch.migrate.choose(reach, middle);
                let next = self.write_moved(scratch, load, previous)?;
                if limits.allow(previous, &next)? {
                    (fits, best) = (middle, next);
                } else {
                    beyond = middle;
                }
            }
            Ok(best)
        })
    }

    /// Balance against moves, from the placement in force: each milestone is the best for its
    /// number of moves that the search has found, and [`plan_from`](Self::plan_from) with that
    /// number leads there or nearby. Whether slots may repeat an expert of their rank is as in
    /// [`Reach`].
    ///
    /// # Errors
    /// As [`plan_from`](Self::plan_from).
    pub fn frontier(
        &self,
        load: &Load<'_>,
        previous: &Placement,
        repeats: bool,
    ) -> Result<Vec<Milestone>> {
        let reach = Reach {
            repeats,
            ..Reach::default()
        };
        self.migrate(load, previous, &reach, |scratch| {
            Ok(scratch.migrate.frontier())
        })
    }

    /// Explores what moves lead to, and does something with it.
    fn migrate<T>(
        &self,
        load: &Load<'_>,
        previous: &Placement,
        reach: &Reach,
        then: impl FnOnce(&mut Scratch) -> Result<T>,
    ) -> Result<T> {
        let shape = self.balanced_shape(load.num_experts())?;
        let mut scratch = self.take_scratch();
        let migrate = &mut scratch.migrate;
        let explored = migrate.explore(&self.topology, &shape, self.budget, load, previous, reach);
        let result = explored.and_then(|()| then(&mut scratch));
        self.idle_scratch().push(scratch);
        result
    }

    /// The placement that the moves chosen lead to.
    fn write_moved(
        &self,
        scratch: &mut Scratch,
        load: &Load<'_>,
        previous: &Placement,
    ) -> Result<Placement> {
        let Scratch {
            replicas, migrate, ..
        } = scratch;
        replicas.resize(load.num_layers() * self.topology.num_slots(), Replica::NONE);
        migrate.write(&self.topology, previous, replicas);
        Placement::from_replicas(self.topology.clone(), load.num_experts(), replicas)
    }

    fn idle_scratch(&self) -> MutexGuard<'_, Vec<Scratch>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_scratch(&self) -> Scratch {
        self.idle_scratch().pop().unwrap_or_default()
    }

    fn compute(&self, load: &Load<'_>, scratch: &mut Scratch) -> Result<()> {
        let num_slots = self.topology.num_slots();
        match self.policy {
            Policy::Balanced => drop(self.fresh_shape(load.num_experts())?),
            _ => drop(self.reference_shape(load.num_experts())?),
        }
        let length = load.num_layers().checked_mul(num_slots);
        let more = length.map(|length| length.saturating_sub(scratch.replicas.len()));
        match more.map(|more| scratch.replicas.try_reserve_exact(more)) {
            Some(Ok(())) => scratch
                .replicas
                .resize(length.unwrap_or(0), Replica::default()),
            _ => {
                return Err(Error::invalid(
                    Code::TooLarge,
                    "num_layers",
                    load.num_layers(),
                    format!("small enough for {num_slots} slots a layer to fit in memory"),
                    "plan fewer layers at a time",
                ));
            }
        }
        match self.policy {
            Policy::Trivial => {
                for layer in scratch.replicas.chunks_exact_mut(num_slots) {
                    trivial::plan_layer(load.num_experts(), layer);
                }
            }
            Policy::Balanced => {
                let shape = self.fresh_shape(load.num_experts())?;
                let plan =
                    |loads: &[f32], slots: &mut [Replica], scratch: &mut balance::Scratch| {
                        balance::plan_layers(
                            &self.topology,
                            &shape,
                            self.budget,
                            loads,
                            slots,
                            scratch,
                        );
                    };
                let Scratch {
                    replicas, balance, ..
                } = scratch;
                self.share_out(load, replicas, balance, plan);
            }
            Policy::DeepSeek => {
                let shape = self.reference_shape(load.num_experts())?;
                let plan =
                    |loads: &[f32], slots: &mut [Replica], scratch: &mut deepseek::Scratch| {
                        deepseek::plan_layers(&shape, loads, slots, scratch);
                    };
                let Scratch {
                    replicas, deepseek, ..
                } = scratch;
                self.share_out(load, replicas, deepseek, plan);
            }
        }
        Ok(())
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
        match &self.threads {
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

/// A placement in the memory of the planner that computed it, which gets it back on drop.
#[derive(Debug)]
pub struct Draft<'a> {
    planner: &'a Planner,
    num_layers: usize,
    num_experts: usize,
    scratch: Scratch,
}

impl Draft<'_> {
    /// What each slot holds, `[num_layers, num_slots]`.
    #[must_use]
    pub fn replicas(&self) -> &[Replica] {
        &self.scratch.replicas
    }

    /// The placement, in memory of its own.
    ///
    /// # Errors
    /// [`Code::TooLarge`] if it does not fit in memory.
    pub fn to_placement(&self) -> Result<Placement> {
        let topology = self.planner.topology.clone();
        Placement::from_replicas(topology, self.num_experts, self.replicas())
    }

    /// The placement, in memory of the caller's.
    ///
    /// # Errors
    /// [`Code::WrongShape`] or [`Code::TooSmall`] for the buffers, which are then left as they
    /// were.
    pub fn write_into(&self, out: &mut PlacementMut<'_>) -> Result<()> {
        out.write(self.num_layers, self.num_experts, self.replicas())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        let scratch = std::mem::take(&mut self.scratch);
        self.planner.idle_scratch().push(scratch);
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

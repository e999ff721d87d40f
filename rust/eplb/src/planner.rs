//! The planner: a topology, a policy and the scratch they need, for those who replan in a loop.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::deepseek;
use crate::error::{Code, Error, Result, require_groups, require_positive};
use crate::load::Load;
use crate::placement::{Placement, PlacementMut, Replica};
use crate::topology::Topology;
use crate::trivial;

/// The most threads a planner may own.
pub const MAX_THREADS: usize = 256;

/// How a placement is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Policy {
    /// DeepSeek's EPLB, exactly: greedy replication and packing, `f32` sums, stable sorts.
    DeepSeek,
    /// What engines start from: slot `i` holds expert `i mod num_experts`, whatever the load.
    Trivial,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 2] = [Self::DeepSeek, Self::Trivial];

    /// The name it goes by in Python and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
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

/// Plans placements on one topology. May be used from many threads at once; the answer is the
/// same bytes on any number of threads.
#[derive(Debug)]
pub struct Planner {
    topology: Topology,
    num_groups: usize,
    policy: Policy,
    num_threads: usize,
    threads: Option<ThreadPool>,
    /// Scratch of calls that have ended, for those to come.
    idle: Mutex<Vec<Scratch>>,
}

#[derive(Debug, Default)]
struct Scratch {
    replicas: Vec<Replica>,
    deepseek: Vec<deepseek::Scratch>,
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

    /// Whether its plans keep each group on one node. Under [`Policy::DeepSeek`] they do if groups
    /// divide over nodes; otherwise groups and nodes are ignored.
    #[must_use]
    pub fn keeps_groups(&self) -> bool {
        self.policy == Policy::DeepSeek
            && self.topology.num_nodes() > 1
            && deepseek::is_hierarchical(&self.topology, self.num_groups)
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
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = idle.pop().unwrap_or_default();
        drop(idle);
        let mut draft = Draft {
            planner: self,
            num_layers: load.num_layers(),
            num_experts: load.num_experts(),
            scratch,
        };
        self.compute(load, &mut draft.scratch)?;
        Ok(draft)
    }

    fn compute(&self, load: &Load<'_>, scratch: &mut Scratch) -> Result<()> {
        let num_slots = self.topology.num_slots();
        let shape = deepseek::Shape::new(&self.topology, load.num_experts(), self.num_groups)?;
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
            Policy::DeepSeek => {
                let per_thread = load.num_layers().div_ceil(self.num_threads);
                scratch
                    .deepseek
                    .resize_with(self.num_threads, Default::default);
                let loads = load.values();
                match &self.threads {
                    None => deepseek::plan_layers(
                        &shape,
                        loads,
                        &mut scratch.replicas,
                        &mut scratch.deepseek[0],
                    ),
                    Some(threads) => threads.install(|| {
                        loads
                            .par_chunks(per_thread * load.num_experts())
                            .zip(scratch.replicas.par_chunks_mut(per_thread * num_slots))
                            .zip(&mut scratch.deepseek)
                            .for_each(|((loads, replicas), scratch)| {
                                deepseek::plan_layers(&shape, loads, replicas, scratch);
                            });
                    }),
                }
            }
        }
        Ok(())
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
        let idle = self.planner.idle.lock();
        let scratch = std::mem::take(&mut self.scratch);
        idle.unwrap_or_else(PoisonError::into_inner).push(scratch);
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

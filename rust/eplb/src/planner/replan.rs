//! Plans from the placement in force.

use std::time::Instant;

use super::{Planner, Scratch};
use crate::balance::{Budget, Shape};
use crate::error::Result;
use crate::load::Load;
use crate::migrate::{Milestone, Reach};
use crate::placement::{Placement, Replica};
use crate::transfer::TransferLimits;

impl Planner {
    /// Plans the best placement within reach of the one in force. A move is an expert that arrives
    /// on a rank that did not hold it. Experts that stay on their rank keep their slot.
    ///
    /// Where GPUs have died or joined since, some moves cannot be avoided: an expert that lost its
    /// last replica gets one, and a rank that holds nothing gets an expert; if no slot may repeat an
    /// expert, every slot that came free gets one. These are made whatever the limits.
    ///
    /// # Errors
    /// As [`draft`](Self::draft); [`Code::Inconsistent`](crate::Code::Inconsistent) or
    /// [`Code::WrongShape`](crate::Code::WrongShape) for a previous
    /// placement of other machines, layers or experts.
    pub fn plan_from(
        &self,
        load: &Load<'_>,
        previous: &Placement,
        reach: &Reach,
    ) -> Result<Placement> {
        self.plan_from_at(self.budget, load, previous, reach)
    }

    /// The same with another budget.
    pub(crate) fn plan_from_at(
        &self,
        budget: Budget,
        load: &Load<'_>,
        previous: &Placement,
        reach: &Reach,
    ) -> Result<Placement> {
        self.migrate(budget, load, previous, reach, false, |scratch| {
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
    /// As [`plan_from`](Self::plan_from), and [`Code::WrongShape`](crate::Code::WrongShape) for
    /// other layers in the limits.
    pub fn plan_within(
        &self,
        load: &Load<'_>,
        previous: &Placement,
        reach: &Reach,
        limits: &TransferLimits<'_>,
    ) -> Result<Placement> {
        limits.check(load.num_layers())?;
        self.migrate(self.budget, load, previous, reach, true, |scratch| {
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
        self.migrate(self.budget, load, previous, &reach, true, |scratch| {
            Ok(scratch.migrate.frontier())
        })
    }

    /// Explores what moves lead to, and does something with it.
    fn migrate<T>(
        &self,
        budget: Budget,
        load: &Load<'_>,
        previous: &Placement,
        reach: &Reach,
        whole: bool,
        then: impl FnOnce(&mut Scratch) -> Result<T>,
    ) -> Result<T> {
        let mut scratch = self.take_scratch();
        let explored = self.explore(budget, load, previous, reach, whole, &mut scratch);
        let result = explored.and_then(|()| then(&mut scratch));
        self.idle_scratch().push(scratch);
        result
    }

    /// Explores what moves lead to; where that falls short, a plan from scratch is tried.
    fn explore(
        &self,
        all: Budget,
        load: &Load<'_>,
        previous: &Placement,
        reach: &Reach,
        whole: bool,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let fresh = self.fresh_shape(load.num_experts());
        let shape = match &fresh {
            Ok(shape) if shape.price().is_some() => *shape,
            _ => self.balanced_shape(load.num_experts())?,
        };
        let start = Instant::now();
        let budget = all.halved();
        let migrate = &mut scratch.migrate;
        migrate.start(&self.topology, &shape, load, previous, reach.repeats)?;
        if !migrate.list_unsettled().is_empty() {
            match &fresh {
                Ok(shape) => {
                    self.plan_listed(shape, budget, load, scratch)?;
                    let migrate = &mut scratch.migrate;
                    migrate.start_from_plans(&self.topology, &scratch.replicas);
                }
                // Empty slots harm nobody.
                Err(error) if migrate.lacks_experts() => return Err(error.clone()),
                Err(_) => {}
            }
        }
        scratch.migrate.walk(reach, whole, budget);
        let falls_short = !scratch.migrate.list_short(reach).is_empty();
        // Where a node has no group left, moves may lead on, but a plan from scratch is refused.
        if let (true, Ok(shape)) = (falls_short, fresh) {
            self.plan_listed(&shape, all.since(start), load, scratch)?;
            scratch
                .migrate
                .add_plans(reach, &self.topology, &scratch.replicas);
        }
        Ok(())
    }

    /// Plans the layers that were listed last from scratch, into the replicas of the scratch.
    fn plan_listed(
        &self,
        shape: &Shape,
        budget: Budget,
        load: &Load<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let mut loads = std::mem::take(&mut scratch.loads);
        loads.clear();
        let listed = scratch.migrate.listed();
        for &layer in listed {
            loads.extend_from_slice(load.layer(layer));
        }
        let listed = Load::new(&loads, listed.len(), load.num_experts())?;
        let planned = self.compute_balanced(shape, budget, &listed, scratch);
        scratch.loads = loads;
        planned
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
}

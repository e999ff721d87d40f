//! The native module `eplb_rs._core`: converts, validates, lets go of the interpreter; decides
//! nothing.
//!
//! Arrays come in borrowed and go out moved. Everything that Python hands over is checked here
//! or in the planner crates, and refused with the exceptions of `eplb_rs.errors`.

mod arguments;
mod buffers;
mod errors;
mod forecast;
mod placement;
mod planner;
mod realtime;
mod scenario;
mod schedule;
mod schedule_choice;
mod schedule_errors;
mod split;
mod topology;
mod transfers;

/// Planning core of `eplb_rs` and `dualpipe`. Use the packages; this module is theirs.
#[pyo3::pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::forecast::{Forecaster, total_variation};
    #[pymodule_export]
    use crate::placement::{Placement, bounds, tight_lower_bound};
    #[pymodule_export]
    use crate::planner::{Planner, check_groups};
    #[pymodule_export]
    use crate::realtime::StepPlanner;
    #[pymodule_export]
    use crate::scenario::{outlook_scenarios, plan_linked, plan_scenarios, windows_since_shift};
    #[pymodule_export]
    use crate::schedule::{Schedule, schedule_methods};
    #[pymodule_export]
    use crate::schedule_choice::{partition_layers, search_schedules};
    #[pymodule_export]
    use crate::split::Splitter;
    #[pymodule_export]
    use crate::topology::Topology;
    #[pymodule_export]
    use crate::transfers::{predicted_s, transfers};

    /// The version of the distribution.
    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name Python expects")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}

//! Who computes what when: pipeline-parallel schedules as data.
//!
//! This crate is to generate, prove and simulate the instruction stream of every rank.
//! It is empty so far: the planner crate `eplb` comes first.
#![forbid(unsafe_code)]

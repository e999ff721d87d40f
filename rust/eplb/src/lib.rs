//! Where experts live.
#![forbid(unsafe_code)]

//! Eight problems side by side, one in each lane of a vector.
//!
//! The greedy algorithms are chains of comparisons, each of which waits for the one before; a
//! vector register would stand idle on one problem. But layers are independent and alike, so
//! eight of them run in step, and every comparison is one minimum or maximum of whole rows.
//!
//! What is compared is a [`key`]: an `f32` as an `f64`, with a tag in the low 29 bits that the
//! conversion leaves free. One floating-point comparison then orders by value and, among equals,
//! by tag; and the tag travels with the value.

/// How many problems run side by side.
pub(crate) const LANES: usize = 8;

/// One value of each problem.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(align(64))]
pub(crate) struct Row(pub(crate) [f64; LANES]);

impl Default for Row {
    fn default() -> Self {
        Self([NOTHING; LANES])
    }
}

/// The low bits of an `f64` that are zero if it was an `f32`.
pub(crate) const TAG: u64 = (1 << 29) - 1;

/// Stands for zero. It vanishes in any sum of `f32`, and keeps a tagged zero a normal number, so
/// that comparisons see the tag even on a thread that flushes denormals.
pub(crate) const NOTHING: f64 = f64::MIN_POSITIVE;

/// A value that is not negative, with a tag of at most 29 bits.
#[inline(always)]
pub(crate) fn key(value: f64, tag: u64) -> f64 {
    f64::from_bits(larger(value, NOTHING).to_bits() | tag)
}

/// The value in a key.
#[inline(always)]
pub(crate) fn value(key: f64) -> f64 {
    f64::from_bits(key.to_bits() & !TAG)
}

/// The tag in a key.
#[inline(always)]
pub(crate) fn tag(key: f64) -> u64 {
    key.to_bits() & TAG
}

/// One instruction, where `f64::max` would be three for the sake of NaN.
#[inline(always)]
pub(crate) fn larger(a: f64, b: f64) -> f64 {
    if a > b { a } else { b }
}

/// One instruction, where `f64::min` would be three for the sake of NaN.
#[inline(always)]
pub(crate) fn smaller(a: f64, b: f64) -> f64 {
    if a < b { a } else { b }
}

impl Row {
    /// The larger of each lane.
    #[inline(always)]
    pub(crate) fn larger(&self, other: &Self) -> Self {
        let mut out = *self;
        for lane in 0..LANES {
            out.0[lane] = larger(self.0[lane], other.0[lane]);
        }
        out
    }

    /// The smaller of each lane.
    #[inline(always)]
    pub(crate) fn smaller(&self, other: &Self) -> Self {
        let mut out = *self;
        for lane in 0..LANES {
            out.0[lane] = smaller(self.0[lane], other.0[lane]);
        }
        out
    }
}

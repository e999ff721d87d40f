//! Numbers that look drawn: the same ones on every machine, in every run.

/// A xorshift generator.
///
/// Source: G. Marsaglia, "Xorshift RNGs", Journal of Statistical Software 8(14), 2003.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// The generator that every layer starts with, so that a layer's plan does not depend on
    /// those before it.
    pub(crate) const fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// A number below `limit`, which is at most 2^32; 0 if that is 0.
    #[inline(always)]
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (((self.0 >> 32) * limit as u64) >> 32) as usize
    }
}

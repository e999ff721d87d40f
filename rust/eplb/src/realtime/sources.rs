//! Loads by source rank: adding them up, and splitting copies' tokens by where they come from.

use multiversion::multiversion;

use crate::error::{Code, Error, Result};

use super::MAX_STEP_TOKENS;
use super::relieve::Copy;

/// A type that counts tokens: what engines have in memory.
pub trait Count: std::marker::Copy + Into<i64> + TryFrom<i64> + Default {}

impl Count for i32 {}
impl Count for i64 {}

/// Adds a load up by expert, and returns the sum of all. The load has one row of experts, or more.
/// Nothing is written that counts if it is refused.
pub(super) fn add_up<T: Count>(load: &[T], totals: &mut [i64]) -> Result<i64> {
    let bits = add_rows(load, totals);
    // Below 2^31 each, no sum overflows.
    if (0..1 << 31).contains(&bits) {
        let total = totals.iter().sum();
        if total <= MAX_STEP_TOKENS {
            return Ok(total);
        }
    }
    let mut total = 0i64;
    for (index, &tokens) in load.iter().enumerate() {
        let tokens: i64 = tokens.into();
        if tokens < 0 {
            return Err(Error::invalid(
                Code::Negative,
                "load",
                format!(
                    "{tokens} at source rank {}, expert {}",
                    index / totals.len(),
                    index % totals.len()
                ),
                "0 or more",
                "",
            ));
        }
        total = total.saturating_add(tokens);
    }
    if total <= MAX_STEP_TOKENS {
        return Ok(total);
    }
    Err(Error::invalid(
        Code::TooLarge,
        "load",
        format!("{total} or more tokens in all"),
        format!("at most {MAX_STEP_TOKENS} in all"),
        "",
    ))
}

/// Adds rows up, and returns the bits that any of their values has.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt"
))]
fn add_rows<T: Count>(load: &[T], totals: &mut [i64]) -> i64 {
    let mut bits = 0;
    totals.fill(0);
    for row in load.chunks_exact(totals.len()) {
        for (total, &tokens) in totals.iter_mut().zip(row) {
            let tokens: i64 = tokens.into();
            bits |= tokens;
            *total = total.wrapping_add(tokens);
        }
    }
    bits
}

/// What [`split`](Self::split) needs, kept between calls.
#[derive(Debug, Clone)]
pub(super) struct Scratch {
    num_ranks: usize,
    /// The place of each expert among those with copies, or `NONE`.
    place_of: Vec<u32>,
    /// Those experts.
    experts: Vec<u32>,
    /// Their tokens that are still free, `[place, source rank]`.
    free: Vec<i64>,
    /// The first copy of each, and the next copy of the same expert, or `NONE`.
    first: Vec<u32>,
    next: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl Scratch {
    pub(super) fn with_capacity(num_ranks: usize, num_experts: usize, num_spare: usize) -> Self {
        let most = num_spare.min(num_experts);
        Self {
            num_ranks,
            place_of: vec![NONE; num_experts],
            experts: Vec::with_capacity(most),
            free: Vec::with_capacity(most * num_ranks),
            first: Vec::with_capacity(most),
            next: Vec::with_capacity(num_spare),
        }
    }

    /// Splits the tokens of each copy by source rank: `out` `[D, S, D]`.
    ///
    /// A rank's own tokens go to its own copy, or stay at home, as far as these take them. What a
    /// copy takes beyond that comes from the ranks after its expert's last copy, in turn.
    pub(super) fn split<T: Count>(&mut self, load: &[T], copies: &[Copy], out: &mut [T]) {
        let num_ranks = self.num_ranks;
        let num_experts = self.place_of.len();
        out.fill(T::default());
        self.chain(copies);
        // Row by row of the load: its columns lie far apart.
        self.free.clear();
        self.free.resize(self.experts.len() * num_ranks, 0);
        for (source, row) in load.chunks_exact(num_experts).enumerate() {
            for (place, &expert) in self.experts.iter().enumerate() {
                self.free[place * num_ranks + source] = row[expert as usize].into();
            }
        }
        let home_slots = num_experts / num_ranks;
        let free = self.free.chunks_exact_mut(num_ranks);
        for ((&expert, &first), free) in self.experts.iter().zip(&self.first).zip(free) {
            // What is at home on its own rank stays there.
            let home = expert as usize / home_slots;
            let mut kept = free.iter().sum::<i64>();
            let mut index = first;
            while let Some(copy) = copies.get(index as usize) {
                kept -= copy.tokens;
                index = self.next[index as usize];
            }
            free[home] -= kept.min(free[home]);
            index = first;
            while let Some(copy) = copies.get(index as usize) {
                let rank = copy.rank as usize;
                let own = copy.tokens.min(free[rank]);
                free[rank] -= own;
                out[copy.slot as usize * num_ranks + rank] = count(own);
                index = self.next[index as usize];
            }
            index = first;
            let mut source = copies[first as usize].rank as usize;
            while let Some(copy) = copies.get(index as usize) {
                let row = &mut out[copy.slot as usize * num_ranks..][..num_ranks];
                let own: i64 = row[copy.rank as usize].into();
                take(free, &mut source, copy.tokens - own, row);
                index = self.next[index as usize];
            }
        }
    }

    /// Lists the experts with copies, and chains the copies of each.
    fn chain(&mut self, copies: &[Copy]) {
        for &expert in &self.experts {
            self.place_of[expert as usize] = NONE;
        }
        self.experts.clear();
        self.first.clear();
        self.next.clear();
        for (index, copy) in (0..).zip(copies) {
            let place = &mut self.place_of[copy.expert as usize];
            if *place == NONE {
                *place = self.experts.len() as u32;
                self.experts.push(copy.expert);
                self.first.push(NONE);
            }
            let first = &mut self.first[*place as usize];
            self.next.push(std::mem::replace(first, index));
        }
    }
}

/// Moves tokens from where they are free to a row, from a source onwards, in turn.
#[inline(always)]
fn take<T: Count>(free: &mut [i64], source: &mut usize, mut wanted: i64, row: &mut [T]) {
    // Once around and back to where it began: all that is free.
    for _ in 0..=free.len() {
        let taken = wanted.min(free[*source]);
        if taken > 0 {
            free[*source] -= taken;
            wanted -= taken;
            let before: i64 = row[*source].into();
            row[*source] = count(before + taken);
        }
        if wanted == 0 {
            return;
        }
        *source += 1;
        if *source == free.len() {
            *source = 0;
        }
    }
}

/// A part of a count, which fits as the whole did.
fn count<T: Count>(tokens: i64) -> T {
    T::try_from(tokens).unwrap_or_default()
}

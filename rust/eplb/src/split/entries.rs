//! Shares as engines take them: repeated entries of `log2phy`, or whole tokens.

use crate::error::{Code, Error, Result, require_length, require_positive};
use crate::placement::Placement;

use super::{MAX_TOKENS, check_tokens};

/// The widest table of entries: more would tell shares apart that no engine can.
pub const MAX_WIDTH: usize = 1024;

/// Shares as repeated entries, in memory of their own: see [`entries_into`].
///
/// # Errors
/// As [`entries_into`], and [`Code::TooLarge`] for a table that does not fit in memory.
pub fn entries(placement: &Placement, shares: &[f64], width: usize) -> Result<Vec<i64>> {
    check_width(width)?;
    let length = placement.logcnt().len() * width;
    let mut table = Vec::new();
    if table.try_reserve_exact(length).is_err() {
        return Err(too_wide(width));
    }
    table.resize(length, -1);
    entries_into(placement, shares, width, &mut table)?;
    Ok(table)
}

/// Writes shares as repeated entries: `table` `[L, E, width]` lists each expert's slots, a slot as
/// often as its share of the entries comes nearest, -1 pads. An engine that picks one of an
/// expert's entries at random then splits by these shares.
///
/// Each expert has as many entries, `width` at most, as bring its shares nearest (the largest
/// error of a slot's share counts; ties to fewer entries). For a number of entries each slot has
/// the whole part of its share, and those with the largest remainders one more (ties to the lowest
/// replica). Slots are listed in turn, by replica number: first each that has any, then each that
/// has a second.
///
/// O(L E width X) for experts with several replicas.
///
/// # Errors
/// [`Code::NotPositive`] or [`Code::TooLarge`] for the width, [`Code::WrongShape`] for a buffer, [`Code::OutOfRange`]
/// for a share that is no number from 0 to 1; the table is then as it was.
pub fn entries_into(
    placement: &Placement,
    shares: &[f64],
    width: usize,
    table: &mut [i64],
) -> Result<()> {
    check_width(width)?;
    let num_slots = placement.topology().num_slots();
    check_shares(placement, shares)?;
    let counts = placement.num_layers() * placement.num_experts();
    require_length("table", table.len(), counts.saturating_mul(width))?;
    let widest = placement.max_replicas();
    let mut tried = vec![0usize; widest];
    let mut best = vec![0usize; widest];
    let mut remainders = Vec::with_capacity(widest);
    let slots = placement.log2phy().chunks_exact(widest);
    let rows = slots
        .zip(placement.logcnt())
        .zip(table.chunks_exact_mut(width));
    for (index, ((slots, &count), row)) in rows.enumerate() {
        let layer = index / placement.num_experts();
        let shares = &shares[layer * num_slots..(layer + 1) * num_slots];
        let slots = &slots[..count as usize];
        row.fill(-1);
        if let &[slot] = slots {
            row[0] = slot;
            continue;
        }
        let share = |number: usize| shares[slots[number] as usize];
        let mut least = f64::INFINITY;
        for entries in 1..=width {
            remainders.clear();
            let mut given = 0;
            for number in 0..slots.len() {
                let exact = share(number) * entries as f64;
                tried[number] = exact as usize;
                given += tried[number];
                remainders.push((exact - exact.floor(), number));
            }
            remainders.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for &(_, number) in remainders.iter().take(entries.saturating_sub(given)) {
                tried[number] += 1;
            }
            let error = (0..slots.len())
                .map(|number| (tried[number] as f64 / entries as f64 - share(number)).abs())
                .fold(0.0, f64::max);
            if error < least {
                least = error;
                best.copy_from_slice(&tried);
            }
        }
        let mut places = row.iter_mut();
        for turn in 0..width {
            for (&slot, &times) in slots.iter().zip(&best) {
                if turn < times
                    && let Some(place) = places.next()
                {
                    *place = slot;
                }
            }
        }
    }
    Ok(())
}

/// Splits tokens `[L, E]` by shares `[L, R]` into whole numbers by slot, `quotas` `[L, R]`. Each
/// expert's add up to exactly its tokens: each slot has the whole part, and those with the largest
/// remainders one more (ties to the lowest replica). O(L R log X).
///
/// # Errors
/// [`Code::WrongShape`] for a buffer, [`Code::OutOfRange`] for a share that is no number from 0 to
/// 1, [`Code::Negative`] or [`Code::TooLarge`] for tokens; the quotas are then as they were.
pub fn quotas_into(
    placement: &Placement,
    shares: &[f64],
    tokens: &[i64],
    quotas: &mut [i64],
) -> Result<()> {
    let num_slots = placement.topology().num_slots();
    check_shares(placement, shares)?;
    let counts = placement.num_layers() * placement.num_experts();
    require_length("tokens", tokens.len(), counts)?;
    require_length("quotas", quotas.len(), shares.len())?;
    for row in tokens.chunks_exact(placement.num_experts()) {
        check_tokens(row, MAX_TOKENS)?;
    }
    let widest = placement.max_replicas();
    let mut remainders = Vec::with_capacity(widest);
    let slots = placement.log2phy().chunks_exact(widest);
    let experts = slots.zip(placement.logcnt()).zip(tokens);
    for (index, ((slots, &count), &tokens)) in experts.enumerate() {
        let layer = index / placement.num_experts();
        let of_layer = layer * num_slots..(layer + 1) * num_slots;
        let (shares, quotas) = (&shares[of_layer.clone()], &mut quotas[of_layer]);
        let mut left = tokens;
        remainders.clear();
        for &slot in &slots[..count as usize] {
            let exact = shares[slot as usize] * tokens as f64;
            let whole = (exact as i64).min(left);
            quotas[slot as usize] = whole;
            left -= whole;
            remainders.push((exact - whole as f64, slot as usize));
        }
        remainders.sort_by(|a, b| b.0.total_cmp(&a.0));
        // Shares that add up to 1 leave less than a token a slot; any others are made to fit.
        let count = remainders.len() as i64;
        for (number, &(_, slot)) in (0..).zip(&remainders) {
            quotas[slot] += left / count + i64::from(number < left % count);
        }
    }
    Ok(())
}

fn check_width(width: usize) -> Result<()> {
    require_positive("width", width)?;
    if width > MAX_WIDTH {
        return Err(too_wide(width));
    }
    Ok(())
}

fn too_wide(width: usize) -> Error {
    Error::invalid(
        Code::TooLarge,
        "width",
        width,
        format!("at most {MAX_WIDTH}, and small enough to fit in memory"),
        "",
    )
}

/// Refuses what are no shares of a placement.
fn check_shares(placement: &Placement, shares: &[f64]) -> Result<()> {
    let num_slots = placement.topology().num_slots();
    require_length("shares", shares.len(), placement.num_layers() * num_slots)?;
    // Room for the rounding of sums.
    match shares
        .iter()
        .position(|share| !(0.0..=1.0 + 1e-9).contains(share))
    {
        None => Ok(()),
        Some(index) => Err(Error::invalid(
            Code::OutOfRange,
            "shares",
            format!(
                "{} at layer {}, slot {}",
                shares[index],
                index / num_slots,
                index % num_slots
            ),
            "a number from 0 to 1",
            "",
        )),
    }
}

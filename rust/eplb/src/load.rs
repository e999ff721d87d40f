//! How many tokens each expert got.

use crate::error::{Code, Error, Result, require_positive};

/// The most experts a layer may have.
pub const MAX_EXPERTS: usize = crate::topology::MAX_SLOTS;

/// The load of every expert in every layer, checked: finite, not negative, and small enough
/// that no sum of a layer overflows `f32`.
///
/// A view, row-major `[num_layers, num_experts]`; the unit is the caller's (tokens, as a rule).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load<'a> {
    values: &'a [f32],
    num_layers: usize,
    num_experts: usize,
}

impl<'a> Load<'a> {
    /// Checks a row-major `[num_layers, num_experts]` buffer. O(layers x experts): 2 us for
    /// 58 x 256.
    ///
    /// # Errors
    /// [`Code::NotPositive`] or [`Code::TooLarge`] for the sizes, [`Code::WrongShape`] if they do
    /// not fit the buffer, [`Code::NotFinite`], [`Code::Negative`] or [`Code::TooLarge`] for its
    /// content.
    pub fn new(values: &'a [f32], num_layers: usize, num_experts: usize) -> Result<Self> {
        require_positive("num_layers", num_layers)?;
        require_positive("num_experts", num_experts)?;
        if num_experts > MAX_EXPERTS {
            return Err(Error::invalid(
                Code::TooLarge,
                "num_experts",
                num_experts,
                format!("at most {MAX_EXPERTS}"),
                "",
            ));
        }
        if num_layers.checked_mul(num_experts) != Some(values.len()) {
            return Err(Error::invalid(
                Code::WrongShape,
                "load",
                format!("{} values", values.len()),
                format!("{num_layers} x {num_experts} values"),
                "",
            ));
        }
        for (layer, row) in values.chunks_exact(num_experts).enumerate() {
            check_layer(layer, row)?;
        }
        Ok(Self {
            values,
            num_layers,
            num_experts,
        })
    }

    /// How many layers there are.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// How many experts each layer has.
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// All values, row-major `[num_layers, num_experts]`.
    #[must_use]
    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    /// One layer: `num_experts` loads.
    pub(crate) fn layer(&self, layer: usize) -> &'a [f32] {
        &self.values[layer * self.num_experts..][..self.num_experts]
    }

    /// The layers in order, each a slice of `num_experts` loads.
    pub fn layers(&self) -> std::slice::ChunksExact<'a, f32> {
        self.values.chunks_exact(self.num_experts)
    }
}

/// Refuses what is not a load. The common case is one vector pass without a branch per value.
fn check_layer(layer: usize, row: &[f32]) -> Result<()> {
    let mut sound = true;
    let mut largest = 0.0f32;
    for &value in row {
        sound &= (0.0..=f32::MAX).contains(&value);
        largest = if value > largest { value } else { largest };
    }
    // Half the range leaves room for the rounding of the sums.
    let limit = f64::from(f32::MAX) / 2.0;
    if sound && f64::from(largest) * row.len() as f64 <= limit {
        return Ok(());
    }
    for (expert, &value) in row.iter().enumerate() {
        let (code, expected) = if !value.is_finite() {
            (Code::NotFinite, "finite")
        } else if value < 0.0 {
            (Code::Negative, "0 or more")
        } else {
            continue;
        };
        return Err(Error::invalid(
            code,
            "load",
            format!("{value} at layer {layer}, expert {expert}"),
            expected,
            "loads are float32 counts of tokens",
        ));
    }
    let total: f64 = row.iter().map(|&value| f64::from(value)).sum();
    if total <= limit {
        return Ok(());
    }
    Err(Error::invalid(
        Code::TooLarge,
        "load",
        format!("{total:e} in all at layer {layer}"),
        format!("at most {limit:e} a layer"),
        "float32 sums would overflow; scale the loads down",
    ))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may fail")]
    use super::*;

    fn code(values: &[f32], layers: usize, experts: usize) -> Code {
        Load::new(values, layers, experts)
            .unwrap_err()
            .refusal()
            .code
    }

    #[test]
    fn what_is_no_load_is_refused() {
        assert_eq!(code(&[], 0, 4), Code::NotPositive);
        assert_eq!(code(&[], 4, 0), Code::NotPositive);
        assert_eq!(code(&[1.0; 3], 2, 2), Code::WrongShape);
        assert_eq!(code(&[1.0; 3], usize::MAX, 2), Code::WrongShape);
        assert_eq!(code(&[1.0, f32::NAN], 1, 2), Code::NotFinite);
        assert_eq!(code(&[1.0, f32::INFINITY], 1, 2), Code::NotFinite);
        assert_eq!(code(&[1.0, -1.0], 1, 2), Code::Negative);
        assert_eq!(code(&[f32::MAX, f32::MAX], 1, 2), Code::TooLarge);
    }

    #[test]
    fn the_edges_of_the_range_are_taken() {
        assert!(Load::new(&[0.0, -0.0, f32::MIN_POSITIVE, 1e-45], 1, 4).is_ok());
        assert!(Load::new(&[f32::MAX / 2.0, 0.0, 0.0], 1, 3).is_ok());
    }

    #[test]
    fn the_message_points_at_the_value() {
        let error = Load::new(&[1.0, 2.0, 3.0, -4.0], 2, 2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`load` (-4 at layer 1, expert 1) must be 0 or more; loads are float32 counts of tokens"
        );
    }
}

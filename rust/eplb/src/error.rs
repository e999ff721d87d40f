//! What is said when a request cannot be met.
//!
//! Every refusal names the argument, shows what it got, says what it wanted and how to mend it.
//! The parts are kept apart, so that a front end can hand them on one by one.

use std::fmt;

/// The result of everything in this crate that can be refused.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a request was refused. Nothing was changed by it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is wrong in itself, or does not fit another one.
    #[error("{0}")]
    InvalidInput(Box<Refusal>),
    /// Each argument is fine, but no placement can satisfy them together.
    #[error("{0}")]
    Infeasible(Box<Refusal>),
}

const _: () = assert!(
    size_of::<Error>() <= 16,
    "an error must stay cheap to return"
);

/// The parts of a refusal.
///
/// Printed as "`argument` (got) must be expected; hint", for example
/// "`num_replicas` (290) must be a multiple of `num_gpus` (32); nearest: 288, 320".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What kind of fault it is.
    pub code: Code,
    /// The name of the argument at fault.
    pub argument: &'static str,
    /// What was given.
    pub got: String,
    /// What would have been taken.
    pub expected: String,
    /// How to mend it; may be empty.
    pub hint: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            argument,
            got,
            expected,
            hint,
            ..
        } = self;
        write!(f, "`{argument}` ({got}) must be {expected}")?;
        if !hint.is_empty() {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

/// The kinds of fault. Their names, in snake case, are the `code` of the Python exceptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// A count that is zero.
    NotPositive,
    /// A count that is no multiple of another.
    NotMultiple,
    /// A count that does not divide another.
    NotDivisor,
    /// A count below its least value.
    TooSmall,
    /// A size beyond what can be held or indexed.
    TooLarge,
    /// An array whose size contradicts another argument.
    WrongShape,
    /// A load that is infinite or not a number.
    NotFinite,
    /// A load below zero.
    Negative,
    /// An index beyond its range.
    OutOfRange,
    /// Two arguments, or two parts of one, that contradict each other.
    Inconsistent,
}

impl Code {
    /// The code in snake case.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotPositive => "not_positive",
            Self::NotMultiple => "not_multiple",
            Self::NotDivisor => "not_divisor",
            Self::TooSmall => "too_small",
            Self::TooLarge => "too_large",
            Self::WrongShape => "wrong_shape",
            Self::NotFinite => "not_finite",
            Self::Negative => "negative",
            Self::OutOfRange => "out_of_range",
            Self::Inconsistent => "inconsistent",
        }
    }
}

impl Error {
    /// A fault of one argument.
    pub fn invalid(
        code: Code,
        argument: &'static str,
        got: impl fmt::Display,
        expected: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self::InvalidInput(Box::new(Refusal {
            code,
            argument,
            got: got.to_string(),
            expected: expected.into(),
            hint: hint.into(),
        }))
    }

    /// The same refusal where each argument is fine by itself, but no placement satisfies all.
    #[must_use]
    pub fn infeasible(self) -> Self {
        match self {
            Self::InvalidInput(refusal) | Self::Infeasible(refusal) => Self::Infeasible(refusal),
        }
    }

    /// The parts of this refusal.
    #[must_use]
    pub fn refusal(&self) -> &Refusal {
        match self {
            Self::InvalidInput(refusal) | Self::Infeasible(refusal) => refusal,
        }
    }
}

/// Refuses zero.
pub(crate) fn require_positive(argument: &'static str, value: usize) -> Result<()> {
    if value == 0 {
        return Err(Error::invalid(
            Code::NotPositive,
            argument,
            value,
            "at least 1",
            "",
        ));
    }
    Ok(())
}

/// Refuses a buffer of another length.
pub(crate) fn require_length(argument: &'static str, length: usize, wanted: usize) -> Result<()> {
    if length == wanted {
        return Ok(());
    }
    Err(Error::invalid(
        Code::WrongShape,
        argument,
        format!("{length} values"),
        format!("{wanted} values"),
        "",
    ))
}

/// Refuses a `value` that is no multiple of `divisor`, and names the nearest that are.
///
/// `divisor` is not zero: callers check it first.
pub(crate) fn require_multiple(
    argument: &'static str,
    value: usize,
    divisor_name: &'static str,
    divisor: usize,
) -> Result<()> {
    if value.is_multiple_of(divisor) {
        return Ok(());
    }
    let below = value - value % divisor;
    let nearest = match (below, below.checked_add(divisor)) {
        (0, Some(above)) => above.to_string(),
        (below, Some(above)) => format!("{below}, {above}"),
        (below, None) => below.to_string(),
    };
    Err(Error::invalid(
        Code::NotMultiple,
        argument,
        value,
        format!("a multiple of `{divisor_name}` ({divisor})"),
        format!("nearest: {nearest}"),
    ))
}

/// Refuses a `num_groups` that experts do not divide into, and names the nearest that would do.
///
/// Neither is zero: callers check it first.
pub(crate) fn require_groups(num_groups: usize, num_experts: usize) -> Result<()> {
    if num_experts.is_multiple_of(num_groups) {
        return Ok(());
    }
    let divides = |groups: &usize| num_experts.is_multiple_of(*groups);
    let below = (1..num_groups.min(num_experts + 1)).rev().find(divides);
    let above = (num_groups..=num_experts).find(divides);
    let nearest: Vec<_> = below
        .into_iter()
        .chain(above)
        .map(|n| n.to_string())
        .collect();
    Err(Error::invalid(
        Code::NotDivisor,
        "num_groups",
        num_groups,
        format!("a divisor of the number of experts ({num_experts})"),
        format!("nearest: {}", nearest.join(", ")),
    ))
}

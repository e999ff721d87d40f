//! What can go wrong, with the values in it.

use crate::verify::Violation;

/// The result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that this crate refuses.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is outside of what the function can do.
    #[error("`{argument}` ({got}) must be {expected}; {hint}")]
    Input {
        /// A stable short name for the case.
        code: &'static str,
        /// The argument.
        argument: &'static str,
        /// What was given.
        got: String,
        /// What would be right.
        expected: String,
        /// How to mend it.
        hint: String,
    },
    /// A file or a text is not what it should be.
    #[error("line {line}, word {word}: {got:?} is not {expected}; {hint}")]
    Text {
        /// A stable short name for the case.
        code: &'static str,
        /// The line, counted from 1.
        line: usize,
        /// The word or cell in the line, counted from 1.
        word: usize,
        /// What stands there.
        got: String,
        /// What may stand there.
        expected: String,
        /// How to mend it.
        hint: String,
    },
    /// A schedule breaks a rule.
    #[error("{0}")]
    Rule(Box<Violation>),
}

// An error is rare and travels by value through every return: keep it small.
const _: () = assert!(size_of::<Error>() <= 128);

impl Error {
    pub(crate) fn input(
        code: &'static str,
        argument: &'static str,
        got: impl ToString,
        expected: impl ToString,
        hint: impl ToString,
    ) -> Self {
        Self::Input {
            code,
            argument,
            got: got.to_string(),
            expected: expected.to_string(),
            hint: hint.to_string(),
        }
    }

    pub(crate) fn text(
        code: &'static str,
        (line, word): (usize, usize),
        got: impl ToString,
        expected: impl ToString,
        hint: impl ToString,
    ) -> Self {
        Self::Text {
            code,
            line,
            word,
            got: got.to_string(),
            expected: expected.to_string(),
            hint: hint.to_string(),
        }
    }

    /// A stable short name for the case.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Input { code, .. } | Self::Text { code, .. } => code,
            Self::Rule(violation) => violation.rule.code(),
        }
    }
}

impl From<Violation> for Error {
    fn from(violation: Violation) -> Self {
        Self::Rule(Box::new(violation))
    }
}

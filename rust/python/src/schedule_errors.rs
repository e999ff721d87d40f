//! Refusals of the schedule crate as the exceptions of `dualpipe.errors`.

use pipeline::Error;
use pipeline::verify::{Rule, Violation};
use pyo3::PyErr;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};

static SCHEDULE_ERROR: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static DEADLOCK_ERROR: PyOnceLock<Py<PyType>> = PyOnceLock::new();

/// The exception for a refusal of the schedule crate.
pub(crate) fn schedule_error(py: Python<'_>, error: &Error) -> PyErr {
    raise(py, error).unwrap_or_else(|failure| failure)
}

fn raise(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let kwargs = PyDict::new(py);
    kwargs.set_item("code", error.code())?;
    let mut deadlock = false;
    match error {
        Error::Input {
            argument,
            got,
            expected,
            hint,
            ..
        } => {
            kwargs.set_item("argument", argument)?;
            kwargs.set_item("got", got)?;
            kwargs.set_item("expected", expected)?;
            kwargs.set_item("hint", hint)?;
        }
        Error::Text {
            line,
            word,
            got,
            expected,
            hint,
            ..
        } => {
            kwargs.set_item("argument", "text")?;
            kwargs.set_item("got", format!("line {line}, word {word}: {got:?}"))?;
            kwargs.set_item("expected", expected)?;
            kwargs.set_item("hint", hint)?;
        }
        Error::Rule(violation) => {
            deadlock = violation.rule == Rule::Deadlock;
            describe(&kwargs, violation)?;
        }
        // The enum may grow; its message always says what there is to say.
        other => {
            kwargs.set_item("argument", "schedule")?;
            kwargs.set_item("got", other.to_string())?;
            kwargs.set_item("expected", "something else")?;
        }
    }
    let class = if deadlock {
        DEADLOCK_ERROR.import(py, "dualpipe.errors", "DeadlockError")
    } else {
        SCHEDULE_ERROR.import(py, "dualpipe.errors", "ScheduleError")
    }?;
    Ok(PyErr::from_value(class.call((), Some(&kwargs))?))
}

fn describe(kwargs: &Bound<'_, PyDict>, violation: &Violation) -> PyResult<()> {
    let instruction = violation
        .op
        .map_or_else(|| "the end".to_owned(), |op| op.to_string());
    let got = format!(
        "rank {}, instruction {}: {instruction}",
        violation.rank, violation.index
    );
    let waits: Vec<_> = violation
        .waits
        .iter()
        .map(|wait| (wait.rank, wait.index, wait.op.to_string(), wait.waits_for))
        .collect();
    kwargs.set_item("argument", "schedule")?;
    kwargs.set_item("got", got)?;
    kwargs.set_item(
        "expected",
        format!("a schedule that keeps the rule {:?}", violation.rule.code()),
    )?;
    kwargs.set_item("hint", &violation.message)?;
    kwargs.set_item("rank", violation.rank)?;
    kwargs.set_item("index", violation.index)?;
    kwargs.set_item("instruction", instruction)?;
    kwargs.set_item(
        "transport",
        violation.transport.map(|transport| transport.name()),
    )?;
    kwargs.set_item("waits", waits)?;
    kwargs.set_item("report", violation.to_string())
}

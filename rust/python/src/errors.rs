//! Refusals of the planner crates as the exceptions of `eplb_rs.errors`.

use eplb::{Error, Refusal};
use pyo3::PyErr;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};

static INVALID_INPUT: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static INFEASIBLE: PyOnceLock<Py<PyType>> = PyOnceLock::new();

/// The exception for a refusal of the planner crate.
pub(crate) fn plan_error(py: Python<'_>, error: &Error) -> PyErr {
    let refusal = error.refusal();
    let class = match error {
        Error::InvalidInput(_) => INVALID_INPUT.import(py, "eplb_rs.errors", "InvalidInputError"),
        Error::Infeasible(_) => INFEASIBLE.import(py, "eplb_rs.errors", "InfeasibleError"),
        _ => return PyRuntimeError::new_err(error.to_string()),
    };
    class
        .and_then(|class| raise(class, refusal.code.as_str(), refusal))
        .unwrap_or_else(|failure| failure)
}

/// An `InvalidInputError` for what is wrong before the planner crate sees it.
pub(crate) fn invalid_input(
    py: Python<'_>,
    code: &str,
    argument: &str,
    got: &str,
    expected: &str,
    hint: &str,
) -> PyErr {
    INVALID_INPUT
        .import(py, "eplb_rs.errors", "InvalidInputError")
        .and_then(|class| build(class, code, argument, got, expected, hint))
        .unwrap_or_else(|failure| failure)
}

fn raise(class: &Bound<'_, PyType>, code: &str, refusal: &Refusal) -> PyResult<PyErr> {
    let Refusal {
        argument,
        got,
        expected,
        hint,
        ..
    } = refusal;
    build(class, code, argument, got, expected, hint)
}

fn build(
    class: &Bound<'_, PyType>,
    code: &str,
    argument: &str,
    got: &str,
    expected: &str,
    hint: &str,
) -> PyResult<PyErr> {
    let kwargs = PyDict::new(class.py());
    kwargs.set_item("code", code)?;
    kwargs.set_item("argument", argument)?;
    kwargs.set_item("got", got)?;
    kwargs.set_item("expected", expected)?;
    kwargs.set_item("hint", hint)?;
    Ok(PyErr::from_value(class.call((), Some(&kwargs))?))
}

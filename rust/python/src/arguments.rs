//! Python's numbers and arrays as the planner crates take them.

use eplb::Load;
use eplb::topology::MAX_SLOTS;
use numpy::{
    PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use pyo3::types::PyBool;

use crate::errors::{invalid_input, plan_error};

/// A count: anything with `__index__` but a bool, that is not negative. That it is not zero
/// either is for the planner to say.
pub(crate) fn count(value: &Bound<'_, PyAny>, argument: &'static str) -> PyResult<usize> {
    whole(value, argument, 1)
}

/// The number of something that is counted from 0, likewise.
pub(crate) fn index(value: &Bound<'_, PyAny>, argument: &'static str) -> PyResult<usize> {
    whole(value, argument, 0)
}

fn whole(value: &Bound<'_, PyAny>, argument: &'static str, least: usize) -> PyResult<usize> {
    let refuse = |code| {
        let got = value
            .repr()
            .map_or_else(|_| "?".into(), |repr| repr.to_string());
        let expected = match code {
            "too_large" => "a whole number of 64 bits".into(),
            _ => format!("a whole number of at least {least}"),
        };
        invalid_input(value.py(), code, argument, &got, &expected, "")
    };
    if value.is_instance_of::<PyBool>() {
        return Err(refuse("not_integer"));
    }
    if let Ok(count) = value.extract::<usize>() {
        return Ok(count);
    }
    // A number that does not fit, or no whole number at all.
    match value.call_method0("__index__") {
        Err(_) => Err(refuse("not_integer")),
        Ok(index) if index.lt(0)? => Err(refuse(["negative", "not_positive"][least])),
        Ok(_) => Err(refuse("too_large")),
    }
}

/// What a list of any kind holds, one by one, where there is none for more GPUs than can be.
pub(crate) fn listed<'py, T>(
    values: &Bound<'py, PyAny>,
    argument: &'static str,
    expected: &str,
    one: impl Fn(&Bound<'py, PyAny>) -> PyResult<T>,
) -> PyResult<Vec<T>> {
    let py = values.py();
    let Ok(items) = values.try_iter() else {
        let got = values.get_type().name()?.to_string();
        return Err(invalid_input(
            py,
            "wrong_type",
            argument,
            &got,
            expected,
            "",
        ));
    };
    let items = items.take(MAX_SLOTS + 1);
    items.map(|item| one(&item?)).collect()
}

/// A number.
pub(crate) fn number(value: &Bound<'_, PyAny>, argument: &'static str) -> PyResult<f64> {
    let py = value.py();
    value.extract::<f64>().or_else(|_| {
        let got = value.get_type().name()?.to_string();
        Err(invalid_input(
            py,
            "wrong_type",
            argument,
            &got,
            "numbers alone",
            "",
        ))
    })
}

/// A load that `eplb_rs` has made a C-contiguous `float32` array.
pub(crate) struct LoadArray<'py>(PyReadonlyArray2<'py, f32>);

impl<'py> LoadArray<'py> {
    pub(crate) fn new(load: &Bound<'py, PyArray2<f32>>) -> PyResult<Self> {
        if !load.is_c_contiguous() {
            return Err(not_contiguous(load.py(), "load"));
        }
        let borrowed = load.try_readonly();
        borrowed.map(Self).map_err(|_| in_use(load.py(), "load"))
    }

    /// Layers and experts.
    pub(crate) fn shape(&self) -> (usize, usize) {
        match self.0.shape() {
            &[num_layers, num_experts] => (num_layers, num_experts),
            _ => (0, 0),
        }
    }

    /// The values, row-major.
    pub(crate) fn values(&self) -> PyResult<&[f32]> {
        let values = self.0.as_slice();
        values.map_err(|_| not_contiguous(self.0.py(), "load"))
    }

    /// The load, its content checked.
    pub(crate) fn checked(&self) -> PyResult<Load<'_>> {
        let (num_layers, num_experts) = self.shape();
        Load::new(self.values()?, num_layers, num_experts)
            .map_err(|error| plan_error(self.0.py(), &error))
    }
}

/// An array that `eplb_rs` has flattened, and that nobody is writing to.
pub(crate) fn borrowed<'py>(
    array: &Bound<'py, PyArray1<i64>>,
    argument: &'static str,
) -> PyResult<PyReadonlyArray1<'py, i64>> {
    let borrowed = array.try_readonly();
    borrowed.map_err(|_| in_use(array.py(), argument))
}

/// The values of an array that `eplb_rs` has flattened.
pub(crate) fn flat<'a>(
    array: &'a PyReadonlyArray1<'_, i64>,
    argument: &'static str,
) -> PyResult<&'a [i64]> {
    array
        .as_slice()
        .map_err(|_| not_contiguous(array.py(), argument))
}

pub(crate) fn not_contiguous(py: Python<'_>, argument: &str) -> PyErr {
    invalid_input(
        py,
        "not_contiguous",
        argument,
        "a strided array",
        "C-contiguous",
        "numpy.ascontiguousarray makes it so",
    )
}

/// An array that another call is writing to.
pub(crate) fn in_use(py: Python<'_>, argument: &str) -> PyErr {
    invalid_input(
        py,
        "in_use",
        argument,
        "an array that another call is writing to",
        "an array that nobody writes to meanwhile",
        "wait for the other call, or pass a copy",
    )
}

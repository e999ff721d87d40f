//! Arrays of any dtype that the steps of a serving loop read from and write to.

use numpy::ndarray::Dimension;
use numpy::{
    BorrowError, Element, PyArray, PyArrayDescrMethods, PyArrayMethods, PyReadonlyArray,
    PyReadwriteArray, PyUntypedArray, PyUntypedArrayMethods, dtype,
};
use pyo3::prelude::*;

use crate::arguments::{in_use, not_contiguous};
use crate::errors::invalid_input;

/// A writable C-contiguous array of exactly this shape, that nobody else is writing to.
pub(crate) fn writable<'py, T: Element, D: Dimension>(
    array: &Bound<'py, PyAny>,
    argument: &'static str,
    shape: &[usize],
) -> PyResult<PyReadwriteArray<'py, T, D>> {
    let sizes: Vec<_> = shape.iter().map(|&size| Some(size)).collect();
    writable_of(array, argument, &sizes, "")
}

/// The same where some sizes, those that are `None`, are the caller's to choose. `hint` says where
/// arrays that fit come from.
pub(crate) fn writable_of<'py, T: Element, D: Dimension>(
    array: &Bound<'py, PyAny>,
    argument: &'static str,
    shape: &[Option<usize>],
    hint: &str,
) -> PyResult<PyReadwriteArray<'py, T, D>> {
    let py = array.py();
    let wanted = dtype::<T>(py);
    let refuse = |code, got: &str, hint| {
        let size = |size: &Option<usize>| size.map_or("width".into(), |size| size.to_string());
        let sizes: Vec<_> = shape.iter().map(size).collect();
        let comma = if shape.len() == 1 { "," } else { "" };
        let expected = format!(
            "a writable C-contiguous {wanted} array of shape ({}{comma})",
            sizes.join(", ")
        );
        invalid_input(py, code, argument, got, &expected, hint)
    };
    let Ok(untyped) = array.cast::<PyUntypedArray>() else {
        return Err(refuse("wrong_type", &array.get_type().to_string(), hint));
    };
    if !untyped.dtype().is_equiv_to(&wanted) {
        let got = format!("dtype {}", untyped.dtype());
        return Err(refuse("wrong_dtype", &got, hint));
    }
    let fits = untyped.shape().len() == shape.len();
    let mut sizes = untyped.shape().iter().zip(shape);
    let fits = fits && sizes.all(|(&got, size)| size.is_none_or(|size| size == got));
    let (Ok(array), true) = (array.cast::<PyArray<T, D>>(), fits) else {
        let got = format!("shape {}", untyped.getattr("shape")?);
        return Err(refuse("wrong_shape", &got, hint));
    };
    if !untyped.is_c_contiguous() {
        return Err(not_contiguous(py, argument));
    }
    array.try_readwrite().map_err(|error| match error {
        BorrowError::NotWriteable => refuse("read_only", "a read-only array", ""),
        _ => refuse(
            "in_use",
            "an array that another call, or another argument of this one, is using",
            "give each call and each argument memory of its own",
        ),
    })
}

/// The values of an array that was borrowed for writing.
pub(crate) fn values_mut<'a, T: Element, D: Dimension>(
    py: Python<'_>,
    array: &'a mut PyReadwriteArray<'_, T, D>,
    argument: &'static str,
) -> PyResult<&'a mut [T]> {
    array
        .as_slice_mut()
        .map_err(|_| not_contiguous(py, argument))
}

/// An array that `eplb_rs` has made C-contiguous, and that nobody is writing to.
pub(crate) fn readable<'py, T: Element, D: Dimension>(
    array: &Bound<'py, PyArray<T, D>>,
    argument: &'static str,
) -> PyResult<PyReadonlyArray<'py, T, D>> {
    let borrowed = array.try_readonly();
    borrowed.map_err(|_| in_use(array.py(), argument))
}

/// The values of an array that was borrowed for reading.
pub(crate) fn values<'a, T: Element, D: Dimension>(
    array: &'a PyReadonlyArray<'_, T, D>,
    argument: &'static str,
) -> PyResult<&'a [T]> {
    array
        .as_slice()
        .map_err(|_| not_contiguous(array.py(), argument))
}

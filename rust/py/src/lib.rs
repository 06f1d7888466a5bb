//! `mminference_sgl._core`: conversions between Python and `mminference-core`, nothing else.

use mminference_core::{Field, Item, LayoutOptions, Order, OrderName, PlanRequest, RawItem};
use numpy::ndarray::ArrayView1;
use numpy::{Element, IntoPyArray, PyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict};

pyo3::create_exception!(
    mminference_sgl._core,
    LayoutError,
    PyValueError,
    "A layout or plan that cannot be made; the message names the item or request and what to do."
);

type Array<'py, T> = Bound<'py, PyArray1<T>>;
type Segments<'py> = (Array<'py, i32>, Array<'py, i32>, Array<'py, u8>, Array<'py, i32>);
type RawRequest = (Py<Layout>, i64, i64, i64);
type KeyTiles<'py> = (Array<'py, i32>, Array<'py, i32>, Array<'py, u8>);

fn refuse(error: impl std::fmt::Display) -> PyErr {
    LayoutError::new_err(error.to_string())
}

/// Segments, token orders and key tiles of one request; immutable, made once per request.
#[pyclass(frozen, module = "mminference_sgl._core")]
struct Layout {
    core: mminference_core::Layout,
    #[pyo3(get)]
    length: usize,
    #[pyo3(get)]
    num_items: usize,
    #[pyo3(get)]
    num_cells: usize,
    #[pyo3(get)]
    max_frame_stride: usize,
}

/// An array over `data`, which must belong to the layout in `owner` and stay in place as long as it lives.
fn lend<'py, T: Element>(owner: &Bound<'py, Layout>, data: &[T]) -> Array<'py, T> {
    // SAFETY: the array keeps `owner` alive, whose core layout is immutable and never moves or drops its arrays.
    unsafe { PyArray1::borrow_from_array(&ArrayView1::from(data), owner.clone().into_any()) }
}

fn order<'a>(owner: &'a Bound<'_, Layout>, name: &str) -> PyResult<&'a Order> {
    let (name, layout) = (name.parse::<OrderName>().map_err(refuse)?, &owner.get().core);
    Ok(owner.py().detach(|| layout.order(name)))
}

#[pymethods]
impl Layout {
    #[new]
    #[pyo3(signature = (length, items, *, chunk_tokens, tile_queries, cell_size = 0))]
    fn new(
        py: Python<'_>,
        length: i64,
        items: Vec<RawItem>,
        chunk_tokens: i64,
        tile_queries: i64,
        cell_size: i64,
    ) -> PyResult<Self> {
        let cell_size = (cell_size != 0).then_some(cell_size);
        let options = LayoutOptions { chunk_tokens, tile_queries, cell_size };
        let lay_out = || mminference_core::Layout::new(length, &Item::from_raw(items)?, &options);
        let core = py.detach(lay_out).map_err(refuse)?;
        let (length, num_items, num_cells) = (core.length(), core.num_items(), core.num_cells());
        Ok(Self { length, num_items, num_cells, max_frame_stride: core.max_frame_stride(), core })
    }

    fn frame_stride(&self, item: usize) -> PyResult<usize> {
        self.core.frame_stride(item).map_err(refuse)
    }

    fn cell_size(&self, item: usize) -> PyResult<usize> {
        self.core.cell_size(item).map_err(refuse)
    }

    fn segments<'py>(slf: &Bound<'py, Self>) -> Segments<'py> {
        let s = slf.get().core.segments();
        (lend(slf, &s.start), lend(slf, &s.length), lend(slf, &s.modality), lend(slf, &s.item))
    }

    fn segment_kinds<'py>(slf: &Bound<'py, Self>) -> Array<'py, u8> {
        lend(slf, &slf.get().core.segments().kind)
    }

    fn kinds<'py>(slf: &Bound<'py, Self>) -> Array<'py, u8> {
        let layout = &slf.get().core;
        lend(slf, slf.py().detach(|| layout.kinds()))
    }

    fn order<'py>(slf: &Bound<'py, Self>, name: &str) -> PyResult<Array<'py, i32>> {
        Ok(lend(slf, &order(slf, name)?.tokens))
    }

    fn inverse<'py>(slf: &Bound<'py, Self>, name: &str) -> PyResult<Array<'py, i32>> {
        Ok(lend(slf, &order(slf, name)?.inverse))
    }

    fn runs<'py>(slf: &Bound<'py, Self>, name: &str) -> PyResult<Array<'py, i32>> {
        Ok(lend(slf, &order(slf, name)?.runs))
    }

    fn run_items<'py>(slf: &Bound<'py, Self>) -> Array<'py, i32> {
        lend(slf, slf.get().core.run_items())
    }

    fn key_tiles<'py>(slf: &Bound<'py, Self>, name: &str, tile_keys: i64) -> PyResult<KeyTiles<'py>> {
        let (name, layout) = (name.parse().map_err(refuse)?, &slf.get().core);
        let tiles = slf.py().detach(|| layout.key_tiles(name, tile_keys)).map_err(refuse)?;
        Ok((lend(slf, &tiles.min_pos), lend(slf, &tiles.max_pos), lend(slf, &tiles.modality_mask)))
    }
}

/// The query tiles of one forward, as int32 arrays in one packed buffer.
#[pyclass(frozen, module = "mminference_sgl._core")]
struct Plan {
    #[pyo3(get)]
    buffer: Py<PyArray1<i32>>,
    fields: Vec<Field>,
}

#[pymethods]
impl Plan {
    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.fields.iter().map(|field| (field.name, (field.offset, field.length))).into_py_dict(py)
    }
}

/// Plans a forward from (layout, prefix length, chunk length, row offset) per request.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
#[pyo3(signature = (requests, *, tile_queries, tile_keys))]
fn plan(py: Python<'_>, requests: Vec<RawRequest>, tile_queries: i64, tile_keys: i64) -> PyResult<Plan> {
    let requests =
        requests.iter().map(|r| PlanRequest::new(&r.0.get().core, r.1, r.2, r.3)).collect::<Vec<_>>();
    let make = || mminference_core::Plan::new(&requests, tile_queries, tile_keys);
    let (buffer, fields) = py.detach(make).map_err(refuse)?.into_parts();
    Ok(Plan { buffer: buffer.into_pyarray(py).unbind(), fields })
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("LayoutError", module.py().get_type::<LayoutError>())?;
    module.add_class::<Layout>()?;
    module.add_class::<Plan>()?;
    module.add_function(wrap_pyfunction!(plan, module)?)
}

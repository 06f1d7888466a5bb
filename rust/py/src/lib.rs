//! `mminference_sgl._core`: conversions between Python and `mminference-core`, nothing else.

use mminference_core::{Field, Item, Layout as Core, LayoutError as Refusal, LayoutOptions, OrderName};
use mminference_core::{Plan as CorePlan, PlanRequest, RawItem};
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
type Lent<'py> = PyResult<Array<'py, i32>>;
type Segments<'py> = (Array<'py, i32>, Array<'py, i32>, Array<'py, u8>, Array<'py, i32>);
type RawRequest = (Py<Layout>, i64, i64, i64);
type KeyTiles<'py> = (Array<'py, i32>, Array<'py, i32>, Array<'py, u8>);

fn refuse(error: impl std::fmt::Display) -> PyErr {
    LayoutError::new_err(error.to_string())
}

/// Segments, token orders and key tiles of one request; immutable, made once per request.
#[pyclass(frozen, module = "mminference_sgl._core")]
struct Layout {
    core: Core,
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

/// What `make` makes of the order `name`, without the GIL.
fn of_order<'a, T: Send>(
    owner: &'a Bound<'_, Layout>,
    name: &str,
    make: impl FnOnce(&'a Core, OrderName) -> Result<T, Refusal> + Send,
) -> PyResult<T> {
    let (name, layout) = (name.parse().map_err(refuse)?, &owner.get().core);
    owner.py().detach(|| make(layout, name)).map_err(refuse)
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
        let lay_out = || Core::new(length, &Item::from_raw(items)?, &options);
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

    fn order<'py>(slf: &Bound<'py, Self>, name: &str) -> Lent<'py> {
        Ok(lend(slf, of_order(slf, name, Core::tokens)?))
    }

    fn inverse<'py>(slf: &Bound<'py, Self>, name: &str) -> Lent<'py> {
        Ok(lend(slf, of_order(slf, name, Core::inverse)?))
    }

    fn runs<'py>(slf: &Bound<'py, Self>, name: &str) -> Lent<'py> {
        Ok(lend(slf, of_order(slf, name, |layout, name| Ok(layout.runs(name)))?))
    }

    fn run_items<'py>(slf: &Bound<'py, Self>) -> Array<'py, i32> {
        lend(slf, slf.get().core.run_items())
    }

    fn key_tiles<'py>(slf: &Bound<'py, Self>, name: &str, tile_keys: i64) -> PyResult<KeyTiles<'py>> {
        let tiles = of_order(slf, name, |layout, name| layout.key_tiles(name, tile_keys))?;
        Ok((lend(slf, &tiles.min_pos), lend(slf, &tiles.max_pos), lend(slf, &tiles.modality_mask)))
    }

    fn key_tile_of_token<'py>(slf: &Bound<'py, Self>, name: &str, tile_keys: i64) -> Lent<'py> {
        Ok(lend(slf, &of_order(slf, name, |layout, name| layout.key_tile_of_token(name, tile_keys))?))
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
    let make = || CorePlan::new(&requests, tile_queries, tile_keys);
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

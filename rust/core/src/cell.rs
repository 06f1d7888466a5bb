//! Cells: groups of neighbouring spatial positions of a frame, along a space-filling curve.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// The spatial positions (`row * cols + col`) of a `rows` x `cols` frame along a generalised Hilbert
/// curve, which exists for every size (the recursion halves the longer side, or walks a U).
///
/// Source: J. Cerveny, "gilbert: space-filling curve for rectangular domains of arbitrary size".
#[must_use]
pub fn curve(rows: usize, cols: usize) -> Vec<u32> {
    let mut walk = Walk { cols: cols as i64, places: Vec::with_capacity(rows * cols) };
    let (rows, cols) = (rows as i64, cols as i64);
    if cols >= rows {
        walk.rectangle((0, 0), (cols, 0), (0, rows));
    } else {
        walk.rectangle((0, 0), (0, rows), (cols, 0));
    }
    walk.places
}

type Vector = (i64, i64);

struct Walk {
    cols: i64,
    places: Vec<u32>,
}

impl Walk {
    /// Walks the rectangle spanned at `at` by the axis-parallel vectors `a` (direction of travel) and `b`.
    fn rectangle(&mut self, at: Vector, a: Vector, b: Vector) {
        let (width, height) = ((a.0 + a.1).abs(), (b.0 + b.1).abs());
        let (unit_a, unit_b) = ((a.0.signum(), a.1.signum()), (b.0.signum(), b.1.signum()));
        if height == 1 {
            return self.line(at, unit_a, width);
        }
        if width == 1 {
            return self.line(at, unit_b, height);
        }
        let (mut half_a, mut half_b) =
            ((a.0.div_euclid(2), a.1.div_euclid(2)), (b.0.div_euclid(2), b.1.div_euclid(2)));
        if 2 * width > 3 * height {
            // Long: two rectangles in a row, the first of even width.
            if (half_a.0 + half_a.1) % 2 != 0 && width > 2 {
                half_a = add(half_a, unit_a);
            }
            self.rectangle(at, half_a, b);
            self.rectangle(add(at, half_a), sub(a, half_a), b);
        } else {
            // Square-like: up, across, down.
            if (half_b.0 + half_b.1) % 2 != 0 && height > 2 {
                half_b = add(half_b, unit_b);
            }
            self.rectangle(at, half_b, half_a);
            self.rectangle(add(at, half_b), a, sub(b, half_b));
            let corner = add(at, add(sub(a, unit_a), sub(half_b, unit_b)));
            self.rectangle(corner, neg(half_b), neg(sub(a, half_a)));
        }
    }

    fn line(&mut self, mut at: Vector, step: Vector, count: i64) {
        for _ in 0..count {
            self.places.push((at.1 * self.cols + at.0) as u32);
            at = add(at, step);
        }
    }
}

fn add(a: Vector, b: Vector) -> Vector {
    (a.0 + b.0, a.1 + b.1)
}

fn sub(a: Vector, b: Vector) -> Vector {
    (a.0 - b.0, a.1 - b.1)
}

fn neg(a: Vector) -> Vector {
    (-a.0, -a.1)
}

/// Rows, columns and cell size of a table.
pub(crate) type TableKey = (usize, usize, usize);

/// Most places that tables are kept for, 12 bytes each.
const KEPT_PLACES: usize = 1 << 20;

/// Tables of earlier requests.
#[derive(Default)]
struct Tables {
    by_key: HashMap<TableKey, Arc<CellTable>>,
    weight: usize,
}

static TABLES: LazyLock<Mutex<Tables>> = LazyLock::new(Mutex::default);

/// The cells of a frame: `size` consecutive places of the curve each, the last one maybe fewer.
#[derive(Debug)]
pub struct CellTable {
    size: usize,
    /// Cell by cell, in raster order inside a cell, so that token positions ascend in the cell's run.
    places: Vec<u32>,
    /// Of each place: its index in `places`.
    index: Vec<i32>,
    /// Of each place: the index in `places` of its cell's first one.
    first: Vec<i32>,
}

impl CellTable {
    /// Cells of `size` places (1 to `rows * cols`) of a `rows` x `cols` frame.
    #[must_use]
    pub fn new(rows: usize, cols: usize, size: usize) -> Self {
        let size = size.clamp(1, (rows * cols).max(1));
        let mut places = curve(rows, cols);
        let mut first = vec![0; places.len()];
        for (cell, at) in places.chunks(size).zip((0..).step_by(size)) {
            for &p in cell {
                first[p as usize] = at;
            }
        }
        // A frame's places in raster order each take the next slot of their cell.
        let mut next: Vec<i32> = (0..places.len() as i32).step_by(size).collect();
        let post_increment = |slot: &mut i32| std::mem::replace(slot, *slot + 1);
        let index = first.iter().map(|&at| post_increment(&mut next[at as usize / size])).collect::<Vec<_>>();
        index.iter().zip(0..).for_each(|(&at, p)| places[at as usize] = p);
        Self { size, places, index, first }
    }

    /// As [`CellTable::new`], made once for frames of ordinary size.
    pub(crate) fn shared((rows, cols, size): TableKey) -> Arc<Self> {
        let lock = || TABLES.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = lock().by_key.get(&(rows, cols, size)).map(Arc::clone);
        kept.unwrap_or_else(|| {
            let table = Arc::new(Self::new(rows, cols, size));
            // A table of a few places takes memory too.
            let weight = table.area() + 32;
            let mut tables = lock();
            if weight <= KEPT_PLACES {
                if tables.weight + weight > KEPT_PLACES {
                    *tables = Tables::default();
                }
                tables.by_key.insert((rows, cols, size), Arc::clone(&table));
                tables.weight += weight;
            }
            table
        })
    }

    /// Places of every cell but the last one, which may have fewer.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Places of a frame.
    #[must_use]
    pub fn area(&self) -> usize {
        self.places.len()
    }

    /// Number of cells.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len().div_ceil(self.size)
    }

    /// Never true for a frame that has a place.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The cells along the curve, each as its places in raster order.
    #[must_use]
    pub fn cells(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.places.chunks(self.size)
    }

    /// The places of some cells.
    pub(crate) fn places(&self, cells: Range<usize>) -> &[u32] {
        &self.places[cells.start * self.size..self.area().min(cells.end * self.size)]
    }

    /// The places of the last cell if it has fewer than the others.
    pub(crate) fn short_cell(&self) -> &[u32] {
        self.places.chunks_exact(self.size).remainder()
    }

    /// Where the first frame's tokens at some places lie in an item's part of cell order.
    pub(crate) fn first_frame(&self, places: Range<usize>, frames: usize) -> impl Iterator<Item = i32> {
        let between = frames as i32 - 1;
        let cell = &self.first[places.clone()];
        self.index[places].iter().zip(cell).map(move |(&index, &first)| index + first * between)
    }
}

/// Keys that the run of a cell should hold: a few key tiles, so that their ends, which other cells share, count little.
const RUN_KEYS: usize = 256;

/// Cell size that lets one query tile hold whole cells of one chunk, and keeps cells small.
///
/// A chunk of `chunk_tokens` shows every place of a frame `ceil(chunk_tokens / area)` times at most, so a cell of
/// `tile_queries / that` places has at most `tile_queries` rows in the chunk. Then a query tile needs the keys of
/// one cell for its slash lines, about `1 / cells` of the item. Larger cells would be split and read their keys
/// once per part. Smaller ones share a tile, which then reads all their keys, so they cost its slash lines nothing,
/// and a place that all rows read drags fewer others along: a cell is no larger than its run of all frames needs to
/// be to hold [`RUN_KEYS`] keys. An item shorter than the chunk (`extent` tokens, gaps included) is seen whole, and
/// `chunk_tokens` 0 means that there are no chunks: then every place is seen once per frame.
#[must_use]
pub fn automatic_cell_size(
    chunk_tokens: usize,
    tile_queries: usize,
    extent: usize,
    frames: usize,
    area: usize,
) -> usize {
    let repeats = if chunk_tokens == 0 { frames } else { chunk_tokens.min(extent).div_ceil(area) };
    (tile_queries / repeats.max(1)).min(RUN_KEYS.div_ceil(frames.max(1))).clamp(1, area)
}

//! Token orders: permutations of a sequence in which runs of ascending token positions lie together.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use crate::buffer::Buffer;
use crate::cell::{CellTable, TableKey, automatic_cell_size};
use crate::error::LayoutError;
use crate::options::LayoutOptions;
use crate::segment::{ItemGeometry, Segments};

/// Names of the token orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OrderName {
    /// Token position itself; one run.
    Sequence,
    /// Text, image, video, audio; one run each, four in all, empty ones included.
    Modality,
    /// All text (one run, maybe empty), then item by item and cell by cell.
    Cell,
}

impl FromStr for OrderName {
    type Err = LayoutError;

    fn from_str(name: &str) -> Result<Self, LayoutError> {
        match name {
            "sequence" => Ok(Self::Sequence),
            "modality" => Ok(Self::Modality),
            "cell" => Ok(Self::Cell),
            _ => Err(LayoutError::OrderName { name: name.to_owned() }),
        }
    }
}

/// A token order. Its arrays are made when they are first asked for.
#[derive(Debug)]
pub(crate) struct Order {
    /// Offsets of the runs (CSR, runs + 1 entries).
    pub(crate) runs: Vec<i32>,
    pub(crate) tokens: OnceLock<Buffer>,
    pub(crate) inverse: OnceLock<Buffer>,
}

impl Order {
    pub(crate) fn new(runs: Vec<i32>) -> Self {
        Self { runs, tokens: OnceLock::new(), inverse: OnceLock::new() }
    }
}

/// Where an item's cells lie in cell order: run of cell `k` starts at `start + k * table.size() * frames`.
#[derive(Debug)]
pub(crate) struct ItemCells {
    /// Order position of the item's first run.
    pub(crate) start: usize,
    /// Number of the item's first run.
    pub(crate) first_run: usize,
    pub(crate) frames: usize,
    /// Without a grid: one cell of one place, and every token a frame.
    pub(crate) table: Arc<CellTable>,
}

/// Places the items' cells behind the text.
pub(crate) fn place_items(length: usize, items: &[ItemGeometry], options: &LayoutOptions) -> Vec<ItemCells> {
    let mut tables: HashMap<TableKey, Arc<CellTable>> = HashMap::new();
    let mut start = length - items.iter().map(|item| item.tokens).sum::<usize>();
    let mut first_run = 1;
    let mut places = Vec::with_capacity(items.len());
    for item in items {
        let (frames, rows, cols) =
            item.grid.map_or((item.tokens, 1, 1), |g| (g.frames as usize, g.rows as usize, g.cols as usize));
        let area = rows * cols;
        let size = match options.cell_size {
            Some(size) => (size as usize).min(area),
            None => automatic_cell_size(
                options.chunk_tokens as usize,
                options.tile_queries as usize,
                item.end() - item.first(),
                frames,
                area,
            ),
        };
        let key = (rows, cols, size);
        let table = Arc::clone(tables.entry(key).or_insert_with(|| CellTable::shared(key)));
        let cells = table.len();
        places.push(ItemCells { start, first_run, frames, table });
        start += item.tokens;
        first_run += cells;
    }
    places
}

/// Runs of modality order.
pub(crate) fn modality_runs(segments: &Segments) -> Vec<i32> {
    let mut runs = vec![0; 5];
    for (&modality, &length) in segments.modality.iter().zip(&segments.length) {
        runs[usize::from(modality) + 1] += length;
    }
    for modality in 1..runs.len() {
        runs[modality] += runs[modality - 1];
    }
    runs
}

/// Runs of cell order, and the item of each (-1 for text).
pub(crate) fn cell_runs(length: usize, items: &[ItemGeometry], cells: &[ItemCells]) -> (Vec<i32>, Vec<i32>) {
    let count = 1 + cells.iter().map(|place| place.table.len()).sum::<usize>();
    let (mut runs, mut run_items) = (Vec::with_capacity(count + 1), Vec::with_capacity(count));
    runs.push(0);
    run_items.push(-1);
    for (item, place) in items.iter().zip(cells) {
        let cell_tokens = place.table.size() * place.frames;
        runs.extend((0..place.table.len()).map(|cell| (place.start + cell * cell_tokens) as i32));
        run_items.resize(run_items.len() + place.table.len(), item.number as i32);
    }
    runs.push(length as i32);
    (runs, run_items)
}

/// Writes the identity.
pub(crate) fn write_sequence(out: &mut [i32], map: impl Fn(i32) -> i32) {
    out.iter_mut().zip(0..).for_each(|(slot, position)| *slot = map(position));
}

/// Writes the tokens of modality order.
pub(crate) fn write_modality_tokens(segments: &Segments, runs: &[i32], out: &mut [i32]) {
    for (start, at, length) in modality_parts(segments, runs) {
        out[at..at + length].iter_mut().zip(start..).for_each(|(slot, token)| *slot = token as i32);
    }
}

/// Writes `map(order position in modality order)` of each token position.
pub(crate) fn write_modality_inverse(
    segments: &Segments,
    runs: &[i32],
    out: &mut [i32],
    map: impl Fn(i32) -> i32,
) {
    for (start, at, length) in modality_parts(segments, runs) {
        out[start..start + length].iter_mut().zip(at as i32..).for_each(|(slot, at)| *slot = map(at));
    }
}

/// First token, order position and tokens of each segment.
fn modality_parts(segments: &Segments, runs: &[i32]) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut next = runs.to_vec();
    (0..segments.len()).map(move |s| {
        let (modality, length) = (usize::from(segments.modality[s]), segments.length[s]);
        let at = next[modality];
        next[modality] += length;
        (segments.start[s] as usize, at as usize, length as usize)
    })
}

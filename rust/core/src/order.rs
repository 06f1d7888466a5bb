//! Token orders: permutations of a sequence in which runs of ascending token positions lie together.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;

use crate::cell::{CellTable, automatic_cell_size};
use crate::error::LayoutError;
use crate::layout::LayoutOptions;
use crate::segment::{ItemGeometry, Modality, Segments};

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

/// A token order: the permutation, its inverse and its runs.
#[derive(Debug)]
pub struct Order {
    /// Token position at each order position.
    pub tokens: Vec<i32>,
    /// Order position of each token position.
    pub inverse: Vec<i32>,
    /// Offsets of the runs in `tokens` (CSR, runs + 1 entries). Token positions ascend inside a run.
    pub runs: Vec<i32>,
}

/// Where an item's cells lie in cell order: run of cell `k` starts at `start + k * table.size() * frames`.
#[derive(Debug)]
pub(crate) struct ItemCells {
    /// Order position of the item's first run.
    pub(crate) start: usize,
    pub(crate) frames: usize,
    /// Without a grid: one cell of one place, and every token a frame.
    pub(crate) table: Arc<CellTable>,
}

/// The identity.
pub(crate) fn sequence(length: usize) -> Order {
    let tokens: Vec<i32> = (0..length as i32).collect();
    Order { inverse: tokens.clone(), tokens, runs: vec![0, length as i32] }
}

/// Tokens by modality.
pub(crate) fn modality(length: usize, segments: &Segments) -> Order {
    let mut order =
        Order { tokens: Vec::with_capacity(length), inverse: vec![0; length], runs: Vec::with_capacity(5) };
    order.runs.push(0);
    for modality in [Modality::Text, Modality::Image, Modality::Video, Modality::Audio] {
        for s in 0..segments.len() {
            if segments.modality[s] == modality as u8 {
                append(&mut order, segments.start[s], segments.length[s]);
            }
        }
        order.runs.push(order.tokens.len() as i32);
    }
    order
}

/// Text, then the items' cells. Also returns each run's item (-1 for text) and each item's place in the order.
pub(crate) fn cell(
    length: usize,
    segments: &Segments,
    items: &[ItemGeometry],
    options: &LayoutOptions,
) -> Result<(Order, Vec<i32>, Vec<ItemCells>), LayoutError> {
    let cells = place_items(length, items, options);
    let runs = 1 + cells.iter().map(|item| item.table.len()).sum::<usize>();
    let mut order =
        Order { tokens: reserve(length)?, inverse: reserve(length)?, runs: Vec::with_capacity(runs + 1) };
    order.inverse.resize(length, 0);
    let mut run_items = Vec::with_capacity(runs);
    order.runs.push(0);
    for s in 0..segments.len() {
        if segments.item[s] < 0 {
            append(&mut order, segments.start[s], segments.length[s]);
        }
    }
    order.runs.push(order.tokens.len() as i32);
    run_items.push(-1);
    for (item, place) in items.iter().zip(&cells) {
        append_item(&mut order, item, place);
        run_items.resize(run_items.len() + place.table.len(), item.number as i32);
    }
    Ok((order, run_items, cells))
}

fn reserve(elements: usize) -> Result<Vec<i32>, LayoutError> {
    let mut array = Vec::new();
    array.try_reserve_exact(elements).map_err(|_| LayoutError::Memory { elements })?;
    Ok(array)
}

fn place_items(length: usize, items: &[ItemGeometry], options: &LayoutOptions) -> Vec<ItemCells> {
    let mut tables: HashMap<(i64, i64, usize), Arc<CellTable>> = HashMap::new();
    let mut start = length - items.iter().map(|item| item.tokens).sum::<usize>();
    let mut places = Vec::with_capacity(items.len());
    for item in items {
        let (frames, rows, cols) =
            item.grid.map_or((item.tokens, 1, 1), |g| (g.frames as usize, g.rows, g.cols));
        let area = (rows * cols) as usize;
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
        let table = tables
            .entry((rows, cols, size))
            .or_insert_with(|| Arc::new(CellTable::new(rows as usize, cols as usize, size)));
        places.push(ItemCells { start, frames, table: Arc::clone(table) });
        start += item.tokens;
    }
    places
}

/// Appends tokens `start..start + length`.
fn append(order: &mut Order, start: i32, length: i32) {
    let at = order.tokens.len() as i32;
    order.tokens.extend(start..start + length);
    let inverse = &mut order.inverse[start as usize..(start + length) as usize];
    inverse.iter_mut().zip(at..).for_each(|(slot, position)| *slot = position);
}

/// Appends an item's runs.
fn append_item(order: &mut Order, item: &ItemGeometry, place: &ItemCells) {
    let Some(grid) = item.grid else {
        for span in &item.spans {
            append(order, span.start as i32, (span.end - span.start) as i32);
        }
        order.runs.push(order.tokens.len() as i32);
        return;
    };
    let area = grid.area();
    let starts = item.frame_starts();
    let whole = item.spans.iter().all(|s| s.ordinal % area == 0 && (s.end - s.start) % area == 0);
    if whole {
        append_whole_frames(order, place, &starts);
    } else {
        append_cut_frames(order, item, place);
    }
}

/// Every frame is consecutive: token = frame start + place.
fn append_whole_frames(order: &mut Order, place: &ItemCells, starts: &[usize]) {
    // The run position of place p in frame f is base[p] + f * width[p].
    let mut base = vec![0; place.table.area()];
    let mut width = vec![0; place.table.area()];
    for cell in place.table.cells() {
        let at = order.tokens.len() as i32;
        for (offset, &p) in cell.iter().enumerate() {
            base[p as usize] = at + offset as i32;
            width[p as usize] = cell.len() as i32;
        }
        for &start in starts {
            order.tokens.extend(cell.iter().map(|&p| start as i32 + p as i32));
        }
        order.runs.push(order.tokens.len() as i32);
    }
    for (frame, &start) in starts.iter().enumerate() {
        let inverse = &mut order.inverse[start..start + base.len()];
        for ((slot, &base), &width) in inverse.iter_mut().zip(&base).zip(&width) {
            *slot = base + frame as i32 * width;
        }
    }
}

/// A span boundary lies inside a frame: token = the item's token of that ordinal.
fn append_cut_frames(order: &mut Order, item: &ItemGeometry, place: &ItemCells) {
    let tokens: Vec<i32> = item.spans.iter().flat_map(|span| span.start as i32..span.end as i32).collect();
    for cell in place.table.cells() {
        for frame in tokens.chunks(place.table.area()) {
            for &p in cell {
                let token = frame[p as usize];
                order.inverse[token as usize] = order.tokens.len() as i32;
                order.tokens.push(token);
            }
        }
        order.runs.push(order.tokens.len() as i32);
    }
}

//! The layout of a request: everything that is known before its first chunk.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::buffer::Buffer;
use crate::cell_order::CellOrder;
use crate::error::LayoutError;
use crate::options::LayoutOptions;
use crate::order::{self, ItemCells, Order, OrderName};
use crate::segment::{Item, ItemGeometry, Segments, segment};
use crate::tile::KeyTiles;

/// What depends on the order and on the size of its key tiles, kept as long as the layout.
type ByTiles<T> = Mutex<HashMap<(OrderName, usize), Arc<T>>>;

/// Segments, token orders and key tiles of one request. Immutable; shared by all its forwards.
///
/// Only the segments are made at once. Arrays as long as the request are made when they are first asked for, without
/// a lock: of two threads that ask at the same time both work, and one result is kept.
#[derive(Debug)]
pub struct Layout {
    length: usize,
    segments: Segments,
    /// By first token.
    items: Vec<ItemGeometry>,
    /// As `items`.
    cells: Vec<ItemCells>,
    /// Index in `items` of the caller's item.
    rank: Vec<u32>,
    sequence: Order,
    modality: Order,
    cell: Order,
    run_items: Vec<i32>,
    kinds: OnceLock<Vec<u8>>,
    max_frame_stride: usize,
    key_tiles: ByTiles<KeyTiles>,
    tile_of_token: ByTiles<Buffer>,
}

impl Layout {
    /// Lays out a sequence of `length` tokens.
    pub fn new(length: i64, items: &[Item], options: &LayoutOptions) -> Result<Self, LayoutError> {
        options.check()?;
        let (items, segments) = segment(length, items)?;
        let length = length as usize;
        let cells = order::place_items(length, &items, options);
        let (cell_runs, run_items) = order::cell_runs(length, &items, &cells);
        let mut rank = vec![0; items.len()];
        for (at, item) in items.iter().enumerate() {
            rank[item.number] = at as u32;
        }
        Ok(Self {
            length,
            sequence: Order::new(vec![0, length as i32]),
            modality: Order::new(order::modality_runs(&segments)),
            cell: Order::new(cell_runs),
            run_items,
            kinds: OnceLock::new(),
            max_frame_stride: items.iter().map(|item| item.frame_stride).max().unwrap_or(0),
            key_tiles: Mutex::default(),
            tile_of_token: Mutex::default(),
            segments,
            items,
            cells,
            rank,
        })
    }

    /// Tokens of the sequence.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Number of items.
    #[must_use]
    pub fn num_items(&self) -> usize {
        self.items.len()
    }

    /// Runs of items in cell order: every cell of an item with a grid, one for an item without.
    #[must_use]
    pub fn num_cells(&self) -> usize {
        self.run_items.len() - 1
    }

    /// The segments.
    #[must_use]
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// Kind of every token (see [`crate::Kind`]); made at the first call.
    pub fn kinds(&self) -> &[u8] {
        self.kinds.get_or_init(|| self.segments.expand_kinds(self.length))
    }

    /// Token position at each position of an order.
    pub fn tokens(&self, name: OrderName) -> Result<&[i32], LayoutError> {
        let order = self.order(name);
        self.once(&order.tokens, |out| match name {
            OrderName::Sequence => order::write_sequence(out, |token| token),
            OrderName::Modality => order::write_modality_tokens(&self.segments, &order.runs, out),
            OrderName::Cell => self.cell_order().write_tokens(out),
        })
    }

    /// Order position of each token position.
    pub fn inverse(&self, name: OrderName) -> Result<&[i32], LayoutError> {
        if name == OrderName::Sequence {
            return self.tokens(name);
        }
        self.once(&self.order(name).inverse, |out| self.write_inverse(name, out, |position| position))
    }

    /// Offsets of an order's runs (CSR, runs + 1 entries). Token positions ascend inside a run.
    #[must_use]
    pub fn runs(&self, name: OrderName) -> &[i32] {
        &self.order(name).runs
    }

    fn order(&self, name: OrderName) -> &Order {
        match name {
            OrderName::Sequence => &self.sequence,
            OrderName::Modality => &self.modality,
            OrderName::Cell => &self.cell,
        }
    }

    fn cell_order(&self) -> CellOrder<'_> {
        let Self { segments, items, cells, rank, .. } = self;
        CellOrder { segments, items, cells, rank, runs: &self.cell.runs }
    }

    fn write_inverse(&self, name: OrderName, out: &mut [i32], map: impl Fn(i32) -> i32 + Copy + Sync) {
        match name {
            OrderName::Sequence => order::write_sequence(out, map),
            OrderName::Modality => order::write_modality_inverse(&self.segments, self.runs(name), out, map),
            OrderName::Cell => self.cell_order().write_inverse(out, map),
        }
    }

    /// The array that `slot` holds or will hold. Written without the slot's lock: a thread that waits for rayon may be
    /// given work that asks for the same array.
    fn once<'a>(
        &self,
        slot: &'a OnceLock<Buffer>,
        write: impl FnOnce(&mut [i32]),
    ) -> Result<&'a [i32], LayoutError> {
        if let Some(array) = slot.get() {
            return Ok(array);
        }
        let mut array = Buffer::new(self.length)?;
        write(&mut array);
        Ok(slot.get_or_init(|| array))
    }

    /// Item of each run of cell order, -1 for the text run, which is the first one.
    #[must_use]
    pub fn run_items(&self) -> &[i32] {
        &self.run_items
    }

    /// Places of the cells of the caller's item `item`, 0 without a grid.
    pub fn cell_size(&self, item: usize) -> Result<usize, LayoutError> {
        let rank = self.find(item)?;
        Ok(self.items[rank].grid.map_or(0, |_| self.cells[rank].table.size()))
    }

    /// Largest distance between the first tokens of consecutive frames of the caller's item `item`: `rows * cols`
    /// for a single frame, 0 without a grid.
    pub fn frame_stride(&self, item: usize) -> Result<usize, LayoutError> {
        Ok(self.items[self.find(item)?].frame_stride)
    }

    fn find(&self, item: usize) -> Result<usize, LayoutError> {
        let rank = self.rank.get(item).ok_or(LayoutError::NoItem { item, items: self.items.len() })?;
        Ok(*rank as usize)
    }

    /// Largest [`Layout::frame_stride`], 0 without an item that has a grid.
    #[must_use]
    pub fn max_frame_stride(&self) -> usize {
        self.max_frame_stride
    }

    /// Key tiles of `tile_keys` order positions.
    pub fn key_tiles(&self, name: OrderName, tile_keys: i64) -> Result<Arc<KeyTiles>, LayoutError> {
        let size = check_tile_keys(tile_keys)?;
        kept(&self.key_tiles, (name, size), || self.build_key_tiles(name, size))
    }

    /// Key tile of each token position.
    pub fn key_tile_of_token(&self, name: OrderName, tile_keys: i64) -> Result<Arc<Buffer>, LayoutError> {
        let size = check_tile_keys(tile_keys)?;
        kept(&self.tile_of_token, (name, size), || {
            let mut tiles = Buffer::new(self.length)?;
            if size.is_power_of_two() {
                let shift = size.trailing_zeros();
                self.write_inverse(name, &mut tiles, |position| position >> shift);
            } else {
                self.write_inverse(name, &mut tiles, |position| position / size as i32);
            }
            Ok(tiles)
        })
    }

    fn build_key_tiles(&self, name: OrderName, tile_keys: usize) -> Result<KeyTiles, LayoutError> {
        let of_runs = |modality: &dyn Fn(usize) -> u8| {
            KeyTiles::of_runs(self.tokens(name)?, self.runs(name), modality, tile_keys)
        };
        match name {
            OrderName::Sequence => KeyTiles::of_sequence(self.length, &self.segments, tile_keys),
            OrderName::Modality => of_runs(&|run| run as u8),
            OrderName::Cell => of_runs(&|run| match self.run_items[run] {
                -1 => 0,
                item => self.items[self.rank[item as usize] as usize].modality as u8,
            }),
        }
    }

    /// Geometry and cells of the caller's item `item`.
    pub(crate) fn item(&self, item: i32) -> (usize, &ItemGeometry, &ItemCells) {
        let rank = self.rank[item as usize] as usize;
        (rank, &self.items[rank], &self.cells[rank])
    }

    /// As [`Layout::item`], by rank among the first tokens.
    pub(crate) fn ranked(&self, rank: usize) -> (&ItemGeometry, &ItemCells) {
        (&self.items[rank], &self.cells[rank])
    }
}

fn check_tile_keys(tile_keys: i64) -> Result<usize, LayoutError> {
    if (1..=i64::from(i32::MAX)).contains(&tile_keys) {
        return Ok(tile_keys as usize);
    }
    let expected = "the keys of a tile, at least 1";
    Err(LayoutError::Option { name: "tile_keys", value: tile_keys, expected })
}

/// The entry of `key`, made without the lock if there is none (see [`Layout::once`]).
fn kept<T>(
    cache: &ByTiles<T>,
    key: (OrderName, usize),
    build: impl FnOnce() -> Result<T, LayoutError>,
) -> Result<Arc<T>, LayoutError> {
    // A poisoned cache is still a cache of whole entries.
    let lock = || cache.lock().unwrap_or_else(PoisonError::into_inner);
    let found = lock().get(&key).map(Arc::clone);
    if let Some(entry) = found {
        return Ok(entry);
    }
    let made = Arc::new(build()?);
    Ok(Arc::clone(lock().entry(key).or_insert(made)))
}

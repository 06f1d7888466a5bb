//! The layout of a request: everything that is known before its first chunk.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::error::LayoutError;
use crate::order::{self, ItemCells, Order, OrderName};
use crate::segment::{Item, ItemGeometry, Segments, segment};
use crate::tile::KeyTiles;

/// What the size of the cells depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayoutOptions {
    /// Tokens of a chunk, 0 if prefill is not chunked.
    pub chunk_tokens: i64,
    /// Rows of a query tile.
    pub tile_queries: i64,
    /// Places of a cell; `None` picks it per item (see [`crate::cell::automatic_cell_size`]).
    pub cell_size: Option<i64>,
}

impl LayoutOptions {
    fn check(&self) -> Result<(), LayoutError> {
        let limit = i64::from(i32::MAX);
        let refuse = |name, value, expected| Err(LayoutError::Option { name, value, expected });
        if !(0..=limit).contains(&self.chunk_tokens) {
            return refuse("chunk_tokens", self.chunk_tokens, "the tokens of a chunk, or 0 for no chunks");
        }
        if !(1..=limit).contains(&self.tile_queries) {
            return refuse("tile_queries", self.tile_queries, "the rows of a query tile, at least 1");
        }
        match self.cell_size {
            Some(size) if !(1..=limit).contains(&size) => {
                refuse("cell_size", size, "the places of a cell, at least 1, or leave it to the planner")
            }
            _ => Ok(()),
        }
    }
}

/// Segments, token orders and key tiles of one request. Immutable; shared by all its forwards.
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
    cell: Order,
    run_items: Vec<i32>,
    sequence: OnceLock<Order>,
    modality: OnceLock<Order>,
    kinds: OnceLock<Vec<u8>>,
    max_frame_stride: usize,
    key_tiles: Mutex<HashMap<(OrderName, usize), Arc<KeyTiles>>>,
}

impl Layout {
    /// Lays out a sequence of `length` tokens.
    pub fn new(length: i64, items: &[Item], options: &LayoutOptions) -> Result<Self, LayoutError> {
        options.check()?;
        let (items, segments) = segment(length, items)?;
        let length = length as usize;
        let (cell, run_items, cells) = order::cell(length, &segments, &items, options)?;
        let mut rank = vec![0; items.len()];
        for (at, item) in items.iter().enumerate() {
            rank[item.number] = at as u32;
        }
        let max_frame_stride = items.iter().map(ItemGeometry::frame_stride).max().unwrap_or(0);
        Ok(Self {
            length,
            segments,
            items,
            cells,
            rank,
            cell,
            run_items,
            sequence: OnceLock::new(),
            modality: OnceLock::new(),
            kinds: OnceLock::new(),
            max_frame_stride,
            key_tiles: Mutex::default(),
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

    /// A token order. `Sequence` and `Modality` are made at the first call.
    pub fn order(&self, name: OrderName) -> &Order {
        match name {
            OrderName::Sequence => self.sequence.get_or_init(|| order::sequence(self.length)),
            OrderName::Modality => self.modality.get_or_init(|| order::modality(self.length, &self.segments)),
            OrderName::Cell => &self.cell,
        }
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
        Ok(self.items[self.find(item)?].frame_stride())
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

    /// Key tiles of `tile_keys` order positions; kept as long as the layout.
    pub fn key_tiles(&self, name: OrderName, tile_keys: i64) -> Result<Arc<KeyTiles>, LayoutError> {
        if !(1..=i64::from(i32::MAX)).contains(&tile_keys) {
            let expected = "the keys of a tile, at least 1";
            return Err(LayoutError::Option { name: "tile_keys", value: tile_keys, expected });
        }
        let size = tile_keys as usize;
        // A poisoned cache is still a cache of whole entries.
        let mut cache = self.key_tiles.lock().unwrap_or_else(PoisonError::into_inner);
        let tiles = cache.entry((name, size)).or_insert_with(|| Arc::new(self.build_key_tiles(name, size)));
        Ok(Arc::clone(tiles))
    }

    fn build_key_tiles(&self, name: OrderName, tile_keys: usize) -> KeyTiles {
        match name {
            OrderName::Sequence => KeyTiles::of_sequence(self.length, &self.segments, tile_keys),
            OrderName::Modality => KeyTiles::of_runs(self.order(name), |run| run as u8, tile_keys),
            OrderName::Cell => {
                let modality = |run: usize| match self.run_items[run] {
                    -1 => 0,
                    item => self.items[self.rank[item as usize] as usize].modality as u8,
                };
                KeyTiles::of_runs(&self.cell, modality, tile_keys)
            }
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

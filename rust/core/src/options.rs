//! What a layout is told beside the request.

use crate::error::LayoutError;

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
    pub(crate) fn check(&self) -> Result<(), LayoutError> {
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

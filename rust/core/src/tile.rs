//! Key tiles: bounds and modalities of consecutive order positions.

use crate::order::Order;
use crate::segment::Segments;

/// Bounds of the key tiles of an order; the last tile may be short.
#[derive(Debug)]
pub struct KeyTiles {
    /// Smallest token position of each tile.
    pub min_pos: Vec<i32>,
    /// Largest token position of each tile.
    pub max_pos: Vec<i32>,
    /// Bit `m` is set if the tile holds a token of modality `m` (0 text, 1 image, 2 video, 3 audio).
    pub modality_mask: Vec<u8>,
}

impl KeyTiles {
    fn new(length: usize, tile_keys: usize) -> Self {
        let tiles = length.div_ceil(tile_keys);
        Self { min_pos: vec![i32::MAX; tiles], max_pos: vec![-1; tiles], modality_mask: vec![0; tiles] }
    }

    /// Key tiles of sequence order.
    pub(crate) fn of_sequence(length: usize, segments: &Segments, tile_keys: usize) -> Self {
        let mut tiles = Self::new(length, tile_keys);
        for s in 0..segments.len() {
            let start = segments.start[s] as usize;
            let end = start + segments.length[s] as usize;
            tiles.add_run(start..end, tile_keys, 1 << segments.modality[s], |position| position as i32);
        }
        tiles
    }

    /// Key tiles of an order whose runs hold one modality each.
    pub(crate) fn of_runs(order: &Order, modality: impl Fn(usize) -> u8, tile_keys: usize) -> Self {
        let mut tiles = Self::new(order.tokens.len(), tile_keys);
        for (run, ends) in order.runs.windows(2).enumerate() {
            let range = ends[0] as usize..ends[1] as usize;
            tiles.add_run(range, tile_keys, 1 << modality(run), |at| order.tokens[at]);
        }
        tiles
    }

    /// Widens the tiles that the order positions `run` touch; `token` ascends over the run.
    fn add_run(
        &mut self,
        run: std::ops::Range<usize>,
        tile_keys: usize,
        mask: u8,
        token: impl Fn(usize) -> i32,
    ) {
        let mut at = run.start;
        while at < run.end {
            let tile = at / tile_keys;
            let end = run.end.min((tile + 1) * tile_keys);
            self.min_pos[tile] = self.min_pos[tile].min(token(at));
            self.max_pos[tile] = self.max_pos[tile].max(token(end - 1));
            self.modality_mask[tile] |= mask;
            at = end;
        }
    }
}

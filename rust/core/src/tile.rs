//! Key tiles: bounds and modalities of consecutive order positions.

use crate::buffer::Buffer;
use crate::error::LayoutError;
use crate::order::write_sequence;
use crate::segment::Segments;

/// Bounds of the key tiles of an order; the last tile may be short.
#[derive(Debug)]
pub struct KeyTiles {
    /// Smallest token position of each tile.
    pub min_pos: Buffer,
    /// Largest token position of each tile.
    pub max_pos: Buffer,
    /// Bit `m` is set if the tile holds a token of modality `m` (0 text, 1 image, 2 video, 3 audio).
    pub modality_mask: Vec<u8>,
}

impl KeyTiles {
    /// Bounds to be written, and empty masks.
    fn new(length: usize, tile_keys: usize) -> Result<Self, LayoutError> {
        let tiles = length.div_ceil(tile_keys);
        Ok(Self { min_pos: Buffer::new(tiles)?, max_pos: Buffer::new(tiles)?, modality_mask: vec![0; tiles] })
    }

    /// Key tiles of sequence order.
    pub(crate) fn of_sequence(
        length: usize,
        segments: &Segments,
        tile_keys: usize,
    ) -> Result<Self, LayoutError> {
        let mut tiles = Self::new(length, tile_keys)?;
        write_sequence(&mut tiles.min_pos, |tile| tile * tile_keys as i32);
        let before_last = tiles.min_pos.len() - 1;
        write_sequence(&mut tiles.max_pos[..before_last], |tile| (tile + 1) * tile_keys as i32 - 1);
        tiles.max_pos[before_last] = length as i32 - 1;
        for s in 0..segments.len() {
            let start = segments.start[s] as usize;
            let end = start + segments.length[s] as usize;
            for mask in &mut tiles.modality_mask[start / tile_keys..end.div_ceil(tile_keys)] {
                *mask |= 1 << segments.modality[s];
            }
        }
        Ok(tiles)
    }

    /// Key tiles of an order whose runs hold one modality each.
    pub(crate) fn of_runs(
        tokens: &[i32],
        runs: &[i32],
        modality: impl Fn(usize) -> u8,
        tile_keys: usize,
    ) -> Result<Self, LayoutError> {
        let mut tiles = Self::new(tokens.len(), tile_keys)?;
        let mut tile = 0;
        // The runs' parts of the tile that is not full yet.
        let (mut low, mut high, mut mask) = (i32::MAX, -1, 0);
        let mut at = 0;
        let mut tile_end = tile_keys.min(tokens.len());
        for (run, &run_end) in runs[1..].iter().enumerate() {
            let run_end = run_end as usize;
            while at < run_end {
                // Tokens ascend in a run.
                let end = run_end.min(tile_end);
                low = low.min(tokens[at]);
                high = high.max(tokens[end - 1]);
                mask |= 1 << modality(run);
                at = end;
                if at == tile_end {
                    tiles.min_pos[tile] = low;
                    tiles.max_pos[tile] = high;
                    tiles.modality_mask[tile] = mask;
                    tile += 1;
                    (low, high, mask) = (i32::MAX, -1, 0);
                    tile_end = (tile_end + tile_keys).min(tokens.len());
                }
            }
        }
        Ok(tiles)
    }
}

//! Writing a pass: rows and tiles of one request into its slices of the packed buffer.

use std::ops::Range;

use crate::buffer::Rest;
use crate::order::ItemCells;
use crate::segment::{ItemGeometry, Kind};

/// Rows of a query tile and keys of a key tile.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TileSizes {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
}

/// Receives the tiles of a walk over cells.
pub(crate) trait Tiles {
    /// Adds the rows at order positions `part` to the open tile.
    fn rows(&mut self, part: Range<usize>);
    /// Closes the open tile; its rows belong to runs that lie in the order positions `own`.
    fn close(&mut self, own: Range<usize>);
}

pub(crate) struct Count(pub(crate) usize);

impl Tiles for Count {
    fn rows(&mut self, _: Range<usize>) {}

    fn close(&mut self, _: Range<usize>) {
        self.0 += 1;
    }
}

/// Packs cell after cell into a tile while it holds at most `queries` rows; a cell with more is cut into tiles of its
/// own. Cells without a row in the chunk are passed over.
pub(crate) fn walk_item(
    item: &ItemGeometry,
    place: &ItemCells,
    chunk: Range<usize>,
    queries: usize,
    tiles: &mut impl Tiles,
) {
    let area = place.table.area();
    let (low, high) = (item.ordinals_before(chunk.start), item.ordinals_before(chunk.end));
    let (low, high) = ((low / area, (low % area) as u32), (high / area, (high % area) as u32));
    let mut run = place.start..place.start;
    let mut own = run.clone();
    let mut held = 0;
    for cell in place.table.cells() {
        run = run.end..run.end + place.frames * cell.len();
        let before =
            |(frame, p): (usize, u32)| run.start + frame * cell.len() + cell.partition_point(|&q| q < p);
        let mut part = before(low)..before(high);
        if part.is_empty() {
            continue;
        }
        if held > 0 && held + part.len() > queries {
            tiles.close(own.clone());
            held = 0;
        }
        if part.len() > queries {
            while !part.is_empty() {
                let end = part.end.min(part.start + queries);
                tiles.rows(part.start..end);
                tiles.close(run.clone());
                part.start = end;
            }
            continue;
        }
        own = if held == 0 { run.clone() } else { own.start..run.end };
        held += part.len();
        tiles.rows(part);
    }
    if held > 0 {
        tiles.close(own);
    }
}

/// Size of a pass, or of one request's part of it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Extent {
    pub(crate) rows: usize,
    pub(crate) tiles: usize,
}

impl std::iter::Sum for Extent {
    fn sum<I: Iterator<Item = Self>>(extents: I) -> Self {
        extents.fold(Self::default(), |a, b| Self { rows: a.rows + b.rows, tiles: a.tiles + b.tiles })
    }
}

/// One request's part of a pass.
pub(crate) struct Pass<'a> {
    rows: &'a mut [i32],
    positions: &'a mut [i32],
    /// End slot of each tile.
    ends: &'a mut [i32],
    request: &'a mut [i32],
    kind: &'a mut [i32],
    min_pos: &'a mut [i32],
    max_pos: &'a mut [i32],
    /// Own key tiles; empty in a pass without them.
    own_lo: &'a mut [i32],
    own_hi: &'a mut [i32],
    /// Slots of the requests before this one.
    first_slot: usize,
}

impl<'a> Pass<'a> {
    /// Cuts the fields of a pass, in the order of [`crate::plan::CELL_FIELDS`], by request.
    pub(crate) fn split(
        fields: impl Iterator<Item = &'a mut [i32]>,
        own: bool,
        extents: impl Iterator<Item = Extent>,
    ) -> Vec<Self> {
        let mut rests: [Rest; 9] = Default::default();
        rests.iter_mut().zip(fields).for_each(|(rest, field)| rest.0 = field);
        let [rows, positions, ends, request, kind, min_pos, max_pos, own_lo, own_hi] = &mut rests;
        // The CSR's leading zero.
        ends.take(1);
        let mut first_slot = 0;
        let split = extents.map(|extent| {
            let own_tiles = if own { extent.tiles } else { 0 };
            let pass = Self {
                rows: rows.take(extent.rows),
                positions: positions.take(extent.rows),
                ends: ends.take(extent.tiles),
                request: request.take(extent.tiles),
                kind: kind.take(extent.tiles),
                min_pos: min_pos.take(extent.tiles),
                max_pos: max_pos.take(extent.tiles),
                own_lo: own_lo.take(own_tiles),
                own_hi: own_hi.take(own_tiles),
                first_slot,
            };
            first_slot += extent.rows;
            pass
        });
        split.collect()
    }
}

/// Writes one request's tiles into its part of a pass.
pub(crate) struct PassWriter<'a, 'b> {
    pass: &'a mut Pass<'b>,
    /// Token position at each order position.
    pub(crate) order: &'a [i32],
    request: i32,
    pub(crate) kind: Kind,
    row_shift: i64,
    sizes: TileSizes,
    slot: usize,
    tile: usize,
    min_pos: i32,
    max_pos: i32,
}

impl<'a, 'b> PassWriter<'a, 'b> {
    pub(crate) fn new(pass: &'a mut Pass<'b>, request: usize, row_shift: i64, sizes: TileSizes) -> Self {
        Self {
            pass,
            order: &[],
            request: request as i32,
            kind: Kind::Media,
            row_shift,
            sizes,
            slot: 0,
            tile: 0,
            min_pos: i32::MAX,
            max_pos: -1,
        }
    }

    /// Writes ascending token ranges as tiles of `sizes.queries` rows.
    pub(crate) fn write_range(
        &mut self,
        kind: Kind,
        parts: impl Iterator<Item = Range<usize>>,
        own: Range<usize>,
    ) {
        self.kind = kind;
        let mut room = self.sizes.queries;
        for mut part in parts {
            while !part.is_empty() {
                let end = part.end.min(part.start + room);
                self.put(part.start as i32..end as i32);
                room -= end - part.start;
                part.start = end;
                if room == 0 {
                    self.close(own.clone());
                    room = self.sizes.queries;
                }
            }
        }
        if room < self.sizes.queries {
            self.close(own);
        }
    }

    /// Writes the rows of ascending token positions.
    fn put(&mut self, positions: impl ExactSizeIterator<Item = i32> + DoubleEndedIterator + Clone) {
        let slots = self.slot..self.slot + positions.len();
        self.slot = slots.end;
        let (Some(first), Some(last)) = (positions.clone().next(), positions.clone().next_back()) else {
            return;
        };
        self.min_pos = self.min_pos.min(first);
        self.max_pos = self.max_pos.max(last);
        let shift = self.row_shift as i32;
        let slots = self.pass.rows[slots.clone()].iter_mut().zip(&mut self.pass.positions[slots]);
        for ((row, slot), position) in slots.zip(positions) {
            *slot = position;
            *row = position + shift;
        }
    }
}

impl Tiles for PassWriter<'_, '_> {
    fn rows(&mut self, part: Range<usize>) {
        let order = self.order;
        self.put(order[part].iter().copied());
    }

    fn close(&mut self, own: Range<usize>) {
        let (pass, tile) = (&mut *self.pass, self.tile);
        pass.ends[tile] = (pass.first_slot + self.slot) as i32;
        pass.request[tile] = self.request;
        pass.kind[tile] = self.kind as i32;
        pass.min_pos[tile] = self.min_pos;
        pass.max_pos[tile] = self.max_pos;
        if let (Some(lo), Some(hi)) = (pass.own_lo.get_mut(tile), pass.own_hi.get_mut(tile)) {
            *lo = (own.start / self.sizes.keys) as i32;
            *hi = own.end.div_ceil(self.sizes.keys) as i32;
        }
        self.tile += 1;
        (self.min_pos, self.max_pos) = (i32::MAX, -1);
    }
}

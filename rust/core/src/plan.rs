//! The plan of one forward: which rows form which query tiles, and the keys that are theirs by geometry.
//!
//! Inside a run token positions ascend and the chunk is an interval of them, so the chunk's part of a run follows
//! from the item's geometry: nothing here reads or walks the prefix.

use std::ops::Range;

use rayon::prelude::*;

use crate::error::PlanError;
use crate::layout::Layout;
use crate::order::OrderName;
use crate::pass::{Count, Extent, Pass, PassWriter, TileSizes, Tiles, walk_item};
use crate::segment::Kind;

/// Fields start at multiples of this many elements (64 bytes), which vector loads on a device want.
const ALIGNMENT: usize = 16;

/// Rows of a batch below which threads cost more than they bring.
const PARALLEL_ROWS: usize = 1 << 15;

/// One request of a forward.
#[derive(Debug, Clone, Copy)]
pub struct PlanRequest<'a> {
    /// Layout of the whole sequence.
    pub layout: &'a Layout,
    /// Tokens that are in the KV pool.
    pub prefix: i64,
    /// Tokens that this forward extends, at least 1.
    pub chunk: i64,
    /// Row of the chunk's first token in the batch.
    pub row_offset: i64,
}

impl<'a> PlanRequest<'a> {
    /// A request; [`Plan::new`] checks it.
    #[must_use]
    pub fn new(layout: &'a Layout, prefix: i64, chunk: i64, row_offset: i64) -> Self {
        Self { layout, prefix, chunk, row_offset }
    }
}

/// A named part of the packed buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// `seq.` or `cell.` and the array's name.
    pub name: &'static str,
    /// First element.
    pub offset: usize,
    /// Elements.
    pub length: usize,
}

/// The query tiles of a forward, as int32 arrays in one buffer.
///
/// Each pass, `seq` and `cell`, has per row slot `rows` (row in the batch) and `positions` (token position), and per
/// tile `row_indptr` (CSR, tiles + 1), `tile_request`, `tile_kind` (see [`Kind`]; 1 in `seq` for media and
/// interstitial rows together), `tile_min_pos` and `tile_max_pos`. `cell` also has `own_lo` and `own_hi`: the key
/// tiles in cell order that cover the runs which the tile's rows belong to, before and after the chunk.
#[derive(Debug)]
pub struct Plan {
    buffer: Vec<i32>,
    fields: Vec<Field>,
}

/// Fields of the sequence pass.
const SEQ_FIELDS: [&str; 7] = [
    "seq.rows",
    "seq.positions",
    "seq.row_indptr",
    "seq.tile_request",
    "seq.tile_kind",
    "seq.tile_min_pos",
    "seq.tile_max_pos",
];
/// Fields of the cell pass: those of the sequence pass and two more.
pub(crate) const CELL_FIELDS: [&str; 9] = [
    "cell.rows",
    "cell.positions",
    "cell.row_indptr",
    "cell.tile_request",
    "cell.tile_kind",
    "cell.tile_min_pos",
    "cell.tile_max_pos",
    "cell.own_lo",
    "cell.own_hi",
];

impl Plan {
    /// Plans a forward with query tiles of at most `tile_queries` rows and key tiles of `tile_keys` keys.
    pub fn new(requests: &[PlanRequest], tile_queries: i64, tile_keys: i64) -> Result<Self, PlanError> {
        for (name, value) in [("tile_queries", tile_queries), ("tile_keys", tile_keys)] {
            if !(1..=i64::from(i32::MAX)).contains(&value) {
                return Err(PlanError::TileSize { name, value });
            }
        }
        let sizes = TileSizes { queries: tile_queries as usize, keys: tile_keys as usize };
        let rows = check(requests)?;
        let parallel = rows >= PARALLEL_ROWS && requests.len() > 1;
        let chunks: Result<Vec<Chunk>, PlanError> = if parallel {
            (0..requests.len()).into_par_iter().map(|number| Chunk::new(requests, number, sizes)).collect()
        } else {
            (0..requests.len()).map(|number| Chunk::new(requests, number, sizes)).collect()
        };
        let chunks = chunks?;
        let mut fields = Vec::with_capacity(SEQ_FIELDS.len() + CELL_FIELDS.len());
        let end = place_fields(&mut fields, &SEQ_FIELDS, chunks.iter().map(|chunk| chunk.seq).sum(), 0);
        let end = place_fields(&mut fields, &CELL_FIELDS, chunks.iter().map(|chunk| chunk.cell).sum(), end);
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(end).map_err(|_| PlanError::Memory { elements: end })?;
        buffer.resize(end, 0);

        let mut slices = carve(&mut buffer, &fields).into_iter();
        let seq = slices.by_ref().take(SEQ_FIELDS.len());
        let seq_passes = Pass::split(seq, false, chunks.iter().map(|chunk| chunk.seq));
        let cell_passes = Pass::split(slices, true, chunks.iter().map(|chunk| chunk.cell));
        let work = chunks.iter().zip(seq_passes).zip(cell_passes).enumerate();
        if parallel {
            let work: Vec<_> = work.collect();
            work.into_par_iter()
                .for_each(|(number, ((chunk, seq), cell))| chunk.write(number, sizes, seq, cell));
        } else {
            work.for_each(|(number, ((chunk, seq), cell))| chunk.write(number, sizes, seq, cell));
        }
        Ok(Self { buffer, fields })
    }

    /// The packed buffer.
    #[must_use]
    pub fn buffer(&self) -> &[i32] {
        &self.buffer
    }

    /// Where the fields are in the buffer.
    #[must_use]
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// The field `name`, such as `seq.rows`.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&[i32]> {
        let field = self.fields.iter().find(|field| field.name == name)?;
        Some(&self.buffer[field.offset..field.offset + field.length])
    }

    /// The buffer and its fields, without a copy.
    #[must_use]
    pub fn into_parts(self) -> (Vec<i32>, Vec<Field>) {
        (self.buffer, self.fields)
    }
}

/// Rows of the batch, if every request is sound.
fn check(requests: &[PlanRequest]) -> Result<usize, PlanError> {
    let limit = i64::from(i32::MAX);
    let mut rows = 0;
    for (number, &PlanRequest { layout, prefix, chunk, row_offset }) in requests.iter().enumerate() {
        if prefix < 0 || chunk < 1 {
            return Err(PlanError::Chunk { request: number, prefix, chunk });
        }
        let length = layout.length() as i64;
        if prefix.checked_add(chunk).is_none_or(|end| end > length) {
            return Err(PlanError::PastEnd { request: number, prefix, chunk, length });
        }
        rows += chunk;
        if row_offset < 0 || row_offset > limit - chunk || rows > limit {
            return Err(PlanError::Rows { request: number, row_offset, chunk });
        }
    }
    Ok(rows as usize)
}

/// Appends the fields of a pass behind `end` and returns the new end.
fn place_fields(
    fields: &mut Vec<Field>,
    names: &[&'static str],
    Extent { rows, tiles }: Extent,
    mut end: usize,
) -> usize {
    let lengths = [rows, rows, tiles + 1].into_iter().chain(std::iter::repeat(tiles));
    for (&name, length) in names.iter().zip(lengths) {
        fields.push(Field { name, offset: end, length });
        end = (end + length).next_multiple_of(ALIGNMENT);
    }
    end
}

/// The fields as disjoint slices.
fn carve<'a>(mut buffer: &'a mut [i32], fields: &[Field]) -> Vec<&'a mut [i32]> {
    let mut at = 0;
    let mut slices = Vec::with_capacity(fields.len());
    for field in fields {
        let (_, rest) = buffer.split_at_mut(field.offset - at);
        let (slice, rest) = rest.split_at_mut(field.length);
        slices.push(slice);
        buffer = rest;
        at = field.offset + field.length;
    }
    slices
}

/// The chunk of one request.
struct Chunk<'a> {
    request: PlanRequest<'a>,
    start: usize,
    end: usize,
    /// Segments that the chunk touches.
    segments: Range<usize>,
    /// Items that the chunk touches, as ranks among the first tokens, ascending.
    items: Vec<usize>,
    /// Cell order, if the chunk touches an item.
    order: &'a [i32],
    seq: Extent,
    cell: Extent,
}

impl<'a> Chunk<'a> {
    fn new(requests: &[PlanRequest<'a>], number: usize, sizes: TileSizes) -> Result<Self, PlanError> {
        let request = &requests[number];
        let layout = request.layout;
        let (start, end) = (request.prefix as usize, (request.prefix + request.chunk) as usize);
        let segments = layout.segments().find(start)..layout.segments().find(end - 1) + 1;
        let mut items: Vec<usize> = layout.segments().item[segments.clone()]
            .iter()
            .filter(|&&item| item >= 0)
            .map(|&item| layout.item(item).0)
            .collect();
        items.sort_unstable();
        items.dedup();
        let refuse = |source| PlanError::Layout { request: number, source };
        let order = if items.is_empty() { &[] } else { layout.tokens(OrderName::Cell).map_err(refuse)? };
        let mut chunk = Self {
            request: *request,
            start,
            end,
            segments,
            items,
            order,
            seq: Extent::default(),
            cell: Extent::default(),
        };
        let mut rows = [0; 3];
        for (kind, part) in chunk.parts() {
            rows[kind as usize] += part.len();
        }
        let [decides, media, interstitial] = rows;
        let tiles = |rows: usize| rows.div_ceil(sizes.queries);
        chunk.seq = Extent { rows: end - start, tiles: tiles(media + interstitial) + tiles(decides) };
        let mut count = Count(tiles(interstitial));
        chunk.walk_cells(sizes, &mut count);
        chunk.cell = Extent { rows: media + interstitial, tiles: count.0 };
        Ok(chunk)
    }

    /// Kind and token range of each segment's part in the chunk.
    fn parts(&self) -> impl Iterator<Item = (u8, Range<usize>)> + '_ {
        let segments = self.request.layout.segments();
        self.segments.clone().map(move |s| {
            let start = segments.start[s] as usize;
            let end = start + segments.length[s] as usize;
            (segments.kind[s], start.max(self.start)..end.min(self.end))
        })
    }

    /// Cuts the chunk's rows of items into tiles of whole cells where they fit.
    fn walk_cells(&self, sizes: TileSizes, sink: &mut impl Tiles) {
        for &rank in &self.items {
            let (item, cells) = self.request.layout.ranked(rank);
            walk_item(item, cells, self.start..self.end, sizes.queries, sink);
        }
    }

    fn write(&self, number: usize, sizes: TileSizes, mut seq: Pass, mut cell: Pass) {
        let row_shift = self.request.row_offset - self.request.prefix;
        let mut pass = PassWriter::new(&mut seq, number, row_shift, sizes);
        let decides = |kind: u8| kind == Kind::Decides as u8;
        pass.write_range(Kind::Media, self.parts().filter(|part| !decides(part.0)).map(|part| part.1), 0..0);
        pass.write_range(Kind::Decides, self.parts().filter(|part| decides(part.0)).map(|part| part.1), 0..0);
        let text = 0..self.request.layout.runs(OrderName::Cell)[1] as usize;
        let mut pass = PassWriter::new(&mut cell, number, row_shift, sizes);
        pass.order = self.order;
        pass.kind = Kind::Interstitial;
        let interstitial = self.parts().filter(|part| part.0 == Kind::Interstitial as u8).map(|part| part.1);
        pass.write_range(Kind::Interstitial, interstitial, text);
        pass.kind = Kind::Media;
        self.walk_cells(sizes, &mut pass);
    }
}

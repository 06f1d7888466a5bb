//! Writing cell order and its inverse. Nothing is sorted: both follow from the segments, the items' frames and the
//! cells of a frame.

use std::ops::Range;

use crate::buffer::Rest;
use crate::cell::CellTable;
use crate::order::ItemCells;
use crate::segment::{ItemGeometry, Segments};

/// Orders of fewer tokens are written by one thread: at a million tokens that takes less time than a busy machine may
/// take to wake another one.
const PARALLEL_TOKENS: usize = 1 << 22;

/// Tokens that one thread writes at a time.
const GRAIN: usize = 1 << 17;

/// What cell order follows from.
#[derive(Clone, Copy)]
pub(crate) struct CellOrder<'a> {
    pub(crate) segments: &'a Segments,
    /// By first token, as `cells`.
    pub(crate) items: &'a [ItemGeometry],
    pub(crate) cells: &'a [ItemCells],
    /// Index in `items` of the caller's item.
    pub(crate) rank: &'a [u32],
    pub(crate) runs: &'a [i32],
}

impl CellOrder<'_> {
    /// Writes the token position at each order position.
    pub(crate) fn write_tokens(self, out: &mut [i32]) {
        let frames = Frames::of(self.items);
        self.write_runs(0..self.runs.len() - 1, grain(out.len()), &frames, out);
    }

    fn write_runs(self, runs: Range<usize>, grain: usize, frames: &Frames, out: &mut [i32]) {
        if out.len() <= grain || runs.len() == 1 {
            return self.write_some_runs(runs, frames, out);
        }
        let first = self.runs[runs.start];
        let half = first + (out.len() / 2) as i32;
        let inner = runs.start + 1..runs.end;
        let mid = inner.start + self.runs[inner.clone()].partition_point(|&start| start < half);
        let mid = mid.min(inner.end - 1);
        let (head, tail) = out.split_at_mut((self.runs[mid] - first) as usize);
        rayon::join(
            || self.write_runs(runs.start..mid, grain, frames, head),
            || self.write_runs(mid..runs.end, grain, frames, tail),
        );
    }

    fn write_some_runs(self, runs: Range<usize>, frames: &Frames, out: &mut [i32]) {
        let mut out = Rest(out);
        let mut run = runs.start;
        if run == 0 {
            for s in (0..self.segments.len()).filter(|&s| self.segments.item[s] < 0) {
                ascend(self.segments.start[s], out.take(self.segments.length[s] as usize));
            }
            run = 1;
        }
        let mut rank = self.cells.partition_point(|cells| cells.first_run <= run).saturating_sub(1);
        while run < runs.end {
            let (item, cells) = (&self.items[rank], &self.cells[rank]);
            let first = run - cells.first_run;
            let end = cells.table.len().min(runs.end - cells.first_run);
            let places = cells.table.places(first..end);
            // A cell of the item may write beyond its end, where the next one has yet to write.
            let own = out.take(places.len() * cells.frames);
            write_cells(item, cells.table.size(), places, frames.of_item(rank), own);
            run = cells.first_run + end;
            rank += 1;
        }
    }

    /// Writes `map(order position)` of each token position.
    pub(crate) fn write_inverse(self, out: &mut [i32], map: impl Fn(i32) -> i32 + Copy + Sync) {
        self.write_positions(0..out.len(), grain(out.len()), out, map);
    }

    fn write_positions(
        self,
        tokens: Range<usize>,
        grain: usize,
        out: &mut [i32],
        map: impl Fn(i32) -> i32 + Copy + Sync,
    ) {
        if out.len() > grain {
            let mid = tokens.start + out.len() / 2;
            let (head, tail) = out.split_at_mut(out.len() / 2);
            rayon::join(
                || self.write_positions(tokens.start..mid, grain, head, map),
                || self.write_positions(mid..tokens.end, grain, tail, map),
            );
            return;
        }
        let mut rest = Rest(out);
        let mut bases = Bases::default();
        let mut at = tokens.start;
        for s in self.segments.find(at).. {
            if at == tokens.end {
                break;
            }
            let start = self.segments.start[s] as usize;
            let end = tokens.end.min(start + self.segments.length[s] as usize);
            let own = rest.take(end - at);
            let ordinal = self.segments.ordinal[s] as usize + (at - start);
            at = end;
            // All text is one run, the first one.
            let mut run = 0;
            if let Ok(number) = usize::try_from(self.segments.item[s]) {
                let rank = self.rank[number] as usize;
                if self.items[rank].grid.is_some() {
                    write_frames(&self.cells[rank], ordinal, &mut bases, own, map);
                    continue;
                }
                run = self.cells[rank].start;
            }
            let first = (run + ordinal) as i32;
            own.iter_mut().zip(first..).for_each(|(slot, position)| *slot = map(position));
        }
    }
}

fn grain(tokens: usize) -> usize {
    if tokens < PARALLEL_TOKENS { usize::MAX } else { GRAIN }
}

fn ascend(first: i32, out: &mut [i32]) {
    out.iter_mut().zip(first..).for_each(|(slot, token)| *slot = token);
}

/// Per item the first token of each frame, or every token if a span boundary lies inside a frame.
struct Frames {
    tokens: Vec<i32>,
    /// End of each item's part of `tokens`.
    ends: Vec<usize>,
}

impl Frames {
    fn of(items: &[ItemGeometry]) -> Self {
        let mut frames = Self { tokens: Vec::new(), ends: Vec::with_capacity(items.len()) };
        for item in items {
            if item.whole_frames {
                item.each_frame(|start| frames.tokens.push(start as i32));
            } else if item.grid.is_some() {
                frames.tokens.extend(item.spans.iter().flat_map(|span| span.start as i32..span.end as i32));
            }
            frames.ends.push(frames.tokens.len());
        }
        frames
    }

    fn of_item(&self, rank: usize) -> &[i32] {
        let start = rank.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.tokens[start..self.ends[rank]]
    }
}

/// Writes the tokens of an item's cells of `size` places, the last one maybe fewer.
fn write_cells(item: &ItemGeometry, size: usize, places: &[u32], frames: &[i32], out: &mut [i32]) {
    let mut out = Rest(out);
    if item.grid.is_none() {
        for span in &item.spans {
            ascend(span.start as i32, out.take(span.end - span.start));
        }
    } else if !item.whole_frames {
        let area = item.grid.map_or(1, crate::segment::Grid::area);
        for cell in places.chunks(size) {
            for frame in frames.chunks(area) {
                let slots = out.take(cell.len()).iter_mut();
                slots.zip(cell).for_each(|(slot, &p)| *slot = frame[p as usize]);
            }
        }
    } else if let &[start] = frames {
        out.0.iter_mut().zip(places).for_each(|(slot, &p)| *slot = start + p as i32);
    } else {
        for cell in places.chunks(size) {
            match cell.len() {
                1 => out.0.iter_mut().zip(frames).for_each(|(slot, &start)| *slot = start + cell[0] as i32),
                2..=4 => write_lanes::<4>(cell, frames, out.0),
                5..=8 => write_lanes::<8>(cell, frames, out.0),
                9..=16 => write_lanes::<16>(cell, frames, out.0),
                _ => write_frame_by_frame(cell, frames, out.0),
            }
            out.take(cell.len() * frames.len());
        }
    }
}

/// Writes a cell of at most `N` places: `N` lanes per frame, of which the next frame overwrites those beyond the cell.
/// What lies behind the last frame is overwritten too, as far as `out` goes.
fn write_lanes<const N: usize>(cell: &[u32], frames: &[i32], out: &mut [i32]) {
    let mut lanes = [0; N];
    lanes.iter_mut().zip(cell).for_each(|(lane, &p)| *lane = p as i32);
    let fit = (out.len() + cell.len()).saturating_sub(N) / cell.len();
    let (wide, narrow) = frames.split_at(fit.min(frames.len()));
    let mut at = 0;
    for &start in wide {
        out[at..at + N].iter_mut().zip(lanes).for_each(|(slot, lane)| *slot = start + lane);
        at += cell.len();
    }
    write_frame_by_frame(cell, narrow, &mut out[at..]);
}

fn write_frame_by_frame(cell: &[u32], frames: &[i32], out: &mut [i32]) {
    for (slots, &start) in out.chunks_exact_mut(cell.len()).zip(frames) {
        slots.iter_mut().zip(cell).for_each(|(slot, &p)| *slot = start + p as i32);
    }
}

/// Order position of each place of an item's first frame, from the item's first one; the last table's are kept.
#[derive(Default)]
struct Bases<'a> {
    of: Option<(&'a CellTable, usize)>,
    positions: Vec<i32>,
}

impl<'a> Bases<'a> {
    fn get(&mut self, table: &'a CellTable, frames: usize) -> &[i32] {
        if !self.of.is_some_and(|(of, count)| std::ptr::eq(of, table) && count == frames) {
            self.of = Some((table, frames));
            self.positions.clear();
            self.positions.extend(table.first_frame(0..table.area(), frames));
        }
        &self.positions
    }
}

/// Writes the order positions of an item's tokens from `ordinal` on.
fn write_frames<'a>(
    cells: &'a ItemCells,
    ordinal: usize,
    bases: &mut Bases<'a>,
    out: &mut [i32],
    map: impl Fn(i32) -> i32,
) {
    let mut out = Rest(out);
    let table = &*cells.table;
    let (mut frame, mut place) = (ordinal / table.area(), ordinal % table.area());
    while !out.0.is_empty() {
        let count = out.0.len().min(table.area() - place);
        let slots = out.take(count);
        // Each frame takes `size` positions of a cell's run. In a short last cell the sum may leave the int32
        // range, but that cell is written below.
        let shift = (cells.start + frame * table.size()) as i32;
        if count == table.area() {
            let bases = bases.get(table, cells.frames);
            slots.iter_mut().zip(bases).for_each(|(slot, base)| *slot = map(base.wrapping_add(shift)));
        } else {
            let bases = table.first_frame(place..place + count, cells.frames);
            slots.iter_mut().zip(bases).for_each(|(slot, base)| *slot = map(base.wrapping_add(shift)));
        }
        let short = table.short_cell();
        let shift = (cells.start + frame * short.len()) as i32;
        for p in short.iter().map(|&p| p as usize).filter(|p| (place..place + count).contains(p)) {
            let base: i32 = table.first_frame(p..p + 1, cells.frames).sum();
            slots[p - place] = map(base + shift);
        }
        (frame, place) = (frame + 1, 0);
    }
}

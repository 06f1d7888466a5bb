//! What is where: items, their geometry, and the segments that partition a sequence.

use crate::error::LayoutError;

/// Most items that one request may hold.
pub const MAX_ITEMS: usize = 1 << 20;

/// Modality of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Modality {
    /// Text, and every token outside an item's spans.
    Text = 0,
    /// Image.
    Image = 1,
    /// Video.
    Video = 2,
    /// Audio.
    Audio = 3,
}

/// What a token does in the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// Text outside the extent of every item: instructions and questions, the rows that decide.
    Decides = 0,
    /// A token of an item.
    Media = 1,
    /// Text strictly between the first and the last span of an item: timestamps and separators.
    Interstitial = 2,
}

/// Frame grid of an item after spatial merging and temporal patching.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Frames.
    pub frames: i64,
    /// Rows of a frame.
    pub rows: i64,
    /// Columns of a frame.
    pub cols: i64,
}

impl Grid {
    /// Spatial positions of a frame.
    #[must_use]
    pub fn area(self) -> usize {
        (self.rows * self.cols) as usize
    }
}

/// One image, video or audio clip as the caller describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Image, video or audio.
    pub modality: Modality,
    /// Inclusive token spans in any order; text may lie between them.
    pub spans: Vec<(i64, i64)>,
    /// Frame grid, if it is known.
    pub grid: Option<Grid>,
}

/// (modality number, inclusive spans, (frames, rows, cols)) of an item.
pub type RawItem = (i64, Vec<(i64, i64)>, Option<(i64, i64, i64)>);

impl Item {
    /// Items from their raw form.
    pub fn from_raw(items: Vec<RawItem>) -> Result<Vec<Self>, LayoutError> {
        let convert = |(item, (modality, spans, grid)): (usize, RawItem)| {
            let modality = match modality {
                1 => Modality::Image,
                2 => Modality::Video,
                3 => Modality::Audio,
                _ => return Err(LayoutError::Modality { item, modality }),
            };
            let grid = grid.map(|(frames, rows, cols)| Grid { frames, rows, cols });
            Ok(Self { modality, spans, grid })
        };
        items.into_iter().enumerate().map(convert).collect()
    }
}

/// Consecutive tokens `start..end` of one item; `ordinal` tokens of the item lie before them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) ordinal: usize,
}

/// A checked item: token `ordinal` of the item is at frame `ordinal / area`, place `ordinal % area`.
#[derive(Debug)]
pub(crate) struct ItemGeometry {
    /// Index in the caller's list.
    pub(crate) number: usize,
    pub(crate) modality: Modality,
    /// Ascending, and merged where they touch.
    pub(crate) spans: Vec<Span>,
    pub(crate) tokens: usize,
    pub(crate) grid: Option<Grid>,
    /// The item has a grid, and no span ends inside a frame.
    pub(crate) whole_frames: bool,
    /// Largest distance between the first tokens of consecutive frames, the frame's area for a
    /// single frame, 0 without a grid.
    pub(crate) frame_stride: usize,
}

impl ItemGeometry {
    pub(crate) fn first(&self) -> usize {
        self.spans[0].start
    }

    /// One past the last token.
    pub(crate) fn end(&self) -> usize {
        self.spans[self.spans.len() - 1].end
    }

    /// How many tokens of the item lie before token position `position`.
    pub(crate) fn ordinals_before(&self, position: usize) -> usize {
        match self.spans.partition_point(|span| span.start < position) {
            0 => 0,
            after => {
                let span = &self.spans[after - 1];
                span.ordinal + position.min(span.end) - span.start
            }
        }
    }

    /// Calls `visit` with the token position of each frame's first token. Nothing without a grid.
    pub(crate) fn each_frame(&self, mut visit: impl FnMut(usize)) {
        let Some(grid) = self.grid else { return };
        let mut ordinal = 0;
        for span in &self.spans {
            while ordinal < span.ordinal + (span.end - span.start) {
                visit(span.start + (ordinal - span.ordinal));
                ordinal += grid.area();
            }
        }
    }

    fn measure_frames(&mut self) {
        let Some(area) = self.grid.map(Grid::area) else { return };
        let (mut stride, mut last, mut aligned) = (0, None, 0);
        self.each_frame(|start| {
            stride = last.map_or(0, |last| start - last).max(stride);
            last = Some(start);
            aligned += usize::from(self.spans.get(aligned).is_some_and(|span| span.start == start));
        });
        self.frame_stride = if stride == 0 { area } else { stride };
        // Every span starts with a frame, so every frame ends before the next span.
        self.whole_frames = aligned == self.spans.len();
    }
}

/// Maximal runs of tokens of one item or of text; they partition the sequence.
#[derive(Debug, Default)]
pub struct Segments {
    /// First token of each segment, ascending from 0.
    pub start: Vec<i32>,
    /// Tokens of each segment, at least 1.
    pub length: Vec<i32>,
    /// Modality of each segment (0 text, 1 image, 2 video, 3 audio).
    pub modality: Vec<u8>,
    /// Index of each segment's item in the caller's list, -1 for text.
    pub item: Vec<i32>,
    /// Kind of each segment's tokens (see [`Kind`]).
    pub kind: Vec<u8>,
    /// Tokens of the segment's item, or of text, that lie before it.
    pub(crate) ordinal: Vec<i32>,
}

impl Segments {
    fn with_capacity(segments: usize) -> Self {
        Self {
            start: Vec::with_capacity(segments),
            length: Vec::with_capacity(segments),
            modality: Vec::with_capacity(segments),
            item: Vec::with_capacity(segments),
            kind: Vec::with_capacity(segments),
            ordinal: Vec::with_capacity(segments),
        }
    }

    /// Number of segments.
    #[must_use]
    pub fn len(&self) -> usize {
        self.start.len()
    }

    /// Never true for the segments of a layout.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start.is_empty()
    }

    /// Kind of every token.
    pub(crate) fn expand_kinds(&self, length: usize) -> Vec<u8> {
        let mut kinds = vec![0; length];
        for ((&start, &length), &kind) in self.start.iter().zip(&self.length).zip(&self.kind) {
            kinds[start as usize..(start + length) as usize].fill(kind);
        }
        kinds
    }

    /// Index of the segment that holds token `position`.
    pub(crate) fn find(&self, position: usize) -> usize {
        self.start.partition_point(|&start| start as usize <= position) - 1
    }

    fn push(
        &mut self,
        (start, end): (usize, usize),
        modality: Modality,
        item: i32,
        kind: Kind,
        ordinal: usize,
    ) {
        self.start.push(start as i32);
        self.length.push((end - start) as i32);
        self.modality.push(modality as u8);
        self.item.push(item);
        self.kind.push(kind as u8);
        self.ordinal.push(ordinal as i32);
    }
}

/// Checks the items and returns them by first token, with the segments they make of `0..length`.
pub(crate) fn segment(length: i64, items: &[Item]) -> Result<(Vec<ItemGeometry>, Segments), LayoutError> {
    if !(1..=i64::from(i32::MAX)).contains(&length) {
        return Err(LayoutError::Length { length });
    }
    if items.len() > MAX_ITEMS {
        return Err(LayoutError::TooManyItems { count: items.len(), limit: MAX_ITEMS });
    }
    let mut spans = Vec::with_capacity(items.iter().map(|item| item.spans.len()).sum());
    for (number, item) in items.iter().enumerate() {
        check_spans(number, item, length)?;
        spans.extend(item.spans.iter().map(|&(start, end)| (start, end, number)));
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        let ((other_start, other_end, other), (start, end, item)) = (pair[0], pair[1]);
        if start <= other_end {
            return Err(LayoutError::Overlap { item, start, end, other, other_start, other_end });
        }
    }
    let mut geometry = Vec::with_capacity(items.len());
    for (number, item) in items.iter().enumerate() {
        geometry.push(measure(number, item)?);
    }
    let segments = partition(length as usize, &spans, &geometry);
    geometry.sort_unstable_by_key(ItemGeometry::first);
    Ok((geometry, segments))
}

fn check_spans(number: usize, item: &Item, length: i64) -> Result<(), LayoutError> {
    if item.modality == Modality::Text {
        return Err(LayoutError::Modality { item: number, modality: 0 });
    }
    if item.spans.is_empty() {
        return Err(LayoutError::NoSpans { item: number });
    }
    for &(start, end) in &item.spans {
        if start > end {
            return Err(LayoutError::Reversed { item: number, start, end });
        }
        if start < 0 || end >= length {
            return Err(LayoutError::OutOfRange { item: number, start, end, length });
        }
    }
    Ok(())
}

/// The geometry of an item whose spans are in range and disjoint.
fn measure(number: usize, item: &Item) -> Result<ItemGeometry, LayoutError> {
    let mut sorted = item.spans.clone();
    sorted.sort_unstable();
    let mut spans: Vec<Span> = Vec::with_capacity(sorted.len());
    let mut tokens = 0;
    for (start, end) in sorted {
        let (start, end) = (start as usize, end as usize + 1);
        match spans.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => spans.push(Span { start, end, ordinal: tokens }),
        }
        tokens += end - start;
    }
    if let Some(Grid { frames, rows, cols }) = item.grid {
        if frames < 1 || rows < 1 || cols < 1 {
            return Err(LayoutError::GridDimension { item: number, frames, rows, cols });
        }
        let product = rows.checked_mul(cols).and_then(|area| area.checked_mul(frames));
        if product != Some(tokens as i64) {
            return Err(LayoutError::GridMismatch {
                item: number,
                frames,
                rows,
                cols,
                tokens: tokens as i64,
            });
        }
    }
    let (modality, grid) = (item.modality, item.grid);
    let mut geometry =
        ItemGeometry { number, modality, spans, tokens, grid, whole_frames: false, frame_stride: 0 };
    geometry.measure_frames();
    Ok(geometry)
}

/// Segments of `0..length` from disjoint spans in ascending order; `geometry` by item number.
fn partition(length: usize, spans: &[(i64, i64, usize)], geometry: &[ItemGeometry]) -> Segments {
    let mut segments = Segments::with_capacity(2 * spans.len() + 1);
    let mut position = 0;
    // One past the last token of the items that have started: text before it is inside an item.
    let mut extent = 0;
    // Tokens so far, of text and of each item.
    let mut text = 0;
    let mut held = vec![0; geometry.len()];
    for &(start, end, number) in spans {
        let (start, end) = (start as usize, end as usize + 1);
        let item = &geometry[number];
        if start > position {
            let kind = if position < extent { Kind::Interstitial } else { Kind::Decides };
            segments.push((position, start), Modality::Text, -1, kind, text);
            text += start - position;
        }
        match segments.item.last() {
            Some(&last) if start == position && last == number as i32 => {
                *segments.length.last_mut().expect("as long as item") += (end - start) as i32;
            }
            _ => segments.push((start, end), item.modality, number as i32, Kind::Media, held[number]),
        }
        held[number] += end - start;
        extent = extent.max(item.end());
        position = end;
    }
    if position < length {
        segments.push((position, length), Modality::Text, -1, Kind::Decides, text);
    }
    segments
}

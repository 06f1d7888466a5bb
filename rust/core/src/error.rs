//! Typed errors. Each message names the offending value and says what to do.

use thiserror::Error;

/// Why a request's layout was refused. `item` is the item's index in the list that was given.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The sequence length is not in `1..2^31`.
    #[error("length {length} is outside 1..2147483647: give the request's number of prompt tokens")]
    Length {
        /// The length that was given.
        length: i64,
    },
    /// `chunk_tokens`, `tile_queries`, `cell_size` or `tile_keys` has no meaning.
    #[error("{name} is {value}: give {expected}")]
    Option {
        /// The option's name.
        name: &'static str,
        /// The value that was given.
        value: i64,
        /// What the option accepts.
        expected: &'static str,
    },
    /// More items than a request may hold.
    #[error("{count} items, more than the {limit} a request may hold: run this request dense")]
    TooManyItems {
        /// The number of items that was given.
        count: usize,
        /// The most that is accepted.
        limit: usize,
    },
    /// An item's modality is text or unknown.
    #[error("item {item}: modality {modality} is not one of 1 (image), 2 (video), 3 (audio)")]
    Modality {
        /// The item.
        item: usize,
        /// The modality's number.
        modality: i64,
    },
    /// An item without a span.
    #[error("item {item}: no spans: leave the item out or give its token spans")]
    NoSpans {
        /// The item.
        item: usize,
    },
    /// A span that ends before it starts.
    #[error("item {item}: span ({start}, {end}) is reversed: spans are inclusive (start, end), start <= end")]
    Reversed {
        /// The item.
        item: usize,
        /// First token of the span.
        start: i64,
        /// Last token of the span.
        end: i64,
    },
    /// A span outside the sequence.
    #[error(
        "item {item}: span ({start}, {end}) is outside 0..{length}: \
         give absolute, inclusive positions of the expanded prompt"
    )]
    OutOfRange {
        /// The item.
        item: usize,
        /// First token of the span.
        start: i64,
        /// Last token of the span.
        end: i64,
        /// Length of the sequence.
        length: i64,
    },
    /// Two spans share a token.
    #[error(
        "item {item}: span ({start}, {end}) overlaps span ({other_start}, {other_end}) of item {other}: \
         give every token to one item at most"
    )]
    Overlap {
        /// The item of the span that starts later.
        item: usize,
        /// First token of that span.
        start: i64,
        /// Last token of that span.
        end: i64,
        /// The item it collides with.
        other: usize,
        /// First token of the other span.
        other_start: i64,
        /// Last token of the other span.
        other_end: i64,
    },
    /// A frame grid with a dimension below one.
    #[error(
        "item {item}: grid {frames} x {rows} x {cols} has a dimension below 1: pass no grid if it is unknown"
    )]
    GridDimension {
        /// The item.
        item: usize,
        /// Frames.
        frames: i64,
        /// Rows of a frame.
        rows: i64,
        /// Columns of a frame.
        cols: i64,
    },
    /// A frame grid whose product is not the number of tokens in the spans.
    #[error(
        "item {item}: grid {frames} x {rows} x {cols} does not match its {tokens} span tokens: \
         give the grid after merging, or none"
    )]
    GridMismatch {
        /// The item.
        item: usize,
        /// Frames.
        frames: i64,
        /// Rows of a frame.
        rows: i64,
        /// Columns of a frame.
        cols: i64,
        /// Tokens in the item's spans.
        tokens: i64,
    },
    /// An item that the layout does not have.
    #[error("no item {item} among the {items} of this layout")]
    NoItem {
        /// The item that was asked for.
        item: usize,
        /// Items of the layout.
        items: usize,
    },
    /// An unknown token order.
    #[error("no token order `{name}`: name sequence, modality or cell")]
    OrderName {
        /// The name that was given.
        name: String,
    },
    /// The arrays of the layout do not fit in memory.
    #[error("no memory for {elements} elements of a token order: run this request dense")]
    Memory {
        /// Elements of the array that could not be allocated.
        elements: usize,
    },
}

/// Why a forward's plan was refused. `request` is the index in the list that was given.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A tile size below one.
    #[error("{name} is {value}: give a tile size in 1..2147483647")]
    TileSize {
        /// `tile_queries` or `tile_keys`.
        name: &'static str,
        /// The value that was given.
        value: i64,
    },
    /// A chunk without tokens, or a negative prefix.
    #[error(
        "request {request}: prefix {prefix}, chunk {chunk}: the prefix must be >= 0 and the chunk >= 1 token"
    )]
    Chunk {
        /// The request.
        request: usize,
        /// Prefix length.
        prefix: i64,
        /// Chunk length.
        chunk: i64,
    },
    /// A chunk that ends behind the sequence.
    #[error(
        "request {request}: prefix {prefix} + chunk {chunk} exceeds the layout's length {length}: \
         build the layout for the whole sequence"
    )]
    PastEnd {
        /// The request.
        request: usize,
        /// Prefix length.
        prefix: i64,
        /// Chunk length.
        chunk: i64,
        /// Length of the layout.
        length: i64,
    },
    /// Batch rows that do not fit int32.
    #[error(
        "request {request}: rows {row_offset} to {row_offset} + {chunk} leave the int32 range of a batch"
    )]
    Rows {
        /// The request.
        request: usize,
        /// First row of the request.
        row_offset: i64,
        /// Chunk length.
        chunk: i64,
    },
    /// The layout's arrays cannot be made.
    #[error("request {request}: {source}")]
    Layout {
        /// The request.
        request: usize,
        /// Why.
        source: LayoutError,
    },
    /// The packed buffer does not fit in memory.
    #[error("no memory for a plan of {elements} elements: send fewer tokens per forward")]
    Memory {
        /// Elements of the buffer.
        elements: usize,
    },
}

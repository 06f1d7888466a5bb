//! Arbitrary requests never panic: they are refused with an error that can be told, or laid out and planned so that
//! the orders are permutations and every row of the chunks has its place.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mminference_core::{Item, Layout, LayoutOptions, OrderName, Plan, PlanRequest, RawItem};

/// Longest sequence whose arrays are made; longer ones only meet the checks.
const MOST_TOKENS: i64 = 1 << 16;

/// Mostly numbers that mean something, now and then any.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Number {
    Small(u8),
    Medium(u16),
    Any(i64),
}

impl Number {
    fn get(self) -> i64 {
        match self {
            Self::Small(value) => i64::from(value),
            Self::Medium(value) => i64::from(value),
            Self::Any(value) => value,
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Forward {
    chunks: Vec<(Number, Number, Number)>,
    tile_queries: Number,
    tile_keys: Number,
}

/// An item that starts behind the one before it, cut into spans of the given lengths.
#[derive(Arbitrary, Debug)]
struct Clip {
    modality: u8,
    frames: u8,
    rows: u8,
    cols: u8,
    grid_known: bool,
    cuts: Vec<(u16, u8)>,
    lead: u8,
}

#[derive(Arbitrary, Debug)]
enum Items {
    Any(Vec<(Number, Vec<(Number, Number)>, Option<(Number, Number, Number)>)>),
    Sound(Vec<Clip>),
}

#[derive(Arbitrary, Debug)]
struct Request {
    items: Items,
    length: Number,
    chunk_tokens: Number,
    tile_queries: Number,
    cell_size: Option<Number>,
}

impl Request {
    fn raw(&self) -> (i64, Vec<RawItem>) {
        match &self.items {
            Items::Any(items) => {
                let pair = |&(a, b): &(Number, Number)| (a.get(), b.get());
                let raw = |(modality, spans, grid): &(Number, Vec<_>, Option<(Number, Number, Number)>)| {
                    let grid = grid.map(|(frames, rows, cols)| (frames.get(), rows.get(), cols.get()));
                    (modality.get(), spans.iter().map(pair).collect(), grid)
                };
                // A frame of billions of places is sound, and more than this machine's memory.
                let length = self.length.get();
                let length = if length < 1 << 31 { length.min(MOST_TOKENS) } else { length };
                (length, items.iter().map(raw).collect())
            }
            Items::Sound(clips) => {
                let mut end = 0;
                let raw = clips.iter().map(|clip| clip.lay(&mut end)).collect();
                (end + self.length.get().rem_euclid(64), raw)
            }
        }
    }
}

impl Clip {
    fn lay(&self, end: &mut i64) -> RawItem {
        let side = |value: u8| 1 + i64::from(value % 24);
        let (frames, rows, cols) = (1 + i64::from(self.frames % 16), side(self.rows), side(self.cols));
        let mut left = frames * rows * cols;
        *end += i64::from(self.lead % 32);
        let mut spans = Vec::new();
        for &(length, gap) in self.cuts.iter().chain([&(u16::MAX, 0)]) {
            let length = (1 + i64::from(length)).min(left);
            if length == 0 {
                break;
            }
            spans.push((*end, *end + length - 1));
            *end += length + i64::from(gap % 16);
            left -= length;
        }
        (1 + i64::from(self.modality % 3), spans, self.grid_known.then_some((frames, rows, cols)))
    }
}

fn check(layout: &Layout, tile_keys: i64) {
    let length = layout.length();
    for name in [OrderName::Sequence, OrderName::Modality, OrderName::Cell] {
        let (tokens, inverse) = (layout.tokens(name).expect("memory"), layout.inverse(name).expect("memory"));
        assert!(tokens.len() == length && inverse.len() == length);
        assert!(tokens.iter().zip(0..).all(|(&token, at)| inverse[token as usize] == at));
        for ends in layout.runs(name).windows(2) {
            assert!(tokens[ends[0] as usize..ends[1] as usize].is_sorted_by(|a, b| a < b));
        }
        match (layout.key_tiles(name, tile_keys), layout.key_tile_of_token(name, tile_keys)) {
            (Ok(tiles), Ok(of_token)) => {
                for (token, &tile) in of_token.iter().enumerate() {
                    let bounds = tiles.min_pos[tile as usize]..=tiles.max_pos[tile as usize];
                    assert!(bounds.contains(&(token as i32)));
                }
            }
            (Err(error), Err(same)) => assert_eq!(error.to_string(), same.to_string()),
            _ => panic!("the size is good for both or for none"),
        }
    }
}

fuzz_target!(|input: (Vec<Request>, Forward)| {
    let (requests, forward) = input;
    let mut layouts = Vec::new();
    for request in &requests {
        let (length, raw) = request.raw();
        let options = LayoutOptions {
            chunk_tokens: request.chunk_tokens.get(),
            tile_queries: request.tile_queries.get(),
            cell_size: request.cell_size.map(Number::get),
        };
        match Item::from_raw(raw).and_then(|items| Layout::new(length, &items, &options)) {
            Ok(layout) if layout.length() as i64 <= MOST_TOKENS => layouts.push(layout),
            Ok(_) => {}
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    for layout in &layouts {
        check(layout, forward.tile_keys.get());
    }
    let (queries, keys) = (forward.tile_queries.get(), forward.tile_keys.get());
    let chunks = forward.chunks.iter().map(|&(a, b, c)| (a.get(), b.get(), c.get()));
    let any: Vec<_> = layouts.iter().zip(chunks).map(|(l, (a, b, c))| PlanRequest::new(l, a, b, c)).collect();
    if let Err(error) = Plan::new(&any, queries, keys) {
        assert!(!error.to_string().is_empty());
    }
    // The same numbers as prefixes and chunks that fit, rows one after another.
    let mut rows = 0;
    let mut sound = Vec::new();
    for (layout, &(prefix, chunk, _)) in layouts.iter().zip(&forward.chunks) {
        let prefix = prefix.get().rem_euclid(layout.length() as i64);
        let chunk = 1 + chunk.get().rem_euclid(layout.length() as i64 - prefix);
        sound.push(PlanRequest::new(layout, prefix, chunk, rows));
        rows += chunk;
    }
    let (queries, keys) = (1 + queries.rem_euclid(300), 1 + keys.rem_euclid(300));
    let plan = Plan::new(&sound, queries, keys).expect("sound chunks");
    let mut seen = vec![false; rows as usize];
    for &row in plan.field("seq.rows").expect("a field of every plan") {
        assert!(!std::mem::replace(&mut seen[row as usize], true));
    }
    assert!(seen.iter().all(|&seen| seen));
    let indptr = plan.field("cell.row_indptr").expect("a field of every plan");
    assert!(indptr.windows(2).all(|ends| (1..=queries as i32).contains(&(ends[1] - ends[0]))));
});

//! Random requests for the property tests.

use mminference_core::{Grid, Item, Layout, LayoutOptions, Modality};
use proptest::prelude::*;

/// A request with valid geometry.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) length: i64,
    pub(crate) items: Vec<Item>,
    pub(crate) options: LayoutOptions,
}

impl Request {
    pub(crate) fn layout(&self) -> Layout {
        Layout::new(self.length, &self.items, &self.options).expect("the geometry is valid")
    }

    /// Item and ordinal of every token, the slow way.
    pub(crate) fn owners(&self) -> Vec<Option<(usize, i64)>> {
        let mut owners = vec![None; self.length as usize];
        for (number, item) in self.items.iter().enumerate() {
            let mut tokens: Vec<i64> = item.spans.iter().flat_map(|&(start, end)| start..=end).collect();
            tokens.sort_unstable();
            for (ordinal, token) in tokens.into_iter().enumerate() {
                owners[token as usize] = Some((number, ordinal as i64));
            }
        }
        owners
    }

    /// Kind of every token, the slow way.
    pub(crate) fn kinds(&self) -> Vec<u8> {
        let inside = |token: i64| {
            self.items.iter().any(|item| {
                let first = item.spans.iter().map(|span| span.0).min();
                let last = item.spans.iter().map(|span| span.1).max();
                first < Some(token) && Some(token) < last
            })
        };
        let kind = |(token, owner): (usize, &Option<_>)| match owner {
            Some(_) => 1,
            None => 2 * u8::from(inside(token as i64)),
        };
        self.owners().iter().enumerate().map(kind).collect()
    }
}

/// How an item's tokens are cut into spans.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    OneSpan,
    /// A span per frame, text of random length between (timestamps).
    Frames,
    /// Anywhere, inside frames too.
    Anywhere,
}

#[derive(Debug, Clone)]
struct Draft {
    modality: Modality,
    grid: Option<Grid>,
    cut: Cut,
    cuts: Vec<prop::sample::Index>,
    gaps: Vec<usize>,
    lead: usize,
}

fn draft() -> impl Strategy<Value = Draft> {
    let side = || prop_oneof![4 => 1i64..8, 1 => Just(1i64), 1 => 8i64..24];
    let frames = prop_oneof![1 => Just(1i64), 4 => 1i64..14];
    let grid = (frames, side(), side()).prop_map(|(frames, rows, cols)| Grid { frames, rows, cols });
    let gap = prop_oneof![2 => Just(0usize), 4 => 1usize..6, 1 => 6usize..40];
    (
        prop_oneof![Just(Modality::Image), Just(Modality::Video), Just(Modality::Audio)],
        prop_oneof![1 => grid.clone().prop_map(|grid| (grid, false)), 5 => grid.prop_map(|grid| (grid, true))],
        prop_oneof![Just(Cut::OneSpan), Just(Cut::Frames), Just(Cut::Anywhere)],
        prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        prop::collection::vec(gap.clone(), 14),
        gap,
    )
        .prop_map(|(modality, (grid, known), cut, cuts, gaps, lead)| Draft {
            modality,
            // Without a grid the frames only say how many tokens there are.
            grid: Some(grid).filter(|_| known),
            cut: if known { cut } else { Cut::Anywhere },
            cuts,
            gaps,
            lead,
        })
}

/// The lengths of an item's spans.
fn span_lengths(draft: &Draft) -> Vec<i64> {
    let tokens = draft.grid.map_or(37, |g| g.frames * g.rows * g.cols);
    match draft.cut {
        Cut::OneSpan => vec![tokens],
        Cut::Frames => draft.grid.map_or(vec![tokens], |g| vec![g.rows * g.cols; g.frames as usize]),
        Cut::Anywhere => {
            let mut ends: Vec<i64> =
                draft.cuts.iter().map(|at| 1 + at.index(tokens as usize) as i64).chain([tokens]).collect();
            ends.sort_unstable();
            ends.dedup();
            ends.iter().scan(0, |start, &end| Some(end - std::mem::replace(start, end))).collect()
        }
    }
}

/// Lays the drafts out. `weave` > 0 lets the next item's spans lie between those of the one before.
fn place(drafts: &[Draft], tail: usize, weave: usize, reverse: bool) -> (i64, Vec<Item>) {
    let mut queues: Vec<_> = drafts.iter().map(|draft| span_lengths(draft).into_iter().enumerate()).collect();
    let mut items: Vec<Item> = drafts
        .iter()
        .map(|draft| Item { modality: draft.modality, spans: Vec::new(), grid: draft.grid })
        .collect();
    let mut position = 0;
    let mut step = 0;
    let mut open: Vec<usize> = (0..drafts.len()).collect();
    while !open.is_empty() {
        step += 1;
        let at = if weave > 0 && step % (weave + 1) == 0 { 1.min(open.len() - 1) } else { 0 };
        let number = open[at];
        let Some((index, length)) = queues[number].next() else {
            open.remove(at);
            continue;
        };
        let gap = if index == 0 { drafts[number].lead } else { drafts[number].gaps[index % 14] };
        position += gap as i64;
        items[number].spans.push((position, position + length - 1));
        position += length;
    }
    if reverse {
        items.reverse();
        for item in &mut items {
            item.spans.reverse();
        }
    }
    // A sequence has a token even without items.
    ((position + tail as i64).max(1), items)
}

pub(crate) fn options() -> impl Strategy<Value = LayoutOptions> {
    (prop_oneof![Just(0i64), 1i64..64, 64i64..600], 1i64..40, prop::option::weighted(0.4, 1i64..20)).prop_map(
        |(chunk_tokens, tile_queries, cell_size)| LayoutOptions { chunk_tokens, tile_queries, cell_size },
    )
}

pub(crate) fn request() -> impl Strategy<Value = Request> {
    let weave = prop_oneof![2 => Just(0usize), 1 => 1usize..4];
    (prop::collection::vec(draft(), 0..6), 0usize..40, weave, any::<bool>(), options()).prop_map(
        |(drafts, tail, weave, reverse, options)| {
            let (length, items) = place(&drafts, tail, weave, reverse);
            Request { length, items, options }
        },
    )
}

/// Cases of a property, fewer under Miri.
pub(crate) fn cases(count: u32) -> ProptestConfig {
    ProptestConfig {
        cases: if cfg!(miri) { 4 } else { count },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

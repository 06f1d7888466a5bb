//! Plans of random batches against the definitions.

use std::collections::HashMap;

use crate::common::{Request, cases, request};
use mminference_core::{Item, Layout, LayoutOptions, Modality, OrderName, Plan, PlanRequest};
use proptest::prelude::*;

/// A request with its prefix and chunk.
#[derive(Debug, Clone)]
struct Extend {
    request: Request,
    prefix: i64,
    chunk: i64,
}

fn extend() -> impl Strategy<Value = Extend> {
    (request(), any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()).prop_map(
        |(request, prefix, chunk, whole)| {
            let prefix = if whole { 0 } else { prefix.index(request.length as usize) as i64 };
            let rest = request.length - prefix;
            let chunk = if whole { rest } else { 1 + chunk.index(rest as usize) as i64 };
            Extend { request, prefix, chunk }
        },
    )
}

/// A pass, read back tile by tile.
struct Tile<'a> {
    request: usize,
    kind: i32,
    rows: &'a [i32],
    positions: &'a [i32],
    own: Option<(usize, usize)>,
}

fn tiles<'a>(plan: &'a Plan, pass: &str) -> Vec<Tile<'a>> {
    let field = |name: &str| plan.field(&format!("{pass}.{name}"));
    let required = |name: &str| field(name).expect("a field of every pass");
    let indptr = required("row_indptr");
    assert_eq!(indptr[0], 0);
    assert_eq!(indptr[indptr.len() - 1] as usize, required("rows").len());
    assert_eq!(required("rows").len(), required("positions").len());
    let mut tiles = Vec::new();
    for t in 0..indptr.len() - 1 {
        let slots = indptr[t] as usize..indptr[t + 1] as usize;
        let tile = Tile {
            request: required("tile_request")[t] as usize,
            kind: required("tile_kind")[t],
            rows: &required("rows")[slots.clone()],
            positions: &required("positions")[slots],
            own: field("own_lo").zip(field("own_hi")).map(|(lo, hi)| (lo[t] as usize, hi[t] as usize)),
        };
        assert!(!tile.rows.is_empty());
        assert_eq!(tile.positions.iter().min(), Some(&required("tile_min_pos")[t]));
        assert_eq!(tile.positions.iter().max(), Some(&required("tile_max_pos")[t]));
        tiles.push(tile);
    }
    for name in ["tile_request", "tile_kind", "tile_min_pos", "tile_max_pos"] {
        assert_eq!(required(name).len(), tiles.len());
    }
    tiles
}

/// A batch: its extends, layouts, row offsets and plan.
struct Batch {
    extends: Vec<Extend>,
    layouts: Vec<Layout>,
    offsets: Vec<i64>,
    plan: Plan,
    queries: usize,
    keys: usize,
}

impl Batch {
    fn new(extends: Vec<Extend>, queries: i64, keys: i64) -> Self {
        let layouts: Vec<_> = extends.iter().map(|extend| extend.request.layout()).collect();
        // Decode rows lie between the requests.
        let offsets: Vec<i64> = extends
            .iter()
            .scan(3, |at, extend| Some(std::mem::replace(at, *at + extend.chunk + 2)))
            .collect();
        let requests: Vec<_> = extends
            .iter()
            .zip(&layouts)
            .zip(&offsets)
            .map(|((extend, layout), &row)| PlanRequest::new(layout, extend.prefix, extend.chunk, row))
            .collect();
        let plan = Plan::new(&requests, queries, keys).expect("a valid batch");
        Self { extends, layouts, offsets, plan, queries: queries as usize, keys: keys as usize }
    }

    /// Checks that a pass holds each row of the `wanted` kinds once, at the right position.
    fn check_rows(&self, tiles: &[Tile], wanted: impl Fn(u8) -> bool) -> Result<(), TestCaseError> {
        let mut seen = HashMap::new();
        for tile in tiles {
            prop_assert!(tile.rows.len() <= self.queries);
            let shift = self.offsets[tile.request] - self.extends[tile.request].prefix;
            for (&row, &position) in tile.rows.iter().zip(tile.positions) {
                prop_assert_eq!(i64::from(row), i64::from(position) + shift);
                prop_assert_eq!(seen.insert(row, tile.request), None);
            }
        }
        let mut count = 0;
        for (number, extend) in self.extends.iter().enumerate() {
            let kinds = extend.request.kinds();
            for row in 0..extend.chunk {
                if wanted(kinds[(extend.prefix + row) as usize]) {
                    count += 1;
                    prop_assert_eq!(seen.get(&((self.offsets[number] + row) as i32)), Some(&number));
                }
            }
        }
        prop_assert_eq!(seen.len(), count);
        prop_assert!(tiles.is_sorted_by_key(|tile| tile.request));
        Ok(())
    }
}

/// All tiles but the last of consecutive equal (request, group) are full, and positions ascend through them.
fn check_full_and_ascending<K: PartialEq>(
    tiles: &[&Tile],
    queries: usize,
    group: impl Fn(&Tile) -> K,
) -> Result<(), TestCaseError> {
    for tile in tiles {
        prop_assert!(tile.positions.is_sorted_by(|a, b| a < b));
    }
    for pair in tiles.windows(2) {
        if pair[0].request == pair[1].request && group(pair[0]) == group(pair[1]) {
            prop_assert_eq!(pair[0].rows.len(), queries);
            prop_assert!(pair[0].positions.last() < pair[1].positions.first());
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(3000))]

    #[test]
    fn seq_holds_every_row_once_in_tiles_of_one_kind(
        extends in prop::collection::vec(extend(), 0..4), queries in 1i64..50, keys in 1i64..40,
    ) {
        let batch = Batch::new(extends, queries, keys);
        let tiles = tiles(&batch.plan, "seq");
        batch.check_rows(&tiles, |_| true)?;
        for tile in &tiles {
            let kinds = batch.layouts[tile.request].kinds();
            prop_assert!(tile.own.is_none());
            prop_assert!(tile.positions.iter().all(|&p| i32::from(kinds[p as usize] != 0) == tile.kind));
        }
        check_full_and_ascending(&tiles.iter().collect::<Vec<_>>(), batch.queries, |tile| tile.kind)?;
        // Media before the text that decides.
        for pair in tiles.windows(2) {
            prop_assert!(pair[0].request < pair[1].request || pair[0].kind >= pair[1].kind);
        }
    }

    #[test]
    fn cell_holds_media_and_interstitial_rows_once_with_their_own_keys(
        extends in prop::collection::vec(extend(), 0..4), queries in 1i64..50, keys in 1i64..40,
    ) {
        let batch = Batch::new(extends, queries, keys);
        let tiles = tiles(&batch.plan, "cell");
        batch.check_rows(&tiles, |kind| kind != 0)?;
        for tile in &tiles {
            let layout = &batch.layouts[tile.request];
            let kinds = layout.kinds();
            prop_assert!(tile.positions.iter().all(|&p| i32::from(kinds[p as usize]) == tile.kind));
            // The own key tiles are exactly those from the first to the last run of the tile's rows.
            let (inverse, starts) = (layout.inverse(OrderName::Cell).unwrap(), layout.runs(OrderName::Cell));
            let run = |p: i32| starts.partition_point(|&start| start <= inverse[p as usize]) - 1;
            let runs: Vec<usize> = tile.positions.iter().map(|&p| run(p)).collect();
            let (low, high) = (runs.iter().min().unwrap(), runs.iter().max().unwrap());
            let ends = (starts[*low] as usize / batch.keys, (starts[high + 1] as usize).div_ceil(batch.keys));
            prop_assert_eq!(tile.own, Some(ends));
            // One item per tile.
            prop_assert_eq!(layout.run_items()[*low], layout.run_items()[*high]);
        }
        let (text, media): (Vec<_>, Vec<_>) = tiles.iter().partition(|tile| tile.kind == 2);
        check_full_and_ascending(&text, batch.queries, |tile| tile.kind)?;
        for pair in tiles.windows(2) {
            prop_assert!(pair[0].request < pair[1].request || pair[0].kind >= pair[1].kind);
        }
        // Rows are in cell order, item by item.
        for pair in media.windows(2).filter(|pair| pair[0].request == pair[1].request) {
            let inverse = batch.layouts[pair[0].request].inverse(OrderName::Cell).unwrap();
            let at = |tile: &Tile| tile.positions.iter().map(|&p| inverse[p as usize]).collect::<Vec<_>>();
            let (a, b) = (at(pair[0]), at(pair[1]));
            prop_assert!(a.is_sorted_by(|x, y| x < y) && b.is_sorted_by(|x, y| x < y) && a.last() < b.first());
        }
    }

    #[test]
    fn cells_are_packed_whole(extend in extend(), queries in 1i64..50) {
        let batch = Batch::new(vec![extend], queries, 8);
        let tiles = tiles(&batch.plan, "cell");
        let layout = &batch.layouts[0];
        let (inverse, starts) = (layout.inverse(OrderName::Cell).unwrap(), layout.runs(OrderName::Cell));
        let run = |p: i32| starts.partition_point(|&start| start <= inverse[p as usize]) - 1;
        // Rows of every run in the chunk, and in the tiles.
        let mut whole: HashMap<usize, usize> = HashMap::new();
        let mut parts: Vec<Vec<(usize, usize)>> = Vec::new();
        for tile in tiles.iter().filter(|tile| tile.kind == 1) {
            let mut held: Vec<(usize, usize)> = Vec::new();
            for &p in tile.positions {
                *whole.entry(run(p)).or_default() += 1;
                match held.last_mut() {
                    Some(last) if last.0 == run(p) => last.1 += 1,
                    _ => held.push((run(p), 1)),
                }
            }
            parts.push(held);
        }
        for held in &parts {
            if held.len() > 1 {
                prop_assert!(held.iter().all(|(run, rows)| whole[run] == *rows));
            } else if held[0].1 < whole[&held[0].0] {
                prop_assert!(whole[&held[0].0] > batch.queries);
            }
        }
        // A tile of whole cells is closed only if the next cell of the item does not fit.
        for pair in parts.windows(2) {
            let (last, next) = (pair[0].last().unwrap().0, pair[1][0].0);
            if whole[&last] <= batch.queries && layout.run_items()[last] == layout.run_items()[next] {
                let held: usize = pair[0].iter().map(|part| part.1).sum();
                prop_assert!(held + whole[&next] > batch.queries);
            }
        }
    }

    #[test]
    fn a_batch_is_its_requests(extends in prop::collection::vec(extend(), 1..4), queries in 1i64..50) {
        let batch = Batch::new(extends.clone(), queries, 16);
        for pass in ["seq", "cell"] {
            let all = tiles(&batch.plan, pass);
            for (number, extend) in extends.iter().enumerate() {
                let alone = Batch::new(vec![extend.clone()], queries, 16);
                let mine = all.iter().filter(|tile| tile.request == number);
                let alone_tiles = tiles(&alone.plan, pass);
                prop_assert_eq!(mine.clone().count(), alone_tiles.len());
                for (a, b) in mine.zip(&alone_tiles) {
                    prop_assert_eq!((a.kind, a.positions, a.own), (b.kind, b.positions, b.own));
                }
            }
        }
    }
}

/// A batch above the threshold for threads equals its requests planned alone.
#[test]
#[cfg_attr(miri, ignore = "too many rows for Miri")]
fn parallel_plans_equal_sequential_ones() {
    let grid = mminference_core::Grid { frames: 64, rows: 18, cols: 20 };
    let video = |start: i64| Item {
        modality: Modality::Video,
        spans: (0..64).map(|frame| (start + frame * 370, start + frame * 370 + 359)).collect(),
        grid: Some(grid),
    };
    let options = LayoutOptions { chunk_tokens: 8192, tile_queries: 128, cell_size: None };
    let layouts: Vec<_> =
        (0..5).map(|n| Layout::new(24_000, &[video(7 + n)], &options).expect("a valid video")).collect();
    let requests: Vec<_> =
        layouts.iter().zip(0..).map(|(l, n)| PlanRequest::new(l, 100 * n, 20_000, 20_000 * n)).collect();
    let all = Plan::new(&requests, 128, 64).expect("a valid batch");
    for pass in ["seq", "cell"] {
        let together = tiles(&all, pass);
        for (number, request) in requests.iter().enumerate() {
            let alone = Plan::new(&[*request], 128, 64).expect("a valid request");
            let mine: Vec<_> = together.iter().filter(|tile| tile.request == number).collect();
            let alone = tiles(&alone, pass);
            assert_eq!(mine.len(), alone.len());
            for (a, b) in mine.iter().zip(&alone) {
                assert_eq!((a.kind, a.rows, a.positions, a.own), (b.kind, b.rows, b.positions, b.own));
            }
        }
    }
}

#[test]
fn an_empty_batch_has_no_tiles() {
    let plan = Plan::new(&[], 128, 64).expect("nothing to plan");
    assert_eq!(plan.field("seq.row_indptr"), Some(&[0][..]));
    assert_eq!(plan.field("cell.row_indptr"), Some(&[0][..]));
    assert_eq!(plan.field("cell.own_lo"), Some(&[][..]));
    assert_eq!(plan.field("seq.own_lo"), None);
}

/// Fields are aligned, disjoint and in the buffer.
#[test]
fn fields_are_aligned() {
    let options = LayoutOptions { chunk_tokens: 0, tile_queries: 4, cell_size: None };
    let item = Item { modality: Modality::Audio, spans: vec![(3, 9)], grid: None };
    let layout = Layout::new(20, &[item], &options).expect("a valid clip");
    let plan = Plan::new(&[PlanRequest::new(&layout, 1, 17, 0)], 4, 4).expect("a valid request");
    let mut end = 0;
    for field in plan.fields() {
        assert!(field.offset >= end && field.offset % 16 == 0);
        end = field.offset + field.length;
    }
    assert!(end <= plan.buffer().len());
}

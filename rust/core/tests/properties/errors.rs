//! Bad input is a typed error that carries the item or the request, never a panic.

use crate::common::{cases, request};
use mminference_core::{
    Grid, Item, Layout, LayoutError, LayoutOptions, MAX_ITEMS, Modality, OrderName, Plan, PlanError,
    PlanRequest,
};
use proptest::prelude::*;

const OPTIONS: LayoutOptions = LayoutOptions { chunk_tokens: 64, tile_queries: 16, cell_size: None };

fn item(spans: &[(i64, i64)], grid: Option<(i64, i64, i64)>) -> Item {
    let grid = grid.map(|(frames, rows, cols)| Grid { frames, rows, cols });
    Item { modality: Modality::Video, spans: spans.to_vec(), grid }
}

fn refused(length: i64, items: &[Item]) -> LayoutError {
    Layout::new(length, items, &OPTIONS).expect_err("bad input")
}

#[test]
fn lengths() {
    for length in [i64::MIN, -1, 0, 1 << 31, i64::MAX] {
        assert_eq!(refused(length, &[]), LayoutError::Length { length });
    }
}

#[test]
fn spans() {
    let good = item(&[(0, 3)], None);
    assert_eq!(refused(10, &[good.clone(), item(&[], None)]), LayoutError::NoSpans { item: 1 });
    assert_eq!(
        refused(10, &[good.clone(), item(&[(5, 6), (8, 7)], None)]),
        LayoutError::Reversed { item: 1, start: 8, end: 7 }
    );
    for (start, end) in [(5, 10), (-1, 3), (i64::MIN, i64::MAX), (10, 10)] {
        assert_eq!(
            refused(10, &[good.clone(), item(&[(start, end)], None)]),
            LayoutError::OutOfRange { item: 1, start, end, length: 10 }
        );
    }
    assert_eq!(
        refused(10, &[item(&[(5, 7)], None), item(&[(7, 7)], None)]),
        LayoutError::Overlap { item: 1, start: 7, end: 7, other: 0, other_start: 5, other_end: 7 }
    );
    assert_eq!(
        refused(10, &[item(&[(5, 7), (2, 5)], None)]),
        LayoutError::Overlap { item: 0, start: 5, end: 7, other: 0, other_start: 2, other_end: 5 }
    );
    let text = Item { modality: Modality::Text, ..good };
    assert_eq!(refused(10, &[text]), LayoutError::Modality { item: 0, modality: 0 });
}

#[test]
fn grids() {
    for (frames, rows, cols) in [(0, 2, 2), (2, -1, 2), (1, 4, 0), (-2, -2, 1)] {
        assert_eq!(
            refused(10, &[item(&[(0, 3)], Some((frames, rows, cols)))]),
            LayoutError::GridDimension { item: 0, frames, rows, cols }
        );
    }
    for (frames, rows, cols) in
        [(1, 2, 3), (i64::MAX, i64::MAX, i64::MAX), (1 << 32, 1 << 32, 1), (4, 1 << 62, 1)]
    {
        assert_eq!(
            refused(10, &[item(&[(0, 3)], Some((frames, rows, cols)))]),
            LayoutError::GridMismatch { item: 0, frames, rows, cols, tokens: 4 }
        );
    }
}

#[test]
fn options_and_names() {
    for options in [
        LayoutOptions { chunk_tokens: -1, ..OPTIONS },
        LayoutOptions { tile_queries: 0, ..OPTIONS },
        LayoutOptions { cell_size: Some(0), ..OPTIONS },
        LayoutOptions { cell_size: Some(i64::MAX), ..OPTIONS },
    ] {
        assert!(matches!(Layout::new(10, &[], &options), Err(LayoutError::Option { .. })), "{options:?}");
    }
    let layout = Layout::new(10, &[item(&[(0, 3)], None)], &OPTIONS).unwrap();
    for tile_keys in [i64::MIN, 0, 1 << 31] {
        assert!(matches!(layout.key_tiles(OrderName::Cell, tile_keys), Err(LayoutError::Option { .. })));
    }
    assert_eq!("grid".parse::<OrderName>(), Err(LayoutError::OrderName { name: "grid".into() }));
    assert_eq!(layout.cell_size(1), Err(LayoutError::NoItem { item: 1, items: 1 }));
    assert_eq!(layout.frame_stride(usize::MAX), Err(LayoutError::NoItem { item: usize::MAX, items: 1 }));
}

#[test]
#[cfg_attr(miri, ignore = "a million items take Miri minutes")]
fn item_count() {
    let items = vec![item(&[], None); MAX_ITEMS + 1];
    assert_eq!(refused(10, &items), LayoutError::TooManyItems { count: MAX_ITEMS + 1, limit: MAX_ITEMS });
}

#[test]
fn raw_modalities() {
    for modality in [i64::MIN, 0, 4] {
        let raw = vec![(2, vec![(0, 1)], None), (modality, vec![(3, 4)], None)];
        assert_eq!(Item::from_raw(raw), Err(LayoutError::Modality { item: 1, modality }));
    }
}

#[test]
fn plans() {
    let layout = Layout::new(100, &[item(&[(10, 39)], Some((5, 2, 3)))], &OPTIONS).unwrap();
    let plan = |prefix, chunk, row| Plan::new(&[PlanRequest::new(&layout, prefix, chunk, row)], 16, 8).err();
    assert_eq!(plan(0, 100, 0), None);
    assert_eq!(plan(0, 0, 0), Some(PlanError::Chunk { request: 0, prefix: 0, chunk: 0 }));
    assert_eq!(plan(-1, 4, 0), Some(PlanError::Chunk { request: 0, prefix: -1, chunk: 4 }));
    assert_eq!(plan(97, 4, 0), Some(PlanError::PastEnd { request: 0, prefix: 97, chunk: 4, length: 100 }));
    let huge = i64::MAX;
    assert_eq!(
        plan(huge, huge, 0),
        Some(PlanError::PastEnd { request: 0, prefix: huge, chunk: huge, length: 100 })
    );
    for row_offset in [-1, i64::from(i32::MAX) - 3, i64::MAX] {
        assert_eq!(plan(0, 4, row_offset), Some(PlanError::Rows { request: 0, row_offset, chunk: 4 }));
    }
    let requests = [PlanRequest::new(&layout, 0, 4, 0)];
    for (queries, keys) in [(0, 8), (16, 0), (i64::MIN, 8), (16, i64::MAX)] {
        assert!(matches!(Plan::new(&requests, queries, keys), Err(PlanError::TileSize { .. })));
    }
}

#[test]
fn messages_name_the_item_and_the_values() {
    let message = refused(10, &[item(&[(0, 3)], None), item(&[(2, 5)], None)]).to_string();
    assert!(message.contains("item 1: span (2, 5) overlaps span (0, 3) of item 0"), "{message}");
}

/// Mostly small numbers around the limits, so that inputs get past the first checks.
fn number() -> impl Strategy<Value = i64> {
    prop_oneof![
        20 => -2i64..64,
        1 => any::<i64>(),
        1 => prop::sample::select(vec![i64::MIN, i64::MAX, 1 << 31, (1 << 31) - 1, 1 << 32, -(1 << 31)]),
    ]
}

fn any_item() -> impl Strategy<Value = Item> {
    let modality =
        prop::sample::select(vec![Modality::Text, Modality::Image, Modality::Video, Modality::Audio]);
    let spans = prop_oneof![
        prop::collection::vec((number(), number()), 0..4),
        prop::collection::vec((0i64..500, 0i64..9).prop_map(|(start, more)| (start, start + more)), 1..4),
    ];
    let grid = prop::option::of((number(), number(), number()));
    (modality, spans, grid).prop_map(|(modality, spans, grid)| Item { modality, ..item(&spans, grid) })
}

proptest! {
    #![proptest_config(cases(4000))]

    #[test]
    fn arbitrary_input_never_panics(
        // Lengths that are valid and small, or invalid: a valid one costs memory in proportion.
        length in prop_oneof![6 => 1i64..600, 1 => number().prop_filter("small or invalid", |n| *n < 4096 || *n >= 1 << 31)],
        items in prop::collection::vec(any_item(), 0..4),
        options in (number(), number(), prop::option::of(number())),
        plan in (number(), number(), number(), number(), number()),
    ) {
        let (chunk_tokens, tile_queries, cell_size) = options;
        let options = LayoutOptions { chunk_tokens, tile_queries, cell_size };
        match Layout::new(length, &items, &options) {
            Ok(layout) => {
                let (prefix, chunk, row, queries, keys) = plan;
                if let Ok(plan) = Plan::new(&[PlanRequest::new(&layout, prefix, chunk, row)], queries, keys) {
                    prop_assert_eq!(plan.field("seq.rows").map(<[i32]>::len), Some(chunk as usize));
                }
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    #[test]
    fn one_defect_is_refused_with_its_item(
        request in request(), at in any::<prop::sample::Index>(), defect in 0..5, amount in 1i64..1000,
    ) {
        prop_assume!(!request.items.is_empty());
        let mut request = request;
        let number = at.index(request.items.len());
        let length = request.length;
        let broken = &mut request.items[number];
        match defect {
            0 => broken.spans.clear(),
            1 => broken.spans[0] = (broken.spans[0].1 + amount, broken.spans[0].0),
            2 => broken.spans[0].1 = length - 1 + amount,
            3 => broken.spans[0].0 = -amount,
            _ => {
                let tokens: i64 = broken.spans.iter().map(|(start, end)| end - start + 1).sum();
                broken.grid = Some(Grid { frames: tokens + amount, rows: 1, cols: 1 });
            }
        }
        let error = Layout::new(request.length, &request.items, &request.options).expect_err("a defect");
        let item = match error {
            LayoutError::NoSpans { item }
            | LayoutError::Reversed { item, .. }
            | LayoutError::OutOfRange { item, .. }
            | LayoutError::GridMismatch { item, .. } => item,
            other => return Err(TestCaseError::fail(format!("unexpected {other:?}"))),
        };
        prop_assert_eq!(item, number);
    }
}

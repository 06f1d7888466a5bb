//! Segments, kinds, orders and key tiles of random requests.

use crate::common::{cases, request};
use mminference_core::{Grid, Item, Layout, LayoutOptions, Modality, OrderName};
use proptest::prelude::*;

const ORDERS: [OrderName; 3] = [OrderName::Sequence, OrderName::Modality, OrderName::Cell];

proptest! {
    #![proptest_config(cases(3000))]

    #[test]
    fn segments_are_maximal_and_partition_the_sequence(request in request()) {
        let layout = request.layout();
        let segments = layout.segments();
        let (owners, kinds) = (request.owners(), request.kinds());
        let mut end = 0;
        for s in 0..segments.len() {
            prop_assert_eq!(segments.start[s], end);
            prop_assert!(segments.length[s] > 0);
            end += segments.length[s];
            if s > 0 {
                prop_assert_ne!(segments.item[s], segments.item[s - 1]);
            }
            for token in segments.start[s]..end {
                let owner = owners[token as usize].map(|owner| owner.0);
                prop_assert_eq!(segments.item[s], owner.map_or(-1, |item| item as i32));
                prop_assert_eq!(segments.modality[s], owner.map_or(0, |item| request.items[item].modality as u8));
                prop_assert_eq!(segments.kind[s], kinds[token as usize]);
            }
        }
        prop_assert_eq!(i64::from(end), request.length);
        prop_assert_eq!(layout.kinds(), &kinds);
        prop_assert_eq!(layout.num_items(), request.items.len());
    }

    #[test]
    fn orders_are_permutations_whose_runs_ascend(request in request()) {
        let layout = request.layout();
        for name in ORDERS {
            let (tokens, inverse) = (layout.tokens(name).unwrap(), layout.inverse(name).unwrap());
            let runs = layout.runs(name);
            prop_assert_eq!(tokens.len(), layout.length());
            prop_assert_eq!(inverse.len(), layout.length());
            for (at, &token) in tokens.iter().enumerate() {
                prop_assert_eq!(inverse[token as usize], at as i32);
            }
            prop_assert_eq!(runs[0], 0);
            prop_assert_eq!(runs.last().copied(), Some(layout.length() as i32));
            for ends in runs.windows(2) {
                prop_assert!(ends[0] <= ends[1]);
                prop_assert!(tokens[ends[0] as usize..ends[1] as usize].is_sorted_by(|a, b| a < b));
            }
        }
        prop_assert!(layout.tokens(OrderName::Sequence).unwrap().iter().copied().eq(0..layout.length() as i32));
        prop_assert_eq!(layout.runs(OrderName::Sequence).len(), 2);
        prop_assert_eq!(layout.runs(OrderName::Modality).len(), 5);
    }

    #[test]
    fn modality_and_cell_runs_hold_what_they_should(request in request()) {
        let layout = request.layout();
        let owners = request.owners();
        let tokens = layout.tokens(OrderName::Modality).unwrap();
        for (m, ends) in layout.runs(OrderName::Modality).windows(2).enumerate() {
            for &token in &tokens[ends[0] as usize..ends[1] as usize] {
                let owner = owners[token as usize];
                prop_assert_eq!(owner.map_or(0, |(item, _)| request.items[item].modality as usize), m);
            }
        }
        let (cell, runs) = (layout.tokens(OrderName::Cell).unwrap(), layout.runs(OrderName::Cell));
        prop_assert_eq!(layout.run_items().len() + 1, runs.len());
        prop_assert_eq!(layout.num_cells() + 1, layout.run_items().len());
        prop_assert_eq!(layout.run_items()[0], -1);
        let mut firsts = Vec::new();
        for (run, ends) in runs.windows(2).enumerate() {
            let item = layout.run_items()[run];
            let tokens = &cell[ends[0] as usize..ends[1] as usize];
            prop_assert!(run == 0 || !tokens.is_empty());
            prop_assert!(tokens.iter().all(|&t| owners[t as usize].map_or(-1, |o| o.0 as i32) == item));
            let Some(number) = usize::try_from(item).ok() else { continue };
            if layout.run_items()[run - 1] != item {
                firsts.push(request.items[number].spans.iter().map(|span| span.0).min());
            }
            let Some(grid) = request.items[number].grid else { continue };
            // Every frame shows the same places of the cell, in the same order.
            let area = grid.rows * grid.cols;
            let ordinals: Vec<i64> = tokens.iter().filter_map(|&t| owners[t as usize]).map(|o| o.1).collect();
            let places = ordinals.len() / grid.frames as usize;
            prop_assert!(places <= layout.cell_size(number).unwrap());
            for (frame, part) in ordinals.chunks(places).enumerate() {
                for (&ordinal, &first) in part.iter().zip(&ordinals[..places]) {
                    prop_assert_eq!((ordinal / area, ordinal % area), (frame as i64, first % area));
                }
            }
        }
        prop_assert!(firsts.is_sorted_by(|a, b| a < b));
        prop_assert_eq!(firsts.len(), request.items.len());
    }

    #[test]
    fn key_tiles_bound_their_tokens(request in request(), tile_keys in 1i64..70) {
        let layout = request.layout();
        let owners = request.owners();
        for name in ORDERS {
            let (order, inverse) = (layout.tokens(name).unwrap(), layout.inverse(name).unwrap());
            let tile_of_token = layout.key_tile_of_token(name, tile_keys).unwrap();
            prop_assert!(tile_of_token.iter().zip(inverse).all(|(&tile, &at)| i64::from(tile) == i64::from(at) / tile_keys));
            let tiles = layout.key_tiles(name, tile_keys).unwrap();
            prop_assert_eq!(tiles.min_pos.len(), layout.length().div_ceil(tile_keys as usize));
            for (k, tokens) in order.chunks(tile_keys as usize).enumerate() {
                prop_assert_eq!(Some(&tiles.min_pos[k]), tokens.iter().min());
                prop_assert_eq!(Some(&tiles.max_pos[k]), tokens.iter().max());
                let modality = |&t: &i32| owners[t as usize].map_or(0, |o| request.items[o.0].modality as u8);
                prop_assert_eq!(tiles.modality_mask[k], tokens.iter().fold(0, |mask, t| mask | 1 << modality(t)));
            }
        }
    }

    #[test]
    fn frame_stride_is_the_largest_distance_of_frames(request in request()) {
        let layout = request.layout();
        let owners = request.owners();
        let mut largest = 0;
        for (number, item) in request.items.iter().enumerate() {
            let stride = item.grid.map_or(0, |grid| {
                let area = grid.rows * grid.cols;
                let starts: Vec<i64> = (0..request.length)
                    .filter(|&t| owners[t as usize].is_some_and(|o| o.0 == number && o.1 % area == 0))
                    .collect();
                starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(area)
            });
            prop_assert_eq!(layout.frame_stride(number).unwrap() as i64, stride);
            largest = largest.max(stride);
        }
        prop_assert_eq!(layout.max_frame_stride() as i64, largest);
    }
}

#[test]
fn a_layout_is_shared_between_threads() {
    fn check<T: Send + Sync>() {}
    check::<Layout>();
}

/// A sequence that several threads write: text, videos with whole, cut and interleaved frames, images, a clip.
#[test]
#[cfg_attr(miri, ignore = "too many tokens for Miri")]
fn a_long_layout_is_a_permutation_too() {
    let item = |modality, spans, grid: (i64, i64, i64)| {
        let grid = Some(Grid { frames: grid.0, rows: grid.1, cols: grid.2 });
        Item { modality, spans, grid }
    };
    let spans = |start: i64, count: i64, length: i64, every: i64| -> Vec<_> {
        (0..count).map(|at| (start + at * every, start + at * every + length - 1)).collect()
    };
    let mut items = vec![
        item(Modality::Video, spans(50_000, 3000, 360, 371), (3000, 18, 20)),
        item(Modality::Video, spans(1_200_000, 1000, 35 * 37, 3000), (1000, 35, 37)),
        // Between the frames of the one before, and cut inside frames.
        item(Modality::Video, spans(1_201_400, 500, 1234, 3000), (1234, 20, 25)),
        item(Modality::Image, vec![(4_300_000, 4_300_000 + 901 * 503 - 1)], (1, 901, 503)),
        Item { modality: Modality::Audio, spans: spans(4_800_000, 40, 5000, 5003), grid: None },
    ];
    for at in 0..60 {
        items.push(item(
            Modality::Image,
            vec![(5_100_000 + at * 1000, 5_100_000 + at * 1000 + 869)],
            (1, 29, 30),
        ));
    }
    let length = 5_400_001;
    let options = LayoutOptions { chunk_tokens: 8192, tile_queries: 128, cell_size: None };
    let layout = Layout::new(length, &items, &options).expect("valid items");
    let tokens = layout.tokens(OrderName::Cell).expect("memory");
    let inverse = layout.inverse(OrderName::Cell).expect("memory");
    assert!(tokens.iter().zip(0..).all(|(&token, at)| inverse[token as usize] == at));
    assert!(tokens.len() == length as usize && inverse.len() == length as usize);
    for ends in layout.runs(OrderName::Cell).windows(2) {
        assert!(tokens[ends[0] as usize..ends[1] as usize].is_sorted_by(|a, b| a < b));
    }
    for tile_keys in [64, 63] {
        let tiles = layout.key_tile_of_token(OrderName::Cell, tile_keys).expect("memory");
        assert!(tiles.iter().zip(inverse).all(|(&tile, &at)| tile == at / tile_keys as i32));
    }
}

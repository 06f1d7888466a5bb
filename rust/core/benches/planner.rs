//! The requests of `benchmarks/planner.py` without Python: layout by its parts, and the plan of an 8K chunk.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mminference_core::{Grid, Item, Layout, LayoutOptions, Modality, OrderName, Plan, PlanRequest};

const CHUNK: i64 = 8192;
const TILE_KEYS: i64 = 64;
const OPTIONS: LayoutOptions = LayoutOptions { chunk_tokens: CHUNK, tile_queries: 128, cell_size: None };
const SIZES: [(&str, i64); 3] = [("32K", 1 << 15), ("128K", 1 << 17), ("1M", 1 << 20)];
const ROWS: i64 = 18;
const COLS: i64 = 20;
const AREA: i64 = ROWS * COLS;
/// Fewest tokens of text before the media.
const LEAD: i64 = 24;

/// One span; a frame begins at the chunk.
fn video(tokens: i64, chunk: i64) -> Vec<Item> {
    let frames = (tokens - LEAD) / AREA + chunk / AREA;
    let start = LEAD + (tokens - LEAD) % AREA;
    let grid = Some(Grid { frames, rows: ROWS, cols: COLS });
    vec![Item { modality: Modality::Video, spans: vec![(start, start + frames * AREA - 1)], grid }]
}

/// A span per frame, 10 to 13 tokens of text between them.
fn timestamps(tokens: i64, chunk: i64) -> Vec<Item> {
    const TEXTS: [i64; 7] = [10, 10, 11, 10, 13, 11, 12];
    let period = TEXTS.iter().sum::<i64>() + TEXTS.len() as i64 * AREA;
    let mut start = LEAD + (tokens - LEAD) % period;
    let mut spans = Vec::new();
    for text in TEXTS.into_iter().cycle() {
        start += text;
        if start + AREA > tokens + chunk {
            break;
        }
        spans.push((start, start + AREA - 1));
        start += AREA;
    }
    let grid = Some(Grid { frames: spans.len() as i64, rows: ROWS, cols: COLS });
    vec![Item { modality: Modality::Video, spans, grid }]
}

/// 64 images of one size, and eight of 990 tokens in the chunk.
fn images(tokens: i64, chunk: i64) -> Vec<Item> {
    let before = (0..64).map(|at| (at * (tokens / 64), tokens / 64));
    let inside = (0..chunk / 1024).map(|at| (tokens + at * 1024, 1024));
    let image = |(start, length): (i64, i64)| {
        let cols = (length - LEAD).isqrt();
        let rows = (length - LEAD) / cols;
        let spans = vec![(start + LEAD, start + LEAD + rows * cols - 1)];
        Item { modality: Modality::Image, spans, grid: Some(Grid { frames: 1, rows, cols }) }
    };
    before.chain(inside).map(image).collect()
}

type Make = fn(i64, i64) -> Vec<Item>;
const CASES: [(&str, Make); 3] = [("video", video), ("timestamps", timestamps), ("images", images)];

fn lay_out(length: i64, items: &[Item]) -> Layout {
    Layout::new(length, items, &OPTIONS).expect("a valid request")
}

fn layout(criterion: &mut Criterion) {
    for (case, make) in CASES {
        let mut group = criterion.benchmark_group(format!("layout/{case}"));
        for (size, tokens) in SIZES {
            let items = make(tokens, 0);
            group.throughput(Throughput::Elements(tokens as u64));
            // Every part comes with the segments.
            group.bench_function(BenchmarkId::new("segments", size), |b| {
                b.iter(|| lay_out(tokens, black_box(&items)));
            });
            group.bench_function(BenchmarkId::new("tokens", size), |b| {
                b.iter(|| lay_out(tokens, &items).tokens(OrderName::Cell).map(<[i32]>::len));
            });
            group.bench_function(BenchmarkId::new("inverse", size), |b| {
                b.iter(|| lay_out(tokens, &items).inverse(OrderName::Cell).map(<[i32]>::len));
            });
            let of_token = |layout: Layout| layout.key_tile_of_token(OrderName::Cell, TILE_KEYS);
            group.bench_function(BenchmarkId::new("key_tile_of_token", size), |b| {
                b.iter(|| of_token(lay_out(tokens, &items)));
            });
            group.bench_function(BenchmarkId::new("all", size), |b| {
                b.iter(|| {
                    let layout = lay_out(tokens, &items);
                    layout.tokens(OrderName::Cell).expect("memory");
                    layout.inverse(OrderName::Cell).expect("memory");
                    layout.key_tiles(OrderName::Cell, TILE_KEYS).expect("memory");
                    layout.key_tiles(OrderName::Sequence, TILE_KEYS).expect("memory");
                    layout
                });
            });
        }
        group.finish();
    }
}

fn plan(criterion: &mut Criterion) {
    for (case, make) in CASES {
        let mut group = criterion.benchmark_group(format!("plan/{case}"));
        group.throughput(Throughput::Elements(CHUNK as u64));
        for (size, tokens) in SIZES {
            let layout = lay_out(tokens + CHUNK, &make(tokens, CHUNK));
            let request = [PlanRequest::new(&layout, tokens, CHUNK, 0)];
            group.bench_function(BenchmarkId::from_parameter(size), |b| {
                b.iter(|| Plan::new(black_box(&request), OPTIONS.tile_queries, TILE_KEYS));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, layout, plan);
criterion_main!(benches);

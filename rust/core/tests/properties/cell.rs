//! The curve and the cells.

use crate::common::cases;
use mminference_core::cell::{CellTable, automatic_cell_size, curve};
use proptest::prelude::*;

#[test]
fn curve_visits_every_place_once_and_stays_near() {
    let limit = if cfg!(miri) { 9 } else { 48 };
    for (rows, cols) in (1..limit).flat_map(|rows| (1..limit).map(move |cols| (rows, cols))) {
        let places = curve(rows, cols);
        let mut sorted = places.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..(rows * cols) as u32), "{rows} x {cols}");
        for step in places.windows(2) {
            let place = |p: u32| (p as usize / cols, p as usize % cols);
            let ((y0, x0), (y1, x1)) = (place(step[0]), place(step[1]));
            assert!(y0.abs_diff(y1).max(x0.abs_diff(x1)) == 1, "{rows} x {cols}: {step:?}");
        }
    }
}

#[test]
fn automatic_cell_size_fills_a_tile_of_a_chunk() {
    // 8K chunk, 256 places: 32 rows per place, four places fill 128 rows.
    assert_eq!(automatic_cell_size(8192, 128, 1 << 20, 64, 256), 4);
    // As many frames by themselves make a long run.
    assert_eq!(automatic_cell_size(8192, 128, 1 << 20, 100, 256), 3);
    assert_eq!(automatic_cell_size(8192, 128, 1 << 20, 4096, 256), 1);
    // Unchunked: a place has a row per frame.
    assert_eq!(automatic_cell_size(0, 128, 1 << 20, 64, 256), 2);
    // An image is seen once.
    assert_eq!(automatic_cell_size(8192, 128, 1024, 1, 1024), 128);
    assert_eq!(automatic_cell_size(8192, 128, 100, 1, 100), 100);
    // More rows per place than a tile has.
    assert_eq!(automatic_cell_size(8192, 128, 1 << 20, 1 << 18, 4), 1);
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn cells_partition_the_frame(rows in 1usize..40, cols in 1usize..40, size in 1usize..200) {
        let table = CellTable::new(rows, cols, size);
        prop_assert_eq!(table.size(), size.min(rows * cols));
        prop_assert_eq!(table.cells().len(), table.len());
        let mut all = Vec::new();
        for (k, cell) in table.cells().enumerate() {
            prop_assert!(cell.is_sorted_by(|a, b| a < b));
            prop_assert!(cell.len() == table.size() || k + 1 == table.len());
            all.extend_from_slice(cell);
        }
        all.sort_unstable();
        prop_assert!(all.into_iter().eq(0..(rows * cols) as u32));
    }

    #[test]
    fn a_whole_cell_of_a_chunk_fits_a_tile(
        chunk in 1usize..5000, tile in 1usize..200, frames in 1usize..60, area in 1usize..300, gap in 0usize..8,
    ) {
        let extent = frames * (area + gap) - gap;
        let size = automatic_cell_size(chunk, tile, extent, frames, area);
        let repeats = chunk.min(extent).div_ceil(area).min(frames);
        prop_assert!(size == 1 || size * repeats <= tile);
        prop_assert!((1..=area).contains(&size));
    }
}

//! Token orders, segment maps and tile plans for sparse prefill of multimodal requests.
//!
//! A [`Layout`] is made once per request from its length, its items' token spans and frame grids. A [`Plan`] is made
//! once per forward from the layouts, prefixes and chunks of a batch; its cost grows with the chunks only.
#![forbid(unsafe_code)]

mod buffer;
pub mod cell;
mod cell_order;
mod error;
mod layout;
mod options;
mod order;
mod pass;
mod plan;
mod segment;
mod tile;

pub use buffer::Buffer;
pub use error::{LayoutError, PlanError};
pub use layout::Layout;
pub use options::LayoutOptions;
pub use order::OrderName;
pub use plan::{Field, Plan, PlanRequest};
pub use segment::{Grid, Item, Kind, MAX_ITEMS, Modality, RawItem, Segments};
pub use tile::KeyTiles;

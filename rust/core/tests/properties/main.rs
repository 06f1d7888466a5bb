//! Properties of layouts and plans over random geometry; one file per source file.

mod cell;
mod common;
mod errors;
mod layout;
mod plan;

//! Plans by what they promise.

mod cases;
mod figures;
mod plan_files;
mod properties;

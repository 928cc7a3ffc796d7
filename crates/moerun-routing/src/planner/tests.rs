//! Plans by what they promise.

mod cases;
mod evaluated;
mod figures;
mod plan_files;
mod properties;

//! The number formats that weights can be held in, listed once for all commands.

use moerun_types::NumberFormat;

/// All of them, widest first.
pub(crate) const FORMATS: [NumberFormat; 2] = [NumberFormat::F32, NumberFormat::Bf16];

//! Lossless packing of partial sums for the wire: each exact row at the width of its largest element.

use moerun_types::CombineMode;

use super::{CombineError, PartialSums};

impl PartialSums {
    /// Packs without loss: each exact row at the fewest whole bytes (0–8) that hold its largest magnitude in two's
    /// complement, little-endian; fast rows as f32. Returns the width of each row (empty in fast mode) and the bytes.
    pub fn pack(&self) -> (Vec<u8>, Vec<u8>) {
        match self {
            PartialSums::Exact { hidden, sums } => {
                let rows = || sums.chunks_exact((*hidden).max(1));
                let widths: Vec<u8> = rows().map(row_width).collect();
                let mut bytes = Vec::with_capacity(widths.iter().map(|&width| usize::from(width) * hidden).sum());
                for (row, &width) in rows().zip(&widths) {
                    pack_row(row, width, &mut bytes);
                }
                (widths, bytes)
            }
            PartialSums::Fast { sums, .. } => (Vec::new(), sums.iter().flat_map(|sum| sum.to_le_bytes()).collect()),
        }
    }

    /// The inverse of [`PartialSums::pack`].
    ///
    /// Errors: a width above 8, another number of widths than `rows` (than none in fast mode), another number of bytes
    /// than they ask for. Wider rows than necessary are read all the same.
    pub fn unpack(
        mode: CombineMode,
        rows: usize,
        hidden: usize,
        widths: &[u8],
        bytes: &[u8],
    ) -> Result<Self, CombineError> {
        let wanted_widths = match mode {
            CombineMode::Exact => rows,
            CombineMode::Fast => 0,
        };
        if widths.len() != wanted_widths {
            return Err(CombineError::WidthCount {
                wanted: wanted_widths,
                found: widths.len(),
            });
        }
        if let Some(row) = widths.iter().position(|&width| width > 8) {
            return Err(CombineError::Width {
                row,
                width: widths[row],
            });
        }
        let row_bytes = match mode {
            CombineMode::Exact => widths.iter().map(|&width| usize::from(width)).sum(),
            CombineMode::Fast => rows.saturating_mul(size_of::<f32>()),
        };
        // A product that saturates is longer than any slice, and so refused.
        let wanted = row_bytes.saturating_mul(hidden);
        if wanted != bytes.len() || rows.checked_mul(hidden).is_none() {
            return Err(CombineError::Length {
                rows,
                hidden,
                wanted,
                found: bytes.len(),
            });
        }
        Ok(match mode {
            CombineMode::Exact => PartialSums::Exact {
                hidden,
                sums: unpack_rows(hidden, widths, bytes),
            },
            CombineMode::Fast => {
                let (elements, _) = bytes.as_chunks();
                PartialSums::Fast {
                    hidden,
                    sums: elements.iter().map(|&element| f32::from_le_bytes(element)).collect(),
                }
            }
        })
    }
}

/// Fewest bytes that hold every element in two's complement; 0 for a row of zeros.
fn row_width(row: &[i64]) -> u8 {
    let mut any = 0;
    let mut magnitude = 0;
    for &sum in row {
        any |= sum;
        // Negative numbers need as many bits as their complement: -128 fits where 127 does.
        magnitude |= sum ^ (sum >> 63);
    }
    if any == 0 {
        return 0;
    }
    let magnitude_bits = 64 - magnitude.leading_zeros(); // at most 63; one more is the sign
    (magnitude_bits / 8 + 1) as u8
}

fn pack_row(row: &[i64], width: u8, bytes: &mut Vec<u8>) {
    /// One loop per width, so that each element is one store of known size.
    fn at_width<const WIDTH: usize>(row: &[i64], bytes: &mut Vec<u8>) {
        bytes.extend(row.iter().flat_map(|sum| {
            let mut packed = [0; WIDTH];
            packed.copy_from_slice(&sum.to_le_bytes()[..WIDTH]);
            packed
        }));
    }
    match width {
        0 => {}
        1 => at_width::<1>(row, bytes),
        2 => at_width::<2>(row, bytes),
        3 => at_width::<3>(row, bytes),
        4 => at_width::<4>(row, bytes),
        5 => at_width::<5>(row, bytes),
        6 => at_width::<6>(row, bytes),
        7 => at_width::<7>(row, bytes),
        _ => at_width::<8>(row, bytes),
    }
}

/// `widths` are at most 8 and ask for exactly `bytes`.
fn unpack_rows(hidden: usize, widths: &[u8], bytes: &[u8]) -> Vec<i64> {
    /// One loop per width, as in [`pack_row`].
    fn at_width<const WIDTH: usize>(packed: &[u8], sums: &mut Vec<i64>) {
        let (elements, _) = packed.as_chunks::<WIDTH>();
        sums.extend(elements.iter().map(|element| {
            let mut wide = [0; 8];
            wide[8 - WIDTH..].copy_from_slice(element);
            // The element stands in the top bytes; an arithmetic shift brings it down with its sign.
            i64::from_le_bytes(wide) >> (64 - 8 * WIDTH)
        }));
    }
    let mut sums = Vec::with_capacity(widths.len() * hidden);
    let mut rest = bytes;
    for &width in widths {
        let (row, after) = rest.split_at(usize::from(width) * hidden);
        rest = after;
        match width {
            0 => sums.resize(sums.len() + hidden, 0),
            1 => at_width::<1>(row, &mut sums),
            2 => at_width::<2>(row, &mut sums),
            3 => at_width::<3>(row, &mut sums),
            4 => at_width::<4>(row, &mut sums),
            5 => at_width::<5>(row, &mut sums),
            6 => at_width::<6>(row, &mut sums),
            7 => at_width::<7>(row, &mut sums),
            _ => at_width::<8>(row, &mut sums),
        }
    }
    sums
}

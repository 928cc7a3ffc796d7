//! Little-endian packed fields of a length that is known beforehand.

use crate::WireError;

/// `rows * row_len * element_bytes`, or an error that names `field`.
pub(crate) fn byte_len(field: &'static str, factors: &[usize]) -> Result<usize, WireError> {
    factors
        .iter()
        .try_fold(1usize, |product, &factor| product.checked_mul(factor))
        .ok_or_else(|| {
            WireError::new(
                field,
                "a length that fits this machine",
                format!("product of {factors:?}"),
            )
        })
}

/// That `bytes` is `wanted` long.
pub(crate) fn check_len(field: &'static str, bytes: &[u8], wanted: usize) -> Result<(), WireError> {
    if bytes.len() == wanted {
        Ok(())
    } else {
        Err(WireError::new(
            field,
            format!("{wanted} bytes"),
            format!("{} bytes", bytes.len()),
        ))
    }
}

/// Elements of a packed field whose length has been checked.
pub(crate) fn u16s(bytes: &[u8]) -> impl ExactSizeIterator<Item = u16> + '_ {
    bytes.as_chunks::<2>().0.iter().map(|&chunk| u16::from_le_bytes(chunk))
}

/// Elements of a packed field whose length has been checked.
pub(crate) fn f32s(bytes: &[u8]) -> impl ExactSizeIterator<Item = f32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|&chunk| f32::from_le_bytes(chunk))
}

/// Bytes that cannot be partial sums, or two that cannot be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CombineError {
    /// Packed bytes do not have the length that their rows ask for.
    #[error("packed sums of {rows} rows x {hidden} take {wanted} bytes, found {found}")]
    Length {
        /// Rows.
        rows: usize,
        /// Length of a row.
        hidden: usize,
        /// Bytes wanted.
        wanted: usize,
        /// Bytes found.
        found: usize,
    },
    /// There is not one width for each row (none at all in fast mode).
    #[error("packed sums have {found} row widths, wanted {wanted}")]
    WidthCount {
        /// Widths wanted.
        wanted: usize,
        /// Widths found.
        found: usize,
    },
    /// A row's width is not 1 to 8 bytes (0 for a row of zeros).
    #[error("row {row} is packed at {width} bytes an element, wanted 0 to 8")]
    Width {
        /// Row.
        row: usize,
        /// Width found.
        width: u8,
    },
    /// Shapes or modes differ.
    #[error("partial sums do not match: wanted {wanted}, found {found}")]
    Mismatch {
        /// Wanted, in words.
        wanted: String,
        /// Found, in words.
        found: String,
    },
}

//! How the converter reorders what it does not store as it was trained.

/// Rows `[heads, 2, head/2]` become `[heads, head/2, 2]`.
pub(super) fn interleave(data: &[u8], rows: usize, head: usize) -> Vec<u8> {
    let row_bytes = data.len() / rows;
    let row = |index: usize| &data[index * row_bytes..(index + 1) * row_bytes];
    (0..rows)
        .flat_map(|stored| {
            let (start, within) = (stored / head * head, stored % head);
            row(start + within % 2 * (head / 2) + within / 2).iter().copied()
        })
        .collect()
}

/// `[stacks, rows, cols]` elements become `[stacks, cols, rows]`.
pub(super) fn transpose(data: &[u8], [stacks, rows, cols]: [usize; 3]) -> Vec<u8> {
    let size = data.len() / (stacks * rows * cols);
    let element = |index: usize| data[index * size..(index + 1) * size].iter().copied();
    (0..stacks)
        .flat_map(|stack| (0..cols).flat_map(move |col| (0..rows).map(move |row| (stack * rows + row) * cols + col)))
        .flat_map(element)
        .collect()
}

/// Every second of the pieces of `size` bytes, from `first` on.
pub(super) fn every_second(data: &[u8], size: usize, first: usize) -> Vec<u8> {
    data.chunks_exact(size)
        .skip(first)
        .step_by(2)
        .flatten()
        .copied()
        .collect()
}

/// Of each run of `run` bytes the part `from..to`.
pub(super) fn part_of_each(data: &[u8], run: usize, from: usize, to: usize) -> Vec<u8> {
    data.chunks_exact(run).flat_map(|run| &run[from..to]).copied().collect()
}

/// 4-bit codes with neighbours in a byte, and their exponents, become ggml's blocks: the exponent, then bytes whose
/// lower halves are the first 16 codes.
pub(super) fn mxfp4_blocks(codes: &[u8], exponents: &[u8]) -> Vec<u8> {
    let mut blocks = Vec::with_capacity(codes.len() + exponents.len());
    for (codes, exponent) in codes.chunks_exact(16).zip(exponents) {
        let code = |col: usize| codes[col / 2] >> (col % 2 * 4) & 15;
        blocks.push(*exponent);
        blocks.extend((0..16).map(|col| code(col) | code(col + 16) << 4));
    }
    blocks
}

//! Which bits of a stream are flipped.

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::{Corrupt, Within};

/// What a client of HTTP/2 sends before its first frame.
const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
const DATA: u8 = 0;

/// Decides as the bytes of one direction pass; follows frames whether or not anything is flipped, so that it can begin at
/// any time.
#[derive(Debug)]
pub(super) struct Corruption {
    stream: u64,
    rng: Option<(Corrupt, ChaCha8Rng)>,
    /// Bytes that may be hit and are not, before the next that is.
    spared: u64,
    frames: Frames,
}

impl Corruption {
    /// Of what a client sends.
    pub(super) fn of_client(stream: u64) -> Self {
        Self::new(stream, PREFACE_BYTES)
    }

    /// Of what a server sends.
    pub(super) fn of_server(stream: u64) -> Self {
        Self::new(stream, 0)
    }

    fn new(stream: u64, preface_bytes: usize) -> Self {
        Self {
            stream,
            rng: None,
            spared: 0,
            frames: Frames::new(preface_bytes),
        }
    }

    /// Flips bits of the next bytes of the stream; returns how many bytes were hit.
    pub(super) fn apply(&mut self, corrupt: Option<Corrupt>, bytes: &mut [u8]) -> u64 {
        let data = self.frames.data_in(bytes);
        let Some(corrupt) = corrupt else {
            self.rng = None;
            return 0;
        };
        if self.rng.as_ref().is_none_or(|(of, _)| *of != corrupt) {
            let mut rng = ChaCha8Rng::seed_from_u64(corrupt.seed);
            rng.set_stream(self.stream);
            self.spared = pause(&mut rng, corrupt.one_in);
            self.rng = Some((corrupt, rng));
        }
        let Some((_, rng)) = &mut self.rng else { return 0 };
        let ranges = match corrupt.within {
            Within::Anything => std::iter::once(0..bytes.len()).collect(),
            Within::DataFrames => data,
        };
        let mut hit = 0;
        for range in ranges {
            let mut at = range.start;
            while self.spared < (range.end - at) as u64 {
                at += self.spared as usize;
                bytes[at] ^= 1 << rng.random_range(0..8);
                hit += 1;
                at += 1;
                self.spared = pause(rng, corrupt.one_in);
            }
            self.spared -= (range.end - at) as u64;
        }
        hit
    }
}

/// Bytes spared before the next hit: exponential, so that hits are independent of each other and of all framing.
fn pause(rng: &mut ChaCha8Rng, one_in: u64) -> u64 {
    (-(1.0 - rng.random::<f64>()).ln() * one_in as f64) as u64
}

/// Follows the frames of one direction of an HTTP/2 connection.
#[derive(Debug)]
struct Frames {
    preface_left: usize,
    header: Vec<u8>,
    payload_left: usize,
    is_data: bool,
}

impl Frames {
    fn new(preface_left: usize) -> Self {
        Self {
            preface_left,
            header: Vec::with_capacity(FRAME_HEADER_BYTES),
            payload_left: 0,
            is_data: false,
        }
    }

    /// Where in the next bytes of the stream lie contents of DATA frames.
    fn data_in(&mut self, bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
        let mut data = Vec::new();
        let mut at = self.preface_left.min(bytes.len());
        self.preface_left -= at;
        while at < bytes.len() {
            let left = bytes.len() - at;
            if self.payload_left > 0 {
                let length = self.payload_left.min(left);
                if self.is_data {
                    data.push(at..at + length);
                }
                self.payload_left -= length;
                at += length;
                continue;
            }
            let length = (FRAME_HEADER_BYTES - self.header.len()).min(left);
            self.header.extend_from_slice(&bytes[at..at + length]);
            at += length;
            if let [a, b, c, kind, ..] = self.header[..]
                && self.header.len() == FRAME_HEADER_BYTES
            {
                self.payload_left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                self.is_data = kind == DATA;
                self.header.clear();
            }
        }
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    }

    /// Preface, headers, data of 600 ones, settings, data of 400 ones: ones are contents, all else is not.
    fn stream() -> Vec<u8> {
        [
            vec![9; PREFACE_BYTES],
            frame(1, &[2; 50]),
            frame(0, &[1; 600]),
            frame(4, &[3; 30]),
            frame(0, &[1; 400]),
        ]
        .concat()
    }

    #[test]
    fn contents_of_data_frames_are_found_however_the_stream_is_cut() {
        let stream = stream();
        for piece in [1, 2, 7, 100, 5000] {
            let mut frames = Frames::new(PREFACE_BYTES);
            let mut found = 0;
            for bytes in stream.chunks(piece) {
                for range in frames.data_in(bytes) {
                    assert!(bytes[range.clone()].iter().all(|&byte| byte == 1));
                    found += range.len();
                }
            }
            assert_eq!(found, 1000, "pieces of {piece}");
        }
    }

    #[test]
    fn bits_are_flipped_at_the_rate_asked_for_and_only_where_they_may_be() {
        let corrupt = Corrupt {
            one_in: 50,
            seed: 3,
            within: Within::DataFrames,
        };
        let stream = stream();
        let mut flipped = 0;
        for connection in 0..100 {
            let mut corruption = Corruption::of_client(connection);
            let mut bytes = stream.clone();
            let hits: u64 = bytes
                .chunks_mut(37)
                .map(|piece| corruption.apply(Some(corrupt), piece))
                .sum();
            let changed: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] != stream[at]).collect();
            assert_eq!(changed.len() as u64, hits);
            assert!(
                changed
                    .iter()
                    .all(|&at| stream[at] == 1 && (bytes[at] ^ 1).count_ones() == 1)
            );
            flipped += hits;
        }
        // 100 000 bytes, one in about 50.
        assert!((1700..2300).contains(&flipped), "{flipped}");
    }

    #[test]
    fn what_is_hit_hangs_on_the_seed_alone() {
        let hit = |seed, piece: usize| {
            let corrupt = Corrupt {
                one_in: 20,
                seed,
                within: Within::Anything,
            };
            let mut corruption = Corruption::of_server(5);
            let mut bytes = vec![0u8; 1000];
            for piece in bytes.chunks_mut(piece) {
                corruption.apply(Some(corrupt), piece);
            }
            bytes
        };
        assert_eq!(hit(1, 1000), hit(1, 13));
        assert_ne!(hit(1, 1000), hit(2, 1000));
    }
}

//! Who takes what one worker alone holds.

/// What a worker holds, and what more it could.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// Bytes held.
    pub(super) held_bytes: u64,
    /// Bytes left.
    pub(super) free_bytes: u64,
}

/// Gives things of `sizes` bytes away, the largest first, each to whoever holds least and has room; returns who takes each,
/// or how many find none. `rooms` is what is left then.
pub(super) fn cover(sizes: &[u64], rooms: &mut [Room]) -> Result<Vec<usize>, usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(sizes[index]), index));
    let (mut given, mut unplaced) = (vec![0; sizes.len()], 0);
    for index in order {
        let bytes = sizes[index];
        let able = rooms.iter().enumerate().filter(|(_, room)| room.free_bytes >= bytes);
        let Some((taker, _)) = able.min_by_key(|(at, room)| (room.held_bytes, *at)) else {
            unplaced += 1;
            continue;
        };
        rooms[taker].held_bytes += bytes;
        rooms[taker].free_bytes -= bytes;
        given[index] = taker;
    }
    if unplaced > 0 { Err(unplaced) } else { Ok(given) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(held_bytes: u64, free_bytes: u64) -> Room {
        Room { held_bytes, free_bytes }
    }

    #[test]
    fn who_holds_least_takes_most_within_what_each_can() {
        let mut rooms = [room(10, 100), room(30, 100), room(0, 8)];
        assert_eq!(cover(&[10, 10, 10, 10], &mut rooms), Ok(vec![0, 0, 0, 1]));
        assert_eq!(cover(&[8], &mut rooms), Ok(vec![2]));
        assert_eq!(rooms, [room(40, 70), room(40, 90), room(8, 0)]);
    }

    #[test]
    fn what_finds_no_room_is_counted() {
        assert_eq!(cover(&[5, 9, 5], &mut [room(0, 9), room(0, 3)]), Err(2));
        assert_eq!(cover(&[1], &mut []), Err(1));
        assert_eq!(cover(&[], &mut []), Ok(vec![]));
    }
}

//! Guesses at the next tokens from the sequence's own text: what followed the last time that it went as it goes now.

/// Longest run of last tokens that is looked up.
const LONGEST: usize = 4;

/// Shortest run that counts: a single token says too little about what follows.
const SHORTEST: usize = 2;

/// Looks for the last tokens of `tokens`, four of them down to two, further ahead in it, and returns the `count` tokens
/// that followed there: after the longest run, and among equal ones the latest. None if there is no such run.
///
/// Where the run lies so near the end that fewer than `count` followed, the guess goes on with its own beginning, so
/// that a text which repeats a short period is guessed as far as one with a long period.
pub(crate) fn look_up(tokens: &[u32], count: usize) -> Vec<u32> {
    let Some(start) = after_last_like(tokens).filter(|_| count > 0) else {
        return Vec::new();
    };
    let period = &tokens[start..];
    period.iter().copied().cycle().take(count).collect()
}

/// Where the text goes on after the latest of the longest runs that equal its end.
fn after_last_like(tokens: &[u32]) -> Option<usize> {
    let mut best = None;
    let mut longest = SHORTEST - 1;
    for end in (SHORTEST..tokens.len()).rev() {
        let alike = common_suffix(&tokens[..end], tokens);
        if alike > longest {
            (best, longest) = (Some(end), alike);
        }
        if longest == LONGEST {
            break;
        }
    }
    best
}

/// How many of their last tokens are equal, up to [`LONGEST`].
fn common_suffix(a: &[u32], b: &[u32]) -> usize {
    let pairs = a.iter().rev().zip(b.iter().rev()).take(LONGEST);
    pairs.take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guess_is_what_followed_the_longest_latest_run() {
        assert_eq!(look_up(&[1, 2, 9, 8, 1, 2], 2), [9, 8]);
        // The later run of two, before the earlier one.
        assert_eq!(look_up(&[1, 2, 9, 1, 2, 8, 1, 2], 1), [8]);
        // An earlier run of three, before a later one of two.
        assert_eq!(look_up(&[5, 1, 2, 9, 1, 2, 8, 5, 1, 2], 1), [9]);
        // Four are as good as five.
        assert_eq!(look_up(&[6, 5, 4, 1, 2, 9, 7, 5, 4, 1, 2, 8, 6, 5, 4, 1, 2], 1), [8]);
    }

    #[test]
    fn a_short_period_is_guessed_on_and_on() {
        assert_eq!(look_up(&[7, 7, 7], 5), [7; 5]);
        assert_eq!(look_up(&[1, 2, 3, 1, 2, 3, 1, 2], 7), [3, 1, 2, 3, 1, 2, 3]);
    }

    #[test]
    fn nothing_is_guessed_without_two_tokens_that_came_before() {
        for tokens in [&[][..], &[1], &[1, 1], &[1, 2, 3, 4], &[1, 2, 3, 2]] {
            assert!(look_up(tokens, 4).is_empty(), "{tokens:?}");
        }
        assert!(look_up(&[1, 2, 1, 2], 0).is_empty());
    }
}

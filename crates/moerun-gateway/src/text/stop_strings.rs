//! Stop strings across token borders.

use crate::GatewayError;

/// Most stop strings of a request.
pub const MAX_STOP_STRINGS: usize = 16;

/// Longest stop string, in bytes; none is empty.
pub const MAX_STOP_STRING_BYTES: usize = 1024;

/// Watches a text for stop strings and holds back what may be the beginning of one.
///
/// The text ends before the stop string that is complete first; of several that are complete at the same character, the
/// longest. So the result does not depend on the pieces in which the text arrives. A byte costs a few steps per stop
/// string, whatever the length of the text.
#[derive(Debug, Default)]
pub struct StopStrings {
    searches: Vec<Search>,
    /// Text that may be the beginning of a stop string: as long as the furthest search has matched.
    held: String,
}

/// Knuth, Morris and Pratt's search for one string.
#[derive(Debug)]
struct Search {
    wanted: Vec<u8>,
    /// `borders[n]`: length of the longest proper prefix of `wanted[..=n]` that is also its suffix.
    borders: Vec<usize>,
    /// How many bytes of `wanted` the text ends with.
    matched: usize,
}

/// What became of a piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// Text that is certain to be part of the answer.
    pub text: String,
    /// Whether a stop string was found: the answer ends with `text`.
    pub stopped: bool,
}

impl StopStrings {
    /// Watches for these; an error names the field `stop` if there are too many, or one is empty or too long.
    pub fn new(wanted: &[String]) -> Result<Self, GatewayError> {
        if wanted.len() > MAX_STOP_STRINGS {
            return Err(GatewayError::invalid(
                "stop",
                format!("at most {MAX_STOP_STRINGS} strings"),
                wanted.len(),
            ));
        }
        if let Some(bad) = wanted
            .iter()
            .find(|text| text.is_empty() || text.len() > MAX_STOP_STRING_BYTES)
        {
            let range = format!("strings of 1 to {MAX_STOP_STRING_BYTES} bytes");
            return Err(GatewayError::invalid(
                "stop",
                range,
                format!("one of {} bytes", bad.len()),
            ));
        }
        Ok(StopStrings {
            searches: wanted.iter().map(|text| Search::new(text)).collect(),
            held: String::new(),
        })
    }

    /// Takes the next piece of the text. Nothing may be pushed after a stop string was found.
    pub fn push(&mut self, piece: &str) -> Checked {
        let known = self.held.len();
        self.held.push_str(piece);
        for (at, byte) in piece.bytes().enumerate() {
            let found = self.searches.iter_mut().filter_map(|search| search.step(byte)).max();
            if let Some(length) = found {
                self.held.truncate(known + at + 1 - length);
                return Checked {
                    text: std::mem::take(&mut self.held),
                    stopped: true,
                };
            }
        }
        // A partial match begins with the first byte of a stop string, so this is a border between characters.
        let beginning = self.searches.iter().map(|search| search.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - beginning);
        Checked {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// The text that was held back, once no more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

impl Search {
    fn new(wanted: &str) -> Self {
        let wanted = wanted.as_bytes().to_vec();
        let mut borders = vec![0; wanted.len()];
        let mut border = 0;
        for end in 1..wanted.len() {
            while border > 0 && wanted[border] != wanted[end] {
                border = borders[border - 1];
            }
            if wanted[border] == wanted[end] {
                border += 1;
            }
            borders[end] = border;
        }
        Search {
            wanted,
            borders,
            matched: 0,
        }
    }

    /// Takes the next byte of the text; the string's length if it is complete with this byte.
    fn step(&mut self, byte: u8) -> Option<usize> {
        while self.matched > 0 && self.wanted[self.matched] != byte {
            self.matched = self.borders[self.matched - 1];
        }
        if self.wanted[self.matched] == byte {
            self.matched += 1;
        }
        (self.matched == self.wanted.len()).then_some(self.matched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_checkpoints::Dice;

    fn watch(stops: &[&str]) -> StopStrings {
        StopStrings::new(&stops.iter().map(|&text| text.to_owned()).collect::<Vec<_>>()).unwrap()
    }

    /// All pieces, then the end: the answer, and whether it was stopped.
    fn answer(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = watch(stops);
        let mut text = String::new();
        for piece in pieces {
            let checked = watch.push(piece);
            text.push_str(&checked.text);
            if checked.stopped {
                return (text, true);
            }
        }
        (text + &watch.finish(), false)
    }

    #[test]
    fn the_text_ends_before_a_stop_string_that_spans_pieces() {
        assert_eq!(
            answer(&["\n\n"], &["one\n", "two\n", "\nthree"]),
            ("one\ntwo".to_owned(), true)
        );
        assert_eq!(answer(&["END"], &["xE", "N", "D", "never"]), ("x".to_owned(), true));
        assert_eq!(answer(&["END"], &["END"]), (String::new(), true));
    }

    #[test]
    fn a_beginning_that_comes_to_nothing_is_let_go() {
        let mut watch = watch(&["END", "NDX"]);
        assert_eq!(watch.push("aE").text, "a");
        assert_eq!(watch.push("N").text, "");
        // "EN" is still "END"; with another E only the last one may begin something.
        assert_eq!(watch.push("E").text, "EN");
        assert_eq!(watch.push("ü").text, "Eü");
        assert_eq!(watch.push("EN").text, "");
        assert_eq!(watch.finish(), "EN");
    }

    #[test]
    fn the_string_that_is_complete_first_wins() {
        assert_eq!(answer(&["abc", "b"], &["xabc"]), ("xa".to_owned(), true));
        assert_eq!(
            answer(&["bc", "abc", "c"], &["xabc"]),
            ("x".to_owned(), true),
            "the longest of those that end together"
        );
        assert_eq!(answer(&["zz", "b", "a"], &["x a b"]), ("x ".to_owned(), true));
    }

    #[test]
    fn repetitions_within_a_stop_string_are_found() {
        assert_eq!(answer(&["aab"], &["a", "a", "a", "b"]), ("a".to_owned(), true));
        assert_eq!(answer(&["abab"], &["aba", "abab"]), ("aba".to_owned(), true));
    }

    #[test]
    fn the_answer_does_not_depend_on_the_pieces() {
        for seed in 0..2_000 {
            let mut dice = Dice::new(seed);
            let letters = ["a", "b", "é", "日"];
            let mut word = |longest: u32| -> String {
                (0..1 + dice.below(longest))
                    .map(|_| letters[dice.below(4) as usize])
                    .collect()
            };
            let text = word(30);
            let stops: Vec<String> = (0..3).map(|_| word(4)).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<String> = text.chars().map(String::from).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();

            // By hand: the first character at which any stop string ends, and the longest that ends there.
            let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
            let mut expected = (text.clone(), false);
            for end in ends {
                if let Some(longest) = stops
                    .iter()
                    .filter(|s| text[..end].ends_with(**s))
                    .map(|s| s.len())
                    .max()
                {
                    expected = (text[..end - longest].to_owned(), true);
                    break;
                }
            }
            assert_eq!(answer(&stops, &[&text]), expected, "seed {seed}, at once");
            assert_eq!(answer(&stops, &pieces), expected, "seed {seed}, character by character");
        }
    }

    #[test]
    fn too_many_empty_and_long_strings_are_refused() {
        let of = |strings: &[String]| StopStrings::new(strings).map(|_| ());
        assert!(matches!(
            of(&["".to_owned()]),
            Err(GatewayError::Invalid { field: "stop", .. })
        ));
        assert!(matches!(
            of(&["x".repeat(MAX_STOP_STRING_BYTES + 1)]),
            Err(GatewayError::Invalid { field: "stop", .. })
        ));
        assert!(matches!(
            of(&vec!["x".to_owned(); MAX_STOP_STRINGS + 1]),
            Err(GatewayError::Invalid { field: "stop", .. })
        ));
        assert!(of(&vec!["x".repeat(MAX_STOP_STRING_BYTES); MAX_STOP_STRINGS]).is_ok());
        assert!(of(&[]).is_ok());
    }
}

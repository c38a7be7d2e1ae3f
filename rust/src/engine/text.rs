//! The text of an answer as it grows: whole characters, held back where a stop string may begin.
//! Never looks at logits.

use crate::Result;
use crate::tokenizer::{Decoder, Tokenizer};

/// What a token added.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Piece {
    /// Text to give out.
    pub(super) text: String,
    /// The stop string that came next: the answer's text is over.
    pub(super) stop: Option<String>,
}

pub(super) struct Text {
    decoder: Decoder,
    stops: Vec<String>,
    held: String, // not given out: may begin a stop string
}

impl Text {
    pub(super) fn new(skip_special: bool, stops: Vec<String>) -> Text {
        Text { decoder: Decoder::new(skip_special), stops, held: String::new() }
    }

    /// The next token's text; with `search` false it may begin a stop string but not complete one.
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, id: u32, search: bool) -> Result<Piece> {
        let text = self.decoder.push(tokenizer, id)?;
        Ok(self.give(&text, search))
    }

    /// What is left at the end of the answer.
    pub(super) fn finish(&mut self, tokenizer: &Tokenizer) -> Result<Piece> {
        let text = self.decoder.finish(tokenizer)?;
        let mut piece = self.give(&text, true);
        piece.text.push_str(&std::mem::take(&mut self.held));
        Ok(piece)
    }

    fn give(&mut self, text: &str, search: bool) -> Piece {
        self.held.push_str(text);
        if search && let Some((start, stop)) = first_stop(&self.held, &self.stops) {
            self.held.truncate(start);
            return Piece { text: std::mem::take(&mut self.held), stop: Some(stop) };
        }
        let open = self.stops.iter().map(|stop| open(&self.held, stop)).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - open);
        Piece { text: std::mem::replace(&mut self.held, held), stop: None }
    }
}

/// Where in `text` the stop string begins that is complete first; of several, the longest.
/// So the result does not depend on how the text was cut into tokens.
fn first_stop(text: &str, stops: &[String]) -> Option<(usize, String)> {
    let found = stops.iter().filter_map(|stop| text.find(stop).map(|start| (start, stop)));
    let first = found.min_by_key(|&(start, stop)| (start + stop.len(), start))?;
    Some((first.0, first.1.clone()))
}

/// Bytes at the end of `text` that begin `stop`.
fn open(text: &str, stop: &str) -> usize {
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    let longest = (stop.len() - 1).min(text.len());
    // A match ends where the text ends, so it never splits a character.
    (1..=longest).rev().find(|&n| text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| s.to_string()).collect()
    }

    /// Feeds `parts` and returns all text and the stop string.
    fn run(parts: &[&str], list: &[&str]) -> (String, Option<String>) {
        let mut text = Text::new(true, stops(list));
        let mut all = String::new();
        for part in parts {
            let piece = text.give(part, true);
            all.push_str(&piece.text);
            if piece.stop.is_some() {
                return (all, piece.stop);
            }
        }
        (all + &text.held, None)
    }

    #[test]
    fn holds_back_exactly_what_may_begin_a_stop_string() {
        let mut text = Text::new(true, stops(&["</s>", "\n\n"]));
        let cases = [("ab<", "ab"), ("/", ""), ("s", ""), ("x\n", "</sx"), ("y", "\ny")];
        for (given, expected) in cases {
            assert_eq!(text.give(given, true), Piece { text: expected.into(), stop: None });
        }
        assert_eq!(text.give("z\n", true).text, "z");
        let piece = text.give("\nrest", true);
        assert_eq!(piece, Piece { text: "".into(), stop: Some("\n\n".into()) });
    }

    #[test]
    fn a_stop_string_counts_when_it_is_complete() {
        let mut text = Text::new(true, stops(&["ab"]));
        assert_eq!(text.give("xab a", false).text, "xab ");
        assert_eq!(text.give("b ab", true), Piece { text: "".into(), stop: Some("ab".into()) });
    }

    #[test]
    fn the_stop_complete_first_wins_and_then_the_longest() {
        assert_eq!(run(&["xabc"], &["abc", "b"]), ("xa".into(), Some("b".into())));
        assert_eq!(run(&["xabc"], &["bc", "abc"]), ("x".into(), Some("abc".into())));
        assert_eq!(run(&["äöü"], &["ö"]), ("ä".into(), Some("ö".into())));
    }

    proptest::proptest! {
        #[test]
        fn cuts_do_not_matter(
            text in "[ab€]{0,12}",
            list in proptest::collection::vec("[ab€]{1,4}", 0..4),
            cuts in proptest::collection::vec(0usize..12, 0..6),
        ) {
            let list: Vec<&str> = list.iter().map(String::as_str).collect();
            let chars: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(chars.len())).collect();
            cuts.extend([0, chars.len()]);
            cuts.sort();
            let parts: Vec<String> =
                cuts.windows(2).map(|w| chars[w[0]..w[1]].iter().collect()).collect();
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            // Oracle: the shortest prefix of the text that ends in a stop string.
            let ends = text.char_indices().map(|(i, c)| i + c.len_utf8());
            let hit = ends.filter_map(|end| {
                let found = list.iter().filter(|stop| text[..end].ends_with(**stop));
                found.max_by_key(|stop| stop.len()).map(|stop| (end - stop.len(), stop.to_string()))
            }).next();
            let expected = match hit {
                Some((start, stop)) => (text[..start].to_string(), Some(stop)),
                None => (text.clone(), None),
            };
            proptest::prop_assert_eq!(run(&parts, &list), expected);
        }
    }
}

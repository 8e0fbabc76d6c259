//! Text on its way out: whole characters only, and nothing that may be the beginning of a
//! stop string.

use tegula_gguf::tokenizer::Decoder;

/// Turns tokens into the text that may be shown.
#[derive(Clone, Debug)]
pub struct TextStream {
    decoder: Decoder,
    stop: Vec<String>,
    text: String,
    shown: usize,
}

impl TextStream {
    /// A stream that ends before the first of the `stop` strings; empty ones are ignored.
    pub fn new(decoder: Decoder, stop: &[String]) -> TextStream {
        TextStream {
            decoder,
            stop: stop.iter().filter(|s| !s.is_empty()).cloned().collect(),
            text: String::new(),
            shown: 0,
        }
    }

    /// Adds a token; returns the stop string if one is complete now.
    pub fn push(&mut self, id: u32, on_text: &mut dyn FnMut(&str)) -> Option<String> {
        let piece = self.decoder.push(id);
        self.add(&piece, on_text)
    }

    /// Ends the stream: what was held back is shown. Returns the stop string that this
    /// completed, if any.
    pub fn finish(&mut self, on_text: &mut dyn FnMut(&str)) -> Option<String> {
        let rest = self.decoder.flush();
        let stop = self.add(&rest, on_text);
        if stop.is_none() {
            self.show(self.text.len(), on_text);
        }
        stop
    }

    /// Whether everything so far has been shown.
    pub fn is_flushed(&self) -> bool {
        self.shown == self.text.len()
    }

    /// All that was shown.
    pub fn into_text(mut self) -> String {
        self.text.truncate(self.shown);
        self.text
    }

    fn add(&mut self, piece: &str, on_text: &mut dyn FnMut(&str)) -> Option<String> {
        self.text.push_str(piece);
        let pending = &self.text[self.shown..];
        let found = self
            .stop
            .iter()
            .filter_map(|s| Some((pending.find(s.as_str())?, s)))
            .min_by_key(|f| f.0);
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            self.show(self.shown + at, on_text);
            self.text.truncate(self.shown);
            return Some(stop);
        }
        let held = self.stop.iter().map(|s| overlap(pending, s)).max();
        self.show(self.text.len() - held.unwrap_or(0), on_text);
        None
    }

    fn show(&mut self, end: usize, on_text: &mut dyn FnMut(&str)) {
        if end > self.shown {
            on_text(&self.text[self.shown..end]);
            self.shown = end;
        }
    }
}

/// Bytes at the end of `text` that are a proper beginning of `stop`.
pub fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    let fits = |&n: &usize| stop.is_char_boundary(n) && text.ends_with(&stop[..n]);
    (1..=longest).rev().find(fits).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_the_longest_prefix_at_the_end() {
        assert_eq!(overlap("hello <|im", "<|im_end|>"), 4);
        assert_eq!(overlap("aab", "aabaa"), 3);
        assert_eq!(
            overlap("aabaa", "aabaa"),
            2,
            "the whole string is a match, not an overlap"
        );
        assert_eq!(overlap("x", "yz"), 0);
        assert_eq!(overlap("naï", "ïve"), 2);
        assert_eq!(overlap("", "abc"), 0);
    }
}

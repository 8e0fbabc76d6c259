//! Reasoning: what a model writes between `<think>` and `</think>` before its answer.

/// Where reasoning begins and ends.
const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Dims reasoning in a text that comes in pieces.
pub struct Dimmer {
    /// Without it text passes as it is.
    colour: bool,
    inside: bool,
    /// What may be the beginning of a mark.
    held: String,
}

impl Dimmer {
    /// For an answer whose prompt ends so: templates may open the reasoning themselves.
    pub fn new(colour: bool, prompt: &str) -> Dimmer {
        Dimmer {
            colour,
            inside: opened_by(prompt),
            held: String::new(),
        }
    }

    /// What to write before the first piece.
    pub fn start(&self) -> &'static str {
        if self.colour && self.inside { DIM } else { "" }
    }

    /// What to write for a piece.
    pub fn push(&mut self, piece: &str) -> String {
        if !self.colour {
            return piece.to_owned();
        }
        self.held.push_str(piece);
        let mut out = String::new();
        loop {
            let mark = if self.inside { CLOSE } else { OPEN };
            let Some(at) = self.held.find(mark) else {
                break;
            };
            let end = at + mark.len();
            match self.inside {
                true => out.extend([&self.held[..end], PLAIN]),
                false => out.extend([&self.held[..at], DIM, mark]),
            }
            self.held.drain(..end);
            self.inside = !self.inside;
        }
        let mark = if self.inside { CLOSE } else { OPEN };
        let begins = |n: &usize| self.held.ends_with(&mark[..*n]);
        let kept = (1..mark.len()).rev().find(begins).unwrap_or(0);
        out.extend(self.held.drain(..self.held.len() - kept));
        out
    }

    /// What to write at the end.
    pub fn finish(&mut self) -> String {
        let mut out = std::mem::take(&mut self.held);
        if self.colour && self.inside {
            out.push_str(PLAIN);
        }
        out
    }
}

/// Whether a prompt ends inside reasoning.
fn opened_by(prompt: &str) -> bool {
    prompt.trim_end().ends_with(OPEN)
}

/// Takes an answer apart: its reasoning, if any, and the rest, as conversations hold them.
pub fn split(answer: &str, prompt: &str) -> (Option<String>, String) {
    let own = answer.trim_start().strip_prefix(OPEN);
    let inside = match own {
        Some(rest) => rest,
        None if opened_by(prompt) => answer,
        None => return (None, answer.to_owned()),
    };
    match inside.split_once(CLOSE) {
        Some((reasoning, rest)) => (
            Some(reasoning.trim().to_owned()),
            rest.trim_start().to_owned(),
        ),
        // Ended before the answer began.
        None => (Some(inside.trim().to_owned()), String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text of pieces of so many bytes.
    fn dimmed(text: &str, prompt: &str, size: usize) -> String {
        let mut dimmer = Dimmer::new(true, prompt);
        let mut out = dimmer.start().to_owned();
        for piece in text.as_bytes().chunks(size) {
            out.push_str(&dimmer.push(std::str::from_utf8(piece).unwrap()));
        }
        out + &dimmer.finish()
    }

    #[test]
    fn reasoning_is_dimmed_wherever_pieces_end() {
        for size in 1..20 {
            let shown = |text| dimmed(text, "", size);
            assert_eq!(
                shown("<think>a < b</think>\nSo."),
                "\x1b[2m<think>a < b</think>\x1b[0m\nSo."
            );
            assert_eq!(shown("a <thin> b <th"), "a <thin> b <th");
            assert_eq!(
                shown("<think>cut off </th"),
                "\x1b[2m<think>cut off </th\x1b[0m"
            );
            let opened = dimmed("yes</think>So.", "assistant\n<think>\n", size);
            assert_eq!(opened, "\x1b[2myes</think>\x1b[0mSo.");
        }
        let mut plain = Dimmer::new(false, "<think>");
        assert_eq!(plain.push("<th") + &plain.finish(), "<th");
    }

    #[test]
    fn conversations_hold_reasoning_apart() {
        let some = |s: &str| Some(s.to_owned());
        assert_eq!(
            split("<think>\na\n</think>\n\nb", ""),
            (some("a"), "b".into())
        );
        assert_eq!(split("a</think>b", "<think>\n"), (some("a"), "b".into()));
        assert_eq!(split("a", "<think>"), (some("a"), String::new()));
        assert_eq!(split("a <think>", ""), (None, "a <think>".into()));
    }
}

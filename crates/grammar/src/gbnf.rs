//! GBNF, the grammars of llama.cpp, as Lark's.
//!
//! ```text
//! root  ::= (word " ")* word      # `root` is where the text starts
//! word  ::= [a-z]+ | "\"" [^"]{1,5} "\""
//! ```
//!
//! A rule that refers to no rule in a circle describes a regular language and becomes a
//! terminal, so that the lexer sees it whole; the others stay rules.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// What is wrong with a grammar, and in which line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub(crate) struct GbnfError {
    line: usize,
    what: String,
}

/// Groups within groups.
const MAX_DEPTH: usize = 64;
/// More repetitions than anybody means.
const MAX_REPEAT: u32 = 100_000;

/// Whether a text is GBNF rather than Lark: `::=` behind a name that begins a line.
pub(crate) fn is_gbnf(text: &str) -> bool {
    text.lines().any(|line| {
        let rest = line.trim_start().trim_start_matches(is_name);
        rest.len() < line.trim_start().len() && rest.trim_start().starts_with("::=")
    })
}

#[derive(Debug)]
enum Node {
    /// Alternatives of sequences.
    Any(Vec<Vec<Node>>),
    Text(String),
    /// What stands between the brackets of a class, in the syntax of regular expressions.
    Class(String),
    AnyChar,
    Rule(String),
    Repeat(Box<Node>, u32, Option<u32>),
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl Reader<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.rest().starts_with(text);
        if found {
            self.at += text.len();
        }
        found
    }

    fn error<T>(&self, what: impl Into<String>) -> Result<T, GbnfError> {
        Err(GbnfError {
            line: self.text[..self.at].matches('\n').count() + 1,
            what: what.into(),
        })
    }

    /// Skips spaces and comments, and line breaks where a rule can't end.
    fn space(&mut self, breaks: bool) {
        while let Some(c) = self.peek() {
            match c {
                '#' => {
                    let end = self.rest().find('\n').unwrap_or(self.rest().len());
                    self.at += end;
                }
                '\n' | '\r' if !breaks => return,
                c if c.is_whitespace() => {
                    self.next();
                }
                _ => return,
            }
        }
    }

    fn name(&mut self) -> Option<String> {
        let rest = self.rest();
        let len = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let name = rest[..len].to_owned();
        self.at += len;
        (len > 0).then_some(name)
    }

    /// Whether a new rule begins here.
    fn at_rule(&self) -> bool {
        let rest = self.rest();
        let after = rest.trim_start_matches(is_name);
        after.len() < rest.len() && after.trim_start_matches([' ', '\t']).starts_with("::=")
    }

    fn alternatives(&mut self, nested: bool) -> Result<Vec<Vec<Node>>, GbnfError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return self.error(format!("groups nest deeper than {MAX_DEPTH}"));
        }
        let mut all = vec![self.sequence(nested)?];
        loop {
            self.space(nested);
            // An alternative may begin a line of its own.
            let mark = self.at;
            self.space(true);
            if !self.take("|") {
                self.at = mark;
                break;
            }
            self.space(true);
            all.push(self.sequence(nested)?);
        }
        self.depth -= 1;
        Ok(all)
    }

    fn sequence(&mut self, nested: bool) -> Result<Vec<Node>, GbnfError> {
        let mut nodes = Vec::new();
        loop {
            self.space(nested);
            let node = match self.peek() {
                Some('"') => Node::Text(self.string()?),
                Some('[') => Node::Class(self.class()?),
                Some('.') => {
                    self.next();
                    Node::AnyChar
                }
                Some('(') => {
                    self.next();
                    self.space(true);
                    let inner = self.alternatives(true)?;
                    self.space(true);
                    if !self.take(")") {
                        return self.error("expected `)`");
                    }
                    Node::Any(inner)
                }
                Some(c) if is_name(c) && !self.at_rule() => {
                    Node::Rule(self.name().unwrap_or_default())
                }
                _ => return Ok(nodes),
            };
            nodes.push(self.repeated(node)?);
        }
    }

    fn repeated(&mut self, mut node: Node) -> Result<Node, GbnfError> {
        loop {
            let (min, max) = match self.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => {
                    let Some(len) = self.rest().find('}') else {
                        return self.error("expected `}`");
                    };
                    let inside = self.rest()[1..len].replace(' ', "");
                    let number = |s: &str| s.parse::<u32>().ok().filter(|&n| n <= MAX_REPEAT);
                    let bounds = match inside.split_once(',') {
                        None => number(&inside).map(|n| (n, Some(n))),
                        Some((min, "")) => number(min).map(|n| (n, None)),
                        Some((min, max)) => number(min).zip(number(max).map(Some)),
                    };
                    let Some(bounds) = bounds.filter(|(min, max)| max.is_none_or(|m| m >= *min))
                    else {
                        return self.error(format!("{{{inside}}} is no number of repetitions"));
                    };
                    self.at += len;
                    bounds
                }
                _ => return Ok(node),
            };
            self.next();
            node = Node::Repeat(Box::new(node), min, max);
        }
    }

    /// One character of a string or class, behind its backslash if it has one.
    fn character(&mut self) -> Result<char, GbnfError> {
        let Some(c) = self.next() else {
            return self.error("the grammar ends inside a string or class");
        };
        if c != '\\' {
            return Ok(c);
        }
        let digits = match self.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(c @ ('\\' | '"' | '[' | ']' | '^' | '-' | '/')) => return Ok(c),
            _ => return self.error("unknown escape"),
        };
        let hex = self.rest().get(..digits);
        let c = hex
            .and_then(|hex| u32::from_str_radix(hex, 16).ok())
            .and_then(char::from_u32);
        match c {
            Some(c) => {
                self.at += digits;
                Ok(c)
            }
            None => self.error(format!(
                "expected {digits} hexadecimal digits of a character"
            )),
        }
    }

    fn string(&mut self) -> Result<String, GbnfError> {
        self.next();
        let mut text = String::new();
        while !self.take("\"") {
            text.push(self.character()?);
        }
        Ok(text)
    }

    fn class(&mut self) -> Result<String, GbnfError> {
        self.next();
        let mut class = String::from(if self.take("^") { "^" } else { "" });
        let start = class.len();
        while !self.take("]") {
            let from = self.character()?;
            push_class_char(&mut class, from);
            let range = self.rest().starts_with('-') && !self.rest().starts_with("-]");
            if range {
                self.next();
                let to = self.character()?;
                if to < from {
                    return self.error(format!("the range {from:?} to {to:?} is empty"));
                }
                class.push('-');
                push_class_char(&mut class, to);
            }
        }
        if class.len() == start {
            return self.error("an empty class matches nothing");
        }
        Ok(class)
    }
}

fn push_class_char(class: &mut String, c: char) {
    // Writing to a String can't fail.
    let _ = match c.is_ascii_alphanumeric() || !c.is_ascii() {
        true => write!(class, "{c}"),
        false => write!(class, "\\x{:02X}", u32::from(c)),
    };
}

/// The grammar in Lark's syntax.
pub(crate) fn to_lark(text: &str) -> Result<String, GbnfError> {
    let mut reader = Reader {
        text,
        at: 0,
        depth: 0,
    };
    let mut rules = BTreeMap::new();
    loop {
        reader.space(true);
        if reader.peek().is_none() {
            break;
        }
        if !reader.at_rule() {
            return reader.error("expected a rule: `name ::= …`");
        }
        let name = reader.name().unwrap_or_default();
        reader.space(false);
        reader.take("::=");
        reader.space(true);
        let body = Node::Any(reader.alternatives(false)?);
        reader.space(false);
        if !matches!(reader.peek(), None | Some('\n' | '\r')) {
            return reader.error("expected the end of the rule");
        }
        if rules.insert(name.clone(), body).is_some() {
            return reader.error(format!("the rule `{name}` is there twice"));
        }
    }
    if !rules.contains_key("root") {
        return reader.error("there is no rule `root`");
    }
    let uses: BTreeMap<&str, BTreeSet<&str>> = rules
        .iter()
        .map(|(name, body)| {
            let mut used = BTreeSet::new();
            collect(body, &mut used);
            (name.as_str(), used)
        })
        .collect();
    if let Some(missing) = uses.values().flatten().find(|n| !rules.contains_key(**n)) {
        return reader.error(format!("there is no rule `{missing}`"));
    }
    // Rules become terminals from the bottom up; those in circles never do.
    let mut terminals: BTreeSet<&str> = BTreeSet::new();
    loop {
        let next: Vec<&str> = uses
            .iter()
            .filter(|(name, used)| !terminals.contains(**name) && used.is_subset(&terminals))
            .map(|(name, _)| *name)
            .collect();
        if next.is_empty() {
            break;
        }
        terminals.extend(next);
    }
    let numbers: BTreeMap<&str, String> = rules
        .keys()
        .enumerate()
        .map(|(i, name)| {
            let prefix = if terminals.contains(name.as_str()) {
                "T"
            } else {
                "r"
            };
            (name.as_str(), format!("{prefix}{i}"))
        })
        .collect();
    let mut lark = format!("start: {}\n", numbers["root"]);
    for (name, body) in &rules {
        lark += &numbers[name.as_str()];
        lark += ": ";
        write_node(body, &numbers, true, &mut lark);
        lark += "\n";
    }
    Ok(lark)
}

fn collect<'a>(node: &'a Node, used: &mut BTreeSet<&'a str>) {
    match node {
        Node::Any(all) => all.iter().flatten().for_each(|n| collect(n, used)),
        Node::Rule(name) => {
            used.insert(name);
        }
        Node::Repeat(inner, ..) => collect(inner, used),
        Node::Text(_) | Node::Class(_) | Node::AnyChar => {}
    }
}

fn write_node(node: &Node, names: &BTreeMap<&str, String>, top: bool, out: &mut String) {
    match node {
        Node::Any(all) => {
            if !top {
                out.push('(');
            }
            for (i, sequence) in all.iter().enumerate() {
                if i > 0 {
                    out.push_str(" | ");
                }
                if sequence.is_empty() {
                    out.push_str("\"\"");
                }
                for (j, node) in sequence.iter().enumerate() {
                    if j > 0 {
                        out.push(' ');
                    }
                    write_node(node, names, false, out);
                }
            }
            if !top {
                out.push(')');
            }
        }
        Node::Text(text) => out.push_str(&crate::literal_rule(text)),
        Node::Class(class) => {
            out.push_str("/[");
            out.push_str(class);
            out.push_str("]/");
        }
        Node::AnyChar => out.push_str("/(?s:.)/"),
        Node::Rule(name) => out.push_str(&names[name.as_str()]),
        Node::Repeat(inner, min, max) => {
            // A repetition of a repetition needs its own group.
            out.push('(');
            write_node(inner, names, true, out);
            out.push(')');
            // Writing to a String can't fail.
            let _ = match (min, max) {
                (0, None) => write!(out, "*"),
                (1, None) => write!(out, "+"),
                (0, Some(1)) => write!(out, "?"),
                (min, None) => write!(out, "{{{min},}}"),
                (min, Some(max)) => write!(out, "{{{min},{max}}}"),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_in_no_circle_become_terminals() {
        let lark =
            to_lark("# a list\nroot ::= item (\",\" item)*\nitem ::= num | \"(\" root ')'\n");
        assert_eq!(
            lark.unwrap_err().to_string(),
            "line 3: expected the end of the rule"
        );
        let lark = to_lark("root ::= item (\",\" item)*\nitem ::=\n  num\n  | \"(\" root \")\"\nnum ::= [0-9]{1,3} \"\\n\"? # digits\n").unwrap();
        assert_eq!(
            lark,
            "start: r2\nr0: T1 | \"(\" r2 \")\"\nT1: (/[0-9]/){1,3} (\"\\n\")?\nr2: r0 (\",\" r0)*\n"
        );
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        for (text, message) in [
            ("a ::= \"x\"", "line 1: there is no rule `root`"),
            ("root ::= b", "line 1: there is no rule `b`"),
            (
                "root ::= \"x",
                "line 1: the grammar ends inside a string or class",
            ),
            ("root ::= [z-a]", "line 1: the range 'z' to 'a' is empty"),
            (
                "root ::= \"a\"\nroot ::= \"b\"",
                "line 2: the rule `root` is there twice",
            ),
            (
                "root ::= \"a\"{3,2}",
                "line 1: {3,2} is no number of repetitions",
            ),
            ("root ::= \"\\q\"", "line 1: unknown escape"),
            ("root ::= []", "line 1: an empty class matches nothing"),
        ] {
            assert_eq!(to_lark(text).unwrap_err().to_string(), message, "{text}");
        }
        let deep = format!(
            "root ::= {}\"a\"{}",
            "(".repeat(100_000),
            ")".repeat(100_000)
        );
        assert!(
            to_lark(&deep)
                .unwrap_err()
                .to_string()
                .contains("nest deeper")
        );
    }

    #[test]
    fn lark_is_not_taken_for_gbnf() {
        assert!(is_gbnf("root ::= \"a\""));
        assert!(is_gbnf("# comment\n  root\t::= \"a\""));
        assert!(!is_gbnf("start: \"::=\""));
        assert!(!is_gbnf("::= x"));
    }
}

//! JSON as Python's `json.dumps` writes it.

use std::io::{self, Write};

use minijinja::Value;
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter};

/// The arguments of `json.dumps` that templates use.
pub(super) struct Style {
    /// Spaces per level, each element on a line of its own; `None` is one line.
    pub(super) indent: Option<usize>,
    /// Write characters outside ASCII as `\uXXXX`.
    pub(super) ascii: bool,
    /// Between elements, and between a key and its value.
    pub(super) separators: Option<(String, String)>,
}

/// `value` as JSON, its keys in their own order or sorted.
pub(super) fn dumps(value: &Value, style: &Style, sort: bool) -> Result<String, String> {
    let mut out = Vec::new();
    let (element, key) = match &style.separators {
        Some((element, key)) => (element.as_str(), key.as_str()),
        None if style.indent.is_some() => (",", ": "),
        None => (", ", ": "),
    };
    let formatter = Python {
        style,
        element,
        key,
        level: 0,
        filled: false,
    };
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    if sort {
        // `serde_json`'s own maps are sorted, unless some crate switches that off.
        let mut sorted = serde_json::to_value(value).map_err(|e| e.to_string())?;
        sorted.sort_all_objects();
        sorted
            .serialize(&mut serializer)
            .map_err(|e| e.to_string())?;
    } else {
        value
            .serialize(&mut serializer)
            .map_err(|e| e.to_string())?;
    }
    String::from_utf8(out).map_err(|e| e.to_string())
}

struct Python<'a> {
    style: &'a Style,
    element: &'a str,
    key: &'a str,
    level: usize,
    /// Whether the list or map being closed has an element.
    filled: bool,
}

impl Python<'_> {
    fn line<W: ?Sized + Write>(&self, w: &mut W) -> io::Result<()> {
        match self.style.indent {
            Some(spaces) => write!(w, "\n{:width$}", "", width = spaces * self.level),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.level += 1;
        self.filled = false;
        w.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.level -= 1;
        if self.filled {
            self.line(w)?;
        }
        self.filled = true;
        w.write_all(bracket)
    }

    fn next<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if !first {
            w.write_all(self.element.as_bytes())?;
        }
        self.line(w)
    }
}

impl Formatter for Python<'_> {
    fn begin_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        w: &mut W,
        text: &str,
    ) -> io::Result<()> {
        if !self.style.ascii {
            return w.write_all(text.as_bytes());
        }
        for c in text.chars() {
            if c.is_ascii() && c != '\x7f' {
                w.write_all(&[c as u8])?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(w, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + Write>(
        &mut self,
        w: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::Quote => w.write_all(b"\\\""),
            CharEscape::ReverseSolidus => w.write_all(b"\\\\"),
            CharEscape::Solidus => w.write_all(b"/"),
            CharEscape::Backspace => w.write_all(b"\\b"),
            CharEscape::FormFeed => w.write_all(b"\\f"),
            CharEscape::LineFeed => w.write_all(b"\\n"),
            CharEscape::CarriageReturn => w.write_all(b"\\r"),
            CharEscape::Tab => w.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => write!(w, "\\u{byte:04x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_equals_that_of_python() {
        let text =
            r#"{"b": [1, 2.5, true, null, []], "a": {"é\n\"<&": "🦀\u0001\u007f"}, "c": {}}"#;
        let value: Value = serde_json::from_str(text).expect("JSON");
        let plain = Style {
            indent: None,
            ascii: false,
            separators: None,
        };
        assert_eq!(
            dumps(&value, &plain, false).expect("JSON"),
            "{\"b\": [1, 2.5, true, null, []], \"a\": {\"é\\n\\\"<&\": \"🦀\\u0001\u{7f}\"}, \"c\": {}}"
        );
        let ascii = Style {
            ascii: true,
            separators: Some((",".into(), ":".into())),
            ..plain
        };
        assert_eq!(
            dumps(&value, &ascii, true).expect("JSON"),
            r#"{"a":{"\u00e9\n\"<&":"\ud83e\udd80\u0001\u007f"},"b":[1,2.5,true,null,[]],"c":{}}"#
        );
        let indented = Style {
            indent: Some(2),
            ascii: false,
            separators: None,
        };
        assert_eq!(
            dumps(&value, &indented, false).expect("JSON"),
            "{\n  \"b\": [\n    1,\n    2.5,\n    true,\n    null,\n    []\n  ],\n  \"a\": {\n    \"é\\n\\\"<&\": \"🦀\\u0001\u{7f}\"\n  },\n  \"c\": {}\n}"
        );
    }
}

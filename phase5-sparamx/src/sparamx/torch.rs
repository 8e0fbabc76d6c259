//! Reads the files that SparAMX's layers save themselves to: a dictionary that PyTorch has
//! pickled into a ZIP archive of uncompressed parts.
//!
//! Only what such a dictionary needs is understood: numbers, strings, tuples, dictionaries, and
//! tensors over the archive's parts. Nothing of what a pickle could name is executed.

use std::{collections::HashMap, rc::Rc};

use super::layer::{Layer, Values};

/// Why a file can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TorchError {
    #[error("is no ZIP archive of uncompressed parts: {0}")]
    Archive(&'static str),
    #[error("byte {at} of the pickle: {what}")]
    Pickle { at: usize, what: String },
    #[error("the dictionary has no tensor `{0}` of a type that SparAMX gives it")]
    Missing(&'static str),
}

type Result<T> = std::result::Result<T, TorchError>;

/// Nesting that is followed.
const DEEPEST: usize = 16;
/// Tensors that a file may have: each of them is copied out of the archive.
const MOST_TENSORS: usize = 16;

/// A tensor: an array of the archive, whole and in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tensor {
    /// `Int`, `Char`, `BFloat16`, `Float`, …
    pub ty: String,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// Something that a pickle holds.
#[derive(Clone, Debug)]
enum Value {
    Mark,
    Nothing,
    Number(i64),
    Text(Rc<str>),
    Name(Rc<str>),
    Tuple(Rc<[Value]>, usize),
    Dictionary(Rc<HashMap<Rc<str>, Value>>),
    /// Type and part of the archive.
    Storage(Rc<str>, Rc<str>),
    Tensor(Rc<Tensor>),
}

/// Reads a saved layer.
///
/// # Errors
/// For anything but a layer's dictionary.
pub fn read_layer(file: &[u8]) -> Result<Layer> {
    let dictionary = read(file)?;
    let tensor = |name: &'static str, types: &[&str]| match dictionary.get(name) {
        Some(Value::Tensor(t)) if types.contains(&&*t.ty) => Ok(t),
        _ => Err(TorchError::Missing(name)),
    };
    let ints = |t: &Tensor| -> Vec<i64> {
        match &*t.ty {
            "Int" => {
                let words = t.data.as_chunks::<4>().0.iter();
                words.map(|b| i64::from(i32::from_le_bytes(*b))).collect()
            }
            // An empty layer's starts are floats.
            "Float" => {
                let words = t.data.as_chunks::<4>().0.iter();
                words.map(|b| f32::from_le_bytes(*b) as i64).collect()
            }
            _ => Vec::new(),
        }
    };
    let values = tensor("weight_values", &["BFloat16", "Char"])?;
    let outputs = match dictionary.get("out_cols") {
        Some(Value::Number(n)) => usize::try_from(*n).unwrap_or(0),
        _ => return Err(TorchError::Missing("out_cols")),
    };
    let kind = match &*values.ty {
        "Char" => Values::Int8,
        _ => Values::Bf16,
    };
    let factors = match kind {
        Values::Bf16 => Vec::new(),
        Values::Int8 => {
            let factors = tensor("w_scales", &["BFloat16"])?;
            let halves = factors.data.as_chunks::<2>().0.iter();
            halves
                .map(|b| half::bf16::from_le_bytes(*b).to_f32())
                .collect()
        }
    };
    let bitmaps = ints(tensor("weight_metadata", &["Int"])?);
    Ok(Layer {
        values: kind,
        outputs,
        bitmaps: bitmaps.into_iter().map(|w| w as u32).collect(),
        data: values.data.clone(),
        starts: ints(tensor("weight_values_is", &["Int", "Float"])?),
        factors,
    })
}

/// The archive's dictionary.
fn read(file: &[u8]) -> Result<Rc<HashMap<Rc<str>, Value>>> {
    let parts = parts(file)?;
    let pickle = parts.iter().find(|(name, _)| name.ends_with("data.pkl"));
    let (name, pickle) = pickle.ok_or(TorchError::Archive("no data.pkl"))?;
    let root = &name[..name.len() - "data.pkl".len()];
    let mut machine = Machine {
        pickle,
        at: 0,
        stack: Vec::new(),
        memo: HashMap::new(),
        tensors: 0,
        part: &|key: &str| {
            let name = format!("{root}data/{key}");
            parts.get(name.as_str()).copied()
        },
    };
    match machine.run()? {
        Value::Dictionary(d) => Ok(d),
        _ => Err(machine.wrong("the file holds no dictionary")),
    }
}

fn number(file: &[u8], at: usize, bytes: usize) -> Result<usize> {
    let end = at.checked_add(bytes);
    let part = end.and_then(|end| file.get(at..end));
    let part = part.ok_or(TorchError::Archive("it ends early"))?;
    let value = part.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    usize::try_from(value).map_err(|_| TorchError::Archive("a length is too large"))
}

/// The parts of an archive by their names.
fn parts(file: &[u8]) -> Result<HashMap<&str, &[u8]>> {
    const END: &[u8] = b"PK\x05\x06";
    const END_64: &[u8] = b"PK\x06\x06";
    let end = file.windows(4).rposition(|w| w == END);
    let end = end.ok_or(TorchError::Archive("no directory"))?;
    let (mut count, mut at) = (number(file, end + 10, 2)?, number(file, end + 16, 4)?);
    if at == u32::MAX as usize || count == u16::MAX as usize {
        let large = file[..end].windows(4).rposition(|w| w == END_64);
        let large = large.ok_or(TorchError::Archive("no directory"))?;
        (count, at) = (number(file, large + 32, 8)?, number(file, large + 48, 8)?);
    }
    let mut parts = HashMap::new();
    for _ in 0..count {
        if file.get(at..).and_then(|f| f.get(..4)) != Some(b"PK\x01\x02") {
            return Err(TorchError::Archive("a broken directory"));
        }
        let method = number(file, at + 10, 2)?;
        let mut size = number(file, at + 24, 4)?;
        let lengths = [28, 30, 32].map(|field| number(file, at + field, 2));
        let [name_len, extra_len, comment_len] = lengths;
        let (name_len, extra_len, comment_len) = (name_len?, extra_len?, comment_len?);
        let mut local = number(file, at + 42, 4)?;
        let name_at = at + 46;
        let name = file.get(name_at..name_at + name_len);
        let name = name.and_then(|n| std::str::from_utf8(n).ok());
        let name = name.ok_or(TorchError::Archive("a broken name"))?;
        // Large lengths stand behind the name, in this order.
        let (mut extra, extra_end) = (name_at + name_len, name_at + name_len + extra_len);
        while extra + 4 <= extra_end {
            let (id, len) = (number(file, extra, 2)?, number(file, extra + 2, 2)?);
            if id == 1 {
                let mut field = extra + 4;
                if size == u32::MAX as usize {
                    size = number(file, field, 8)?;
                    field += 8;
                }
                if number(file, at + 20, 4)? == u32::MAX as usize {
                    field += 8;
                }
                if local == u32::MAX as usize {
                    local = number(file, field, 8)?;
                }
            }
            extra += 4 + len;
        }
        if method != 0 {
            return Err(TorchError::Archive("a part is compressed"));
        }
        let behind =
            number(file, local.saturating_add(26), 2)? + number(file, local.saturating_add(28), 2)?;
        let start = local + 30 + behind;
        let data = start.checked_add(size).and_then(|end| file.get(start..end));
        let data = data.ok_or(TorchError::Archive("a part ends early"))?;
        parts.insert(name, data);
        at = name_at + name_len + extra_len + comment_len;
    }
    Ok(parts)
}

/// What runs a pickle's instructions.
struct Machine<'a> {
    pickle: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    memo: HashMap<usize, Value>,
    tensors: usize,
    part: &'a dyn Fn(&str) -> Option<&'a [u8]>,
}

impl<'a> Machine<'a> {
    fn wrong(&self, what: impl Into<String>) -> TorchError {
        TorchError::Pickle {
            at: self.at,
            what: what.into(),
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count);
        let bytes = end.and_then(|end| self.pickle.get(self.at..end));
        let bytes = bytes.ok_or_else(|| self.wrong("ends early"))?;
        self.at += count;
        Ok(bytes)
    }

    fn unsigned(&mut self, bytes: usize) -> Result<usize> {
        let bytes = self.take(bytes)?;
        Ok(bytes.iter().rev().fold(0, |n, b| n << 8 | usize::from(*b)))
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.pickle[self.at..];
        let len = rest.iter().position(|b| *b == b'\n');
        let len = len.ok_or_else(|| self.wrong("ends early"))?;
        let line = self.take(len + 1)?;
        std::str::from_utf8(&line[..len]).map_err(|_| self.wrong("not UTF-8"))
    }

    fn text(&mut self, len: usize) -> Result<Value> {
        let bytes = self.take(len)?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.wrong("not UTF-8"))?;
        Ok(Value::Text(text.into()))
    }

    fn pop(&mut self) -> Result<Value> {
        self.stack
            .pop()
            .ok_or_else(|| self.wrong("takes more than there is"))
    }

    /// Everything down to the last mark.
    fn marked(&mut self) -> Result<Vec<Value>> {
        let mark = self.stack.iter().rposition(|v| matches!(v, Value::Mark));
        let mark = mark.ok_or_else(|| self.wrong("no mark"))?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn tuple(&self, items: Vec<Value>) -> Result<Value> {
        let depth = |v: &Value| match v {
            Value::Tuple(_, depth) => *depth,
            _ => 0,
        };
        let depth = 1 + items.iter().map(depth).max().unwrap_or(0);
        if depth > DEEPEST {
            return Err(self.wrong("nested too deeply"));
        }
        Ok(Value::Tuple(items.into(), depth))
    }

    fn set(&mut self, pairs: &[Value]) -> Result<()> {
        let Some(Value::Dictionary(d)) = self.stack.last_mut() else {
            return Err(self.wrong("no dictionary to put something into"));
        };
        // Whoever remembered it earlier sees it as it was: nobody looks there.
        let d = Rc::make_mut(d);
        for pair in pairs.chunks_exact(2) {
            if let (Value::Text(key), false) = (&pair[0], matches!(pair[1], Value::Dictionary(_))) {
                d.insert(key.clone(), pair[1].clone());
            }
        }
        Ok(())
    }

    fn run(&mut self) -> Result<Value> {
        loop {
            let value = match self.take(1)?[0] {
                b'.' => return self.pop(),
                0x80 => {
                    self.take(1)?;
                    continue;
                }
                // FRAME
                0x95 => {
                    self.take(8)?;
                    continue;
                }
                b'(' => Value::Mark,
                b'N' => Value::Nothing,
                0x88 => Value::Number(1),
                0x89 => Value::Number(0),
                b'K' => Value::Number(self.unsigned(1)? as i64),
                b'M' => Value::Number(self.unsigned(2)? as i64),
                b'J' => Value::Number(i64::from(self.unsigned(4)? as u32 as i32)),
                0x8a => {
                    let len = self.unsigned(1)?;
                    if len > 7 {
                        return Err(self.wrong("a number is too long"));
                    }
                    // Of seven bytes none is a sign.
                    Value::Number(self.unsigned(len)? as i64)
                }
                b'X' => {
                    let len = self.unsigned(4)?;
                    self.text(len)?
                }
                0x8c => {
                    let len = self.unsigned(1)?;
                    self.text(len)?
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    Value::Name(format!("{module}.{name}").into())
                }
                0x93 => match (self.pop()?, self.pop()?) {
                    (Value::Text(name), Value::Text(module)) => {
                        Value::Name(format!("{module}.{name}").into())
                    }
                    _ => return Err(self.wrong("a name that is no text")),
                },
                b'}' => Value::Dictionary(Rc::default()),
                b')' => self.tuple(Vec::new())?,
                b't' => {
                    let items = self.marked()?;
                    self.tuple(items)?
                }
                op @ 0x85..=0x87 => {
                    let count = usize::from(op - 0x84);
                    let from = self.stack.len().checked_sub(count);
                    let from = from.ok_or_else(|| self.wrong("takes more than there is"))?;
                    let items = self.stack.split_off(from);
                    self.tuple(items)?
                }
                b'q' | b'r' | 0x94 => {
                    let at = match self.pickle[self.at - 1] {
                        b'q' => self.unsigned(1)?,
                        b'r' => self.unsigned(4)?,
                        _ => self.memo.len(),
                    };
                    let top = self.stack.last().cloned();
                    let top = top.ok_or_else(|| self.wrong("remembers nothing"))?;
                    self.memo.insert(at, top);
                    continue;
                }
                op @ (b'h' | b'j') => {
                    let at = self.unsigned(if op == b'h' { 1 } else { 4 })?;
                    let found = self.memo.get(&at).cloned();
                    found.ok_or_else(|| self.wrong("never remembered"))?
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(&[key, value])?;
                    continue;
                }
                b'u' => {
                    let items = self.marked()?;
                    self.set(&items)?;
                    continue;
                }
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                other => return Err(self.wrong(format!("instruction {other:#04x}"))),
            };
            self.stack.push(value);
        }
    }

    /// `('storage', type, key, device, count)`.
    fn storage(&mut self) -> Result<Value> {
        match self.pop()? {
            Value::Tuple(items, _) => match &items[..] {
                [_, Value::Name(ty), Value::Text(key), ..] => {
                    let ty = ty.strip_prefix("torch.").unwrap_or(ty);
                    let ty = ty.strip_suffix("Storage").unwrap_or(ty);
                    Ok(Value::Storage(ty.into(), key.clone()))
                }
                _ => Err(self.wrong("no storage")),
            },
            _ => Err(self.wrong("no storage")),
        }
    }

    fn call(&mut self) -> Result<Value> {
        let (args, function) = (self.pop()?, self.pop()?);
        let (Value::Tuple(args, _), Value::Name(function)) = (args, function) else {
            return Err(self.wrong("a call of something else than a function"));
        };
        match (&*function, &args[..]) {
            ("collections.OrderedDict", []) => Ok(Value::Dictionary(Rc::default())),
            ("torch._utils._rebuild_parameter", [tensor @ Value::Tensor(_), ..]) => {
                Ok(tensor.clone())
            }
            (
                "torch._utils._rebuild_tensor_v2",
                [
                    Value::Storage(ty, key),
                    Value::Number(0),
                    Value::Tuple(shape, _),
                    Value::Tuple(strides, _),
                    ..,
                ],
            ) => self.tensor(ty, key, shape, strides),
            _ => Err(self.wrong(format!("a call of {function}"))),
        }
    }

    fn tensor(&mut self, ty: &str, key: &str, shape: &[Value], strides: &[Value]) -> Result<Value> {
        let size = |v: &Value| match v {
            Value::Number(n) => usize::try_from(*n).ok(),
            _ => None,
        };
        let sizes = |values: &[Value]| values.iter().map(size).collect::<Option<Vec<usize>>>();
        let (Some(shape), Some(strides)) = (sizes(shape), sizes(strides)) else {
            return Err(self.wrong("a shape that is none"));
        };
        let width = match ty {
            "Int" | "Float" => 4,
            "BFloat16" | "Half" | "Short" => 2,
            "Char" | "Byte" | "Bool" => 1,
            "Long" | "Double" => 8,
            _ => return Err(self.wrong(format!("tensors of {ty}"))),
        };
        self.tensors += 1;
        if self.tensors > MOST_TENSORS {
            return Err(self.wrong("more tensors than a layer has"));
        }
        // Row by row, without gaps.
        let mut bytes: usize = width;
        let mut stride: usize = 1;
        for (&len, &step) in shape.iter().zip(&strides).rev() {
            if step != stride && len > 1 {
                return Err(self.wrong("a tensor that is not in one piece"));
            }
            let product = |n: usize| n.checked_mul(len);
            let (Some(b), Some(s)) = (product(bytes), product(stride)) else {
                return Err(self.wrong("a tensor is too large"));
            };
            (bytes, stride) = (b, s.max(1));
        }
        let part = (self.part)(key).ok_or_else(|| self.wrong(format!("no part {key}")))?;
        let data = part.get(..bytes);
        let data = data.ok_or_else(|| self.wrong(format!("part {key} is too short")))?;
        Ok(Value::Tensor(Rc::new(Tensor {
            ty: ty.to_owned(),
            shape,
            data: data.to_vec(),
        })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `torch.save` makes of a layer: 64 outputs of 64 inputs, packed for two threads.
    const SAVED: &[u8] = include_bytes!("../../tests/data/sparamx-layer.pt");

    fn weight(output: usize, input: usize) -> u16 {
        match (output * 31 + input * 17) % 3 {
            0 => 0x3c00 + ((output * 64 + input) % 977) as u16,
            _ => 0,
        }
    }

    #[test]
    fn saved_layers_are_read() {
        let layer = read_layer(SAVED).unwrap();
        assert_eq!(
            (layer.values, layer.outputs, layer.inputs()),
            (Values::Bf16, 64, 64)
        );
        let bits = (0..64).flat_map(|o| (0..64).map(move |i| weight(o, i)));
        let want: Vec<u8> = bits.flat_map(u16::to_le_bytes).collect();
        assert!(layer.rows().unwrap() == want);
        assert_eq!(Layer::pack(Values::Bf16, (64, 64), &want, 2), Ok(layer));
    }

    #[test]
    fn no_damage_panics() {
        // Behind that there is the length of a comment that isn't there.
        for len in 0..SAVED.len() - 2 {
            assert!(read_layer(&SAVED[..len]).is_err(), "{len} bytes");
        }
        let pickle = SAVED.windows(8).position(|w| w == b"data.pkl").unwrap();
        for at in (0..900)
            .map(|i| pickle + i)
            .chain(SAVED.len() - 700..SAVED.len())
        {
            for flip in [1, 0x80, 0xff] {
                let mut damaged = SAVED.to_vec();
                damaged[at] ^= flip;
                // An error or, where it was of no consequence, a layer that may contradict
                // itself.
                if let Ok(layer) = read_layer(&damaged) {
                    let _ = layer.rows();
                }
            }
        }
    }

    #[test]
    fn what_a_pickle_names_is_not_executed() {
        let run = |pickle: &[u8]| {
            let mut machine = Machine {
                pickle,
                at: 0,
                stack: Vec::new(),
                memo: HashMap::new(),
                tensors: 0,
                part: &|_| None,
            };
            machine.run().map(|_| ()).unwrap_err().to_string()
        };
        let system = run(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.");
        assert!(system.contains("a call of os.system"), "{system}");
        assert!(run(b"\x85").contains("more than there is"));
        let mut deep = vec![b')'];
        deep.extend([0x85; 40]);
        deep.push(b'.');
        assert!(run(&deep).contains("nested"), "{}", run(&deep));
        assert!(run(b"K").contains("ends early"));
    }
}

//! The key–value part of a GGUF file: typed values, kept in file order.

use std::collections::HashMap;

use crate::{Error, error::Result};

macro_rules! value_types {
    ($($(#[$doc:meta])* $variant:ident($rust:ty) = $id:literal, $name:literal, $min:literal;)*) => {
        /// The type tags of metadata values.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum ValueType { $($(#[$doc])* $variant = $id,)* }

        impl ValueType {
            /// Every value type, in order of id.
            pub const ALL: &'static [ValueType] = &[$(ValueType::$variant,)*];

            /// The type with this numeric tag.
            pub const fn from_id(id: u32) -> Option<ValueType> {
                match id { $($id => Some(ValueType::$variant),)* _ => None }
            }

            /// The numeric tag in the file.
            pub const fn id(self) -> u32 {
                self as u32
            }

            /// The name used in messages and listings, such as `u32` or `string`.
            pub const fn name(self) -> &'static str {
                match self { $(ValueType::$variant => $name,)* }
            }

            /// The fewest bytes that one value of this type takes in a file.
            pub(crate) const fn min_bytes(self) -> u64 {
                match self { $(ValueType::$variant => $min,)* }
            }
        }

        /// One metadata value.
        ///
        /// Strings are UTF-8 by the format's definition; bytes that are not are read as
        /// U+FFFD, so that a damaged description doesn't make a model unusable.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Value { $($(#[$doc])* $variant($rust),)* }

        impl Value {
            /// The value's type tag.
            pub const fn ty(&self) -> ValueType {
                match self { $(Value::$variant(_) => ValueType::$variant,)* }
            }
        }

        $(impl From<$rust> for Value {
            fn from(v: $rust) -> Value { Value::$variant(v) }
        })*

        /// An array value: all elements of one type.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Array { $($(#[$doc])* $variant(Vec<$rust>),)* }

        impl Array {
            /// The elements' type tag.
            pub const fn element_type(&self) -> ValueType {
                match self { $(Array::$variant(_) => ValueType::$variant,)* }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self { $(Array::$variant(v) => v.len(),)* }
            }

            /// True when there are none.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// The element at `i` as a scalar value.
            pub fn get(&self, i: usize) -> Option<Value> {
                match self { $(Array::$variant(v) => v.get(i).cloned().map(Value::$variant),)* }
            }
        }

        $(impl From<Vec<$rust>> for Value {
            fn from(v: Vec<$rust>) -> Value { Value::Array(Array::$variant(v)) }
        })*
    };
}

value_types! {
    /// Unsigned 8 bits.
    U8(u8) = 0, "u8", 1;
    /// Signed 8 bits.
    I8(i8) = 1, "i8", 1;
    /// Unsigned 16 bits.
    U16(u16) = 2, "u16", 2;
    /// Signed 16 bits.
    I16(i16) = 3, "i16", 2;
    /// Unsigned 32 bits.
    U32(u32) = 4, "u32", 4;
    /// Signed 32 bits.
    I32(i32) = 5, "i32", 4;
    /// IEEE single.
    F32(f32) = 6, "f32", 4;
    /// One byte, zero or not.
    Bool(bool) = 7, "bool", 1;
    /// Length-prefixed UTF-8.
    String(String) = 8, "string", 8;
    /// Elements of one type.
    Array(Array) = 9, "array", 12;
    /// Unsigned 64 bits.
    U64(u64) = 10, "u64", 8;
    /// Signed 64 bits.
    I64(i64) = 11, "i64", 8;
    /// IEEE double.
    F64(f64) = 12, "f64", 8;
}

impl From<&str> for Value {
    fn from(v: &str) -> Value {
        Value::String(v.to_owned())
    }
}

impl Value {
    /// The string, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// The integer, whatever its width and sign.
    pub fn as_int(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// The floating-point number; `f64` values are rounded.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// The truth value, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// The array, if it is one.
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Value::Array(a) => Some(a),
            _ => None,
        }
    }

    fn describe(&self) -> String {
        let ty = self.ty().name();
        match self {
            Value::Array(a) => format!("array of {} {}", a.len(), a.element_type().name()),
            Value::String(_) => ty.to_owned(),
            Value::F32(v) => format!("{ty} {v}"),
            Value::F64(v) => format!("{ty} {v}"),
            Value::Bool(v) => format!("{ty} {v}"),
            _ => format!("{ty} {}", self.as_int().unwrap_or_default()),
        }
    }
}

impl Array {
    /// The elements as integers, whatever their width and sign.
    pub fn ints(&self) -> Option<Vec<i128>> {
        if matches!(
            self.element_type(),
            ValueType::F32
                | ValueType::F64
                | ValueType::Bool
                | ValueType::String
                | ValueType::Array
        ) {
            return None;
        }
        (0..self.len()).map(|i| self.get(i)?.as_int()).collect()
    }
}

/// The metadata of a file: keys with values, in file order, no key twice.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    origin: String,
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

/// Equal when the same keys have the same values in the same order, wherever they came from.
impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Metadata {
    /// No entries. Errors of the getters will name `origin`.
    pub fn new(origin: impl Into<String>) -> Metadata {
        Metadata {
            origin: origin.into(),
            ..Metadata::default()
        }
    }

    /// The name of the file that errors mention.
    pub fn origin(&self) -> &str {
        if self.origin.is_empty() {
            "(new file)"
        } else {
            &self.origin
        }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        Some(&self.entries[*self.index.get(key)?].1)
    }

    /// True when `key` has a value.
    pub fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    /// Keys and values in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Gives `key` a value: in place when it has one, at the end when not. Returns the old
    /// value.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> Option<Value> {
        let value = value.into();
        match self.index.get(key) {
            Some(&i) => Some(std::mem::replace(&mut self.entries[i].1, value)),
            None => {
                self.index.insert(key.to_owned(), self.entries.len());
                self.entries.push((key.to_owned(), value));
                None
            }
        }
    }

    /// Takes `key` out and returns its value.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let at = self.index.remove(key)?;
        let (_, value) = self.entries.remove(at);
        for i in self.index.values_mut().filter(|i| **i > at) {
            *i -= 1;
        }
        Some(value)
    }

    /// Keeps the entries whose key satisfies `keep`.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.entries.retain(|(k, _)| keep(k));
        self.index = self
            .entries
            .iter()
            .enumerate()
            .map(|(i, (k, _))| (k.clone(), i))
            .collect();
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        convert(value).map(Some).ok_or_else(|| Error::WrongType {
            file: self.origin().to_owned(),
            key: key.to_owned(),
            expected,
            found: value.describe(),
        })
    }

    /// `value`, or the error that `key` is missing: `md.require(k, md.u32(k)?)`.
    pub fn require<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::MissingKey {
            file: self.origin().to_owned(),
            key: key.to_owned(),
        })
    }

    /// The string under `key`; `None` when the key is absent.
    ///
    /// # Errors
    /// [`Error::WrongType`] when the value is no string. The other getters do the same.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// Any integer that fits `u32`.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer in 0..2^32", |v| {
            v.as_int()?.try_into().ok()
        })
    }

    /// Any integer that fits `u64`.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "an integer in 0..2^64", |v| {
            v.as_int()?.try_into().ok()
        })
    }

    /// Any integer that fits `i32`.
    pub fn i32(&self, key: &str) -> Result<Option<i32>> {
        self.typed(key, "an integer in -2^31..2^31", |v| {
            v.as_int()?.try_into().ok()
        })
    }

    /// A floating-point number (`f64` is rounded).
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a floating-point number", Value::as_f32)
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", Value::as_bool)
    }

    /// An array of whatever element type.
    pub fn array(&self, key: &str) -> Result<Option<&Array>> {
        self.typed(key, "an array", Value::as_array)
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::String(v)) => Some(v.as_slice()),
            // Some writers give an empty list the wrong element type.
            Value::Array(a) if a.is_empty() => Some(&[]),
            _ => None,
        })
    }

    /// An array of `f32`.
    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of f32", |v| match v {
            Value::Array(Array::F32(v)) => Some(v.as_slice()),
            Value::Array(a) if a.is_empty() => Some(&[]),
            _ => None,
        })
    }

    /// An array of integers of any width that all fit `i32`.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.typed(key, "an array of integers in -2^31..2^31", |v| {
            v.as_array()?
                .ints()?
                .into_iter()
                .map(|i| i.try_into().ok())
                .collect()
        })
    }

    /// An array of integers of any width that all fit `u32`.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.typed(key, "an array of integers in 0..2^32", |v| {
            v.as_array()?
                .ints()?
                .into_iter()
                .map(|i| i.try_into().ok())
                .collect()
        })
    }

    /// The string under `key`, which must be there.
    pub fn require_str(&self, key: &str) -> Result<&str> {
        self.require(key, self.str(key)?)
    }

    /// The integer under `key`, which must be there and fit `u32`.
    pub fn require_u32(&self, key: &str) -> Result<u32> {
        self.require(key, self.u32(key)?)
    }

    /// The integer under `key`, which must be there and fit `u64`.
    pub fn require_u64(&self, key: &str) -> Result<u64> {
        self.require(key, self.u64(key)?)
    }

    /// The number under `key`, which must be there.
    pub fn require_f32(&self, key: &str) -> Result<f32> {
        self.require(key, self.f32(key)?)
    }

    /// The array of strings under `key`, which must be there.
    pub fn require_strings(&self, key: &str) -> Result<&[String]> {
        self.require(key, self.strings(key)?)
    }
}

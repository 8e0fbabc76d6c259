//! Names of series, by which reports find them again.

use std::{fmt, str::FromStr};
use tegula_lab::Series;

/// A timed product: `product|Q4_0|llama-3-8b gate|8|interleaved|avx512|operations|bytes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Product {
    pub ty: String,
    pub shape: String,
    /// Tokens.
    pub m: usize,
    /// A way's name, or `tegula`.
    pub way: String,
    /// A tier's name, or `amx`.
    pub tier: String,
    /// Multiplications and additions.
    pub operations: u64,
    /// Of the matrix.
    pub bytes: u64,
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "product|{}|{}|{}|{}|{}|{}|{}",
            self.ty, self.shape, self.m, self.way, self.tier, self.operations, self.bytes
        )
    }
}

impl FromStr for Product {
    type Err = ();

    fn from_str(s: &str) -> Result<Product, ()> {
        let parts: Vec<&str> = s.split('|').collect();
        let ["product", ty, shape, m, way, tier, operations, bytes] = parts[..] else {
            return Err(());
        };
        Ok(Product {
            ty: ty.to_owned(),
            shape: shape.to_owned(),
            m: m.parse().map_err(drop)?,
            way: way.to_owned(),
            tier: tier.to_owned(),
            operations: operations.parse().map_err(drop)?,
            bytes: bytes.parse().map_err(drop)?,
        })
    }
}

/// A series of some other kind: `kind|a|b|…`; its parts behind the kind.
pub fn parts<'a>(series: &'a Series, kind: &str) -> Option<Vec<&'a str>> {
    let rest = series.name.strip_prefix(kind)?.strip_prefix('|')?;
    Some(rest.split('|').collect())
}

/// A series of another kind.
pub fn series(kind: &str, parts: &[&str], unit: &str, samples: Vec<f64>) -> Series {
    Series {
        name: format!("{kind}|{}", parts.join("|")),
        unit: unit.to_owned(),
        samples,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        let product = Product {
            ty: "Q4_0".into(),
            shape: "a b".into(),
            m: 8,
            way: "row-wise, decoded once".into(),
            tier: "amx".into(),
            operations: 5,
            bytes: 7,
        };
        assert_eq!(product.to_string().parse(), Ok(product));
        assert_eq!("product|Q4_0".parse::<Product>(), Err(()));
        let other = series("code", &["a", "b"], "n", vec![1.0]);
        assert_eq!(parts(&other, "code"), Some(vec!["a", "b"]));
        assert_eq!(parts(&other, "cod"), None);
    }
}

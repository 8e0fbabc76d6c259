//! The evidence of the parity matrix that is a function of this crate, and what checks 4.4 and
//! 4.5 look at besides: in every test run, ignored by name on CPUs without AVX2.

use std::{collections::BTreeMap, path::Path};

use libtest_mimic::{Arguments, Trial};
use phase4_parity::{
    matrix::{Evidence, ROWS},
    tiles,
};
use tegula_kernels::Tier;

fn main() {
    let mut trials = BTreeMap::new();
    for evidence in ROWS.iter().flat_map(|row| row.evidence) {
        if let Evidence::Here(name, _) = *evidence {
            let look = || evidence.look(Path::new("."));
            trials.insert(name, Trial::test(name, move || Ok(look().map(drop)?)));
        }
    }
    let every_type = || Ok(tiles::every_type().map(drop)?);
    trials.insert("every type", Trial::test("tiles::every_type", every_type));
    let absent = Tier::detect_max() == Tier::Scalar;
    let trials = trials.into_values().map(|t| t.with_ignored_flag(absent));
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

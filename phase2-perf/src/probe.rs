//! What the machine can do at most, as far as a model can use it: bandwidths and peaks.

use serde::{Deserialize, Serialize};
use std::time::Duration;
use tegula_kernels::{
    Amx, Pool, PoolConfig, Tier,
    probe::{Caches, Level, Peak, compute_peak, read_bandwidth},
};

use crate::stats::median;

/// A rate with its samples, in giga-units per second.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// A level of memory, or an instruction.
    pub name: String,
    /// `GB/s` or `GOP/s`.
    pub unit: String,
    /// Bytes that all threads together read, for bandwidths.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    pub samples: Vec<f64>,
}

impl Rate {
    /// The middle sample.
    pub fn median(&self) -> f64 {
        median(&self.samples)
    }
}

/// The machine's limits with so many threads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    pub threads: usize,
    pub bandwidth: Vec<Rate>,
    pub compute: Vec<Rate>,
}

/// How long and how often each probe runs.
#[derive(Clone, Copy, Debug)]
pub struct ProbeOptions {
    pub repetitions: usize,
    pub time: Duration,
    /// Most bytes of memory to use.
    pub memory: u64,
}

impl Default for ProbeOptions {
    fn default() -> ProbeOptions {
        ProbeOptions {
            repetitions: 5,
            time: Duration::from_millis(100),
            memory: 4 << 30,
        }
    }
}

impl Probe {
    /// Measures everything that this machine has. Tiles only with a token, and never the
    /// emulator's.
    pub fn run(threads: usize, amx: Option<Amx>, options: &ProbeOptions) -> Probe {
        let pool = Pool::new(PoolConfig::new(threads));
        let caches = Caches::detect();
        let giga = |samples: Vec<f64>| samples.into_iter().map(|s| s / 1e9).collect();
        let tier = Tier::detect_max();
        let bandwidth = |level: Level| {
            let bytes = caches.bytes(level, threads, options.memory);
            (bytes > 0).then(|| Rate {
                name: level.name().to_owned(),
                unit: "GB/s".to_owned(),
                bytes: Some(bytes),
                samples: giga(
                    read_bandwidth(&pool, tier, bytes, options.repetitions, options.time).samples,
                ),
            })
        };
        let compute = |peak: Peak| {
            let rates = compute_peak(peak, &pool, amx, options.repetitions, options.time)?;
            Some(Rate {
                name: peak.name().to_owned(),
                unit: "GOP/s".to_owned(),
                bytes: None,
                samples: giga(rates.samples),
            })
        };
        Probe {
            threads,
            bandwidth: Level::ALL.into_iter().filter_map(bandwidth).collect(),
            compute: Peak::ALL.into_iter().filter_map(compute).collect(),
        }
    }

    /// Bytes per second read from memory.
    pub fn memory(&self) -> Option<f64> {
        let rate = self
            .bandwidth
            .iter()
            .find(|r| r.name == Level::Memory.name())?;
        Some(rate.median() * 1e9)
    }

    /// Operations per second of what bounds a prompt of a file of this type on these
    /// instruction sets (both as reports name them), and its name.
    pub fn peak(&self, isa: &str, file_type: &str) -> Option<(&str, f64)> {
        let (f32s, bf16) = (["F32", "F16"].contains(&file_type), file_type == "BF16");
        let bounds: &[Peak] = if isa.contains("amx") && !f32s {
            // Codes become bf16 on their way to the tiles.
            &[Peak::AmxBf16]
        } else if isa.contains("avx512") {
            match (f32s, bf16) {
                (true, _) => &[Peak::Avx512Fma],
                (_, true) => &[Peak::Avx512Fma, Peak::Avx512Bf16],
                _ => &[Peak::Avx512Vnni],
            }
        } else if isa.contains("avx2") {
            match f32s || bf16 {
                true => &[Peak::Avx2Fma],
                false => &[Peak::Avx2Int8, Peak::AvxVnni],
            }
        } else {
            &[Peak::Scalar]
        };
        let named = |rate: &&Rate| bounds.iter().any(|bound| bound.name() == rate.name);
        let rates = self.compute.iter().filter(named);
        let best = rates.max_by(|a, b| a.median().total_cmp(&b.median()))?;
        Some((best.name.as_str(), best.median() * 1e9))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_the_machine_has_is_there() {
        let options = ProbeOptions {
            repetitions: 2,
            time: Duration::from_millis(1),
            memory: 8 << 20,
        };
        let probe = Probe::run(2, None, &options);
        let names =
            |rates: &[Rate]| -> Vec<String> { rates.iter().map(|r| r.name.clone()).collect() };
        assert!(names(&probe.bandwidth).contains(&"memory".to_owned()));
        let compute = names(&probe.compute);
        assert_eq!(compute[0], "scalar f32");
        assert!(
            compute.iter().all(|name| !name.contains("amx")),
            "{compute:?}"
        );
        let rates = probe.bandwidth.iter().chain(&probe.compute);
        assert!(
            rates
                .clone()
                .all(|r| r.samples.len() == 2 && r.median() > 0.0)
        );
        assert!(probe.memory().is_some());
        assert_eq!(probe.peak("scalar", "Q4_0").unwrap().0, "scalar f32");
        assert_eq!(probe.peak("avx512, amx", "Q4_0"), None);
        let json = serde_json::to_string(&probe).unwrap();
        assert_eq!(serde_json::from_str::<Probe>(&json).unwrap().threads, 2);
    }
}

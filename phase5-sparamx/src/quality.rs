//! Perplexity against bytes: sparse files of real models beside dense ones (check 5.10), and
//! what the phase's page draws of it.

use std::{collections::BTreeMap, fmt::Write as _, fs, ops::ControlFlow, path::Path};

use tegula_engine::threads::default_threads;
use tegula_gguf::{
    GgmlType, Gguf,
    quantize::{FileType, QuantizeOptions, quantize},
    sparse::{Sparsify, sparsify},
};
use tegula_lab::{Env, Outcome, Record};

use crate::{
    checks::{Result, Scratch, greedy, holds, load, score, text},
    prune::{Calibration, PruneOptions, prune, prune_in_sequence},
};

/// The models, by their files.
const MODELS: [&str; 2] = ["ferrous-7m", "ferrous-moe-21m"];

/// A file's size and how well it predicts.
#[derive(Clone, PartialEq, Debug)]
pub struct Point {
    pub model: String,
    /// `dense Q4_0`, or a sparse type and the pruner's method: `S8 wanda`.
    pub format: String,
    /// Of the weights of pruned matrices, those that are zero.
    pub percent: Option<u32>,
    /// Millions of bytes of all tensors.
    pub megabytes: f64,
    pub perplexity: f64,
}

impl Point {
    /// As a check's fact.
    fn fact(&self) -> (String, String) {
        let percent = self.percent.map(|p| format!(" {p} %")).unwrap_or_default();
        (
            format!("{}: {}{percent}", self.model, self.format),
            format!(
                "{:.2} MB, perplexity {:.3}",
                self.megabytes, self.perplexity
            ),
        )
    }

    /// What a fact says, if it is a point. Older records have one model and don't name it.
    fn parse(key: &str, value: &str) -> Option<Point> {
        let (model, rest) = key.split_once(": ").unwrap_or((MODELS[0], key));
        let (format, percent) = match rest.strip_suffix(" %") {
            Some(rest) => {
                let (format, percent) = rest.rsplit_once(' ')?;
                (format, Some(percent.parse().ok()?))
            }
            None => (rest, None),
        };
        let (megabytes, perplexity) = value.split_once(" MB, perplexity ")?;
        Some(Point {
            model: model.to_owned(),
            format: format.to_owned(),
            percent,
            megabytes: megabytes.parse().ok()?,
            perplexity: perplexity.parse().ok()?,
        })
    }

    fn is_dense(&self) -> bool {
        self.percent.is_none()
    }

    /// Better than a dense file of as many bytes, and than none of fewer.
    fn wins(&self, all: &[Point]) -> bool {
        let of_model = || all.iter().filter(|p| p.is_dense() && p.model == self.model);
        // The largest is the source itself: it is beaten in bytes by everything.
        let most = of_model().map(|p| p.megabytes).fold(0.0, f64::max);
        let beats = |p: &Point| p.megabytes >= self.megabytes && p.perplexity > self.perplexity;
        let beaten = |p: &Point| p.megabytes <= self.megabytes && p.perplexity <= self.perplexity;
        !self.is_dense()
            && of_model().any(|p| p.megabytes < most && beats(p))
            && !of_model().any(beaten)
    }
}

/// What the points say, in a sentence.
fn verdict(points: &[Point]) -> String {
    let wins: Vec<String> = points
        .iter()
        .filter(|p| p.wins(points))
        .map(|p| p.fact().0)
        .collect();
    match wins.is_empty() {
        true => "no sparse file is better than a dense one of no more bytes: without \
                 retraining, quantise instead"
            .to_owned(),
        false => format!(
            "better than any dense file of no more bytes: {}",
            wins.join(", ")
        ),
    }
}

/// Perplexities of the real models by method, sparsity and format, beside formats that take as
/// many bytes.
pub fn check(env: &Env) -> Result<Outcome> {
    let read = |name| fs::read_to_string(env.model(name)?).map_err(text);
    let (held_out, calibration) = (read("heldout.txt")?, read("calib.txt")?);
    let mut points = Vec::new();
    for model in MODELS {
        let source = env.model(&format!("{model}-bf16.gguf"))?;
        points.extend(measure(model, &source, &held_out, &calibration)?);
    }
    let mut facts: BTreeMap<String, String> = points.iter().map(Point::fact).collect();
    facts.insert("at equal bytes".into(), verdict(&points));
    Ok(Outcome::Passed { facts })
}

/// Nobody interrupts these.
fn go_on() -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn measure(model: &str, source: &Path, held_out: &str, calibration: &str) -> Result<Vec<Point>> {
    let scratch = Scratch::new("quality")?;
    let threads = default_threads();
    let how = Calibration {
        limit: 40,
        ..Calibration::default()
    };
    let gguf = Gguf::open(source).map_err(text)?;
    let rate = |path: &Path, format: String, percent: Option<u32>| -> Result<Point> {
        let file = Gguf::open(path).map_err(text)?;
        let bytes: u64 = file.tensors().iter().map(|t| t.bytes).sum();
        Ok(Point {
            model: model.to_owned(),
            format,
            percent,
            megabytes: bytes as f64 / 1e6,
            perplexity: score(&load(path, threads)?, held_out)?,
        })
    };
    let mut points = vec![rate(source, "dense BF16".into(), None)?];
    for ty in [
        FileType::Q3_K_M,
        FileType::Q4_0,
        FileType::Q4_K_M,
        FileType::Q8_0,
    ] {
        let path = scratch.file("dense.gguf");
        let options = QuantizeOptions::new(ty);
        quantize(&gguf, &path, &options, &mut |_| go_on()).map_err(text)?;
        points.push(rate(&path, format!("dense {}", ty.name()), None)?);
    }
    let mut magnitude_50 = f64::NAN;
    for method in ["magnitude", "wanda"] {
        for percent in [30, 50, 70] {
            let pruned = scratch.file("pruned.gguf");
            let options = PruneOptions {
                sparsity: f64::from(percent) / 100.0,
                dense: true,
                least_saving: 0.1,
                ..PruneOptions::default()
            };
            match method {
                "magnitude" => prune(&gguf, &pruned, &options, &mut |_| go_on()).map(drop),
                _ => {
                    let (model, how) = (load(source, threads)?, (calibration, &how));
                    prune_in_sequence(&gguf, model, how, &pruned, &options, &mut |_| go_on())
                        .map(drop)
                }
            }
            .map_err(text)?;
            let pruned_file = Gguf::open(&pruned).map_err(text)?;
            for (ty, file) in [
                (GgmlType::S_BF16, None),
                (GgmlType::S8, Some(FileType::Q8_0)),
                (GgmlType::S4, Some(FileType::Q4_0)),
            ] {
                let path = scratch.file("sparse.gguf");
                let twin = match file {
                    None => pruned.clone(),
                    Some(file) => {
                        let twin = scratch.file("twin.gguf");
                        let options = QuantizeOptions::new(file);
                        quantize(&pruned_file, &twin, &options, &mut |_| go_on()).map_err(text)?;
                        twin
                    }
                };
                let options = Sparsify {
                    wanted: &|t| t.name != "token_embd.weight",
                    least_saving: 0.0,
                    pattern: None,
                };
                let twin_file = Gguf::open(&twin).map_err(text)?;
                sparsify(&twin_file, &path, &options, &mut |_| go_on()).map_err(text)?;
                let point = rate(&path, format!("{ty} {method}"), Some(percent))?;
                if percent == 50 && ty == GgmlType::S8 {
                    same_as_dense(&path, &twin, &point, held_out)?;
                    match method {
                        // On the mixture of experts magnitude alone has been better.
                        "wanda" if model == MODELS[0] => {
                            holds(point.perplexity < magnitude_50, || {
                                let ppl = point.perplexity;
                                format!("wanda {ppl} is no better than magnitude {magnitude_50}")
                            })?
                        }
                        _ => magnitude_50 = point.perplexity,
                    }
                }
                points.push(point);
            }
        }
    }
    Ok(points)
}

/// Holds that a sparse file predicts what its dense twin does.
fn same_as_dense(sparse: &Path, twin: &Path, point: &Point, held_out: &str) -> Result<()> {
    let threads = default_threads();
    let other = score(&load(twin, threads)?, held_out)?;
    let near = (other.ln() - point.perplexity.ln()).abs();
    holds(near < 0.01, || {
        let ppl = point.perplexity;
        format!("{}: {ppl} as dense {other}", point.format)
    })?;
    let [a, b] = [sparse, twin].map(|p| load(p, threads).and_then(|m| greedy(&m, 32)));
    holds(a? == b?, || {
        format!("{}: other tokens than dense", point.format)
    })
}

/// The points of the newest record in which check 5.10 passed, and where they come from.
fn recorded(root: &Path) -> std::result::Result<Option<(Vec<Point>, String)>, String> {
    let records = Record::read_all(&root.join("docs/results")).map_err(|e| e.to_string())?;
    let mut newest: Option<(String, Vec<Point>, String)> = None;
    for record in records.iter().filter(|r| r.subject == "phase-5") {
        for check in record.checks.iter().filter(|c| c.id == "5.10") {
            let Outcome::Passed { facts } = &check.outcome else {
                continue;
            };
            if newest
                .as_ref()
                .is_some_and(|(date, ..)| *date >= record.date)
            {
                continue;
            }
            let points = facts.iter().filter_map(|(k, v)| Point::parse(k, v));
            let day = record.date.get(..10).unwrap_or(&record.date);
            let commit = record.commit.get(..10).unwrap_or(&record.commit);
            let from = format!("{}, commit {commit}, {day}", record.host.cpu);
            newest = Some((record.date.clone(), points.collect(), from));
        }
    }
    Ok(newest.map(|(_, points, from)| (points, from)))
}

/// Where the drawing is, from the root and from the page.
pub const DRAWING: &str = "docs/PHASE_5.svg";

/// What the phase's page says of quality.
///
/// # Errors
/// Names a record that can't be read.
pub fn page(root: &Path) -> std::result::Result<String, String> {
    let mut out = "## Quality at equal bytes\n\n".to_owned();
    let Some((points, from)) = recorded(root)? else {
        out += "There is no record yet (`cargo xtask phase 5 verify`).\n";
        return Ok(out);
    };
    let _ = write!(
        out,
        "{} Perplexities of held-out text, windows of 512 ({from}); one-shot pruning, no \
         retraining.\n\n![Perplexity by megabytes](PHASE_5.svg)\n",
        sentence(&verdict(&points))
    );
    for model in models(&points) {
        let _ = write!(out, "\n| {model} | MB | perplexity |\n|---|---|---|\n");
        let mut all: Vec<&Point> = points.iter().filter(|p| p.model == model).collect();
        all.sort_by(|a, b| a.megabytes.total_cmp(&b.megabytes));
        for p in all {
            let (key, _) = p.fact();
            let name = key.split_once(": ").map_or(&*key, |(_, name)| name);
            let _ = writeln!(out, "| {name} | {:.2} | {:.3} |", p.megabytes, p.perplexity);
        }
    }
    Ok(out)
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(letters).chain(['.']).collect()
}

/// What the newest record says, in a sentence.
///
/// # Errors
/// Names a record that can't be read.
pub fn headline(root: &Path) -> std::result::Result<Option<String>, String> {
    Ok(recorded(root)?.map(|(points, _)| format!("At equal bytes: {}.", verdict(&points))))
}

fn models(points: &[Point]) -> Vec<&str> {
    let mut all: Vec<&str> = points.iter().map(|p| p.model.as_str()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The page's drawing.
///
/// # Errors
/// Names a record that can't be read.
pub fn drawing(root: &Path) -> std::result::Result<Option<String>, String> {
    Ok(recorded(root)?.map(|(points, _)| svg(&points)))
}

/// Pixels of a model's drawing, and of the margins around its axes.
const SIZE: (f64, f64) = (560.0, 420.0);
const MARGIN: (f64, f64) = (60.0, 45.0);

/// Perplexities above this are at the upper edge.
const WORST: f64 = 64.0;

const COLOURS: [&str; 6] = [
    "#1b6ca8", "#7fb2d9", "#b3541e", "#e8a87c", "#2f7d32", "#8fcf93",
];

/// One drawing per model, side by side: bytes and perplexity, both logarithmic. Dense files are
/// black; lines join the sparsities of a sparse type and a method.
fn svg(points: &[Point]) -> String {
    let models = models(points);
    let width = SIZE.0 * models.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        SIZE.1
    );
    let mut formats: Vec<&str> = points.iter().map(|p| p.format.as_str()).collect();
    formats.sort_unstable();
    formats.dedup();
    formats.retain(|f| !f.starts_with("dense "));
    for (i, model) in models.iter().enumerate() {
        let of_model: Vec<&Point> = points.iter().filter(|p| p.model == *model).collect();
        panel(&mut out, i as f64 * SIZE.0, model, &of_model, &formats);
    }
    out += "</svg>\n";
    out
}

fn panel(out: &mut String, left: f64, model: &str, points: &[&Point], formats: &[&str]) {
    let log = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, 0.0f64), |(a, b), x| (a.min(x), b.max(x)));
        ((0.9 * low).ln(), (1.1 * high).ln())
    };
    let shown = |p: &Point| p.perplexity.min(WORST);
    let x_range = log(&mut points.iter().map(|p| p.megabytes));
    let y_range = log(&mut points.iter().map(|p| shown(p)));
    let scale = |x: f64, (low, high): (f64, f64)| (x.ln() - low) / (high - low).max(1e-9);
    let (w, h) = (SIZE.0 - 1.5 * MARGIN.0, SIZE.1 - 2.0 * MARGIN.1);
    let (x0, y0) = (left + MARGIN.0, SIZE.1 - MARGIN.1);
    let x = |mb: f64| x0 + w * scale(mb, x_range);
    let y = |ppl: f64| y0 - h * scale(ppl, y_range);
    let _ = writeln!(
        out,
        "<path d=\"M{x0:.1} {:.1} V{y0:.1} H{:.1}\" fill=\"none\" stroke=\"black\"/>\n\
         <text x=\"{x0:.1}\" y=\"22\" font-weight=\"bold\">{model}</text>\n\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">MB</text>\n\
         <text x=\"{:.1}\" y=\"{:.1}\">perplexity</text>",
        MARGIN.1,
        x0 + w,
        x0 + w / 2.0,
        y0 + 35.0,
        left + 4.0,
        MARGIN.1 - 8.0,
    );
    let steps = [
        1.0f64, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0,
    ];
    for tick in steps {
        if (x_range.0..x_range.1).contains(&tick.ln()) {
            let at = x(tick);
            let _ = writeln!(
                out,
                "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tick}</text>",
                y0 + 17.0
            );
        }
        if (y_range.0..y_range.1).contains(&tick.ln()) {
            let at = y(tick);
            let _ = writeln!(
                out,
                "<path d=\"M{x0:.1} {at:.1} h{w:.1}\" stroke=\"#dddddd\"/>\n\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>",
                x0 - 6.0,
                at + 4.0
            );
        }
    }
    for (i, format) in formats.iter().enumerate() {
        let mut line: Vec<&&Point> = points.iter().filter(|p| p.format == *format).collect();
        line.sort_by_key(|p| p.percent);
        let colour = COLOURS[i % COLOURS.len()];
        let places = line.iter().map(|p| (x(p.megabytes), y(shown(p))));
        let path: Vec<String> = places
            .clone()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>",
            path.join(" ")
        );
        for ((x, y), p) in places.zip(&line) {
            let percent = p.percent.unwrap_or_default();
            let _ = writeln!(
                out,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"9\">{percent}</text>",
                x + 4.0,
                y - 3.0
            );
        }
        let legend = MARGIN.1 + 15.0 * i as f64;
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{legend:.1}\" text-anchor=\"end\" fill=\"{colour}\">{format}</text>",
            x0 + w
        );
    }
    for p in points.iter().filter(|p| p.is_dense()) {
        let (x, y) = (x(p.megabytes), y(shown(p)));
        let name = p.format.trim_start_matches("dense ");
        let _ = writeln!(
            out,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
            y + 16.0
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(format: &str, percent: Option<u32>, megabytes: f64, perplexity: f64) -> Point {
        Point {
            model: "ferrous-7m".into(),
            format: format.into(),
            percent,
            megabytes,
            perplexity,
        }
    }

    fn points() -> Vec<Point> {
        vec![
            point("dense BF16", None, 14.7, 1.98),
            point("dense Q8_0", None, 7.82, 1.979),
            point("dense Q4_0", None, 4.42, 2.097),
            point("S8 wanda", Some(30), 6.75, 2.146),
            point("S8 wanda", Some(70), 4.28, 995.018),
        ]
    }

    #[test]
    fn facts_come_back() {
        for p in points() {
            let (key, value) = p.fact();
            assert_eq!(Point::parse(&key, &value), Some(p));
        }
        let old = Point::parse("S8 magnitude 50 %", "5.48 MB, perplexity 4.297");
        let expected = point("S8 magnitude", Some(50), 5.48, 4.297);
        assert_eq!(old, Some(expected));
        assert_eq!(Point::parse("at equal bytes", "no sparse file"), None);
    }

    #[test]
    fn only_what_no_dense_file_beats_wins() {
        let mut all = points();
        assert!(verdict(&all).contains("quantise instead"));
        // Smaller than Q8_0, and better than Q4_0, which has less.
        all.push(point("S8 wanda", Some(50), 6.0, 2.05));
        assert!(!all.last().unwrap().wins(&all), "Q8_0 is not worse");
        all.push(point("S4 wanda", Some(50), 4.4, 2.0));
        let says = verdict(&all);
        assert!(
            says.ends_with("of no more bytes: ferrous-7m: S4 wanda 50 %"),
            "{says}"
        );
    }

    #[test]
    fn drawings_show_every_point() {
        let mut all = points();
        all.extend(points().into_iter().map(|p| Point {
            model: "other".into(),
            ..p
        }));
        let svg = svg(&all);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<circle").count(), all.len());
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(svg.contains(">ferrous-7m<") && svg.contains(">Q4_0<"));
    }
}

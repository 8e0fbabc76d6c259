//! A record as one drawing: throughput by depth, by threads, by batch, and the roofline.

use crate::{
    probe::Probe,
    record::{BenchRecord, Row},
};
use plotters::{coord::Shift, prelude::*};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Pixels of the drawing.
const SIZE: (u32, u32) = (1400, 1000);

/// A drawing could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    #[error("{}: {error}", path.display())]
    Io {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("cannot draw: {0}")]
    Draw(String),
}

type Lines = BTreeMap<String, Vec<(f64, f64)>>;
type Drawn = Result<(), PlotError>;

fn draw(error: impl std::fmt::Display) -> PlotError {
    PlotError::Draw(error.to_string())
}

/// Draws the record into an SVG file, under a temporary name that is then renamed.
///
/// # Errors
/// When the file can't be written.
pub fn write(path: &Path, record: &BenchRecord) -> Drawn {
    let svg = svg(record)?;
    let temporary = path.with_extension(format!("svg.{}.tmp", std::process::id()));
    let result = fs::write(&temporary, svg).and_then(|()| fs::rename(&temporary, path));
    result.map_err(|error| {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
        PlotError::Io {
            path: path.to_owned(),
            error,
        }
    })
}

/// The drawing as text.
///
/// # Errors
/// None that is known.
pub fn svg(record: &BenchRecord) -> Result<String, PlotError> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(draw)?;
        let host = &record.record.host;
        let short = record.record.commit.get(..10).unwrap_or("");
        let title = format!("{}, commit {short}", host.cpu);
        let area = area.titled(&title, ("sans-serif", 18)).map_err(draw)?;
        let panels = area.split_evenly((2, 2));
        let by = |x: fn(&Row) -> f64, other: fn(&Row) -> String| lines(record, x, other, label);
        let threads = |r: &Row| format!("t{} b{}", r.threads, r.ubatch);
        let by_depth = by(|r| r.n_depth as f64, threads);
        chart(&panels[0], "tokens/s by depth", "tokens before", &by_depth)?;
        let depth = |r: &Row| format!("d{} b{}", r.n_depth, r.ubatch);
        let by_threads = by(|r| r.threads as f64, depth);
        chart(&panels[1], "tokens/s by threads", "threads", &by_threads)?;
        let by_batch = lines(
            record,
            together,
            |r| format!("t{} d{}", r.threads, r.n_depth),
            engine,
        );
        chart(
            &panels[2],
            "tokens/s by batch",
            "tokens that run together",
            &by_batch,
        )?;
        roofline(&panels[3], record)?;
        area.present().map_err(draw)?;
    }
    Ok(text)
}

/// Tokens that pass through the layers at a time, mostly.
fn together(row: &Row) -> f64 {
    match row.n_gen {
        0 => row.n_prompt.min(row.ubatch).min(row.batch) as f64,
        _ => 1.0,
    }
}

/// Median throughput over `x`, one line per `label` and model; `other` tells lines apart by
/// what else varies.
fn lines(
    record: &BenchRecord,
    x: fn(&Row) -> f64,
    other: fn(&Row) -> String,
    label: fn(&Row) -> String,
) -> Lines {
    let mut lines = Lines::new();
    let several = |f: fn(&Row) -> String| {
        let mut values: Vec<String> = record.rows.iter().map(f).collect();
        values.sort();
        values.dedup();
        values.len() > 1
    };
    let (models, others) = (several(|r| r.model.clone()), several(other));
    for row in record.rows.iter().filter(|r| !r.samples_ts.is_empty()) {
        let mut name = label(row);
        if models {
            name += &format!(" {}", row.model);
        }
        if others {
            name += &format!(" {}", other(row));
        }
        let points = lines.entry(name).or_default();
        points.push((x(row), row.summary.median_ts));
    }
    for points in lines.values_mut() {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}

/// Engine and test, without the depth.
fn label(row: &Row) -> String {
    let test = row.test.split(" @").next().unwrap_or("");
    format!("{} {test}", engine(row))
}

fn engine(row: &Row) -> String {
    match row.isa.as_str() {
        "" => row.engine.clone(),
        isa => format!("{} {isa}", row.engine),
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn chart(area: &Area, title: &str, x_name: &str, lines: &Lines) -> Drawn {
    let points = || lines.values().flatten();
    let top = points().map(|p| p.1).fold(1.0, f64::max) * 1.1;
    let left = points().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let right = points().map(|p| p.0).fold(0.0, f64::max);
    let (left, right) = match left < right {
        true => (left, right),
        // A single place needs some room around it.
        false => (right - 1.0, right + 1.0),
    };
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(left..right, 0.0..top)
        .map_err(draw)?;
    chart
        .configure_mesh()
        .max_light_lines(1)
        .x_desc(x_name)
        .draw()
        .map_err(draw)?;
    for (i, (name, points)) in lines.iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), &color))
            .map_err(draw)?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 8, y), 3, color.filled()));
        let dots = points.iter().map(|&p| Circle::new(p, 3, color.filled()));
        chart.draw_series(dots).map_err(draw)?;
    }
    legend(&mut chart)
}

fn legend<'a, C: CoordTranslate>(chart: &mut ChartContext<'a, SVGBackend<'a>, C>) -> Drawn {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 11))
        .draw()
        .map_err(draw)
}

/// Operations per second over operations per byte, under what was probed.
fn roofline(area: &Area, record: &BenchRecord) -> Drawn {
    let mut dots: Vec<(String, f64, f64)> = Vec::new();
    for row in &record.rows {
        let (Some(bytes), Some(operations)) = (row.bytes_per_token, row.operations_per_token)
        else {
            continue;
        };
        let speed = operations * row.summary.median_ts / 1e9;
        if bytes > 0.0 && speed > 0.0 {
            dots.push((label(row), operations / bytes, speed));
        }
    }
    let probe = record.probes.last();
    let title = match probe {
        Some(probe) => format!("roofline, {} threads", probe.threads),
        None => "roofline (limits not probed: --probe)".to_owned(),
    };
    let roofs = probe.map(roofs).unwrap_or_default();
    let left = dots.iter().map(|d| d.1).fold(1.0, f64::min) / 2.0;
    let right = dots.iter().map(|d| d.1).fold(1000.0, f64::max) * 2.0;
    let limits = probe.map_or(&[][..], |p| &p.compute);
    let highest = limits.iter().map(|r| r.median());
    let top = dots.iter().map(|d| d.2).chain(highest).fold(1.0, f64::max) * 2.0;
    let bottom = dots.iter().map(|d| d.2).fold(1.0, f64::min) / 2.0;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d((left..right).log_scale(), (bottom..top).log_scale())
        .map_err(draw)?;
    chart
        .configure_mesh()
        .max_light_lines(1)
        .x_desc("operations per byte of weights and cache")
        .y_desc("GOP/s")
        .draw()
        .map_err(draw)?;
    for (i, (name, slope, flat)) in roofs.into_iter().enumerate() {
        let color = Palette99::pick(i).mix(0.7);
        // A straight line in logarithms needs few points; the knee needs its own.
        let knee = (flat / slope).clamp(left, right);
        let line = [left, knee, right].map(|x| (x, (slope * x).min(flat).max(bottom)));
        chart
            .draw_series(LineSeries::new(line, &color))
            .map_err(draw)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
    }
    for (i, (name, x, y)) in dots.into_iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        chart
            .draw_series([Circle::new((x, y), 4, color.filled())])
            .map_err(draw)?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 8, y), 3, color.filled()));
    }
    legend(&mut chart)
}

/// Name, bytes per second and operations per second of each roof, in giga.
fn roofs(probe: &Probe) -> Vec<(String, f64, f64)> {
    let memory = probe.memory().unwrap_or(f64::INFINITY) / 1e9;
    let roof = |rate: &crate::probe::Rate| (rate.name.clone(), memory, rate.median());
    probe.compute.iter().map(roof).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        probe::Rate,
        record::tests::{record, row},
    };

    #[test]
    fn every_line_and_roof_is_drawn() {
        let mut rows = Vec::new();
        for (depth, speed) in [(0, 20.0), (4096, 18.0)] {
            for (engine, isa) in [("tegula", "avx512"), ("llama-bench", "")] {
                let mut row = row(engine, isa, &[speed]);
                row.n_depth = depth;
                if engine == "tegula" {
                    row.bytes_per_token = Some(4e9);
                    row.operations_per_token = Some(1.6e10);
                }
                rows.push(row);
            }
        }
        let mut record = record(rows);
        let drawing = svg(&record).unwrap();
        assert!(drawing.starts_with("<svg") && drawing.trim_end().ends_with("</svg>"));
        for text in [
            "tokens/s by depth",
            "tegula avx512 tg64",
            "llama-bench tg64",
            "--probe",
        ] {
            assert!(drawing.contains(text), "{text}");
        }
        let rate = |name: &str, giga: f64| Rate {
            name: name.to_owned(),
            samples: vec![giga],
            ..Rate::default()
        };
        record.probes.push(Probe {
            threads: 14,
            bandwidth: vec![rate("memory", 97.5)],
            compute: vec![rate("amx bf16", 14_700.0)],
        });
        let drawing = svg(&record).unwrap();
        assert!(drawing.contains("amx bf16") && drawing.contains("roofline, 14 threads"));
        assert_eq!(svg(&record).unwrap(), drawing);
        record.rows.clear();
        svg(&record).unwrap();
    }

    #[test]
    fn files_appear_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bench.svg");
        write(&path, &record(vec![row("tegula", "avx2", &[1.0])])).unwrap();
        assert!(fs::read_to_string(&path).unwrap().starts_with("<svg"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let nowhere = dir.path().join("none/bench.svg");
        let error = write(&nowhere, &record(Vec::new())).unwrap_err();
        assert!(error.to_string().contains("none/bench.svg"));
    }
}

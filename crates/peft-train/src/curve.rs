//! The loss over the steps, as a picture.
//!
//! The loss of single batches jumps about; it is drawn light, and on top of it
//! its exponential mean s ← 0.9·s + 0.1·x, divided by 1 − 0.9ⁿ so that the start
//! is not pulled to zero. Held-out losses are points. The letters come from a
//! font in this crate, so a picture looks the same on every machine.

use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use peft_core::files;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::error::{Error, Result};
use crate::log::Record;

/// Part of the mean that a step leaves as it was.
const SMOOTH: f64 = 0.9;
const SIZE: (u32, u32) = (1200, 675);
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(38, 50, 56);
const LIGHT: RGBColor = RGBColor(160, 196, 232);
const DARK: RGBColor = RGBColor(25, 101, 176);
const HELD_OUT: RGBColor = RGBColor(220, 80, 32);

/// Draws a log as PNG or SVG, by the ending of `path`.
pub fn draw(path: &Path, records: &[Record], title: &str) -> Result<()> {
    let fault = |reason: String| Error::Picture {
        path: path.to_owned(),
        reason,
    };
    if !has_font() {
        return Err(fault("the built-in font cannot be read".into()));
    }
    let curves = Curves::of(records);
    if path.extension().is_some_and(|it| it == "svg") {
        let mut text = String::new();
        paint(SVGBackend::with_string(&mut text, SIZE), &curves, title).map_err(fault)?;
        return Ok(files::write_text(path, &text)?);
    }
    // The picture's format goes by the ending, so the partial file has it, too.
    let partial = path.with_file_name(format!(".loss.{}.partial.png", std::process::id()));
    let drawn = paint(BitMapBackend::new(&partial, SIZE), &curves, title).map_err(fault);
    let moved = drawn.and_then(|()| std::fs::rename(&partial, path).map_err(Error::io(path)));
    if moved.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    moved
}

fn has_font() -> bool {
    static DONE: OnceLock<bool> = OnceLock::new();
    let font = include_bytes!("../font/DejaVuSans-subset.ttf");
    *DONE.get_or_init(|| register_font(FONT, FontStyle::Normal, font).is_ok())
}

/// What there is to draw: points (step, loss).
struct Curves {
    raw: Vec<(f64, f64)>,
    smooth: Vec<(f64, f64)>,
    held_out: Vec<(f64, f64)>,
}

impl Curves {
    fn of(records: &[Record]) -> Curves {
        let mut raw = Vec::new();
        let mut held_out = Vec::new();
        for record in records {
            match record {
                Record::Step(it) => raw.push((it.step as f64, it.loss)),
                Record::Eval(it) => held_out.push((it.step as f64, it.eval_loss)),
            }
        }
        let (mut sum, mut left) = (0.0, 1.0);
        let mean = |(step, loss): &(f64, f64)| {
            sum = SMOOTH * sum + (1.0 - SMOOTH) * loss;
            left *= SMOOTH;
            (*step, sum / (1.0 - left))
        };
        let smooth = raw.iter().map(mean).collect();
        Curves {
            raw,
            smooth,
            held_out,
        }
    }

    fn steps(&self) -> Range<f64> {
        let steps = self.raw.iter().chain(&self.held_out).map(|(step, _)| *step);
        0.0..steps.fold(1.0, f64::max)
    }

    /// From a little below the least to a little above the most; few wild points may be cut off.
    fn losses(&self) -> Range<f64> {
        let mut all: Vec<f64> = self
            .raw
            .iter()
            .chain(&self.held_out)
            .map(|(_, loss)| *loss)
            .collect();
        all.extend(self.smooth.iter().map(|(_, loss)| *loss));
        all.sort_by(f64::total_cmp);
        let at = |part: f64| {
            all.get((part * all.len().saturating_sub(1) as f64) as usize)
                .copied()
        };
        let most = self
            .held_out
            .iter()
            .map(|(_, loss)| *loss)
            .fold(at(0.995).unwrap_or(1.0), f64::max);
        let least = all.first().copied().unwrap_or(0.0);
        let margin = ((most - least) * 0.06).max(most.abs() * 0.01).max(1e-6);
        (least - margin).max(0.0)..most + margin
    }
}

fn paint<B: DrawingBackend>(backend: B, curves: &Curves, title: &str) -> Result<(), String> {
    let say = |error: DrawingAreaErrorKind<B::ErrorType>| error.to_string();
    let root = backend.into_drawing_area();
    root.fill(&WHITE).map_err(say)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(24)
        .margin_right(36)
        .caption(title, (FONT, 26).into_font().color(&INK))
        .x_label_area_size(56)
        .y_label_area_size(76)
        .build_cartesian_2d(curves.steps(), curves.losses())
        .map_err(say)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(INK.mix(0.12))
        .axis_style(INK.mix(0.6))
        .x_desc("step")
        .y_desc("loss (nats a token)")
        .axis_desc_style((FONT, 20).into_font().color(&INK))
        .label_style((FONT, 17).into_font().color(&INK))
        .x_labels(10)
        .y_labels(8)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .draw()
        .map_err(say)?;
    line(
        &mut chart,
        &curves.raw,
        LIGHT.stroke_width(1),
        "training, each batch",
    )
    .map_err(say)?;
    line(
        &mut chart,
        &curves.smooth,
        DARK.stroke_width(3),
        "training, smoothed",
    )
    .map_err(say)?;
    if !curves.held_out.is_empty() {
        line(
            &mut chart,
            &curves.held_out,
            HELD_OUT.stroke_width(2),
            "held out",
        )
        .map_err(say)?;
        let points = curves
            .held_out
            .iter()
            .map(|at| Circle::new(*at, 5, HELD_OUT.filled()));
        chart.draw_series(points).map_err(say)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(16)
        .legend_area_size(36)
        .background_style(WHITE.mix(0.9))
        .border_style(INK.mix(0.2))
        .label_font((FONT, 18).into_font().color(&INK))
        .draw()
        .map_err(say)?;
    root.present().map_err(say)
}

type Chart<'c, B> = ChartContext<'c, B, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn line<B: DrawingBackend>(
    chart: &mut Chart<'_, B>,
    points: &[(f64, f64)],
    style: ShapeStyle,
    name: &str,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let series = LineSeries::new(points.iter().copied(), style);
    let sample = move |(x, y)| PathElement::new([(x, y), (x + 28, y)], style);
    chart.draw_series(series)?.label(name).legend(sample);
    Ok(())
}

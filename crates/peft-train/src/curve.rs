//! The loss over the steps, as a picture: of one run, or what several runs were judged by.
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
    let curves = Curves::of(records);
    write(path, SIZE, &Loss { curves, title })
}

/// One line in a picture of several runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Whose it is.
    pub name: String,
    /// (step, value), in order.
    pub points: Vec<(f64, f64)>,
}

/// Draws several runs as PNG or SVG, by the ending of `path`: a panel for each figure, (its name, a curve for each run).
pub fn draw_several(path: &Path, panels: &[(String, Vec<Curve>)], title: &str) -> Result<()> {
    let size = (SIZE.0, SIZE.1 * panels.len().clamp(1, 8) as u32);
    write(path, size, &Several { panels, title })
}

/// Something that can be painted in any format.
trait Picture {
    fn paint<B: DrawingBackend>(&self, backend: B) -> Result<(), String>;
}

/// Writes a picture, whole or not at all.
fn write(path: &Path, size: (u32, u32), picture: &impl Picture) -> Result<()> {
    let fault = |reason: String| Error::Picture {
        path: path.to_owned(),
        reason,
    };
    if !has_font() {
        return Err(fault("the built-in font cannot be read".into()));
    }
    if path.extension().is_some_and(|it| it == "svg") {
        let mut text = String::new();
        let backend = SVGBackend::with_string(&mut text, size);
        picture.paint(backend).map_err(fault)?;
        return Ok(files::write_text(path, &text)?);
    }
    // The picture's format goes by the ending, so the partial file has it, too.
    let partial = path.with_file_name(format!(".loss.{}.partial.png", std::process::id()));
    let drawn = picture
        .paint(BitMapBackend::new(&partial, size))
        .map_err(fault);
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
        held_out.retain(|it| it.1.is_finite());
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

/// The loss of one run.
struct Loss<'a> {
    curves: Curves,
    title: &'a str,
}

impl Picture for Loss<'_> {
    fn paint<B: DrawingBackend>(&self, backend: B) -> Result<(), String> {
        let say = |error: Fault<B>| error.to_string();
        let root = backend.into_drawing_area();
        root.fill(&WHITE).map_err(say)?;
        let curves = &self.curves;
        let (steps, losses) = (curves.steps(), curves.losses());
        let mut chart = axes(&root, self.title, "loss", steps, losses).map_err(say)?;
        let thin = LIGHT.stroke_width(1);
        line(&mut chart, &curves.raw, thin, "training, each batch").map_err(say)?;
        let thick = DARK.stroke_width(3);
        line(&mut chart, &curves.smooth, thick, "training, smoothed").map_err(say)?;
        if !curves.held_out.is_empty() {
            let style = HELD_OUT.stroke_width(2);
            line(&mut chart, &curves.held_out, style, "held out").map_err(say)?;
            points(&mut chart, &curves.held_out, HELD_OUT).map_err(say)?;
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight).map_err(say)?;
        root.present().map_err(say)
    }
}

/// What several runs were judged by.
struct Several<'a> {
    panels: &'a [(String, Vec<Curve>)],
    title: &'a str,
}

/// Colours that can be told apart, also by most of those who do not see all of them (P. Tol, "muted", and black).
const COLOURS: [RGBColor; 10] = [
    RGBColor(51, 34, 136),
    RGBColor(204, 102, 119),
    RGBColor(17, 119, 51),
    RGBColor(221, 170, 51),
    RGBColor(136, 204, 238),
    RGBColor(136, 34, 85),
    RGBColor(68, 170, 153),
    RGBColor(153, 153, 51),
    RGBColor(170, 68, 153),
    RGBColor(0, 0, 0),
];

impl Picture for Several<'_> {
    fn paint<B: DrawingBackend>(&self, backend: B) -> Result<(), String> {
        let say = |error: Fault<B>| error.to_string();
        let root = backend.into_drawing_area();
        root.fill(&WHITE).map_err(say)?;
        let areas = root.split_evenly((self.panels.len().max(1), 1));
        for (at, (area, (figure, curves))) in areas.iter().zip(self.panels).enumerate() {
            let title = if at == 0 { self.title } else { figure };
            let steps = curves.iter().flat_map(|it| &it.points).map(|it| it.0);
            let steps = 0.0..steps.fold(1.0, f64::max);
            // The names stand beside the lines: wherever they stood among them, they would hide the ends of some.
            let (lines, names) = area.split_horizontally(SIZE.0 - NAMES);
            let mut chart = axes(&lines, title, figure, steps, reach(curves)).map_err(say)?;
            for (i, (curve, colour)) in curves.iter().zip(COLOURS.iter().cycle()).enumerate() {
                let style = colour.stroke_width(3);
                line(&mut chart, &curve.points, style, &curve.name).map_err(say)?;
                points(&mut chart, &curve.points, *colour).map_err(say)?;
                let y = 84 + 30 * i as i32;
                let sample = PathElement::new([(0, y), (28, y)], style);
                names.draw(&sample).map_err(say)?;
                let text = (FONT, 18).into_font().color(&INK);
                names
                    .draw(&Text::new(curve.name.clone(), (38, y - 9), text))
                    .map_err(say)?;
            }
        }
        root.present().map_err(say)
    }
}

/// Width of the names beside the lines.
const NAMES: u32 = 190;

/// From a little below the least value to a little above where most begin and all end: one run that begins far
/// off does not press the others together.
fn reach(curves: &[Curve]) -> Range<f64> {
    let all = curves.iter().flat_map(|it| &it.points).map(|it| it.1);
    let least = all.clone().fold(f64::INFINITY, f64::min);
    let first = curves.iter().filter_map(|it| it.points.first());
    let last = curves.iter().filter_map(|it| it.points.last());
    let mut begins: Vec<f64> = first.map(|it| it.1).collect();
    begins.sort_by(f64::total_cmp);
    let usual = begins.get(begins.len() / 2).copied();
    let most = last.map(|it| it.1).chain(usual);
    let most = most.fold(f64::NEG_INFINITY, f64::max);
    if !(least.is_finite() && most.is_finite()) {
        return 0.0..1.0;
    }
    let margin = ((most - least) * 0.08).max(most.abs() * 0.01).max(1e-6);
    least - margin..most + margin
}

type Fault<B> = DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>;
type Area<B> = DrawingArea<B, plotters::coord::Shift>;
type Chart<'c, B> = ChartContext<'c, B, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn axes<'c, B: DrawingBackend>(
    area: &'c Area<B>,
    title: &str,
    figure: &str,
    steps: Range<f64>,
    values: Range<f64>,
) -> Result<Chart<'c, B>, Fault<B>> {
    // No more marks than there are whole steps.
    let ticks = (steps.end as usize + 1).clamp(2, 10);
    let most = values.start.abs().max(values.end.abs());
    let apart = values.end - values.start;
    let mut chart = ChartBuilder::on(area)
        .margin(24)
        .margin_right(36)
        .caption(title, (FONT, 26).into_font().color(&INK))
        .x_label_area_size(56)
        .y_label_area_size(76)
        .build_cartesian_2d(steps, values)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(INK.mix(0.12))
        .axis_style(INK.mix(0.6))
        .x_desc("step")
        .y_desc(figure)
        .axis_desc_style((FONT, 20).into_font().color(&INK))
        .label_style((FONT, 17).into_font().color(&INK))
        .x_labels(ticks)
        .y_labels(8)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| mark(*value, most, apart))
        .draw()?;
    Ok(chart)
}

/// A number beside an axis whose numbers are `most` at most and lie `apart`: as wide as fits there.
fn mark(value: f64, most: f64, apart: f64) -> String {
    match most {
        1e5.. => format!("{value:.1e}"),
        1e3.. => format!("{value:.0}"),
        _ if apart < 0.04 && most < 100.0 => format!("{value:.4}"),
        _ => format!("{value:.2}"),
    }
}

fn legend<'c, B: DrawingBackend + 'c>(
    chart: &mut Chart<'c, B>,
    position: SeriesLabelPosition,
) -> Result<(), Fault<B>> {
    chart
        .configure_series_labels()
        .position(position)
        .margin(16)
        .legend_area_size(36)
        .background_style(WHITE.mix(0.9))
        .border_style(INK.mix(0.2))
        .label_font((FONT, 18).into_font().color(&INK))
        .draw()
}

fn line<B: DrawingBackend>(
    chart: &mut Chart<'_, B>,
    points: &[(f64, f64)],
    style: ShapeStyle,
    name: &str,
) -> Result<(), Fault<B>> {
    let series = LineSeries::new(points.iter().copied(), style);
    let sample = move |(x, y)| PathElement::new([(x, y), (x + 28, y)], style);
    chart.draw_series(series)?.label(name).legend(sample);
    Ok(())
}

fn points<B: DrawingBackend>(
    chart: &mut Chart<'_, B>,
    points: &[(f64, f64)],
    colour: RGBColor,
) -> Result<(), Fault<B>> {
    let dots = points.iter().map(|at| Circle::new(*at, 5, colour.filled()));
    chart.draw_series(dots)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::mark;

    #[test]
    fn numbers_beside_an_axis_fit_there() {
        assert_eq!(mark(3.05, 3.5, 1.0), "3.05");
        assert_eq!(mark(3.051, 3.06, 0.02), "3.0510");
        assert_eq!(mark(99_000.5, 99_010.0, 0.02), "99000");
        assert_eq!(mark(1_010_000.0, 2e6, 1e6), "1.0e6");
        for most in [0.001, 9.0, 999.0, 99_999.0, 1e5, 1e30, f64::MAX] {
            assert!(mark(-most, most, most).len() <= 9, "{most}");
        }
    }
}

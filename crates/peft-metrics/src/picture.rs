//! A confusion as a picture, PNG or SVG.
//!
//! A row is a true class, coloured by the part of it that a column got: blue on
//! the diagonal, orange beside it, so that mistakes are seen as such and not as
//! faint hits. Cells hold percent of the row, and the count beneath where there is
//! room. Everything is sized by the number of classes; names that are too long
//! are cut, and turned upright under the columns where they are wider than those.
//! The letters come from a font in this crate, so a picture looks the same on
//! every machine (in an SVG they are the viewer's).

use std::path::Path;
use std::sync::OnceLock;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use crate::confusion::{Confusion, part};
use crate::error::{Error, Result};
use crate::table::percent;

/// Also the list of fonts in an SVG. Of its own, so that no other picture's smaller font
/// replaces it.
const FONT: &str = "DejaVu Sans, sans-serif";
const INK: RGBColor = RGBColor(38, 50, 56);
const RIGHT: RGBColor = RGBColor(25, 101, 176);
const WRONG: RGBColor = RGBColor(220, 80, 32);
const MARGIN: i32 = 28;
/// More classes than this are no picture.
const MOST: usize = 200;
/// The longest name, in pixels.
const NAME: u32 = 190;

impl Confusion {
    /// Draws it as PNG or SVG, by the ending of `path`.
    pub fn draw(&self, path: &Path, title: &str) -> Result<()> {
        let fault = |reason: String| Error::Picture {
            path: path.to_owned(),
            reason,
        };
        if !has_font() {
            return Err(fault("the built-in font cannot be read".into()));
        }
        let classes = self.classes().len();
        if classes > MOST {
            return Err(fault(format!(
                "{classes} classes are too many for a picture, the most is {MOST}"
            )));
        }
        let ending = path.extension().and_then(|it| it.to_str()).unwrap_or("");
        let plan = Plan::of(self, title).map_err(fault)?;
        let partial = path.with_file_name(format!(
            ".confusion.{}.partial.{ending}",
            std::process::id()
        ));
        let drawn = match ending {
            "png" => plan
                .paint(BitMapBackend::new(&partial, plan.size))
                .map_err(fault),
            "svg" => plan
                .paint(SVGBackend::new(&partial, plan.size))
                .map_err(fault),
            other => {
                return Err(fault(format!(
                    "a picture is `.png` or `.svg`, not `.{other}`"
                )));
            }
        };
        let moved = drawn.and_then(|()| {
            std::fs::rename(&partial, path).map_err(|source| Error::Io {
                path: path.to_owned(),
                source,
            })
        });
        if moved.is_err() {
            // It may not be there; what went wrong is in the error.
            let _ = std::fs::remove_file(&partial);
        }
        moved
    }
}

fn has_font() -> bool {
    static DONE: OnceLock<bool> = OnceLock::new();
    let font = include_bytes!("../font/DejaVuSans-subset.ttf");
    *DONE.get_or_init(|| register_font(FONT, FontStyle::Normal, font).is_ok())
}

/// Where everything goes.
struct Plan<'a> {
    seen: &'a Confusion,
    title: String,
    summary: String,
    /// What the numbers in the cells are.
    legend: &'static str,
    names: Vec<String>,
    size: (u32, u32),
    cell: i32,
    /// The matrix' upper left corner.
    corner: (i32, i32),
    /// Names under the columns stand upright.
    upright: bool,
    /// Sizes of letters: names, cells, counts (0: none).
    letters: (u32, u32, u32),
}

impl<'a> Plan<'a> {
    fn of(seen: &'a Confusion, title: &str) -> Result<Self, String> {
        let n = seen.classes().len() as i32;
        let cell = match n {
            ..=4 => 120,
            5..=8 => 92,
            9..=12 => 72,
            13..=20 => 54,
            21..=30 => 44,
            31..=60 => 24,
            _ => 14,
        };
        let letters = match cell {
            120 => (20, 24, 16),
            92 => (19, 21, 14),
            72 => (18, 19, 13),
            54 => (16, 17, 0),
            44 => (15, 14, 0),
            24 => (13, 0, 0),
            _ => (11, 0, 0),
        };
        let names: Vec<String> = seen
            .classes()
            .iter()
            .map(|name| cut(name, letters.0, NAME))
            .collect::<Result<_, _>>()?;
        let mut widest = 0;
        for name in &names {
            widest = widest.max(width(name, letters.0)? as i32);
        }
        let upright = widest > cell - 10;
        let below = if upright { widest + 12 } else { 34 };
        let summary = format!(
            "accuracy {:.3}   ·   macro F1 {:.3}   ·   {} rows",
            seen.accuracy(),
            seen.macro_mean().f1,
            seen.total()
        );
        let legend = match letters {
            (_, 0, _) => "darker: a larger part of the row",
            (_, _, 0) => "in each cell: percent of its row",
            _ => "in each cell: percent of its row, and the count",
        };
        let left = MARGIN + 34 + widest + 12;
        let top = MARGIN + 98;
        let matrix = cell * n;
        let texts = width(title, 26)?.max(width(&summary, 17)?);
        let texts = texts.max(width(legend, 17)?) as i32;
        let across = (left + matrix).max(MARGIN + texts.min(900)) + MARGIN;
        let down = top + matrix + below + 34 + MARGIN;
        Ok(Self {
            seen,
            title: cut(title, 26, (across - 2 * MARGIN).max(0) as u32)?,
            summary,
            legend,
            names,
            size: (across as u32, down as u32),
            cell,
            corner: (left, top),
            upright,
            letters,
        })
    }

    fn paint<B: DrawingBackend>(&self, backend: B) -> Result<(), String> {
        let say = |error: DrawingAreaErrorKind<B::ErrorType>| error.to_string();
        let root = backend.into_drawing_area();
        root.fill(&WHITE).map_err(say)?;
        let write = |text: &str, at: (i32, i32), style: TextStyle<'_>| {
            root.draw(&Text::new(text.to_owned(), at, style))
                .map_err(|error| error.to_string())
        };
        let (left, top) = self.corner;
        let n = self.names.len() as i32;
        let (cell, matrix) = (self.cell, self.cell * n);
        let middle = |at: i32| at * cell + cell / 2;

        write(
            &self.title,
            (MARGIN, MARGIN),
            style(26, INK, HPos::Left, VPos::Top),
        )?;
        let faint = RGBColor(96, 110, 118);
        let small = || style(17, faint, HPos::Left, VPos::Top);
        write(&self.summary, (MARGIN, MARGIN + 38), small())?;
        write(self.legend, (MARGIN, MARGIN + 62), small())?;
        for (truth, name) in (0..).zip(&self.names) {
            let names = style(self.letters.0, INK, HPos::Right, VPos::Center);
            write(name, (left - 10, top + middle(truth)), names)?;
            let under = (left + middle(truth), top + matrix + 10);
            match self.upright {
                true => {
                    let names = style(self.letters.0, INK, HPos::Right, VPos::Center);
                    write(name, under, names.transform(FontTransform::Rotate270))?;
                }
                false => {
                    write(
                        name,
                        under,
                        style(self.letters.0, INK, HPos::Center, VPos::Top),
                    )?;
                }
            }
            for said in 0..n {
                self.paint_cell(&root, truth, said)?;
            }
        }
        let frame = [(left, top), (left + matrix, top + matrix)];
        root.draw(&Rectangle::new(frame, INK.mix(0.5)))
            .map_err(say)?;
        let axis = style(18, faint, HPos::Center, VPos::Top);
        let down = self.size.1 as i32 - MARGIN - 20;
        write("said to be", (left + matrix / 2, down), axis.clone())?;
        let beside = (MARGIN, top + matrix / 2);
        write(
            "true class",
            beside,
            axis.transform(FontTransform::Rotate270),
        )?;
        root.present().map_err(say)
    }

    fn paint_cell<B: DrawingBackend>(
        &self,
        root: &DrawingArea<B, plotters::coord::Shift>,
        truth: i32,
        said: i32,
    ) -> Result<(), String> {
        let say = |error: DrawingAreaErrorKind<B::ErrorType>| error.to_string();
        let (row, column) = (truth as usize, said as usize);
        let count = self.seen.count(row, column);
        let all: u64 = self.seen.row(row).iter().sum();
        let share = part(count, all);
        let colour = if truth == said { RIGHT } else { WRONG };
        let x = self.corner.0 + said * self.cell;
        let y = self.corner.1 + truth * self.cell;
        let body = [(x, y), (x + self.cell, y + self.cell)];
        let fill = match count {
            0 => WHITE,
            // A single mistake among many must still be seen.
            _ => blend(colour, 0.08 + 0.92 * share),
        };
        root.draw(&Rectangle::new(body, fill.filled()))
            .map_err(say)?;
        root.draw(&Rectangle::new(body, INK.mix(0.12)))
            .map_err(say)?;
        let (_, big, small) = self.letters;
        if count == 0 || big == 0 {
            return Ok(());
        }
        let ink = if share > 0.55 { WHITE } else { INK };
        let centre = (x + self.cell / 2, y + self.cell / 2);
        let text = percent(count, all);
        let lift = if small > 0 { self.cell / 9 } else { 0 };
        let middle = |size, colour| style(size, colour, HPos::Center, VPos::Center);
        root.draw(&Text::new(
            text,
            (centre.0, centre.1 - lift),
            middle(big, ink),
        ))
        .map_err(say)?;
        if small > 0 {
            let under = (centre.0, centre.1 + self.cell / 5);
            root.draw(&Text::new(count.to_string(), under, middle(small, ink)))
                .map_err(say)?;
        }
        Ok(())
    }
}

fn style(size: u32, colour: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    let style = (FONT, size).into_font().color(&colour);
    style.pos(Pos::new(h, v))
}

/// A colour on white: an SVG's viewer and a bitmap then agree on it.
fn blend(colour: RGBColor, part: f64) -> RGBColor {
    let mix = |channel: u8| (255.0 - (255.0 - f64::from(channel)) * part).round() as u8;
    RGBColor(mix(colour.0), mix(colour.1), mix(colour.2))
}

/// How wide a text is, in pixels.
fn width(text: &str, size: u32) -> Result<u32, String> {
    let font = (FONT, size).into_font();
    let (width, _) = font.box_size(text).map_err(|error| error.to_string())?;
    Ok(width)
}

/// A text of at most so many pixels, cut with `…`; its end stays where there is room, as it is often what differs.
fn cut(text: &str, size: u32, most: u32) -> Result<String, String> {
    let letters: Vec<char> = text
        .chars()
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .collect();
    let whole: String = letters.iter().collect();
    // No letter is narrower than a fifth of its size, so more of them need not be measured.
    let bound = (most * 5 / size.max(1)) as usize + 1;
    if letters.len() <= bound && width(&whole, size)? <= most {
        return Ok(whole);
    }
    for kept in (0..letters.len().min(bound)).rev() {
        let tail = if kept >= 9 { kept / 3 } else { 0 };
        let (head, end) = (&letters[..kept - tail], &letters[letters.len() - tail..]);
        let shorter: String = head.iter().chain(&['…']).chain(end).collect();
        if width(&shorter, size)? <= most {
            return Ok(shorter);
        }
    }
    Ok(String::new())
}

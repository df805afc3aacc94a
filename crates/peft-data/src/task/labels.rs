//! From what labels say to what a model is asked for.
//!
//! A file's labels are one sort. Which, all of them together say: `1, 2, 3`
//! are classes, `1, 2.5, 3` are numbers; so they are read first and understood
//! afterwards. Classes are numbered in sorted order, integers by their value,
//! unless the caller knows the order already (a model with names for its
//! outputs, or the classes of a training file for its evaluation file). Then a
//! label must be one of them: by name, or, where it is an integer and the names
//! are not, by number.

use std::collections::BTreeSet;

use super::row::{Label, several};
use super::{Problem, Task};
use crate::error::nearest;
use crate::message::quoted;

/// A label and where it stands: the index of its example.
pub(crate) type Placed<'a> = (usize, &'a Label);

/// An error at an example; the caller knows file and line.
pub(crate) type Fault = (usize, String);

/// What labels turned out to be.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Understood {
    /// A class each.
    Classes { names: Vec<String>, ids: Vec<usize> },
    /// `names.len()` flags each.
    Flags { names: Vec<String>, flags: Vec<f32> },
    /// `outputs` numbers each.
    Numbers { outputs: usize, values: Vec<f32> },
}

/// The sorts of single labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Name,
    Int,
    Bool,
    Float,
}

impl Sort {
    fn name(self) -> &'static str {
        match self {
            Sort::Name => "a string",
            Sort::Int => "an integer",
            Sort::Bool => "a boolean",
            Sort::Float => "a number with a fraction",
        }
    }
}

/// Understands the labels of `seq-cls`.
pub(crate) fn understand(
    labels: &[Placed<'_>],
    problem: Option<Problem>,
    classes: Option<&[String]>,
) -> Result<Understood, Fault> {
    let Some((_, first)) = labels.first() else {
        return Err((0, "no rows".into()));
    };
    let listed = |label: &Label| matches!(label, Label::Names(_) | Label::Numbers(_));
    if let Some((at, _)) = labels.iter().find(|(_, it)| listed(it) != listed(first)) {
        return Err((
            *at,
            "a list in one row and a single label in another".into(),
        ));
    }
    let cells = matches!(first, Label::Cell(_));
    match problem {
        None if listed(first) => flags(labels, classes),
        None => {
            // A table's cells are names unless every one is a number, so this asks all of them.
            let sort = sort_of(labels, cells)?;
            match sort {
                Sort::Float => numbers(labels),
                _ => single(labels, sort, classes),
            }
        }
        Some(Problem::MultiLabel) if listed(first) || cells => flags(labels, classes),
        Some(Problem::MultiLabel) => {
            let (at, _) = labels[0];
            Err((at, format!("{} needs lists of labels", Problem::MultiLabel)))
        }
        Some(Problem::Regression) => numbers(labels),
        Some(Problem::SingleLabel) if listed(first) => {
            let (at, _) = labels[0];
            Err((
                at,
                format!("a list of labels, but {} has one", Problem::SingleLabel),
            ))
        }
        Some(Problem::SingleLabel) => {
            let sort = sort_of(labels, cells)?;
            match sort {
                // In a table `1.5` may well be a name.
                Sort::Float if cells => single(labels, Sort::Name, classes),
                Sort::Float => {
                    let fraction = |label: &Label| matches!(label, Label::Float(_));
                    let at = labels.iter().find(|(_, label)| fraction(label));
                    let at = at.map_or(0, |(at, _)| *at);
                    Err((
                        at,
                        format!(
                            "a number with a fraction cannot name a class; {} predicts numbers",
                            Problem::Regression
                        ),
                    ))
                }
                sort => single(labels, sort, classes),
            }
        }
    }
}

/// Understands the tags of words: `labels` has one for each word of every row.
pub(crate) fn tags(
    labels: &[Placed<'_>],
    classes: Option<&[String]>,
) -> Result<(Vec<String>, Vec<usize>), Fault> {
    let cells = labels
        .iter()
        .any(|(_, label)| matches!(label, Label::Cell(_)));
    let sort = match sort_of(labels, cells)? {
        Sort::Float => Sort::Name,
        sort => sort,
    };
    match single(labels, sort, classes)? {
        Understood::Classes { names, ids } => Ok((names, ids)),
        _ => Err((0, format!("{} has a class for each word", Task::TokenCls))),
    }
}

/// The sort that all labels are; integers among numbers with a fraction are such numbers.
fn sort_of(labels: &[Placed<'_>], cells: bool) -> Result<Sort, Fault> {
    if cells {
        let all = |test: &dyn Fn(&str) -> bool| {
            labels.iter().all(|(_, label)| match label {
                Label::Cell(cell) => test(cell.trim()),
                _ => false,
            })
        };
        return Ok(if all(&|cell| plain_int(cell).is_some()) {
            Sort::Int
        } else if all(&|cell| number(cell).is_some()) {
            Sort::Float
        } else {
            Sort::Name
        });
    }
    let mut found: Option<(usize, Sort)> = None;
    for (at, label) in labels {
        let sort = match label {
            Label::Name(_) | Label::Cell(_) => Sort::Name,
            Label::Int(_) => Sort::Int,
            Label::Bool(_) => Sort::Bool,
            Label::Float(_) => Sort::Float,
            Label::Names(_) | Label::Numbers(_) => return Err((*at, "a list of labels".into())),
        };
        match found {
            None => found = Some((*at, sort)),
            Some((_, seen)) if seen == sort => {}
            Some((_, Sort::Float)) if sort == Sort::Int => {}
            Some((first, Sort::Int)) if sort == Sort::Float => found = Some((first, Sort::Float)),
            Some((_, seen)) => {
                return Err((
                    *at,
                    format!(
                        "the label is {}, those before it are {}; all must be of one sort",
                        sort.name(),
                        seen.name()
                            .trim_start_matches("an ")
                            .trim_start_matches("a ")
                            .to_owned()
                            + "s"
                    ),
                ));
            }
        }
    }
    Ok(found.map_or(Sort::Name, |(_, sort)| sort))
}

/// An integer as it is written when nothing is meant but its value: `07` and `+7` are names.
fn plain_int(cell: &str) -> Option<i64> {
    let value: i64 = cell.parse().ok()?;
    (value.to_string() == cell).then_some(value)
}

fn number(cell: &str) -> Option<f64> {
    // Python and Rust agree on what `inf` and `nan` mean; as labels they are words.
    let value: f64 = cell.parse().ok()?;
    value.is_finite().then_some(value)
}

/// One class each.
fn single(
    labels: &[Placed<'_>],
    sort: Sort,
    classes: Option<&[String]>,
) -> Result<Understood, Fault> {
    let value = |label: &Label| match label {
        Label::Int(value) => Some(*value),
        Label::Cell(cell) => plain_int(cell.trim()),
        _ => None,
    };
    let name = |label: &Label| match label {
        Label::Name(name) => name.clone(),
        Label::Cell(cell) => cell.trim().to_owned(),
        Label::Int(value) => value.to_string(),
        Label::Bool(flag) => flag.to_string(),
        Label::Float(value) => value.to_string(),
        Label::Names(_) | Label::Numbers(_) => String::new(),
    };
    let Some(classes) = classes else {
        let names: Vec<String> = if sort == Sort::Int {
            let values: BTreeSet<i64> = labels
                .iter()
                .filter_map(|(_, label)| value(label))
                .collect();
            values.into_iter().map(|value| value.to_string()).collect()
        } else {
            let names: BTreeSet<String> = labels.iter().map(|(_, label)| name(label)).collect();
            names.into_iter().collect()
        };
        let places: std::collections::HashMap<&str, usize> = names
            .iter()
            .enumerate()
            .map(|(at, name)| (name.as_str(), at))
            .collect();
        let ids = labels
            .iter()
            .map(|(at, label)| {
                let name = name(label);
                let id = places.get(name.as_str()).copied();
                id.ok_or((*at, format!("the label `{name}` is in no class")))
            })
            .collect::<Result<_, _>>()?;
        return Ok(Understood::Classes { names, ids });
    };
    let by_number = sort == Sort::Int && classes.iter().any(|name| plain_int(name).is_none());
    let places: std::collections::HashMap<&str, usize> = classes
        .iter()
        .enumerate()
        .map(|(at, name)| (name.as_str(), at))
        .collect();
    let ids = labels.iter().map(|(at, label)| {
        if by_number {
            let value = value(label).unwrap_or(-1);
            let id = usize::try_from(value).ok().filter(|id| *id < classes.len());
            return id.ok_or_else(|| {
                (
                    *at,
                    format!(
                        "label {value} is out of range, there are {} classes {}",
                        classes.len(),
                        short(classes)
                    ),
                )
            });
        }
        let name = name(label);
        let id = places.get(name.as_str()).copied();
        id.ok_or_else(|| (*at, stranger(&name, classes)))
    });
    Ok(Understood::Classes {
        names: classes.to_vec(),
        ids: ids.collect::<Result<_, _>>()?,
    })
}

fn stranger(name: &str, classes: &[String]) -> String {
    let near = nearest(name, classes.iter().map(String::as_str));
    let near = near.map_or(String::new(), |near| format!(", the nearest is `{near}`"));
    format!(
        "unknown label `{name}`, the classes are {}{near}",
        short(classes)
    )
}

/// Names, but not a page of them.
fn short(names: &[String]) -> String {
    const MOST: usize = 20;
    match names.len() {
        0..=MOST => quoted(names),
        n => format!("{} and {} more", quoted(&names[..MOST]), n - MOST),
    }
}

/// Several classes each.
fn flags(labels: &[Placed<'_>], classes: Option<&[String]>) -> Result<Understood, Fault> {
    let named = |label: &Label| match label {
        Label::Names(names) => Some(names.clone()),
        Label::Cell(cell) => Some(several(cell)),
        // An empty list has no sort of its own.
        Label::Numbers(numbers) if numbers.is_empty() => Some(Vec::new()),
        _ => None,
    };
    let bits = |label: &Label| match label {
        Label::Numbers(numbers) => Some(numbers.clone()),
        _ => None,
    };
    if labels
        .iter()
        .any(|(_, label)| bits(label).is_some_and(|it| !it.is_empty()))
    {
        return bit_flags(labels, classes);
    }
    let rows: Vec<(usize, Vec<String>)> = labels
        .iter()
        .map(|(at, label)| (*at, named(label).unwrap_or_default()))
        .collect();
    let names: Vec<String> = match classes {
        Some(classes) => classes.to_vec(),
        None => {
            let all: BTreeSet<&String> = rows.iter().flat_map(|(_, names)| names).collect();
            all.into_iter().cloned().collect()
        }
    };
    if names.is_empty() {
        let at = labels.first().map_or(0, |(at, _)| *at);
        return Err((at, "no row has a label".into()));
    }
    let mut flags = vec![0.0; rows.len() * names.len()];
    for ((at, row), flags) in rows.iter().zip(flags.chunks_mut(names.len())) {
        for name in row {
            let Some(id) = names.iter().position(|known| known == name) else {
                return Err((*at, stranger(name, &names)));
            };
            flags[id] = 1.0;
        }
    }
    Ok(Understood::Flags { names, flags })
}

/// A 0 or 1 for each class.
fn bit_flags(labels: &[Placed<'_>], classes: Option<&[String]>) -> Result<Understood, Fault> {
    let mut flags: Vec<f32> = Vec::new();
    let mut width: Option<usize> = classes.map(<[String]>::len);
    for (at, label) in labels {
        let Label::Numbers(bits) = label else {
            return Err((*at, "names in one row and 0 and 1 in another".into()));
        };
        let width = *width.get_or_insert(bits.len());
        if bits.len() != width {
            return Err((
                *at,
                format!(
                    "{} labels, expected one for each of {width} classes",
                    bits.len()
                ),
            ));
        }
        if let Some(bit) = bits.iter().find(|bit| **bit != 0.0 && **bit != 1.0) {
            return Err((
                *at,
                format!(
                    "{bit} in a list of labels, which may hold names, or 0 and 1 for each class \
                     (numbers to predict are {})",
                    Problem::Regression
                ),
            ));
        }
        flags.extend(bits.iter().map(|bit| *bit as f32));
    }
    let names = match classes {
        Some(classes) => classes.to_vec(),
        None => (0..width.unwrap_or(0)).map(|at| at.to_string()).collect(),
    };
    Ok(Understood::Flags { names, flags })
}

/// Numbers to predict.
fn numbers(labels: &[Placed<'_>]) -> Result<Understood, Fault> {
    let mut values: Vec<f32> = Vec::new();
    let mut outputs: Option<usize> = None;
    for (at, label) in labels {
        let row = match label {
            Label::Int(value) => vec![*value as f64],
            Label::Float(value) => vec![*value],
            Label::Numbers(numbers) => numbers.clone(),
            Label::Cell(cell) => match number(cell.trim()) {
                Some(value) => vec![value],
                None => return Err((*at, format!("`{cell}` is not a number to predict"))),
            },
            Label::Name(name) => {
                return Err((*at, format!("`{name}` is not a number to predict")));
            }
            Label::Bool(_) => return Err((*at, "a boolean is not a number to predict".into())),
            Label::Names(_) => return Err((*at, "names are not numbers to predict".into())),
        };
        let outputs = *outputs.get_or_insert(row.len());
        if row.len() != outputs || row.is_empty() {
            return Err((*at, format!("{} numbers, expected {outputs}", row.len())));
        }
        if let Some(value) = row.iter().find(|value| !(**value as f32).is_finite()) {
            return Err((*at, format!("{value} is too large for a label")));
        }
        values.extend(row.iter().map(|value| *value as f32));
    }
    Ok(Understood::Numbers {
        outputs: outputs.unwrap_or(1),
        values,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(
        labels: &[Label],
        problem: Option<Problem>,
        classes: &[&str],
    ) -> Result<Understood, Fault> {
        let placed: Vec<Placed<'_>> = labels.iter().enumerate().collect();
        let classes: Vec<String> = classes.iter().map(|it| it.to_string()).collect();
        let classes = (!classes.is_empty()).then_some(classes.as_slice());
        understand(&placed, problem, classes)
    }

    fn cells(cells: &[&str]) -> Vec<Label> {
        cells
            .iter()
            .map(|cell| Label::Cell(cell.to_string()))
            .collect()
    }

    fn classes(names: &[&str], ids: &[usize]) -> Understood {
        Understood::Classes {
            names: names.iter().map(|it| it.to_string()).collect(),
            ids: ids.to_vec(),
        }
    }

    #[test]
    fn integers_sort_by_value_and_strings_by_letters() {
        let ints = [10, 9, -1, 10].map(Label::Int);
        assert_eq!(
            check(&ints, None, &[]).unwrap(),
            classes(&["-1", "9", "10"], &[2, 1, 0, 2])
        );
        let names = ["10", "9"].map(|it| Label::Name(it.into()));
        assert_eq!(
            check(&names, None, &[]).unwrap(),
            classes(&["10", "9"], &[0, 1])
        );
        assert_eq!(
            check(&cells(&["10", "9"]), None, &[]).unwrap(),
            classes(&["9", "10"], &[1, 0])
        );
        assert_eq!(
            check(&cells(&["10", "09"]), None, &[]).unwrap(),
            Understood::Numbers {
                outputs: 1,
                values: vec![10.0, 9.0]
            }
        );
        let flags = [true, false].map(Label::Bool);
        assert_eq!(
            check(&flags, None, &[]).unwrap(),
            classes(&["false", "true"], &[1, 0])
        );
    }

    #[test]
    fn one_fraction_makes_numbers_of_all() {
        let labels = [Label::Int(1), Label::Float(2.5), Label::Int(3)];
        let wanted = Understood::Numbers {
            outputs: 1,
            values: vec![1.0, 2.5, 3.0],
        };
        assert_eq!(check(&labels, None, &[]).unwrap(), wanted);
        assert_eq!(
            check(&cells(&["1", "2.5", "3"]), None, &[]).unwrap(),
            wanted
        );
        assert!(
            check(&labels, Some(Problem::SingleLabel), &[])
                .unwrap_err()
                .1
                .contains("regression")
        );
        assert_eq!(
            check(&cells(&["1.5", "2"]), Some(Problem::SingleLabel), &[]).unwrap(),
            classes(&["1.5", "2"], &[0, 1])
        );
    }

    #[test]
    fn given_classes_keep_their_order() {
        let names = ["b", "a"].map(|it| Label::Name(it.into()));
        assert_eq!(
            check(&names, None, &["b", "c", "a"]).unwrap(),
            classes(&["b", "c", "a"], &[0, 2])
        );
        let ints = [2, 1].map(Label::Int);
        assert_eq!(
            check(&ints, None, &["x", "y", "z"]).unwrap(),
            classes(&["x", "y", "z"], &[2, 1])
        );
        assert_eq!(
            check(&ints, None, &["1", "2", "3"]).unwrap(),
            classes(&["1", "2", "3"], &[1, 0])
        );
        let (at, what) = check(&[Label::Int(0), Label::Int(3)], None, &["x", "y"]).unwrap_err();
        assert!(at == 1 && what.contains("out of range"), "{what}");
        let (_, what) = check(
            &[Label::Name("postive".into())],
            None,
            &["negative", "positive"],
        )
        .unwrap_err();
        assert!(what.contains("the nearest is `positive`"), "{what}");
    }

    #[test]
    fn several_labels_and_flags() {
        let names = [
            Label::Names(vec!["b".into(), "a".into()]),
            Label::Names(vec![]),
        ];
        let wanted = Understood::Flags {
            names: vec!["a".into(), "b".into()],
            flags: vec![1.0, 1.0, 0.0, 0.0],
        };
        assert_eq!(check(&names, None, &[]).unwrap(), wanted);
        let bits = [
            Label::Numbers(vec![1.0, 1.0]),
            Label::Numbers(vec![0.0, 0.0]),
        ];
        assert_eq!(check(&bits, None, &["a", "b"]).unwrap(), wanted);
        assert_eq!(
            check(&cells(&["b|a", " | "]), Some(Problem::MultiLabel), &[]).unwrap(),
            wanted
        );
        assert!(
            check(&[Label::Numbers(vec![1.0, 3.0])], None, &[])
                .unwrap_err()
                .1
                .contains('3')
        );
        let mixed = [Label::Name("a".into()), Label::Int(1)];
        assert!(check(&mixed, None, &[]).unwrap_err().1.contains("one sort"));
    }
}

//! The loop.
//!
//! A step is a window of batches. With ℓ(t) the loss of token t and T the
//! labelled tokens of the *whole* window, the gradient is that of
//!
//! ```text
//! L = 1/T Σ_batches Σ_t ℓ(t)
//! ```
//!
//! so four batches of two rows give what one batch of eight gives, also where
//! rows differ in length and in the short window at the end of an epoch. T is
//! counted from the labels before anything runs; averaging the means of the
//! batches instead would weigh tokens of short batches more. (Extractive answers alone depend on the width of a batch, here as in
//! `transformers`: padding is among the places where an answer could begin.) The loss of held-out rows is such a mean, too, over all
//! of them; the `Trainer` of `transformers` weighs the mean of each batch by its rows, which is another number where rows
//! differ in length and do not all fit into one batch.
//!
//! A method may add a term to L and act after each step ([`peft_core::Schedule`]); the term is not part of the losses that are
//! reported, so that methods can be compared.
//!
//! Once a step the loss of each batch and the norm of the gradients come back
//! from the device together; where one of them is no number, the step is not
//! taken and the run stops. Everything that a step depends on is a function of
//! its number or lies in the checkpoint, so a resumed run gives the same bits as
//! an unbroken one.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use peft_core::Ctx;
use peft_data::Pass;
use peft_torch::memory;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::checkpoint::{self, Checkpoint, Interval, Progress};
use crate::curve;
use crate::data::{Batch, Rows};
use crate::error::{Error, Result};
use crate::log::{EvalRecord, Log, Record, StepRecord, read_log};
use crate::objective::Objective;
use crate::optimizer::Optimizer;
use crate::run::Run;
use crate::schedule::{Schedule, ScheduleType};
use crate::settings::Settings;

/// What a run learns from and is judged by.
#[derive(Debug, Clone)]
pub struct Data<'d> {
    /// To train on.
    pub train: Rows<'d>,
    /// Held out; without them nothing is evaluated and no best adapter is kept.
    pub held_out: Option<Rows<'d>>,
}

impl<'d> Data<'d> {
    /// The same for a model that takes rows of `widest` tokens, with batches as wide as the settings want them.
    ///
    /// # Errors
    /// Names the row that is too long, or the setting that needs held-out rows where there are none.
    pub fn fitted(&self, settings: &Settings, widest: Option<usize>) -> Result<Data<'d>> {
        let plateau = settings.lr_scheduler_type == ScheduleType::ReduceOnPlateau;
        for (needs, setting) in [
            (
                settings.early_stopping_patience.is_some(),
                "early_stopping_patience",
            ),
            (plateau, "lr_scheduler_type"),
        ] {
            if needs && self.held_out.is_none() {
                let reason = "goes by the loss of held-out rows, and none are held out";
                return Err(Error::setting(setting, reason));
            }
        }
        let fit = |rows: &Rows<'d>| rows.clone().padded_to(settings.pad_to_multiple_of, widest);
        Ok(Data {
            train: fit(&self.train)?,
            held_out: self.held_out.as_ref().map(fit).transpose()?,
        })
    }
}

/// Something that happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The run begins, or goes on after `done` steps.
    Start {
        /// Steps taken before.
        done: usize,
        /// Steps of the whole run.
        total: usize,
        /// Steps of an epoch.
        per_epoch: usize,
    },
    /// A step was taken.
    Step {
        /// How many were taken.
        done: usize,
        /// Its line of the log, if it has one.
        record: Option<&'a StepRecord>,
    },
    /// An evaluation goes on.
    Evaluating {
        /// Batches done.
        done: usize,
        /// Batches in all.
        of: usize,
    },
    /// An evaluation is done.
    Eval(&'a EvalRecord),
    /// A checkpoint was written.
    Saved {
        /// After how many steps.
        step: usize,
    },
}

/// Who watches a run. The loop itself has no terminal code.
pub trait Observer {
    /// Something happened.
    fn on(&mut self, event: &Event<'_>);
    /// Whether the run should stop after this step, with a checkpoint.
    fn stop(&self) -> bool {
        false
    }
}

/// An observer that does not care.
impl Observer for () {
    fn on(&mut self, _: &Event<'_>) {}
}

/// The best evaluation so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// After how many steps.
    pub step: usize,
    /// Its loss.
    pub eval_loss: f64,
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// All steps were taken.
    Done,
    /// Evaluations stopped getting better.
    EarlyStopped,
    /// The observer asked for it; there is a checkpoint.
    Interrupted,
}

/// What came out of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Why it ended.
    pub ending: Ending,
    /// Steps taken.
    pub steps: usize,
    /// Steps that were planned.
    pub planned: usize,
    /// Loss of the last step.
    pub loss: Option<f64>,
    /// Held-out loss before the first step.
    pub first_eval: Option<f64>,
    /// Held-out loss at the end.
    pub last_eval: Option<f64>,
    /// The lowest held-out loss.
    pub best: Option<Best>,
    /// What the held-out rows were judged by at the end besides the loss.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        with = "crate::number::named"
    )]
    pub figures: BTreeMap<String, f64>,
    /// Tokens seen, without padding.
    pub tokens: u64,
    /// Time spent, with evaluations.
    pub seconds: f64,
    /// The most memory in use, where the system tells.
    pub peak_memory: Option<u64>,
}

/// Trains `objective` on `data` and keeps everything in `run`; goes on `from` a checkpoint if there is one.
pub fn train(
    objective: &mut dyn Objective,
    settings: &Settings,
    data: &Data<'_>,
    run: &Run,
    from: Option<Checkpoint>,
    observer: &mut dyn Observer,
) -> Result<Summary> {
    settings.check()?;
    let Data { train, held_out } = data.fitted(settings, objective.widest())?;
    let plan = train.plan(settings)?;
    let per_epoch = settings.steps_per_epoch(plan.batches_per_epoch());
    let total = settings.total_steps(plan.batches_per_epoch());
    let evaluate_every = settings.evaluate_every(total);
    let window = settings.gradient_accumulation_steps;

    let mut optimizer = Optimizer::new(&objective.params(), settings)?;
    let mut schedule = Schedule::new(settings, total)?;
    let mut method = objective.schedule();
    let mut now = match from {
        Some(checkpoint) => {
            if let Some(method) = &mut method {
                checkpoint.restore_method(&mut **method)?;
            }
            resume(checkpoint, settings, &train, objective, &optimizer)?
        }
        None => {
            tch::manual_seed(settings.seed as i64);
            Progress::start(settings, total, train.len())
        }
    };
    schedule.restore(now.plateau.clone());
    let mut log = Log::open(&run.log(), now.log_bytes)?;
    read_log(&run.log())?; // a damaged one is to be said before the work
    let before = Duration::from_secs_f64(now.seconds);
    let started = Instant::now();
    let mut lap = started;
    let mut epoch_order = (usize::MAX, Vec::new());
    let mut ending = Ending::Done;

    observer.on(&Event::Start {
        done: now.step,
        total,
        per_epoch,
    });
    if let Some(rows) = held_out
        .as_ref()
        .filter(|_| now.step == 0 && settings.eval_on_start)
    {
        let record = judge(objective, settings, rows, &mut now, per_epoch, observer)?;
        now.first_eval = Some(record.eval_loss);
        write(&mut log, Record::Eval(record), observer)?;
        lap = Instant::now();
    }

    while now.step < total {
        let (epoch, at) = (now.step / per_epoch, now.step % per_epoch);
        if epoch_order.0 != epoch {
            epoch_order = (epoch, plan.epoch(epoch));
        }
        let rows = epoch_order.1[at * window..].iter().take(window);
        let pass = Pass::Train { epoch };
        let batches = rows
            .map(|rows| train.batch(rows, pass))
            .collect::<Result<Vec<Batch>>>()?;

        let learning_rate = schedule.learning_rate(now.step);
        let number = now.step + 1;
        let step = take(
            objective,
            &mut optimizer,
            &mut method,
            &batches,
            settings.ctx(),
            (number, learning_rate),
        )
        .map_err(|fault| fault.at(number, &train))?;
        now.count(&step, lap.elapsed());
        lap = Instant::now();

        let due = now.step.is_multiple_of(settings.logging_steps) || now.step == total;
        let record = due.then(|| now.record(learning_rate, step.grad_norm, per_epoch, &*objective));
        if let Some(record) = &record {
            log.write(&Record::Step(record.clone()))?;
        }
        observer.on(&Event::Step {
            done: now.step,
            record: record.as_ref(),
        });

        let mut patient = true;
        let due = now.step.is_multiple_of(evaluate_every) || now.step == total;
        if let Some(rows) = held_out.as_ref().filter(|_| due) {
            let record = judge(objective, settings, rows, &mut now, per_epoch, observer)?;
            schedule.observe(record.eval_loss);
            now.plateau = schedule.plateau().cloned();
            if now.improve(&record) {
                objective.save(&run.best())?;
            }
            patient = settings
                .early_stopping_patience
                .is_none_or(|most| now.not_better < most);
            write(&mut log, Record::Eval(record), observer)?;
            picture(run)?;
            lap = Instant::now();
        }

        let stop = observer.stop() && now.step < total;
        let due = settings.save_steps > 0 && now.step.is_multiple_of(settings.save_steps);
        now.seconds = (before + started.elapsed()).as_secs_f64();
        now.log_bytes = log.bytes();
        if stop || due {
            let path = run.checkpoint();
            checkpoint::save(&path, &now, objective, &optimizer, method.as_deref())?;
            observer.on(&Event::Saved { step: now.step });
            lap = Instant::now();
        }
        if stop || !patient {
            ending = if patient {
                Ending::Interrupted
            } else {
                Ending::EarlyStopped
            };
            break;
        }
    }
    objective.save(&run.adapter())?;
    picture(run)?;
    Ok(now.summary(ending, memory::usage(objective.device()).map(|it| it.peak)))
}

/// What one step gave.
struct Step {
    /// Sum of the losses of the window.
    loss: f64,
    /// Labelled tokens of the window.
    labels: usize,
    /// All tokens without padding.
    tokens: u64,
    grad_norm: f64,
}

/// Why a step was not taken.
enum Fault {
    NotFinite {
        what: &'static str,
        value: f64,
        rows: Vec<usize>,
    },
    Other(Error),
}

impl<E: Into<Error>> From<E> for Fault {
    fn from(error: E) -> Fault {
        Fault::Other(error.into())
    }
}

impl Fault {
    fn at(self, step: usize, data: &Rows<'_>) -> Error {
        match self {
            Fault::Other(error) => error,
            Fault::NotFinite { what, value, rows } => {
                let mut named: Vec<String> =
                    rows.iter().take(16).map(|at| data.origin(*at)).collect();
                if rows.len() > named.len() {
                    named.push(format!("and {} more", rows.len() - named.len()));
                }
                let rows = named.join("; ");
                Error::NotFinite {
                    what,
                    value,
                    step,
                    rows,
                }
            }
        }
    }
}

/// Forward and backward over a window of batches, then one step; nothing is changed if that gives no number.
fn take(
    objective: &mut dyn Objective,
    optimizer: &mut Optimizer,
    method: &mut Option<Box<dyn peft_core::Schedule>>,
    batches: &[Batch],
    ctx: Ctx,
    (number, learning_rate): (usize, f64),
) -> Result<Step, Fault> {
    let labels: usize = batches.iter().map(Batch::labels).sum::<usize>().max(1);
    optimizer.zero_grad();
    let mut measured = Vec::with_capacity(batches.len() + 1);
    for batch in batches {
        let (sum, _) = objective.loss(batch, ctx)?;
        let share = Tensor::from(1.0 / labels as f64)
            .to_kind(sum.kind())
            .to_device(sum.device());
        peft_torch::backward(&[&sum], &[&share])?;
        measured.push(sum.detach().to_kind(Kind::Double));
    }
    if let Some(term) = method
        .as_ref()
        .and_then(|it| it.penalty(&objective.params()))
    {
        peft_torch::backward(&[&term], &[&term.ones_like()])?;
    }
    measured.push(
        optimizer
            .grad_norm()
            .to_kind(Kind::Double)
            .to_device(measured[0].device()),
    );
    let measured = Vec::<f64>::try_from(Tensor::stack(&measured, 0))?; // the one wait for the device

    let (grad_norm, losses) = (measured[batches.len()], &measured[..batches.len()]);
    for (&value, batch) in losses.iter().zip(batches) {
        if !value.is_finite() {
            let rows = batch.indices().to_vec();
            return Err(Fault::NotFinite {
                what: "the loss",
                value,
                rows,
            });
        }
    }
    if !grad_norm.is_finite() {
        let rows = batches
            .iter()
            .flat_map(|batch| batch.indices().to_vec())
            .collect();
        let what = "the norm of the gradient";
        return Err(Fault::NotFinite {
            what,
            value: grad_norm,
            rows,
        });
    }
    optimizer.clip(grad_norm);
    optimizer.step(learning_rate)?;
    if let Some(method) = method {
        method.after_step(&objective.params(), number)?;
    }
    Ok(Step {
        loss: losses.iter().sum(),
        labels,
        tokens: batches.iter().map(Batch::tokens).sum(),
        grad_norm,
    })
}

/// The loss on some rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Evaluation {
    /// Sum of the losses of all labelled tokens.
    pub sum: f64,
    /// How many labelled tokens there are.
    pub labels: u64,
}

impl Evaluation {
    /// Mean loss of a labelled token, in nats.
    pub fn loss(&self) -> f64 {
        self.sum / self.labels as f64
    }

    /// e to the power of the loss: among how many tokens the model hesitates.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }
}

/// Evaluates on `rows`, `size` at a time. `loss` gives a batch's sum and number of labelled tokens;
/// `progress` is told how many batches of how many are done.
pub fn evaluate(
    loss: &mut dyn FnMut(&Batch) -> Result<(Tensor, i64)>,
    rows: &Rows<'_>,
    size: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Evaluation> {
    let _off = tch::no_grad_guard();
    let batches = rows.by_length(size);
    let mut all = Evaluation::default();
    for (done, indices) in batches.iter().enumerate() {
        progress(done, batches.len());
        let (sum, labels) = loss(&rows.batch(indices, Pass::Eval)?)?;
        all.sum += sum.f_double_value(&[])?;
        all.labels += labels as u64;
    }
    progress(batches.len(), batches.len());
    Ok(all)
}

/// An evaluation as a line of the log.
fn judge(
    objective: &mut dyn Objective,
    settings: &Settings,
    rows: &Rows<'_>,
    now: &mut Progress,
    per_epoch: usize,
    observer: &mut dyn Observer,
) -> Result<EvalRecord> {
    let started = Instant::now();
    let size = settings.per_device_eval_batch_size;
    let mut progress = |done, of| observer.on(&Event::Evaluating { done, of });
    let mut loss = |batch: &Batch| objective.loss(batch, Ctx::EVAL);
    let result = evaluate(&mut loss, rows, size, &mut progress)?;
    let figures = objective.figures(rows)?;
    now.last_eval = Some(result.loss());
    now.figures.clone_from(&figures);
    Ok(EvalRecord {
        step: now.step,
        epoch: now.step as f64 / per_epoch as f64,
        eval_loss: result.loss(),
        perplexity: result.perplexity(),
        figures,
        best: now.step > 0 && better(result.loss(), now.best, 0.0),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Whether a loss is below the best so far by more than that; one that is no number never is.
fn better(loss: f64, best: Option<Best>, by: f64) -> bool {
    loss.is_finite() && best.is_none_or(|best| loss < best.eval_loss - by)
}

fn write(log: &mut Log, record: Record, observer: &mut dyn Observer) -> Result<()> {
    log.write(&record)?;
    if let Record::Eval(record) = &record {
        observer.on(&Event::Eval(record));
    }
    Ok(())
}

fn picture(run: &Run) -> Result<()> {
    let records = read_log(&run.log())?;
    let name = run.dir().file_name().unwrap_or(run.dir().as_os_str());
    let title = format!("{} – loss", name.to_string_lossy());
    curve::draw(&run.curve("png"), &records, &title)?;
    curve::draw(&run.curve("svg"), &records, &title)
}

fn resume(
    checkpoint: Checkpoint,
    settings: &Settings,
    rows: &Rows<'_>,
    objective: &mut dyn Objective,
    optimizer: &Optimizer,
) -> Result<Progress> {
    let now = &checkpoint.progress;
    if now.settings != *settings {
        let reason = "a run goes on with the settings it began with, these are others";
        return Err(Error::setting("resume", reason));
    }
    if now.rows != rows.len() {
        let (was, is) = (now.rows, rows.len());
        let reason = format!("the run began with {was} rows to train on, the data has {is} now");
        return Err(Error::setting("resume", reason));
    }
    checkpoint.restore(&objective.params(), optimizer, objective.device())?;
    Ok(checkpoint.progress)
}

impl Progress {
    fn start(settings: &Settings, total: usize, rows: usize) -> Progress {
        Progress {
            step: 0,
            total,
            settings: settings.clone(),
            rows,
            best: None,
            first_eval: None,
            last_eval: None,
            figures: BTreeMap::new(),
            last_loss: None,
            not_better: 0,
            plateau: None,
            tokens: 0,
            seconds: 0.0,
            since: Interval::default(),
            log_bytes: 0,
        }
    }

    fn count(&mut self, step: &Step, time: Duration) {
        self.step += 1;
        self.tokens += step.tokens;
        self.last_loss = Some(step.loss / step.labels as f64);
        self.since.loss += step.loss;
        self.since.labels += step.labels as u64;
        self.since.tokens += step.tokens;
        self.since.seconds += time.as_secs_f64();
    }

    /// The line of the log for the steps since the last line.
    fn record(
        &mut self,
        learning_rate: f64,
        grad_norm: f64,
        per_epoch: usize,
        objective: &dyn Objective,
    ) -> StepRecord {
        let since = std::mem::take(&mut self.since);
        StepRecord {
            step: self.step,
            epoch: self.step as f64 / per_epoch as f64,
            loss: since.loss / since.labels as f64,
            learning_rate,
            grad_norm,
            tokens: self.tokens,
            tokens_per_second: since.tokens as f64 / since.seconds.max(1e-9),
            memory: memory::usage(objective.device()).map(|it| it.now),
        }
    }

    /// Notes an evaluation; whether it is the best so far. Patience counts those that are not better
    /// by `early_stopping_threshold`.
    fn improve(&mut self, record: &EvalRecord) -> bool {
        let threshold = self.settings.early_stopping_threshold;
        let clearly = better(record.eval_loss, self.best, threshold);
        self.not_better = if clearly { 0 } else { self.not_better + 1 };
        if record.best {
            let (step, eval_loss) = (record.step, record.eval_loss);
            self.best = Some(Best { step, eval_loss });
        }
        record.best
    }

    fn summary(self, ending: Ending, peak_memory: Option<u64>) -> Summary {
        Summary {
            ending,
            steps: self.step,
            planned: self.total,
            loss: self.last_loss,
            first_eval: self.first_eval,
            last_eval: self.last_eval,
            best: self.best,
            figures: self.figures,
            tokens: self.tokens,
            seconds: self.seconds,
            peak_memory,
        }
    }
}

//! OpenLineage events of a run: START, then COMPLETE, FAIL or ABORT, for the run and for every stage in it.
//!
//! In: a pipeline, and what happens during its run (as [`Events`]). Out: events to a receiver or a file. They are made
//! and sent beside the run, which waits for none of them; its end waits a few seconds at most. Nothing that goes wrong
//! here is more than one warning.

pub mod columns;
pub mod config;
pub mod facets;
mod jobs;
mod transport;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use super::Pipeline;
use super::cache::Record;
use super::events::{Events, NodePlace};
use crate::error::{Error, Fault};
use crate::stages::Observer;
use jobs::Jobs;
use transport::Transport;

/// After so many failures in a row only the end of the run is tried once more.
const GIVE_UP_AFTER: usize = 3;

/// What happened, and when.
enum News {
    Started(NodePlace),
    Ended {
        place: NodePlace,
        record: Box<Record>,
        cached: bool,
    },
    /// The whole run; the message of its failure.
    Over {
        kind: &'static str,
        message: Option<String>,
    },
}

/// Lineage of one run.
pub struct Lineage {
    news: UnboundedSender<(String, News)>,
    teller: JoinHandle<Option<String>>,
    patience: Duration,
}

fn now() -> String {
    chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

/// What a person is told.
fn warning(why: &str) -> String {
    format!("lineage events are not delivered: {why}; the run goes on")
}

impl Lineage {
    /// Starts telling of a run; `None` where lineage is off. The error is a warning. `env` looks up a variable.
    pub fn start(
        pipeline: &Pipeline,
        run_id: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, String> {
        let settings = config::settings(pipeline.lineage.as_ref(), env, &pipeline.root).map_err(|e| warning(&e))?;
        let Some(settings) = settings else { return Ok(None) };
        let transport = Transport::open(&settings).map_err(|e| warning(&e))?;
        let jobs = Jobs::new(pipeline, run_id, &settings).map_err(|e| warning(&e.message))?;
        let (news, heard) = unbounded_channel();
        let teller = tokio::spawn(tell(jobs, transport, heard, now()));
        Ok(Some(Lineage { news, teller, patience: Duration::from_secs_f64(settings.timeout * 2.0) }))
    }

    /// What `inner` hears, heard here too.
    pub fn beside(&self, inner: Arc<dyn Events>) -> Arc<dyn Events> {
        Arc::new(Hearing { inner, news: self.news.clone() })
    }

    /// The run is over: waits a little until all is told. Returns the warning, if there is one.
    pub async fn end(self, error: Option<&Error>) -> Option<String> {
        let (kind, message) = match error {
            None => ("COMPLETE", None),
            Some(e) => match e.fault {
                Fault::NothingToDo => ("COMPLETE", None),
                Fault::Interrupted | Fault::Terminated => ("ABORT", Some(e.message.clone())),
                _ => ("FAIL", Some(e.message.clone())),
            },
        };
        // The teller may be gone after a panic of its own; then there is nothing to say it to.
        let _ = self.news.send((now(), News::Over { kind, message }));
        drop(self.news);
        let stop = self.teller.abort_handle();
        // A run that was told to stop has little time left.
        let patience = if kind == "ABORT" { self.patience / 2 } else { self.patience };
        match tokio::time::timeout(patience, self.teller).await {
            Ok(Ok(warned)) => warned,
            Ok(Err(_)) => Some(warning("they could not be made")),
            Err(_) => {
                stop.abort();
                Some(warning("the receiver is too slow"))
            }
        }
    }
}

/// Makes and sends events until the run is over. Returns the first failure as a warning.
async fn tell(
    mut jobs: Jobs,
    transport: Transport,
    mut heard: UnboundedReceiver<(String, News)>,
    began: String,
) -> Option<String> {
    let mut first_failure = None;
    let mut failures = 0;
    let mut waiting = vec![jobs.run_started(&began)];
    loop {
        let over = waiting.last().is_some_and(|e| jobs.is_last(e));
        for event in waiting.drain(..) {
            if failures >= GIVE_UP_AFTER && !jobs.is_last(&event) {
                continue;
            }
            match transport.send(&event).await {
                Ok(()) => failures = 0,
                Err(why) => {
                    failures += 1;
                    first_failure.get_or_insert_with(|| warning(&why));
                }
            }
        }
        if over {
            return first_failure;
        }
        let Some((time, news)) = heard.recv().await else { return first_failure };
        waiting = match news {
            News::Started(place) => vec![jobs.started(&time, &place)],
            News::Ended { place, record, cached } => vec![jobs.ended(&time, &place, *record, cached).await],
            News::Over { kind, message } => jobs.over(&time, kind, message.as_deref()),
        };
    }
}

struct Hearing {
    inner: Arc<dyn Events>,
    news: UnboundedSender<(String, News)>,
}

impl Hearing {
    fn pass(&self, news: News) {
        // Nobody hears any more: that is no matter of the run's.
        let _ = self.news.send((now(), news));
    }
}

impl Events for Hearing {
    fn started(&self, place: &NodePlace) -> Arc<dyn Observer> {
        self.pass(News::Started(place.clone()));
        self.inner.started(place)
    }
    fn cached(&self, place: &NodePlace, record: &Record) {
        self.pass(News::Ended { place: place.clone(), record: Box::new(record.clone()), cached: true });
        self.inner.cached(place, record);
    }
    fn finished(&self, place: &NodePlace, record: &Record) {
        self.pass(News::Ended { place: place.clone(), record: Box::new(record.clone()), cached: false });
        self.inner.finished(place, record);
    }
    fn line(&self, text: &str) {
        self.inner.line(text);
    }
}

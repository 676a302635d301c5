//! One request, until it is answered or given up.
//!
//! In: a path and a JSON body. Out: the JSON that the server sent, or a [`Failure`] with its reason. The API key is in
//! the header of the request and nowhere else: not in errors, logs or `Debug`.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use futures::StreamExt;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use serde_json::Value;
use tokio::time::Instant;

use super::config::RemoteSpec;
use crate::error::{Error, Result};

/// Bytes of an answer at most: a server that sends more is not one of ours.
const ANSWER_BYTES: usize = 16 << 20;
/// Longest wait between two tries that we choose ourselves.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// Longest wait that a server may ask for.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(600);
/// Characters of a server's own words in an error.
const SHOWN: usize = 300;

/// Why a request has no usable answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    /// It took longer than one request may.
    Timeout,
    /// No connection, or one that broke off.
    Connection(String),
    /// 429.
    RateLimited(Option<Duration>),
    /// 5xx.
    Server(u16, String, Option<Duration>),
    /// 4xx: the server will not answer this.
    Refused(u16, String),
    /// The bytes are not JSON, or too many.
    Unreadable(String),
    /// JSON, but not an answer that ranks the candidates.
    Unparsable(String),
    /// The server does not give what the mode needs.
    Unsupported(String),
    /// The stage's time was over.
    Deadline,
}

impl Failure {
    /// The `reason` of a `fallback` row.
    pub fn reason(&self) -> &'static str {
        match self {
            Failure::Timeout => "timeout",
            Failure::Connection(_) => "connection",
            Failure::RateLimited(_) => "rate_limited",
            Failure::Server(..) => "server_error",
            Failure::Refused(..) => "refused",
            Failure::Unreadable(_) | Failure::Unparsable(_) => "unparsable",
            Failure::Unsupported(_) => "unsupported",
            Failure::Deadline => "deadline",
        }
    }

    /// Whether the same request may be answered when it is sent again.
    fn may_pass(&self) -> bool {
        match self {
            Failure::Timeout | Failure::Connection(_) | Failure::RateLimited(_) | Failure::Unreadable(_) => true,
            Failure::Server(code, ..) => *code != 501,
            _ => false,
        }
    }

    /// Whether it speaks of the server and not of this request.
    pub fn of_server(&self) -> bool {
        matches!(self, Failure::Timeout | Failure::Connection(_) | Failure::RateLimited(_) | Failure::Server(..))
    }

    fn wait(&self) -> Option<Duration> {
        match self {
            Failure::RateLimited(wait) | Failure::Server(_, _, wait) => *wait,
            _ => None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Timeout => f.write_str("no answer in time"),
            Failure::Connection(why) => write!(f, "no connection: {why}"),
            Failure::RateLimited(_) => f.write_str("too many requests (429)"),
            Failure::Server(code, text, _) | Failure::Refused(code, text) => write!(f, "HTTP {code}: {text}"),
            Failure::Unreadable(why) | Failure::Unparsable(why) => write!(f, "the answer cannot be used: {why}"),
            Failure::Unsupported(what) => f.write_str(what),
            Failure::Deadline => f.write_str("the stage's deadline passed"),
        }
    }
}

/// What was used so far.
#[derive(Debug, Default)]
pub struct Spent {
    /// Tries that were sent.
    pub requests: AtomicU64,
    /// Tries after a failed one.
    pub retries: AtomicU64,
    /// Prompt tokens that the server counted.
    pub prompt_tokens: AtomicU64,
    /// Tokens of answers that it counted.
    pub completion_tokens: AtomicU64,
}

impl Spent {
    /// A figure now.
    pub fn of(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
    fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
    /// Takes the `usage` of an answer; what a server leaves out counts 0.
    fn count(&self, answer: &Value) {
        let of = |key: &str| answer.pointer(&format!("/usage/{key}")).and_then(Value::as_u64).unwrap_or(0);
        Spent::add(&self.prompt_tokens, of("prompt_tokens"));
        Spent::add(&self.completion_tokens, of("completion_tokens"));
    }
}

/// A key that does not print.
struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Secret {
    /// A text without the key, for a server that repeats what it was sent.
    fn out_of(&self, text: &str) -> String {
        text.replace(&self.0, "***")
    }
}

/// Sends requests to one server.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    key: Option<Secret>,
    retries: usize,
    backoff: Duration,
    /// What was used.
    pub spent: Spent,
}

impl Client {
    /// A client of the server that `spec` names, with the key from the environment.
    ///
    /// # Errors
    /// Exit 78 where the environment variable is not set or holds what no header can.
    pub fn new(spec: &RemoteSpec) -> Result<Self> {
        let key = spec.api_key_env.as_deref().map(key_of).transpose()?;
        Client::with_key(spec, key)
    }

    fn with_key(spec: &RemoteSpec, key: Option<Secret>) -> Result<Self> {
        let http = reqwest::Client::builder()
            .timeout(spec.timeout)
            // A redirect would take the key along to a place that nobody named.
            .redirect(reqwest::redirect::Policy::none())
            .pool_max_idle_per_host(spec.concurrency)
            .build()
            .map_err(|e| Error::environment("cannot make an HTTP client").because(e.without_url()))?;
        let (retries, backoff) = (spec.retries, spec.backoff);
        Ok(Client { http, url: spec.url.clone(), key, retries, backoff, spent: Spent::default() })
    }

    /// Posts `body` to `path` below the base URL, and again where that may help, until `until`.
    ///
    /// # Errors
    /// The last try's failure, or [`Failure::Deadline`].
    pub async fn post(&self, path: &str, body: &Value, until: Option<Instant>) -> Result<Value, Failure> {
        let bytes = body.to_string();
        let backoff = ExponentialBuilder::default()
            .with_min_delay(self.backoff)
            .with_max_delay(LONGEST_BACKOFF)
            .with_max_times(self.retries)
            .with_jitter();
        let tries = (|| self.once(path, &bytes))
            .retry(backoff)
            .when(Failure::may_pass)
            .adjust(|failure, delay| delay.map(|d| d.max(failure.wait().unwrap_or_default())))
            .notify(|failure, wait| {
                Spent::add(&self.spent.retries, 1);
                tracing::info!(reason = failure.reason(), wait_s = wait.as_secs_f64(), "asking again");
            });
        let answer = match until {
            None => tries.await,
            Some(until) if until <= Instant::now() => Err(Failure::Deadline),
            Some(until) => tokio::time::timeout_at(until, tries).await.unwrap_or(Err(Failure::Deadline)),
        }?;
        self.spent.count(&answer);
        Ok(answer)
    }

    /// One try.
    async fn once(&self, path: &str, body: &str) -> Result<Value, Failure> {
        Spent::add(&self.spent.requests, 1);
        let mut request = self
            .http
            .post(format!("{}{path}", self.url))
            .header(CONTENT_TYPE, "application/json")
            .body(body.to_owned());
        if let Some(key) = &self.key {
            // `key_of` has checked that it is a header.
            if let Ok(mut header) = HeaderValue::from_str(&format!("Bearer {}", key.0)) {
                header.set_sensitive(true);
                request = request.header(AUTHORIZATION, header);
            }
        }
        let response = request.send().await.map_err(lost)?;
        let status = response.status();
        let wait = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()).and_then(retry_after);
        let mut bytes = Vec::new();
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            bytes.extend_from_slice(&chunk.map_err(lost)?);
            if bytes.len() > ANSWER_BYTES {
                return Err(Failure::Unreadable(format!("more than {ANSWER_BYTES} bytes")));
            }
        }
        match status.as_u16() {
            200..=299 => serde_json::from_slice(&bytes).map_err(|e| Failure::Unreadable(format!("not JSON: {e}"))),
            429 => Err(Failure::RateLimited(wait)),
            408 => Err(Failure::Timeout),
            code @ 500.. => Err(Failure::Server(code, self.words(&bytes), wait)),
            code => Err(Failure::Refused(code, self.words(&bytes))),
        }
    }

    /// What the server says of an error: its message where there is one, cut, without the key.
    fn words(&self, body: &[u8]) -> String {
        let json: Option<Value> = serde_json::from_slice(body).ok();
        let message = json.as_ref().and_then(|j| {
            ["/error/message", "/message", "/error", "/detail"].iter().find_map(|p| j.pointer(p)?.as_str())
        });
        let text = message.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
        let text = self.key.as_ref().map_or_else(|| text.clone(), |key| key.out_of(&text));
        let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SHOWN).collect();
        clean.trim().to_owned()
    }
}

/// A request that got no whole answer.
fn lost(error: reqwest::Error) -> Failure {
    if error.is_timeout() {
        return Failure::Timeout;
    }
    // The URL is known, and the innermost cause says the most.
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(below) = cause.source() {
        cause = below;
    }
    Failure::Connection(cause.to_string())
}

/// Seconds, or a date: how long to wait from now. At least a second, so that a clock that is off does no harm.
fn retry_after(value: &str) -> Option<Duration> {
    let value = value.trim();
    let wait = match value.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok()?,
        Err(_) => {
            let date = chrono::DateTime::parse_from_rfc2822(value).ok()?;
            (date.to_utc() - chrono::Utc::now()).to_std().unwrap_or(Duration::from_secs(1))
        }
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

/// The key in an environment variable.
fn key_of(variable: &str) -> Result<Secret> {
    let help = format!("export {variable}=... before the run, or remove `engine.api_key_env`");
    let key =
        std::env::var(variable).ok().map(|k| k.trim().to_owned()).filter(|k| !k.is_empty()).ok_or_else(|| {
            Error::spec(format!("the environment variable `{variable}` holds no key")).with_help(&help)
        })?;
    match HeaderValue::from_str(&key) {
        Ok(_) => Ok(Secret(key)),
        Err(_) => {
            Err(Error::spec(format!("the key in `{variable}` has characters that no header can hold")).with_help(help))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_may_ask_for_patience() {
        assert_eq!(retry_after("7"), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(" 0.25 "), Some(Duration::from_millis(250)));
        assert_eq!(retry_after("1e9"), Some(LONGEST_RETRY_AFTER));
        for nonsense in ["-3", "soon", "nan", ""] {
            assert_eq!(retry_after(nonsense), None, "{nonsense}");
        }
        let date = (chrono::Utc::now() + chrono::Duration::seconds(90)).to_rfc2822();
        let wait = retry_after(&date).unwrap();
        assert!(wait > Duration::from_secs(80) && wait <= Duration::from_secs(90), "{wait:?}");
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::from_secs(1)));
    }

    #[test]
    fn the_key_shows_nowhere() {
        let spec = crate::llm::remote::EngineConfig {
            kind: crate::llm::remote::EngineKind::Openai,
            url: Some("http://127.0.0.1:9/v1".into()),
            model: Some("m".into()),
            ..Default::default()
        };
        let spec = spec.resolve().unwrap().unwrap();
        let client = Client::with_key(&spec, Some(Secret("sk-hunter2".into()))).unwrap();
        assert!(!format!("{client:?}").contains("hunter2"));
        let words = client.words(br#"{"error": {"message": "bad key sk-hunter2\nsent"}}"#);
        assert_eq!(words, "bad key *** sent");
        assert_eq!(client.words(b"<html>\xff sk-hunter2"), "<html>\u{fffd} ***");
        assert!(client.words(&vec![b'x'; 5000]).len() <= SHOWN);
    }

    #[test]
    fn an_unset_variable_is_named() {
        let error = key_of("TAILFUSE_TEST_NO_SUCH_KEY").unwrap_err();
        assert!(error.fault.exit_code() == 78 && error.message.contains("TAILFUSE_TEST_NO_SUCH_KEY"), "{error}");
    }
}

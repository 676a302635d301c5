//! Events on their way: posted to a receiver, or appended to a file.
//!
//! In: an event as JSON. Out: nothing, or why it was not delivered, in words without the key.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde_json::Value;
use url::Url;

use super::config::{Settings, Target};

/// An open way.
pub enum Transport {
    /// Posts to an address.
    Http {
        /// With time-out and key.
        client: reqwest::Client,
        /// The receiver.
        url: Url,
    },
    /// Appends lines.
    File(PathBuf),
}

impl Transport {
    /// Opens; nothing is sent yet.
    pub fn open(settings: &Settings) -> Result<Self, String> {
        match &settings.target {
            Target::File(path) => Ok(Transport::File(path.clone())),
            Target::Http { url, key } => {
                let mut headers = HeaderMap::new();
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
                if let Some(key) = key {
                    let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
                        .map_err(|_| "the key of the lineage receiver has characters that no header can have")?;
                    value.set_sensitive(true);
                    headers.insert(AUTHORIZATION, value);
                }
                let timeout = Duration::from_secs_f64(settings.timeout);
                let client = reqwest::Client::builder().timeout(timeout).default_headers(headers).build();
                Ok(Transport::Http { client: client.map_err(|e| e.to_string())?, url: url.clone() })
            }
        }
    }

    /// Delivers one event.
    pub async fn send(&self, event: &Value) -> Result<(), String> {
        match self {
            Transport::Http { client, url } => {
                let answer = client.post(url.clone()).body(event.to_string()).send().await;
                // The address without a password that may stand in it.
                let place = format!("{}{}", url.host_str().unwrap_or_default(), url.path());
                match answer {
                    Ok(answer) if answer.status().is_success() => Ok(()),
                    Ok(answer) => Err(format!("{place} answers {}", answer.status())),
                    Err(e) if e.is_timeout() => Err(format!("{place} does not answer in time")),
                    Err(e) => Err(format!("{place}: {}", root_cause(&e))),
                }
            }
            Transport::File(path) => {
                let line = format!("{event}\n");
                let path = path.clone();
                let append = move || -> std::io::Result<()> {
                    use std::io::Write;
                    if let Some(parent) = path.parent() {
                        fs_err::create_dir_all(parent)?;
                    }
                    // One write a line: several runs may share the file.
                    fs_err::OpenOptions::new().create(true).append(true).open(&path)?.write_all(line.as_bytes())
                };
                let done = tokio::task::spawn_blocking(append).await;
                done.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
            }
        }
    }
}

/// The innermost error: `connection refused` in place of `error sending request`.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

//! Where lineage events go: the `[lineage]` block of the pipeline file, or OpenLineage's own environment variables.
//!
//! In: the block, the environment. Out: [`Settings`], or nothing where no place is named: lineage is off then.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use url::Url;

/// `[lineage]`: OpenLineage events of every run. Without it the usual variables decide (`OPENLINEAGE_URL`,
/// `OPENLINEAGE__TRANSPORT__TYPE`, ...), and without those there are no events. A receiver that fails never fails a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LineageConfig {
    /// Address of the receiver (Marquez, DataHub, ...), for example `"http://marquez:5000"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Path of the receiver below `url`.
    #[serde(default = "default_endpoint")]
    pub endpoint: String,
    /// Name of the environment variable that holds the receiver's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// A file to which events are appended, one a line, in place of a receiver. Relative to `root`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Namespace of the jobs.
    #[serde(default = "default_namespace")]
    #[schemars(length(min = 1))]
    pub namespace: String,
    /// Seconds that one event may take; the end of a run waits for twice as long at most.
    #[serde(default = "default_timeout")]
    #[schemars(range(min = 0.1, max = 60.0))]
    pub timeout_seconds: f64,
}

fn default_endpoint() -> String {
    "api/v1/lineage".to_owned()
}
fn default_namespace() -> String {
    "default".to_owned()
}
fn default_timeout() -> f64 {
    2.0
}

/// Where events go.
#[derive(Clone, PartialEq)]
pub enum Target {
    /// A receiver, with its key.
    Http {
        /// Where events are posted to.
        url: Url,
        /// Sent as `Authorization: Bearer ...`.
        key: Option<String>,
    },
    /// A file of JSON lines.
    File(PathBuf),
}

/// The run that started this one (an Airflow task, say).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Namespace of its job.
    pub namespace: String,
    /// Name of its job.
    pub job: String,
    /// Its run id, a UUID.
    pub run_id: String,
}

/// Everything that a run needs to send events.
#[derive(Clone, PartialEq)]
pub struct Settings {
    /// Where they go.
    pub target: Target,
    /// Namespace of the jobs.
    pub namespace: String,
    /// `OPENLINEAGE_PARENT_ID`.
    pub parent: Option<Parent>,
    /// Seconds for one event.
    pub timeout: f64,
}

/// The settings of a run; `None` where lineage is off. `env` looks up a variable. The error is a sentence for a warning:
/// a mistake here ends no run.
pub fn settings(
    block: Option<&LineageConfig>,
    env: &dyn Fn(&str) -> Option<String>,
    root: &Path,
) -> Result<Option<Settings>, String> {
    let env = |name: &str| env(name).filter(|v| !v.trim().is_empty());
    if env("OPENLINEAGE_DISABLED").is_some_and(|v| ["true", "1"].contains(&v.to_ascii_lowercase().as_str())) {
        return Ok(None);
    }
    let named = env("OPENLINEAGE_NAMESPACE");
    let parent = env("OPENLINEAGE_PARENT_ID").map(|text| parent(&text)).transpose()?;
    let make = |target, namespace: Option<String>, timeout| {
        Some(Settings {
            target,
            namespace: namespace.unwrap_or_else(default_namespace),
            parent: parent.clone(),
            timeout,
        })
    };
    if let Some(block) = block {
        let namespace = if block.namespace == default_namespace() { named } else { Some(block.namespace.clone()) };
        let target = match (&block.url, &block.file) {
            (Some(url), None) => {
                let key = block.api_key_env.as_deref().and_then(env).or_else(|| env("OPENLINEAGE_API_KEY"));
                Target::Http { url: address(url, &block.endpoint)?, key }
            }
            (None, Some(file)) => Target::File(root.join(file)),
            (Some(_), Some(_)) => return Err("`[lineage]` has both `url` and `file`; one of them is wanted".to_owned()),
            (None, None) => return Err("`[lineage]` has neither `url` nor `file`".to_owned()),
        };
        return Ok(make(target, namespace, block.timeout_seconds));
    }
    let endpoint = |name: &str| env(name).unwrap_or_else(default_endpoint);
    let target = match env("OPENLINEAGE__TRANSPORT__TYPE").map(|t| t.to_ascii_lowercase()).as_deref() {
        None => match env("OPENLINEAGE_URL") {
            None => return Ok(None),
            Some(url) => {
                Target::Http { url: address(&url, &endpoint("OPENLINEAGE_ENDPOINT"))?, key: env("OPENLINEAGE_API_KEY") }
            }
        },
        Some("http") => {
            let url = env("OPENLINEAGE__TRANSPORT__URL").or_else(|| env("OPENLINEAGE_URL"));
            let url = url.ok_or("OPENLINEAGE__TRANSPORT__URL is not set")?;
            // The client's own form: {"type": "api_key", "apiKey": "..."}.
            let auth = env("OPENLINEAGE__TRANSPORT__AUTH").and_then(|t| serde_json::from_str::<Value>(&t).ok());
            let auth = auth.and_then(|a| Some(a.get("apiKey").or_else(|| a.get("api_key"))?.as_str()?.to_owned()));
            let key = auth
                .or_else(|| env("OPENLINEAGE__TRANSPORT__AUTH__APIKEY"))
                .or_else(|| env("OPENLINEAGE__TRANSPORT__AUTH__API_KEY"))
                .or_else(|| env("OPENLINEAGE_API_KEY"));
            Target::Http { url: address(&url, &endpoint("OPENLINEAGE__TRANSPORT__ENDPOINT"))?, key }
        }
        Some("file") => {
            let file = env("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH");
            Target::File(file.ok_or("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH is not set")?.into())
        }
        Some("noop") => return Ok(None),
        Some(other) => return Err(format!("lineage has no transport `{other}`; there are `http` and `file`")),
    };
    Ok(make(target, named, default_timeout()))
}

fn address(url: &str, endpoint: &str) -> Result<Url, String> {
    let text = format!("{}/{}", url.trim_end_matches('/'), endpoint.trim_start_matches('/'));
    match Url::parse(&text) {
        Ok(url) if ["http", "https"].contains(&url.scheme()) => Ok(url),
        _ => Err(format!("the lineage receiver `{url}` is no http address")),
    }
}

/// `namespace/job/run`, as Airflow writes it.
fn parent(text: &str) -> Result<Parent, String> {
    let parts = text.rsplit_once('/').and_then(|(rest, run)| Some((rest.rsplit_once('/')?, run)));
    match parts {
        Some(((namespace, job), run)) if !namespace.is_empty() && !job.is_empty() && super::facets::is_uuid(run) => {
            Ok(Parent { namespace: namespace.to_owned(), job: job.to_owned(), run_id: run.to_owned() })
        }
        _ => Err("OPENLINEAGE_PARENT_ID is not of the form NAMESPACE/JOB/RUN_UUID".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(block: Option<&str>, variables: &[(&str, &str)]) -> Result<Option<Settings>, String> {
        let block: Option<LineageConfig> = block.map(|b| toml::from_str(b).unwrap());
        let env = |name: &str| variables.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned());
        settings(block.as_ref(), &env, Path::new("/root/of/it"))
    }

    fn http(settings: &Settings) -> (&str, Option<&str>) {
        match &settings.target {
            Target::Http { url, key } => (url.as_str(), key.as_deref()),
            Target::File(_) => panic!("a file"),
        }
    }

    #[test]
    fn off_unless_configured() {
        assert!(of(None, &[]).unwrap().is_none());
        assert!(of(None, &[("OPENLINEAGE_API_KEY", "k")]).unwrap().is_none());
        let off = [("OPENLINEAGE_URL", "http://x"), ("OPENLINEAGE_DISABLED", "true")];
        assert!(of(None, &off).unwrap().is_none());
        assert!(of(Some("url = 'http://x'"), &off).unwrap().is_none());
        assert!(
            of(None, &[("OPENLINEAGE__TRANSPORT__TYPE", "noop"), ("OPENLINEAGE_URL", "http://x")]).unwrap().is_none()
        );
    }

    #[test]
    fn the_usual_variables() {
        let found = of(None, &[("OPENLINEAGE_URL", "http://x:5000/"), ("OPENLINEAGE_API_KEY", "k")]).unwrap().unwrap();
        assert_eq!(http(&found), ("http://x:5000/api/v1/lineage", Some("k")));
        let parent = "prod/dag.task/0197a6b4-6f3e-7a3b-8d2e-000000000001";
        let found = of(
            None,
            &[
                ("OPENLINEAGE__TRANSPORT__TYPE", "http"),
                ("OPENLINEAGE__TRANSPORT__URL", "https://y"),
                ("OPENLINEAGE__TRANSPORT__ENDPOINT", "/events"),
                ("OPENLINEAGE__TRANSPORT__AUTH", r#"{"type": "api_key", "apiKey": "z"}"#),
                ("OPENLINEAGE_NAMESPACE", "prod"),
                ("OPENLINEAGE_PARENT_ID", parent),
            ],
        );
        let found = found.unwrap().unwrap();
        assert_eq!(http(&found), ("https://y/events", Some("z")));
        assert_eq!((found.namespace.as_str(), found.parent.as_ref().unwrap().job.as_str()), ("prod", "dag.task"));
        let file =
            [("OPENLINEAGE__TRANSPORT__TYPE", "file"), ("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", "/tmp/e.jsonl")];
        assert!(of(None, &file).unwrap().unwrap().target == Target::File("/tmp/e.jsonl".into()));
    }

    #[test]
    fn the_block_comes_first_and_mistakes_are_said() {
        let env = [("OPENLINEAGE_URL", "http://x"), ("MY_KEY", "m")];
        let found = of(Some("url = 'http://block'\napi_key_env = 'MY_KEY'\nnamespace = 'n'"), &env).unwrap().unwrap();
        assert_eq!((http(&found), found.namespace.as_str()), (("http://block/api/v1/lineage", Some("m")), "n"));
        let found = of(Some("file = 'events.jsonl'"), &[]).unwrap().unwrap();
        assert!(found.target == Target::File("/root/of/it/events.jsonl".into()));
        assert!(of(Some("url = 'http://x'\nfile = 'y'"), &[]).is_err());
        assert!(of(Some(""), &[]).is_err());
        assert!(of(None, &[("OPENLINEAGE_URL", "marquez")]).is_err());
        assert!(of(None, &[("OPENLINEAGE__TRANSPORT__TYPE", "kafka")]).is_err());
        assert!(of(None, &[("OPENLINEAGE_URL", "http://x"), ("OPENLINEAGE_PARENT_ID", "a/b")]).is_err());
    }
}

//! S3 as the environment describes it: credentials, endpoint, region, patience.
//!
//! In: an `s3://` or `s3a://` URI, the variables that AWS's own tools read (`AWS_ACCESS_KEY_ID`,
//! `AWS_ENDPOINT_URL`, `AWS_REGION`, ...), the profile that `AWS_PROFILE` names, and
//! `TAILFUSE_STORE_*`. Out: an object store at the bucket's root. No key is ever part of an error.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path as ObjectPath;
use object_store::{ClientConfigKey, ObjectStore, RetryConfig};
use url::Url;

use crate::error::{Error, Result};

/// How often a request is sent again after a 5xx, a reset or a time-out.
const RETRIES: (&str, u64) = ("TAILFUSE_STORE_RETRIES", 10);
/// Seconds after which a request is not sent again.
const RETRY_SECONDS: (&str, u64) = ("TAILFUSE_STORE_RETRY_SECONDS", 180);
/// Seconds that one request may take, its body included.
const TIMEOUT_SECONDS: (&str, u64) = ("TAILFUSE_STORE_TIMEOUT_SECONDS", 60);
/// Seconds that a connection may take.
const CONNECT_SECONDS: (&str, u64) = ("TAILFUSE_STORE_CONNECT_SECONDS", 5);

/// Variables by name.
type Variables = BTreeMap<String, String>;

/// The store of `uri`'s bucket, and the path in it. Errors (exit 78): a key in the URI, a profile that is not there or has no
/// key of its own, an `http://` endpoint that was not allowed, a setting that is no number.
pub(super) fn open(url: &Url) -> Result<(Arc<dyn ObjectStore>, ObjectPath)> {
    let variables: Variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(_, value)| !value.is_empty())
        .collect();
    let path = ObjectPath::from_url_path(url.path())
        .map_err(|e| Error::spec(format!("`{url}` has a path that no object can have")).because(e))?;
    let store = builder(url, &variables)?
        .build()
        .map_err(|e| Error::spec(format!("cannot open `{url}`")).because(super::store_errors::text(&e)))?;
    Ok((Arc::new(store), path))
}

fn builder(url: &Url, variables: &Variables) -> Result<AmazonS3Builder> {
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Error::spec(format!(
            "the URI of the bucket `{}` has a key in it",
            url.host_str().unwrap_or_default()
        ))
        .with_help("take it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"));
    }
    let mut builder = AmazonS3Builder::new();
    for (name, value) in variables.iter().filter(|(name, _)| name.starts_with("AWS_")) {
        match name.to_ascii_lowercase().parse() {
            // The URI says which bucket.
            Ok(AmazonS3ConfigKey::Bucket) | Err(_) => {}
            Ok(key) => builder = builder.with_config(key, value),
        }
    }
    let profile = Profile::read(variables)?;
    let set = |names: &[&str]| names.iter().any(|name| variables.contains_key(*name));
    let endpoints = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
    for (names, ours, theirs) in [
        (&["AWS_ACCESS_KEY_ID"][..], AmazonS3ConfigKey::AccessKeyId, "aws_access_key_id"),
        (&["AWS_ACCESS_KEY_ID"], AmazonS3ConfigKey::SecretAccessKey, "aws_secret_access_key"),
        (&["AWS_ACCESS_KEY_ID"], AmazonS3ConfigKey::Token, "aws_session_token"),
        (&["AWS_REGION", "AWS_DEFAULT_REGION"], AmazonS3ConfigKey::Region, "region"),
        (&endpoints, AmazonS3ConfigKey::Endpoint, "endpoint_url"),
    ] {
        if let Some(value) = profile.keys.get(theirs).filter(|_| !set(names)) {
            builder = builder.with_config(ours, value);
        }
    }
    let endpoint = endpoints.iter().find_map(|name| variables.get(*name)).or(profile.keys.get("endpoint_url"));
    if let Some(endpoint) = endpoint.filter(|e| e.starts_with("http://") && !set(&["AWS_ALLOW_HTTP"])) {
        return Err(Error::spec(format!("the S3 endpoint `{endpoint}` is not encrypted"))
            .with_help("use https://, or set AWS_ALLOW_HTTP=true where the network may be trusted"));
    }
    let seconds = |setting| number(variables, setting).map(Duration::from_secs);
    let retry = RetryConfig {
        max_retries: usize::try_from(number(variables, RETRIES)?).unwrap_or(usize::MAX),
        retry_timeout: seconds(RETRY_SECONDS)?,
        ..RetryConfig::default()
    };
    let in_words = |setting| number(variables, setting).map(|n| format!("{n}s"));
    Ok(builder
        .with_url(url.as_str())
        .with_retry(retry)
        .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::Timeout), in_words(TIMEOUT_SECONDS)?)
        .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::ConnectTimeout), in_words(CONNECT_SECONDS)?))
}

fn number(variables: &Variables, (name, default): (&str, u64)) -> Result<u64> {
    match variables.get(name) {
        None => Ok(default),
        Some(text) => text.trim().parse().map_err(|_| {
            Error::spec(format!("the variable {name} is `{text}`, which is not a whole number"))
                .with_help(format!("for example {name}={default}, which is the default"))
        }),
    }
}

/// One profile of `~/.aws/credentials` and `~/.aws/config`; keys of the first come before those of the second.
#[derive(Debug, Default)]
struct Profile {
    keys: BTreeMap<String, String>,
}

impl Profile {
    /// The profile that `AWS_PROFILE` names; `default` where nothing else gives credentials. Without either: an empty one,
    /// and the store asks the machine (web identity, container, instance) for credentials.
    fn read(variables: &Variables) -> Result<Profile> {
        let named = variables.get("AWS_PROFILE").or(variables.get("AWS_DEFAULT_PROFILE"));
        let has_keys = variables.contains_key("AWS_ACCESS_KEY_ID");
        let elsewhere = [
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_SKIP_SIGNATURE",
        ];
        if named.is_none() && (has_keys || elsewhere.iter().any(|name| variables.contains_key(*name))) {
            return Ok(Profile::default());
        }
        let name = named.map_or("default", String::as_str);
        let home = variables.get("HOME").or(variables.get("USERPROFILE")).map(PathBuf::from);
        let file = |variable: &str, usual: &str| {
            let named = variables.get(variable).map(PathBuf::from);
            named.or_else(|| Some(home.clone()?.join(".aws").join(usual)))
        };
        let credentials = file("AWS_SHARED_CREDENTIALS_FILE", "credentials");
        let config = file("AWS_CONFIG_FILE", "config");
        let mut keys = BTreeMap::new();
        let mut found = false;
        for (file, section) in
            [(&config, format!("profile {name}")), (&config, name.to_owned()), (&credentials, name.to_owned())]
        {
            let Some(text) = file.as_ref().and_then(|f| fs_err::read_to_string(f).ok()) else { continue };
            if let Some(section) = ini_section(&text, &section) {
                found = true;
                keys.extend(section);
            }
        }
        let both = keys.contains_key("aws_access_key_id") && keys.contains_key("aws_secret_access_key");
        let places: Vec<String> = [credentials, config].iter().flatten().map(|f| f.display().to_string()).collect();
        match named {
            Some(name) if !found => Err(Error::spec(format!("there is no AWS profile `{name}` (AWS_PROFILE)"))
                .with_help(format!("looked into {}", places.join(" and ")))),
            Some(name) if !both && !has_keys => {
                let way = ["sso_session", "sso_start_url", "role_arn", "credential_process", "login_session"];
                let way = way.iter().find(|w| keys.contains_key(**w)).map_or(String::new(), |w| format!(" but `{w}`"));
                Err(Error::spec(format!("the AWS profile `{name}` has no access key{way}")).with_help(format!(
                    "tailfuse reads `aws_access_key_id` and `aws_secret_access_key` of a profile; for all others: eval \"$(aws configure export-credentials --profile {name} --format env)\" and unset AWS_PROFILE"
                )))
            }
            _ => Ok(Profile { keys }),
        }
    }
}

/// The keys of `[section]` of a file in AWS's form, or `None` where it is not there. Indented lines belong to the key above
/// them (`s3 =` blocks) and are left out.
fn ini_section(text: &str, section: &str) -> Option<BTreeMap<String, String>> {
    let mut keys = None;
    let mut inside = false;
    for line in text.lines() {
        let bare = line.trim();
        if bare.is_empty() || bare.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = bare.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            inside = name.split_whitespace().eq(section.split_whitespace());
            if inside {
                keys.get_or_insert_with(BTreeMap::new);
            }
        } else if inside
            && !line.starts_with([' ', '\t'])
            && let Some((key, value)) = bare.split_once('=')
            && !value.trim().is_empty()
        {
            keys.get_or_insert_with(BTreeMap::new).insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fault;

    fn with(pairs: &[(&str, &str)]) -> Variables {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn value(builder: &AmazonS3Builder, key: AmazonS3ConfigKey) -> Option<String> {
        builder.get_config_value(&key)
    }

    fn bucket() -> Url {
        Url::parse("s3://bucket/prefix").unwrap()
    }

    const CREDENTIALS: &str = "\
[default]
aws_access_key_id = default-id
aws_secret_access_key = default-secret
# a comment
[nightly]
aws_access_key_id=nightly-id
aws_secret_access_key=nightly-secret
aws_session_token=nightly-token
[elsewhere]
role_arn = arn:aws:iam::1:role/x
";
    const CONFIG: &str = "\
[default]
region = eu-west-1
[profile nightly]
region = eu-north-1
s3 =
  addressing_style = path
  region = nonsense
endpoint_url = https://minio.local
";

    /// Both files in a folder, and the variables that name them.
    fn files(more: &[(&str, &str)]) -> (tempfile::TempDir, Variables) {
        let folder = tempfile::tempdir().unwrap();
        let mut variables = with(more);
        for (name, text, variable) in
            [("credentials", CREDENTIALS, "AWS_SHARED_CREDENTIALS_FILE"), ("config", CONFIG, "AWS_CONFIG_FILE")]
        {
            let file = folder.path().join(name);
            fs_err::write(&file, text).unwrap();
            variables.insert(variable.into(), file.display().to_string());
        }
        (folder, variables)
    }

    #[test]
    fn a_profile_gives_what_the_environment_does_not() {
        let (_folder, variables) = files(&[("AWS_PROFILE", "nightly")]);
        let b = builder(&bucket(), &variables).unwrap();
        assert_eq!(value(&b, AmazonS3ConfigKey::AccessKeyId).as_deref(), Some("nightly-id"));
        assert_eq!(value(&b, AmazonS3ConfigKey::SecretAccessKey).as_deref(), Some("nightly-secret"));
        assert_eq!(value(&b, AmazonS3ConfigKey::Token).as_deref(), Some("nightly-token"));
        assert_eq!(value(&b, AmazonS3ConfigKey::Region).as_deref(), Some("eu-north-1"));
        assert_eq!(value(&b, AmazonS3ConfigKey::Endpoint).as_deref(), Some("https://minio.local"));

        let (_folder, variables) = files(&[
            ("AWS_PROFILE", "nightly"),
            ("AWS_ACCESS_KEY_ID", "mine"),
            ("AWS_SECRET_ACCESS_KEY", "my-secret"),
            ("AWS_REGION", "us-west-2"),
        ]);
        let b = builder(&bucket(), &variables).unwrap();
        assert_eq!(value(&b, AmazonS3ConfigKey::AccessKeyId).as_deref(), Some("mine"));
        assert_eq!(value(&b, AmazonS3ConfigKey::Token), None);
        assert_eq!(value(&b, AmazonS3ConfigKey::Region).as_deref(), Some("us-west-2"));
    }

    #[test]
    fn the_default_profile_is_read_where_nothing_is_said() {
        let (_folder, variables) = files(&[]);
        let b = builder(&bucket(), &variables).unwrap();
        assert_eq!(value(&b, AmazonS3ConfigKey::AccessKeyId).as_deref(), Some("default-id"));
        assert_eq!(value(&b, AmazonS3ConfigKey::Region).as_deref(), Some("eu-west-1"));
        let (_folder, variables) = files(&[("AWS_WEB_IDENTITY_TOKEN_FILE", "/token")]);
        let b = builder(&bucket(), &variables).unwrap();
        assert_eq!(value(&b, AmazonS3ConfigKey::AccessKeyId), None);
    }

    #[test]
    fn what_cannot_be_is_said_without_keys() {
        let refuse = |variables: &Variables, uri: &str, word: &str| {
            let e = builder(&Url::parse(uri).unwrap(), variables).unwrap_err();
            assert_eq!(e.fault, Fault::Spec);
            let text = e.to_string();
            assert!(text.contains(word) && !text.contains("secret"), "{text}");
        };
        let (_folder, variables) = files(&[("AWS_PROFILE", "nigthly")]);
        refuse(&variables, "s3://b/x", "nigthly");
        let (_folder, variables) = files(&[("AWS_PROFILE", "elsewhere")]);
        refuse(&variables, "s3://b/x", "role_arn");
        let keys = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "secret")];
        refuse(&with(&keys), "s3://id:secret@b/x", "key in it");
        refuse(
            &with(&[&keys[..], &[("AWS_ENDPOINT_URL", "http://minio:9000")]].concat()),
            "s3://b/x",
            "AWS_ALLOW_HTTP",
        );
        refuse(
            &with(&[&keys[..], &[("TAILFUSE_STORE_RETRIES", "many")]].concat()),
            "s3://b/x",
            "TAILFUSE_STORE_RETRIES",
        );
    }

    #[test]
    fn variables_of_other_programs_are_left_alone() {
        let variables = with(&[
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "k"),
            ("BUCKET", "other"),
            ("REGION", "other"),
            ("AWS_BUCKET", "other"),
        ]);
        let b = builder(&bucket(), &variables).unwrap();
        assert_eq!(value(&b, AmazonS3ConfigKey::Region), None);
        assert!(b.build().unwrap().to_string().contains("bucket"));
    }
}

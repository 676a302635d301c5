//! Getting one file: by HTTP, or as a wheel through pip.
//!
//! In: a source and an empty folder. Out: the file in that folder with its sha256 checked, or why this source
//! is of no use ([`Attempt::Failed`]), so that the next one is tried. Faults of this machine (a full disk) are errors.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures::StreamExt;
use tokio::io::AsyncWriteExt;

use super::digest::{Hasher, sha256_of};
use super::fetch::FetchProgress;
use super::spec::{Source, SourceKind};
use crate::error::{Error, Result};

/// Give up on an address that does not take the connection within this time.
const CONNECT: Duration = Duration::from_secs(5);
/// Give up on an address that sends nothing for this long.
const SILENCE: Duration = Duration::from_secs(30);
/// Look at how far pip has got this often.
const POLL: Duration = Duration::from_millis(200);

/// What became of one source.
pub(super) enum Attempt<T> {
    /// It gave what was wanted.
    Got(T),
    /// It did not; says why, without naming the source.
    Failed(String),
}

/// Gets the file of `source` into `folder` and checks its sha256.
pub(super) async fn download(
    source: &Source,
    python: &OsStr,
    folder: &Path,
    progress: &dyn FetchProgress,
) -> Result<Attempt<PathBuf>> {
    let got = match source.kind {
        SourceKind::Http => http(source, folder, progress).await?,
        SourceKind::Pip => pip(source, python, folder, progress).await?,
    };
    Ok(match got {
        Attempt::Got((path, found)) if found == source.sha256 => Attempt::Got(path),
        Attempt::Got((_, found)) => Attempt::Failed(format!(
            "`{}` from there was refused: its sha256 is {found}, {} is wanted",
            source.file, source.sha256
        )),
        Attempt::Failed(why) => Attempt::Failed(why),
    })
}

fn write_error(e: std::io::Error) -> Error {
    Error::environment("cannot write to the cache").because(e)
}

async fn http(source: &Source, folder: &Path, progress: &dyn FetchProgress) -> Result<Attempt<(PathBuf, String)>> {
    let Some(url) = &source.url else { return Ok(Attempt::Failed("it has no address".into())) };
    let response = match request(url).await {
        Ok(response) => response,
        Err(why) => return Ok(Attempt::Failed(why)),
    };
    let path = folder.join(&source.file);
    let mut file = fs_err::tokio::File::create(&path).await.map_err(write_error)?;
    let mut hasher = Hasher::default();
    let mut received = 0u64;
    progress.begin(&source.file, response.content_length().or(Some(source.bytes)));
    let mut body = response.bytes_stream();
    while let Some(block) = body.next().await {
        let block = match block {
            Ok(block) => block,
            Err(e) => {
                let why = format!("the answer broke off after {received} bytes: {}", root_cause(&e));
                return Ok(Attempt::Failed(why));
            }
        };
        received += block.len() as u64;
        if received > source.bytes.saturating_mul(2) {
            return Ok(Attempt::Failed(format!(
                "the answer is larger than {received} bytes, {} are expected",
                source.bytes
            )));
        }
        hasher.update(&block);
        file.write_all(&block).await.map_err(write_error)?;
        progress.advance(block.len() as u64);
    }
    file.sync_all().await.map_err(write_error)?;
    Ok(Attempt::Got((path, hasher.finish())))
}

async fn request(url: &str) -> Result<reqwest::Response, String> {
    let mut client = reqwest::Client::builder()
        .connect_timeout(CONNECT)
        .read_timeout(SILENCE)
        .user_agent(concat!("tailfuse/", env!("CARGO_PKG_VERSION")));
    let local = url::Url::parse(url)
        .ok()
        .and_then(|u| u.host_str().map(|h| matches!(h, "127.0.0.1" | "localhost" | "[::1]")))
        .unwrap_or(false);
    if local {
        // An address on this machine is never reached through a proxy.
        client = client.no_proxy();
    }
    let client = client.build().map_err(|e| format!("no HTTP client: {}", root_cause(&e)))?;
    let response = client.get(url).send().await.map_err(|e| match () {
        () if e.is_timeout() && e.is_connect() => format!("no connection within {} s", CONNECT.as_secs()),
        () if e.is_timeout() => format!("no answer within {} s", SILENCE.as_secs()),
        () if e.is_connect() => format!("cannot connect: {}", root_cause(&e)),
        () => root_cause(&e),
    })?;
    match response.status() {
        status if status.is_success() => Ok(response),
        status => Err(format!("it answers {status}")),
    }
}

/// The innermost error: reqwest's own text repeats the address and says little else.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

/// `python3 -m pip download`: pip knows the index, the proxy and the credentials of this machine. The wheel is
/// not installed, and nothing in it is run; `--only-binary` keeps pip from running a source package's build either.
async fn pip(
    source: &Source,
    python: &OsStr,
    folder: &Path,
    progress: &dyn FetchProgress,
) -> Result<Attempt<(PathBuf, String)>> {
    let (Some(package), Some(version)) = (&source.package, &source.version) else {
        return Ok(Attempt::Failed("it names no package".into()));
    };
    // pip downloads into its temporary folder first: having that inside ours shows how far it has got.
    let (wheels, temporary) = (folder.join("wheels"), folder.join("pip"));
    for new in [&wheels, &temporary] {
        fs_err::create_dir_all(new).map_err(write_error)?;
    }
    let child = tokio::process::Command::new(python)
        .args(["-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"])
        .args(["--only-binary", ":all:", "--progress-bar", "off", "--timeout", "10", "--retries", "2", "-d"])
        .arg(&wheels)
        .arg(format!("{package}=={version}"))
        .env("TMPDIR", &temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let child = match child {
        Ok(child) => child,
        Err(e) => {
            let name = python.to_string_lossy();
            return Ok(Attempt::Failed(format!("`{name} -m pip` cannot be started: {e}; install Python 3 with pip")));
        }
    };
    progress.begin(&source.file, Some(source.bytes));
    let output = child.wait_with_output();
    tokio::pin!(output);
    let mut seen = 0u64;
    let output = loop {
        tokio::select! {
            output = &mut output => break output,
            () = tokio::time::sleep(POLL) => {
                let now = bytes_below(folder).min(source.bytes);
                progress.advance(now.saturating_sub(seen));
                seen = seen.max(now);
            }
        }
    };
    let output = output.map_err(|e| Error::environment("cannot wait for pip").because(e))?;
    if !output.status.success() {
        return Ok(Attempt::Failed(pip_failure(&output.stderr, &output.stdout)));
    }
    progress.advance(source.bytes.saturating_sub(seen));
    let path = wheels.join(&source.file);
    if !path.is_file() {
        return Ok(Attempt::Failed(format!("pip downloaded another file than `{}`", source.file)));
    }
    let found = sha256_of(&path).await?;
    Ok(Attempt::Got((path, found)))
}

/// What pip says, in one line: its last `ERROR:` line, else its last line.
fn pip_failure(stderr: &[u8], stdout: &[u8]) -> String {
    let text = format!("{}\n{}", String::from_utf8_lossy(stdout), String::from_utf8_lossy(stderr));
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let said = lines.iter().rev().find(|l| l.starts_with("ERROR:")).or(lines.last());
    match said {
        Some(line) => format!("pip failed: {}", line.trim_start_matches("ERROR:").trim()),
        None => "pip failed without a word".into(),
    }
}

/// Bytes in all files below a folder.
fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(t) if t.is_dir() => bytes_below(&entry.path()),
            Ok(t) if t.is_file() => entry.metadata().map_or(0, |m| m.len()),
            _ => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pip_is_quoted_by_its_last_error() {
        let stderr =
            b"WARNING: retrying\nERROR: Could not find a version\nERROR: No matching distribution found for x==1\n";
        assert_eq!(pip_failure(stderr, b""), "pip failed: No matching distribution found for x==1");
        assert_eq!(
            pip_failure(b"/usr/bin/python3: No module named pip\n", b""),
            "pip failed: /usr/bin/python3: No module named pip"
        );
        assert_eq!(pip_failure(b"", b""), "pip failed without a word");
    }
}

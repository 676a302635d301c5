//! Servers for the tests of remote engines: one that speaks the protocol by heart, a proxy that breaks things on
//! purpose, and llama.cpp's own server in a process of its own.
//!
//! They run on threads of their own, so that a test may wait for a process meanwhile.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What goes wrong with a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    Pass,
    /// Passed on after so many milliseconds.
    Slow(u64),
    /// A status, with `Retry-After` where it is given.
    Status(u16, Option<&'static str>),
    /// Half of the answer's bytes, then the end.
    Truncated,
    /// An answer of these bytes.
    Body(&'static [u8]),
    /// The connection is reset.
    Reset,
    /// Nothing, ever.
    Hang,
}

/// Which fault meets a request: by the number of its body (in the order in which different ones were first seen) and by
/// how often that body came before.
pub type Schedule = Arc<dyn Fn(usize, usize) -> Fault + Send + Sync>;

/// A request as it came.
struct Request {
    path: String,
    key: Option<String>,
    body: Vec<u8>,
    raw: Vec<u8>,
}

async fn read_request(socket: &mut TcpStream) -> Option<Request> {
    let mut raw = Vec::new();
    let mut buffer = [0u8; 8192];
    loop {
        if let Some(end) = raw.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&raw[..end]).into_owned();
            let header = |name: &str| {
                head.lines().find_map(|l| l.to_lowercase().starts_with(name).then(|| l[name.len()..].trim().to_owned()))
            };
            let length: usize = header("content-length:").and_then(|v| v.parse().ok()).unwrap_or(0);
            if raw.len() >= end + 4 + length {
                let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
                let key = header("authorization:");
                return Some(Request { path, key, body: raw[end + 4..end + 4 + length].to_vec(), raw });
            }
        }
        match socket.read(&mut buffer).await {
            Ok(n) if n > 0 => raw.extend_from_slice(&buffer[..n]),
            _ => return None,
        }
    }
}

fn response(status: u16, extra: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n{extra}\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// A server on a port of this machine, gone when dropped.
pub struct Running {
    pub address: SocketAddr,
    /// Requests that came.
    pub requests: Arc<AtomicUsize>,
    /// The most that were in work at a time.
    pub most: Arc<AtomicUsize>,
    /// Bodies in the order in which they came.
    pub bodies: Arc<Mutex<Vec<Vec<u8>>>>,
    _runtime: tokio::runtime::Runtime,
}

impl Running {
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

#[derive(Clone)]
enum Behind {
    /// Answers by heart; wants this key where one is given.
    Heart(Option<&'static str>),
    Address(SocketAddr),
}

/// By body of a request: how often it came, and how many faults it has had.
type Attempts = HashMap<Vec<u8>, (usize, usize)>;

fn start(behind: Behind, schedule: Schedule, delay: u64) -> Running {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let (address, requests) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let (most, now) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen: Arc<Mutex<Attempts>> = Arc::default();
    let bodies: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let running =
        Running { address, requests: requests.clone(), most: most.clone(), bodies: bodies.clone(), _runtime: runtime };
    running._runtime.spawn(async move {
        loop {
            let Ok((mut socket, _)) = listener.accept().await else { break };
            let (behind, schedule, requests) = (behind.clone(), schedule.clone(), requests.clone());
            let (most, now, seen, bodies) = (most.clone(), now.clone(), seen.clone(), bodies.clone());
            tokio::spawn(async move {
                let Some(request) = read_request(&mut socket).await else { return };
                requests.fetch_add(1, Ordering::SeqCst);
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                bodies.lock().unwrap().push(request.body.clone());
                let fault = {
                    let mut seen = seen.lock().unwrap();
                    let next = seen.len();
                    let (number, before) = seen.entry(request.body.clone()).or_insert((next, 0));
                    *before += 1;
                    schedule(*number, *before - 1)
                };
                tokio::time::sleep(Duration::from_millis(delay)).await;
                serve(&mut socket, &behind, &request, fault).await;
                now.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    running
}

async fn serve(socket: &mut TcpStream, behind: &Behind, request: &Request, fault: Fault) {
    let bytes = match fault {
        Fault::Hang => {
            tokio::time::sleep(Duration::from_secs(600)).await;
            return;
        }
        Fault::Reset => {
            // With nothing to linger for, closing sends a reset.
            let _ = socket.set_zero_linger();
            return;
        }
        Fault::Status(status, wait) => {
            let extra = wait.map_or_else(String::new, |w| format!("Retry-After: {w}\r\n"));
            // The server repeats what it was sent, as some do.
            let said = format!("no: {}", request.key.as_deref().unwrap_or_default());
            response(status, &extra, json!({ "error": { "message": said } }).to_string().as_bytes())
        }
        Fault::Body(body) => response(200, "", body),
        Fault::Pass | Fault::Slow(_) | Fault::Truncated => {
            if let Fault::Slow(ms) = fault {
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
            let whole = match behind {
                Behind::Heart(key) => by_heart(request, *key),
                Behind::Address(address) => passed_on(*address, &request.raw).await,
            };
            if fault == Fault::Truncated { whole[..whole.len() - whole.len() / 4].to_vec() } else { whole }
        }
    };
    let _ = socket.write_all(&bytes).await;
    let _ = socket.shutdown().await;
}

/// Sends the request's bytes to another server and gives all that comes back.
async fn passed_on(address: SocketAddr, raw: &[u8]) -> Vec<u8> {
    let mut upstream = TcpStream::connect(address).await.unwrap();
    // One request for each connection: the end of the answer is then the end of the stream.
    let line = 2 + raw.windows(2).position(|w| w == b"\r\n").unwrap();
    upstream.write_all(&[&raw[..line], b"Connection: close\r\n", &raw[line..]].concat()).await.unwrap();
    let mut answer = Vec::new();
    let _ = upstream.read_to_end(&mut answer).await;
    answer
}

/// A number in [0, 1) that depends on texts.
fn chance(parts: &[&str]) -> f64 {
    let mut hasher = Sha256::new();
    parts.iter().for_each(|p| hasher.update(p.as_bytes()));
    let bytes = hasher.finalize();
    f64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])) / 4_294_967_296.0
}

/// Answers in the shape of llama.cpp's server: the letters' log-probabilities, or a list, made from the prompt.
fn by_heart(request: &Request, key: Option<&str>) -> Vec<u8> {
    if key.is_some_and(|k| request.key.as_deref() != Some(&format!("Bearer {k}"))) {
        let said = format!("Invalid API key {}", request.key.as_deref().unwrap_or_default());
        return response(401, "", json!({ "error": { "message": said } }).to_string().as_bytes());
    }
    let body: Json = serde_json::from_slice(&request.body).unwrap();
    if request.path != "/v1/chat/completions" {
        return response(404, "", b"{\"error\":{\"message\":\"File Not Found\",\"code\":404}}");
    }
    let prompt = body["messages"].as_array().unwrap().last().unwrap()["content"].as_str().unwrap().to_owned();
    let usage =
        json!({ "completion_tokens": 1, "prompt_tokens": prompt.len() / 4, "total_tokens": prompt.len() / 4 + 1 });
    let names = body.pointer("/response_format/json_schema/schema/properties/ranking/items/enum");
    let choice = match names {
        Some(names) => {
            let mut names: Vec<&str> = names.as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
            names.sort_by(|a, b| chance(&[&prompt, a]).total_cmp(&chance(&[&prompt, b])));
            let text = json!({ "ranking": names }).to_string();
            json!({ "finish_reason": "stop", "index": 0, "message": { "role": "assistant", "content": text } })
        }
        None => {
            let letters = ('A'..='Z').filter(|l| prompt.contains(&format!("\n{l}. ")));
            let top: Vec<Json> = letters
                .map(|l| {
                    let l = l.to_string();
                    json!({ "id": 1, "token": l, "bytes": [1], "logprob": -0.01 - 5.0 * chance(&[&prompt, &l]) })
                })
                .collect();
            let logprobs = json!({ "content": [{ "id": 1, "token": "A", "logprob": -1.0, "top_logprobs": top }] });
            json!({ "finish_reason": "length", "index": 0, "message": { "role": "assistant", "content": "A" }, "logprobs": logprobs })
        }
    };
    let answer = json!({ "choices": [choice], "model": "m", "object": "chat.completion", "usage": usage });
    response(200, "", answer.to_string().as_bytes())
}

/// A server that answers by heart, each request after `delay` milliseconds.
pub fn by_heart_server(key: Option<&'static str>, delay: u64) -> Running {
    start(Behind::Heart(key), Arc::new(|_, _| Fault::Pass), delay)
}

/// The same with faults.
pub fn faulty_server(schedule: impl Fn(usize, usize) -> Fault + Send + Sync + 'static) -> Running {
    start(Behind::Heart(None), Arc::new(schedule), 0)
}

/// Faults before another server.
pub fn proxy(to: SocketAddr, schedule: impl Fn(usize, usize) -> Fault + Send + Sync + 'static) -> Running {
    start(Behind::Address(to), Arc::new(schedule), 0)
}

/// llama.cpp's own server.
pub struct LlamaServer {
    process: Child,
    pub address: SocketAddr,
}

impl Drop for LlamaServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A Python that has `xllamacpp`: `TAILFUSE_PYTHON`, or the one on the path.
fn python() -> Option<PathBuf> {
    let candidates =
        std::env::var_os("TAILFUSE_PYTHON").map(PathBuf::from).into_iter().chain([PathBuf::from("python3")]);
    candidates.into_iter().find(|p| {
        let found = Command::new(p)
            .args(["-c", "import importlib.util as u, sys; sys.exit(u.find_spec('xllamacpp') is None)"])
            .output();
        found.is_ok_and(|o| o.status.success())
    })
}

impl LlamaServer {
    /// Starts it with the weights in `gguf`; where there is no such server, says aloud that `test` is skipped.
    pub fn start(test: &str, gguf: &Path) -> Option<LlamaServer> {
        let Some(python) = python() else {
            eprintln!("SKIPPED: {test}: no Python with xllamacpp; `pip install xllamacpp` and set TAILFUSE_PYTHON");
            return None;
        };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/llama_server.py");
        let mut process = Command::new(python)
            .arg(script)
            .arg("--gguf")
            .arg(gguf)
            .args(["--threads", "2"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().trim_start_matches("http://").parse();
        Some(LlamaServer { process, address: address.unwrap_or_else(|_| panic!("no address in {line:?}")) })
    }
}

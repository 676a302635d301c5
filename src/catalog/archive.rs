//! Members of a zip archive (a wheel is one too), checked by sha256.
//!
//! In: the archive's path, the member's path and digest. Out: the member's bytes, or a file of them.
//! Nothing is ever unpacked to a path that the archive names.

use std::io::{Read, Write};
use std::path::Path;

use super::digest::{Hasher, sha256_bytes};
use super::spec::Member;
use crate::error::{Error, Result};

/// Read this much at a time.
const BLOCK: usize = 1 << 20;
/// Largest member that is held in memory: tables of data sets, cards of models.
const IN_MEMORY: u64 = 1 << 30;
/// Largest member that is written to a file: weights.
const ON_DISK: u64 = 1 << 40;
/// A member that grows more than so many times over what it takes in the archive is a bomb, once it is no longer small.
const RATIO: u64 = 200;
/// Up to this size any ratio will do: a short text of one letter is no danger.
const SMALL: u64 = 16 << 20;

/// Why a member is of no use; the next source may be better.
pub(super) type Unusable = String;

fn open(archive: &Path) -> Result<Result<zip::ZipArchive<fs_err::File>, Unusable>> {
    let file = fs_err::File::open(archive).map_err(|e| Error::environment("cannot open a download").because(e))?;
    Ok(zip::ZipArchive::new(file).map_err(|e| format!("it is no zip archive: {e}")))
}

/// Whether a member may be read at all, by what the archive says of it: a plain file with a plain name, of a size that
/// its packed bytes can hold. What it says may be a lie, so that reading is bounded besides. Returns that bound.
fn bound<R: Read>(file: &zip::read::ZipFile<'_, R>, most: u64) -> Result<u64, Unusable> {
    let name = file.name().to_owned();
    if file.enclosed_name().is_none() || name.starts_with('/') || name.contains('\\') {
        return Err(format!("`{name}` in it is no plain name"));
    }
    if !file.is_file() || file.is_symlink() {
        return Err(format!("`{name}` in it is no file"));
    }
    let by_ratio = file.compressed_size().saturating_mul(RATIO).max(SMALL);
    let bound = most.min(by_ratio);
    match file.size() > bound {
        true => Err(too_large(&name, bound)),
        false => Ok(bound),
    }
}

fn too_large(name: &str, bound: u64) -> Unusable {
    format!("`{name}` in it is larger than {bound} bytes, which is more than it may be")
}

fn differs(member: &Member, found: &str) -> Unusable {
    format!("`{}` in it has the sha256 {found}, {} is wanted", member.path, member.sha256)
}

/// A member in memory.
pub(super) fn read_member(archive: &Path, member: &Member) -> Result<Result<Vec<u8>, Unusable>> {
    let mut zip = match open(archive)? {
        Ok(zip) => zip,
        Err(why) => return Ok(Err(why)),
    };
    let mut bytes = Vec::new();
    match zip.by_name(&member.path) {
        Err(e) => return Ok(Err(format!("`{}` in it: {e}", member.path))),
        Ok(file) => {
            let bound = match bound(&file, IN_MEMORY) {
                Ok(bound) => bound,
                Err(why) => return Ok(Err(why)),
            };
            if let Err(e) = file.take(bound + 1).read_to_end(&mut bytes) {
                return Ok(Err(format!("`{}` in it: {e}", member.path)));
            }
            if bytes.len() as u64 > bound {
                return Ok(Err(too_large(&member.path, bound)));
            }
        }
    }
    let found = sha256_bytes(&bytes);
    Ok(if found == member.sha256 { Ok(bytes) } else { Err(differs(member, &found)) })
}

/// A member as the file `to`, written block by block.
pub(super) fn extract_member(archive: &Path, member: &Member, to: &Path) -> Result<Result<(), Unusable>> {
    let mut zip = match open(archive)? {
        Ok(zip) => zip,
        Err(why) => return Ok(Err(why)),
    };
    let mut from = match zip.by_name(&member.path) {
        Ok(file) => file,
        Err(e) => return Ok(Err(format!("`{}` in it: {e}", member.path))),
    };
    let bound = match bound(&from, ON_DISK) {
        Ok(bound) => bound,
        Err(why) => return Ok(Err(why)),
    };
    let mut written = 0u64;
    let fail = |e| Error::environment("cannot write to the cache").because(e);
    let mut out = fs_err::File::create(to).map_err(fail)?;
    let mut hasher = Hasher::default();
    let mut block = vec![0u8; BLOCK];
    loop {
        let n = match from.read(&mut block) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) => return Ok(Err(format!("`{}` in it: {e}", member.path))),
        };
        written += n as u64;
        if written > bound {
            return Ok(Err(too_large(&member.path, bound)));
        }
        hasher.update(&block[..n]);
        out.write_all(&block[..n]).map_err(fail)?;
    }
    out.sync_all().map_err(fail)?;
    let found = hasher.finish();
    Ok(if found == member.sha256 { Ok(()) } else { Err(differs(member, &found)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zipped(folder: &Path) -> std::path::PathBuf {
        let path = folder.join("a.zip");
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        zip.start_file("in/x.txt", zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(b"abc").unwrap();
        zip.finish().unwrap();
        path
    }

    #[test]
    fn members_are_read_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        let archive = zipped(folder.path());
        let good = Member { path: "in/x.txt".into(), sha256: sha256_bytes(b"abc") };
        assert_eq!(read_member(&archive, &good).unwrap().unwrap(), b"abc");
        let to = folder.path().join("out");
        extract_member(&archive, &good, &to).unwrap().unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"abc");

        let wrong = Member { sha256: "0".repeat(64), ..good.clone() };
        let why = read_member(&archive, &wrong).unwrap().unwrap_err();
        assert!(why.contains(&"0".repeat(64)) && why.contains(&sha256_bytes(b"abc")), "{why}");
        assert!(extract_member(&archive, &wrong, &to).unwrap().is_err());
        let missing = Member { path: "y".into(), ..good.clone() };
        assert!(read_member(&archive, &missing).unwrap().unwrap_err().contains("`y`"));
        std::fs::write(&archive, b"no archive").unwrap();
        assert!(read_member(&archive, &good).unwrap().unwrap_err().contains("no zip archive"));
    }

    #[test]
    fn names_that_leave_and_things_that_are_no_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.zip");
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        let plain = zip::write::SimpleFileOptions::default();
        for name in ["../up.txt", "/absolute.txt", "in/../../up.txt", "c\\windows.txt"] {
            zip.start_file(name, plain).unwrap();
            zip.write_all(b"abc").unwrap();
        }
        zip.add_symlink("link", "/etc/passwd", plain).unwrap();
        zip.add_directory("folder/", plain).unwrap();
        zip.finish().unwrap();
        let before = std::fs::read_dir(folder.path().parent().unwrap()).unwrap().count();
        for name in ["../up.txt", "/absolute.txt", "in/../../up.txt", "c\\windows.txt", "link", "folder/"] {
            let member = Member { path: name.into(), sha256: sha256_bytes(b"abc") };
            let why = read_member(&path, &member).unwrap().expect_err(name);
            assert!(
                why.contains("no plain name") || why.contains("no file") || why.contains("not found"),
                "{name}: {why}"
            );
            let to = folder.path().join("out");
            extract_member(&path, &member, &to).unwrap().expect_err(name);
            assert!(!to.exists(), "{name}");
        }
        assert_eq!(std::fs::read_dir(folder.path().parent().unwrap()).unwrap().count(), before);
    }

    #[test]
    fn bombs_are_refused_before_they_go_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.zip");
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        zip.start_file("zeros", zip::write::SimpleFileOptions::default()).unwrap();
        let zeros = vec![0u8; 1 << 20];
        (0..64).for_each(|_| zip.write_all(&zeros).unwrap());
        zip.finish().unwrap();
        let packed = std::fs::metadata(&path).unwrap().len();
        assert!(packed < 1 << 20);
        let member = Member { path: "zeros".into(), sha256: "0".repeat(64) };
        let to = folder.path().join("out");
        for lies in [false, true] {
            if lies {
                // The same archive, which says that the member has 1000 bytes: in its own header and in the directory.
                let mut bytes = std::fs::read(&path).unwrap();
                let size = (64u32 << 20).to_le_bytes();
                let places: Vec<usize> = (0..bytes.len() - 4).filter(|&i| bytes[i..i + 4] == size).collect();
                assert!(!places.is_empty());
                places.iter().for_each(|&i| bytes[i..i + 4].copy_from_slice(&1000u32.to_le_bytes()));
                std::fs::write(&path, bytes).unwrap();
            }
            let why = read_member(&path, &member).unwrap().unwrap_err();
            assert!(lies || why.contains("larger than"), "{why}");
            extract_member(&path, &member, &to).unwrap().unwrap_err();
            let written = std::fs::metadata(&to).map_or(0, |m| m.len());
            assert!(written <= SMALL.max(packed * RATIO), "{written} bytes were written");
        }
    }
}

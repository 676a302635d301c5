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

/// Why a member is of no use; the next source may be better.
pub(super) type Unusable = String;

fn open(archive: &Path) -> Result<Result<zip::ZipArchive<fs_err::File>, Unusable>> {
    let file = fs_err::File::open(archive).map_err(|e| Error::environment("cannot open a download").because(e))?;
    Ok(zip::ZipArchive::new(file).map_err(|e| format!("it is no zip archive: {e}")))
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
        Ok(mut file) => {
            if let Err(e) = file.read_to_end(&mut bytes) {
                return Ok(Err(format!("`{}` in it: {e}", member.path)));
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
}

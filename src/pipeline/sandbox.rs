//! `--sandbox`: a pipeline file that may not be trusted names no local path outside of its root.
//!
//! In: the file's tree after its parameters were filled in, its root, the folder that bounds it. Out: a mistake for every
//! string that is, or by a symbolic link leads to, a place outside. Nothing has been opened yet. What a key means is not
//! asked: a stage kind that comes later is covered too. Other machines (`s3://`, servers) are a matter of credentials.

use std::path::{Component, Path, PathBuf};

use super::diagnostics::Diagnostic;
use super::document::{Entry, Item, ItemValue};

/// Keys whose strings are never paths of this machine.
const NO_PATHS: [&str; 8] = ["query", "filter", "columns", "types", "delimiter", "url", "endpoint", "partition"];
/// Sections without paths: parameters stand where they are used, tests have rows.
const NO_SECTIONS: [&str; 2] = ["params", "test"];
/// Links that are looked at below a source's folder, so that a huge one ends some time.
const MOST_FILES: usize = 1_000_000;

/// Adds a mistake for everything outside. `bounds` and `root` are canonical.
pub fn check(tree: &Item, root: &Path, bounds: &Path, out: &mut Vec<Diagnostic>) {
    if !root.starts_with(bounds) {
        let origin = tree.get("root").map_or_else(|| tree.origin.clone(), |i| i.origin.clone());
        out.push(
            Diagnostic::new(
                format!("--sandbox: the root {} is outside of {}", root.display(), bounds.display()),
                origin,
                "leaves the sandbox",
            )
            .with_help("start in a folder above it, or name one: --sandbox=DIR"),
        );
        return;
    }
    let mut walk = Walk { root, out };
    for entry in tree.entries().iter().filter(|e| !NO_SECTIONS.contains(&e.key.as_str()) && e.key != "root") {
        walk.entry(entry);
    }
}

struct Walk<'a> {
    root: &'a Path,
    out: &'a mut Vec<Diagnostic>,
}

impl Walk<'_> {
    fn entry(&mut self, entry: &Entry) {
        if !NO_PATHS.contains(&entry.key.as_str()) {
            self.item(&entry.item, entry.key == "uri");
        }
    }

    fn item(&mut self, item: &Item, is_source: bool) {
        match &item.value {
            ItemValue::String(text) => {
                if let Some(why) = self.leaves(text, is_source) {
                    self.out.push(
                        Diagnostic::new(
                            format!("--sandbox: `{text}` {why}"),
                            item.origin.clone(),
                            "leaves the sandbox",
                        )
                        .with_help(format!("everything local must lie below {}", self.root.display())),
                    );
                }
            }
            ItemValue::Array(items) => items.iter().for_each(|i| self.item(i, is_source)),
            ItemValue::Table(entries) => entries.iter().for_each(|e| self.entry(e)),
            _ => {}
        }
    }

    /// Why a string is a place outside, if it is one.
    fn leaves(&self, text: &str, is_source: bool) -> Option<String> {
        let path = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("file") => {
                PathBuf::from(format!("/{}", rest.trim_start_matches('/')))
            }
            Some(_) => return None,
            None => self.root.join(text),
        };
        // A query is no path; one that has `..` as a part of it is none that anybody needs.
        if path.components().any(|c| c == Component::ParentDir) {
            return Some("goes up by `..`".to_owned());
        }
        let real = real_path(&path)?;
        if !real.starts_with(self.root) {
            return Some(match path.starts_with(self.root) {
                true => format!("is a link to {}", real.display()),
                false => "is outside of the pipeline's root".to_owned(),
            });
        }
        let link = (is_source && real.is_dir()).then(|| self.link_below(&real)).flatten()?;
        Some(format!("has a link to the outside below it: {}", link.display()))
    }

    /// The first link below a folder that leads outside.
    fn link_below(&self, folder: &Path) -> Option<PathBuf> {
        let mut folders = vec![folder.to_owned()];
        let mut seen = 0;
        while let Some(folder) = folders.pop() {
            for entry in fs_err::read_dir(&folder).into_iter().flatten().flatten() {
                seen += 1;
                if seen > MOST_FILES {
                    return Some(folder);
                }
                let path = entry.path();
                match entry.file_type() {
                    Ok(kind) if kind.is_symlink() && self.leads_outside(&path) => return Some(path),
                    Ok(kind) if kind.is_dir() => folders.push(path),
                    _ => {}
                }
            }
        }
        None
    }

    fn leads_outside(&self, link: &Path) -> bool {
        real_path(link).is_none_or(|real| !real.starts_with(self.root))
    }
}

/// The path with links resolved as far as it exists; `None` where it cannot be a path.
fn real_path(path: &Path) -> Option<PathBuf> {
    let mut there = path;
    let mut rest = Vec::new();
    loop {
        if let Ok(real) = fs_err::canonicalize(there) {
            return Some(rest.iter().rev().fold(real, |path, part| path.join(part)));
        }
        // A link that leads nowhere now may lead anywhere later.
        if there.is_symlink() {
            return fs_err::read_link(there).ok().map(|to| there.parent().unwrap_or(there).join(to));
        }
        rest.push(there.file_name()?.to_owned());
        there = there.parent()?;
    }
}

#[cfg(test)]
mod tests {
    use crate::pipeline::{LoadOptions, load_text};

    const FILE: &str = "name = 'x'\nroot = 'ROOT'\nwarehouse = 'WAREHOUSE'\n[sources.a]\nuri = 'URI'\n[stages.s]\n\
                        kind = 'sql'\ninputs = { a = 'a' }\nfile = 'SQL'\n";

    /// The mistake of a file with some words replaced, in a folder `in` with a neighbour `out`.
    fn mistake(replaced: &[(&str, &str)]) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let (inside, outside) = (folder.path().join("in"), folder.path().join("out"));
        for place in [&inside, &outside] {
            std::fs::create_dir_all(place.join("data")).unwrap();
            std::fs::write(place.join("q.sql"), "select * from a").unwrap();
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(outside.join("q.sql"), inside.join("link.sql")).unwrap();
            std::os::unix::fs::symlink(outside.join("data"), inside.join("linked")).unwrap();
            std::os::unix::fs::symlink("/nowhere", inside.join("broken")).unwrap();
            std::fs::create_dir(inside.join("deep")).unwrap();
            std::os::unix::fs::symlink(outside.join("q.sql"), inside.join("deep/part-0.parquet")).unwrap();
        }
        let mut text = FILE.to_owned();
        let absolute = outside.join("q.sql").display().to_string();
        for (from, to) in replaced {
            text = text.replace(from, &to.replace("OUTSIDE", &absolute));
        }
        for (from, to) in [("ROOT", "."), ("WAREHOUSE", "w"), ("URI", "data"), ("SQL", "q.sql")] {
            text = text.replace(from, to);
        }
        let options = LoadOptions { sandbox: Some(&inside), ..LoadOptions::default() };
        load_text(text, &inside.join("p.toml"), &options).err().map(|e| e.message)
    }

    #[test]
    fn what_is_inside_is_fine() {
        assert_eq!(mistake(&[]), None);
        assert_eq!(mistake(&[("URI", "s3://bucket/x"), ("WAREHOUSE", "not/there/yet")]), None);
        assert_eq!(
            mistake(&[("URI", "catalog:ml-100k/items"), ("SQL", "builtin:dedup"), ("{ a =", "{ interactions =")]),
            None
        );
        assert_eq!(mistake(&[("file = 'SQL'", "query = \"select 1/2 as x, '/etc/passwd' as p from a\"")]), None);
    }

    #[test]
    fn what_leaves_is_refused_at_its_place() {
        for (key, value) in [
            ("SQL", "../out/q.sql"),
            ("SQL", "OUTSIDE"),
            ("SQL", "link.sql"),
            ("SQL", "data/../../out/q.sql"),
            ("URI", "/etc"),
            ("URI", "file:///etc/passwd"),
            ("URI", "FILE://localhost/../etc/passwd"),
            ("URI", "linked"),
            ("URI", "deep"),
            ("URI", "broken/x"),
            ("WAREHOUSE", "linked/below"),
            ("WAREHOUSE", "broken"),
            ("ROOT", ".."),
            ("ROOT", "/"),
        ] {
            let found = mistake(&[(key, value)]).unwrap_or_else(|| panic!("{key} = {value} passed"));
            assert!(found.contains("--sandbox") && found.contains("leaves the sandbox"), "{value}: {found}");
        }
    }
}

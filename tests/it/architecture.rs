//! The shape of the house: arrows that never point back, registries that are complete.

use std::path::{Path, PathBuf};

use tailfuse::stages::KINDS;

fn source_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => source_files(&path, found),
            false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            false => {}
        }
    }
}

/// Every source file as (module, path below src, lines of code without comments).
fn files() -> Vec<(String, String, Vec<String>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    source_files(&root, &mut paths);
    assert!(paths.len() > 50, "the sources were not found");
    paths
        .into_iter()
        .map(|path| {
            let relative = path.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/");
            let module = relative.split(['/', '.']).next().unwrap().to_owned();
            let text = std::fs::read_to_string(&path).unwrap();
            let lines = text.lines().filter(|l| !l.trim_start().starts_with("//")).map(str::to_owned).collect();
            (module, relative, lines)
        })
        .collect()
}

#[test]
fn an_arrow_never_points_back() {
    // What a module must not know of. `cli -> pipeline -> stages -> everything else`.
    let above = |module: &str| -> &[&str] {
        match module {
            "main" | "lib" | "cli" => &[],
            "pipeline" => &["cli"],
            "stages" => &["cli", "pipeline"],
            _ => &["cli", "pipeline", "stages"],
        }
    };
    let mut wrong = Vec::new();
    for (module, file, lines) in files() {
        for line in &lines {
            for upper in above(&module) {
                if line.contains(&format!("crate::{upper}::")) {
                    wrong.push(format!("{file}: {}", line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "these point back:\n{}", wrong.join("\n"));
}

#[test]
fn burn_stays_with_the_models() {
    for (module, file, lines) in files() {
        let allowed = ["recommenders", "llm", "device"].contains(&module.as_str());
        let uses = lines.iter().any(|l| l.contains("burn::") || l.contains("burn_flex::"));
        assert!(allowed || !uses, "{file} imports burn");
        let features = lines.iter().any(|l| l.contains("cfg(feature") || l.contains("cfg(not(feature"));
        assert!(module == "device" || !features, "{file} has a cfg(feature); only device.rs may");
    }
}

/// Paths below src of the files that a `#[cfg(test)]` before their `mod` line leaves out of the program.
fn files_of_tests() -> Vec<String> {
    let mut found = Vec::new();
    for (_, file, lines) in files() {
        for pair in lines.windows(2).filter(|pair| pair[0].trim() == "#[cfg(test)]") {
            let words: Vec<&str> = pair[1].split([' ', ';']).collect();
            let Some(at) = words.iter().position(|w| *w == "mod").filter(|_| pair[1].ends_with(';')) else { continue };
            let (folder, stem) = file.rsplit_once('/').unwrap_or(("", &file));
            let stem = stem.trim_end_matches(".rs");
            let folder = if ["mod", "lib"].contains(&stem) { folder.to_owned() } else { format!("{folder}/{stem}") };
            found.push(format!("{folder}/{}.rs", words[at + 1]));
        }
    }
    assert!(found.iter().any(|f| f == "llm/hostile.rs"), "the files of tests were not found: {found:?}");
    found
}

#[test]
fn only_main_ends_the_process_and_only_the_command_line_prints() {
    let of_tests = files_of_tests();
    for (module, file, lines) in files() {
        if module == "main" || module == "cli" || of_tests.contains(&file) {
            continue;
        }
        let code = lines.iter().take_while(|l| !l.contains("#[cfg(test)]"));
        for line in code {
            for forbidden in ["process::exit", "println!", "eprintln!", "dbg!", "todo!("] {
                assert!(!line.contains(forbidden), "{file}: {}", line.trim());
            }
        }
    }
}

#[test]
fn every_stage_file_is_registered_under_its_name() {
    let mut names: Vec<&str> = KINDS.iter().map(|k| k.name).collect();
    names.sort_unstable();
    let mut files: Vec<String> = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/stages"))
        .unwrap()
        .map(|e| e.unwrap().path())
        // A kind may have a folder of helpers beside its file.
        .filter(|p| p.is_file())
        .map(|p| p.file_stem().unwrap().to_string_lossy().into_owned())
        .filter(|n| !["mod", "context", "registry"].contains(&n.as_str()))
        .collect();
    files.sort_unstable();
    assert_eq!(names, files);
    for kind in KINDS {
        assert!(kind.about.ends_with('.'), "`{}`: one sentence, please", kind.name);
        let sample: toml::Table =
            toml::from_str(kind.sample).unwrap_or_else(|e| panic!("sample of {}: {e}", kind.name));
        let config = serde_json::to_value(&sample).unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let ctx = tailfuse::stages::ResolveContext { root, history_at_test: "train+valid" };
        if let Err(e) = (kind.resolve)(config, &ctx) {
            panic!("the sample of `{}` does not resolve: {e}", kind.name);
        }
    }
}

//! Finds all tests in the sources, to check that the tests named in documents and in the bounty
//! exist.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// The root of the repository.
pub const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Test {
    /// The folder of its package.
    pub package: String,
    /// In integration tests with the module, such as `placing::bad_input_is_refused`; elsewhere
    /// only the name.
    pub path: String,
}

impl Test {
    /// The name without the module.
    pub fn name(&self) -> &str {
        self.path.rsplit("::").next().unwrap_or(&self.path)
    }
}

/// All tests of all packages.
pub fn all() -> anyhow::Result<Vec<Test>> {
    let mut tests = Vec::new();
    for entry in fs::read_dir(REPOSITORY)? {
        let folder = entry?.path();
        if !folder.join("Cargo.toml").exists() {
            continue;
        }
        let package = folder.file_name().unwrap_or_default().to_string_lossy();
        let integration = folder.join("tests/it");
        for code in ["src", "tests", "programs"] {
            for file in rust_files(&folder.join(code))? {
                let module = file.strip_prefix(&integration).ok().map(module_of);
                let text = fs::read_to_string(&file)
                    .with_context(|| format!("{} cannot be read", file.display()))?;
                tests.extend(names_in(&text).into_iter().map(|name| Test {
                    package: package.clone().into_owned(),
                    path: match &module {
                        Some(module) if !module.is_empty() => format!("{module}::{name}"),
                        _ => name.to_owned(),
                    },
                }));
            }
        }
    }
    Ok(tests)
}

fn rust_files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if !folder.exists() {
        return Ok(files);
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}

/// `http/orders.rs` is the module `http::orders`; `main.rs` has no module.
fn module_of(file: &Path) -> String {
    let path = file.with_extension("");
    let parts = path.iter().map(|part| part.to_string_lossy());
    let module = parts.collect::<Vec<_>>().join("::");
    if module == "main" {
        String::new()
    } else {
        module
    }
}

/// The names of the functions below a `#[test]` or `#[tokio::test]`.
fn names_in(text: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut is_test = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            is_test = true;
        } else if is_test && let Some((_, rest)) = line.split_once("fn ") {
            names.extend(rest.split(['(', '<']).next());
            is_test = false;
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_tests_are_found_in_source_text() {
        let text = "
            #[test]
            fn one() {}
            fn no_test() {}
            #[tokio::test(flavor = \"multi_thread\")]
            #[cfg(unix)]
            async fn two() {}";
        assert_eq!(names_in(text), ["one", "two"]);
        assert_eq!(module_of(Path::new("main.rs")), "");
        assert_eq!(module_of(Path::new("http/orders.rs")), "http::orders");
    }
}

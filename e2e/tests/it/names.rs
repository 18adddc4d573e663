//! Documents name tests as proofs. These tests must exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use e2e::test_names::{self, REPOSITORY};

/// Test names are sentences. Shorter identifiers in documents are columns, settings or problem
/// codes.
const WORDS_MIN: usize = 6;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(REPOSITORY).join(path)).unwrap()
}

fn names_of_tests() -> BTreeSet<String> {
    let tests = test_names::all().unwrap();
    tests.iter().map(|test| test.name().to_owned()).collect()
}

/// Everything between backticks that looks like the name of a test.
fn test_names_in(text: &str) -> Vec<&str> {
    let code = text.split('`').skip(1).step_by(2);
    code.filter(|code| {
        let is_identifier = code
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
        // Names of metrics are excluded.
        let is_sentence = !fault_numbers(code).is_empty() || code.split('_').count() >= WORDS_MIN;
        is_identifier && is_sentence && !code.starts_with("gozon_")
    })
    .collect()
}

/// The numbers at the beginning of a name: 16 and 34 of `f16_f34_every_process`.
fn fault_numbers(name: &str) -> Vec<u32> {
    let number = |word: &str| word.strip_prefix('f')?.parse().ok();
    name.split('_').map_while(number).collect()
}

#[test]
fn every_test_that_a_document_names_exists() {
    let tests = names_of_tests();
    let mut found = 0;
    for document in [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "docs/OPERATING.md",
        "e2e/FAULTS.md",
    ] {
        let text = read(document);
        for name in test_names_in(&text) {
            assert!(
                tests.contains(name),
                "{document} names the test {name}, which does not exist"
            );
            found += 1;
        }
    }
    assert!(found > 50, "only {found} names were found");
}

#[test]
fn every_fault_has_a_test_and_every_numbered_test_is_listed_with_its_fault() {
    let text = read("e2e/FAULTS.md");
    let row = |fault: u32| {
        let mut rows = text
            .lines()
            .filter(|line| line.starts_with(&format!("| F{fault} ")));
        let row = rows.next().unwrap_or_else(|| panic!("F{fault} has no row"));
        assert_eq!(rows.next(), None, "F{fault} has two rows");
        row
    };
    let mut rows = 0;
    for row in text.lines().filter(|line| line.starts_with("| F")) {
        assert!(
            !test_names_in(row).is_empty() || row.contains("not tested"),
            "there is no test in {row}"
        );
        rows += 1;
    }
    assert!(rows > 60, "only {rows} faults were found");
    for name in names_of_tests() {
        for fault in fault_numbers(&name) {
            assert!(
                test_names_in(row(fault)).contains(&name.as_str()),
                "{name} is not listed with F{fault}"
            );
        }
    }
}

/// The build of the container images copies manifests by a pattern, and fails without one of them.
#[test]
fn the_container_build_copies_the_manifest_of_every_crate() {
    let dockerfile = read("Dockerfile");
    let workspace = read("Cargo.toml");
    let members = workspace
        .lines()
        .find_map(|line| line.strip_prefix("members = "))
        .unwrap();
    let members: Vec<String> = serde_json::from_str(members).unwrap();
    assert!(members.len() > 10, "{members:?}");
    for member in members {
        let pattern = match member.rsplit_once('/') {
            Some((folder, _)) => format!(" {folder}/*/Cargo.toml"),
            None => " */Cargo.toml".to_owned(),
        };
        assert!(dockerfile.contains(&pattern), "{member}: no {pattern}");
    }
}

//! The web page: its files, their headers and sizes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use stack::http::Answer;

use crate::harness::{Gateway, Reaction, ok};

/// All files together, compressed.
const PAGE_BYTES_MAX: usize = 100 * 1000;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("web")
}

/// Paths below the folder, as in URLs.
fn files() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![folder()];
    while let Some(here) = folders.pop() {
        for entry in std::fs::read_dir(here).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    found.insert(
                        path.strip_prefix(folder())
                            .unwrap()
                            .to_str()
                            .unwrap()
                            .to_owned(),
                    );
                }
            }
        }
    }
    found
}

async fn page() -> Gateway {
    Gateway::start(|_| Reaction::Answers(ok("{}"))).await
}

async fn get(gateway: &Gateway, path: &str, headers: &[(&str, &str)]) -> Answer {
    gateway
        .http
        .request("GET", path, headers, Bytes::new())
        .await
        .unwrap()
}

#[tokio::test]
async fn the_page_is_served_with_its_types_and_a_strict_policy() {
    let gateway = page().await;
    for (path, content_type) in [
        ("/", "text/html; charset=utf-8"),
        ("/assets/main.js", "text/javascript; charset=utf-8"),
        (
            "/assets/vendor/htm-preact.js",
            "text/javascript; charset=utf-8",
        ),
        ("/assets/style.css", "text/css; charset=utf-8"),
        ("/assets/icon.svg", "image/svg+xml"),
    ] {
        let answer = get(&gateway, path, &[]).await;
        assert_eq!(answer.status, 200, "{path}");
        assert_eq!(answer.header("content-type"), Some(content_type), "{path}");
        assert_eq!(
            answer.header("x-content-type-options"),
            Some("nosniff"),
            "{path}"
        );
        assert_eq!(
            answer.header("referrer-policy"),
            Some("no-referrer"),
            "{path}"
        );
        let policy = answer.header("content-security-policy").unwrap();
        for directive in [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "frame-ancestors 'none'",
        ] {
            assert!(
                policy.split("; ").any(|one| one == directive),
                "{path}: {policy}"
            );
        }
        assert!(!policy.contains("unsafe"), "{path}: {policy}");
    }
}

#[tokio::test]
async fn other_files_are_not_found() {
    let gateway = page().await;
    for path in [
        "/assets/nothing.js",
        "/assets/",
        "/assets/vendor/README.md",
        "/assets/../Cargo.toml",
        "/assets/%2e%2e/Cargo.toml",
    ] {
        let answer = get(&gateway, path, &[]).await;
        assert_eq!(
            (answer.status, answer.header("content-type")),
            (404, Some("application/problem+json")),
            "{path}"
        );
    }
}

#[tokio::test]
async fn a_cached_file_is_answered_with_304() {
    let gateway = page().await;
    let first = get(&gateway, "/assets/main.js", &[]).await;
    let tag = first.header("etag").unwrap();
    assert_eq!(first.header("cache-control"), Some("no-cache"));
    let again = get(
        &gateway,
        "/assets/main.js",
        &[("if-none-match", &format!("W/\"other\", {tag}"))],
    )
    .await;
    assert_eq!(
        (again.status, again.body.len(), again.header("etag")),
        (304, 0, Some(tag))
    );
    assert_eq!(
        get(&gateway, "/assets/style.css", &[("if-none-match", tag)])
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn the_compressed_page_is_small() {
    let gateway = page().await;
    let mut bytes = 0;
    for name in files().iter().filter(|name| !name.ends_with(".md")) {
        let answer = get(
            &gateway,
            &format!("/assets/{name}"),
            &[("accept-encoding", "br, gzip;q=0.8")],
        )
        .await;
        assert_eq!(
            (answer.status, answer.header("content-encoding")),
            (200, Some("gzip")),
            "{name}"
        );
        bytes += answer.body.len();
    }
    assert!(bytes > 1000 && bytes < PAGE_BYTES_MAX, "{bytes} bytes");
    assert_eq!(
        get(&gateway, "/", &[("accept-encoding", "gzip;q=0")])
            .await
            .header("content-encoding"),
        None
    );
}

/// Together with the content security policy, this keeps descriptions plain text.
#[test]
fn the_page_never_inserts_text_as_markup() {
    for name in files()
        .iter()
        .filter(|name| name.ends_with(".js") && !name.starts_with("vendor/"))
    {
        let text = std::fs::read_to_string(folder().join(name)).unwrap();
        for forbidden in [
            "innerHTML",
            "outerHTML",
            "InnerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(!text.contains(forbidden), "{name} has {forbidden}");
        }
    }
}

#[test]
fn every_text_exists_in_both_languages() {
    let names = |language: &str| -> BTreeSet<String> {
        let text = std::fs::read_to_string(folder().join(format!("i18n/{language}.js"))).unwrap();
        let names = text
            .lines()
            .filter_map(|line| line.strip_prefix("  ")?.split_once(": "));
        names
            .map(|(name, _)| name.trim_matches('\'').to_owned())
            .collect()
    };
    let (english, russian) = (names("en"), names("ru"));
    assert!(english.len() > 100);
    assert_eq!(
        english.difference(&russian).collect::<Vec<_>>(),
        Vec::<&String>::new()
    );
    // English uses the API's own texts for fields and problems.
    let only_russian: Vec<_> = russian
        .difference(&english)
        .filter(|name| !name.starts_with("field.") && !name.starts_with("problem."))
        .collect();
    assert_eq!(only_russian, Vec::<&String>::new());
}

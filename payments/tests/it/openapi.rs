//! The committed OpenAPI document matches the code.

#[test]
fn the_openapi_document_in_the_repository_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let current = payments::openapi().to_pretty_json().unwrap() + "\n";
    if std::env::var_os("GOZON_UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(path, &current).unwrap();
    }
    let stored = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        stored == current,
        "payments/openapi.json is outdated: run `just openapi` and review the difference"
    );
}

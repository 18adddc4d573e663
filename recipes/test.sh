#!/usr/bin/env bash
# Runs all tests, or those that the arguments to `cargo test` select, and ends with one line that counts them.
set -euo pipefail
# Tests of the whole system start our programs as processes, so these must be there.
cargo build --locked --workspace --bins
cargo test --locked --workspace --all-targets --no-fail-fast "$@" 2>&1 | awk '
  { print; fflush() }
  /^test result:/ { for (i = 1; i < NF; i++) { if ($(i + 1) == "passed;") passed += $i; if ($(i + 1) == "failed;") failed += $i } }
  END { printf "\n%d passed, %d failed\n", passed, failed }'

#!/usr/bin/env bash
# Runs all tests, or those that the arguments for `cargo test` select. The last line counts them.
set -euo pipefail
# Tests of the whole system start our programs as processes, so they must be built first.
cargo build --locked --workspace --bins
# A test that this machine cannot run (no root, no strace) passes, and writes a line to this file.
not_tested=${CARGO_TARGET_DIR:-target}/tmp/not-tested
rm -f "$not_tested"
cargo test --locked --workspace --all-targets --no-fail-fast "$@" 2>&1 | awk -v not_tested="$not_tested" '
  { print; fflush() }
  /^test result:/ { for (i = 1; i < NF; i++) { if ($(i + 1) == "passed;") passed += $i; if ($(i + 1) == "failed;") failed += $i } }
  END { while ((getline why < not_tested) > 0) print "not tested here: " why }
  END { printf "\n%d passed, %d failed\n", passed, failed }'

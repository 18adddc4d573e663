#!/usr/bin/env bash
# Tests the web page in Chromium, against a stack of its own.
#   recipes/web.sh [--screenshots FOLDER] [WORDS ...]
# WORDS select the tests whose names contain them, in this order. Every run writes screenshots of
# all views to target/web-screenshots; --screenshots also writes those of the README to FOLDER.
# CHROMIUM names the browser to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. recipes/tools.sh
. recipes/own-stack.sh

tests=gateway/web-tests
readme_screenshots='' words=''
while [ $# -gt 0 ]; do
  case $1 in
    --screenshots) readme_screenshots=$(realpath -m "${2:?--screenshots FOLDER}"); shift 2 ;;
    -*) fail "usage: recipes/web.sh [--screenshots FOLDER] [WORDS ...]" ;;
    *) words+="${words:+ }$1"; shift ;;
  esac
done

# Finds Chromium or Chrome, or installs Debian's. Sets $chromium.
with_chromium() {
  chromium=${CHROMIUM:-}
  [ -z "$chromium" ] || return 0
  find_chromium && return
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    fail "no browser is found: run 'apt install chromium fonts-noto-core' as root, or set CHROMIUM to a Chrome or Chromium"
  say "Installing chromium with apt ..."
  local output
  output=$(apt-get update -qq 2>&1 &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-noto-core 2>&1) ||
    fail "apt could not install chromium:
$output"
  find_chromium || fail "chromium is installed but not found"
}
find_chromium() {
  local name
  for name in chromium chromium-browser google-chrome-stable google-chrome; do
    chromium=$(command -v "$name") && return
  done
  return 1
}

with_packages() { # installs what the lock file lists; sets $packages
  packages=$tools/web-tests
  with_node
  cmp -s "$tests/package-lock.json" "$packages/package-lock.json" && [ -d "$packages/node_modules" ] && return
  say "Installing playwright-core and axe-core into $packages ..."
  local output
  rm -rf "$packages"
  mkdir -p "$packages"
  cp "$tests/package.json" "$tests/.npmrc" "$packages/"
  # The lock file is moved into place last, so an interrupted installation is repeated.
  cp "$tests/package-lock.json" "$packages/npm-shrinkwrap.json"
  output=$("${npm[@]}" ci --no-audit --no-fund --ignore-scripts --prefix "$packages" 2>&1) || fail "npm could not install them:
$output"
  mv "$packages/npm-shrinkwrap.json" "$packages/package-lock.json"
}

with_chromium
with_packages
own_stack
screenshots=$(realpath -m "$target/web-screenshots")
rm -rf "$screenshots"
mkdir -p "$screenshots"
say "The page at $url, in $("$chromium" --version 2>/dev/null)"
export CHROMIUM=$chromium NODE_PATH=$packages/node_modules
export GOZON_GATEWAY=$url GOZON_DIR=$folder GOZON_PORT_OFFSET=$offset GOZON_STACK=${stack[0]}
export GOZON_SCREENSHOTS=$screenshots GOZON_README_SCREENSHOTS=$readme_screenshots
run() { # run HOW_MANY_FILES_AT_ONCE NAME ...
  local files=("${@:2}")
  files=("${files[@]/#/$tests/}")
  node --test --test-concurrency="$1" --test-reporter=spec ${words:+--test-name-pattern "$words"} "${files[@]/%/.test.js}"
}
run_all() {
  local failed=0
  run 2 layout shop reload views || failed=1
  # These stop services, so nothing else may run beside them.
  run 1 flow live || failed=1
  return $failed
}
run_all | awk '
  !/# test name does not match pattern/ { print; fflush() }
  $2 == "pass" && NF == 3 { passed += $3 }
  $2 == "fail" && NF == 3 { failed += $3 }
  END { printf "\n%d passed, %d failed\n", passed, failed; if (passed + failed == 0) exit 1 }'
say "Screenshots of all views: $screenshots"

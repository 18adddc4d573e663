#!/usr/bin/env bash
# Runs the long checks one after the other, also after a failure. Writes durations and results to
# e2e/reports/long.md, or to target/long/long.md if NAMES select some of the checks.
#   recipes/long.sh [NAME ...]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$repo"

# The oldest version whose data must keep working.
oldest=76c8346
seed=$((RANDOM * 32768 + RANDOM))
all=(kill-matrix bounty test-long chaos model api test-web upgrade-test)
logs=${CARGO_TARGET_DIR:-$repo/target}/long
names=("$@") report=$logs/long.md
[ $# -gt 0 ] || { names=("${all[@]}") report=e2e/reports/long.md; }

arguments_of() { # arguments_of NAME: sets $arguments
  case $1 in
    chaos) arguments=(--seed "$seed" --seconds 120) ;;
    model) arguments=(--small) ;;
    upgrade-test) arguments=("$oldest") ;;
    kill-matrix | bounty | test-long | api | test-web) arguments=() ;;
    *) fail "there is no long check $1, only ${all[*]}" ;;
  esac
}
for name in "${names[@]}"; do arguments_of "$name"; done

mkdir -p "$logs"
rows=() failed=0
for name in "${names[@]}"; do
  arguments_of "$name"
  say "== ./dev $name ${arguments[*]}"
  begun=$SECONDS result=passed
  ./dev "$name" "${arguments[@]}" >"$logs/$name.log" 2>&1 || result=FAILED
  seconds=$((SECONDS - begun))
  # The last line of each program is its summary.
  summary=$(grep -v '^error: recipe\|^ *$' "$logs/$name.log" | tail -n 1 | tr '|' '/' || true)
  say "   $result after $seconds s: $summary"
  [ $result = passed ] || { failed=1; say "   log: $logs/$name.log"; }
  rows+=("| \`./dev $name${arguments:+ ${arguments[*]}}\` | $result | $seconds s | $summary |")
done

commit=$(git rev-parse --short=10 HEAD 2>/dev/null || echo unknown)
git diff --quiet HEAD -- . ":!$report" 2>/dev/null || commit+=" with local changes"
{
  printf '# The long checks\n\n'
  printf 'Written by `./dev long` for commit %s on %s, with %s cores.\n\n' "$commit" "$(date -u +%F)" "$(getconf _NPROCESSORS_ONLN)"
  printf '| check | result | duration | last line |\n|---|---|---|---|\n'
  printf '%s\n' "${rows[@]}"
} >"$report"
say "Report: $report"
exit $failed

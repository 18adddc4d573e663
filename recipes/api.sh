#!/usr/bin/env bash
# Checks the API from outside, with tools that do not share code with it.
#   recipes/api.sh postman GATEWAY_URL      the Postman collection on a running stack, by newman
#   recipes/api.sh lint                     the OpenAPI documents, by redocly
#   recipes/api.sh fuzz [EXAMPLES]          schemathesis, EXAMPLES per operation and phase
#   recipes/api.sh all                      all three, a short fuzz run, against a stack of its own
# The tools are installed from npm and PyPI into the private folder when they are first needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. recipes/tools.sh
. recipes/own-stack.sh

# Versions that work together.
newman=newman@6.2.2 redocly=@redocly/cli@2.77.0 schemathesis=schemathesis==4.32.5

npm_tool() { # npm_tool PACKAGE@VERSION: installs it unless it is installed
  local folder=$tools/npm package=${1%@*} version=${1##*@} output
  with_node
  grep -qs "\"version\": \"$version\"" "$folder/node_modules/$package/package.json" && return
  say "Installing $1 into $folder ..."
  mkdir -p "$folder"
  output=$("${npm[@]}" install --no-audit --no-fund --ignore-scripts --prefix "$folder" "$1" 2>&1) || fail "npm could not install $1:
$output"
}

postman() { # postman URL
  npm_tool "$newman"
  say "Postman collection against $1"
  "$tools/npm/node_modules/.bin/newman" run postman/gozon.postman_collection.json --env-var "gateway=$1" --color off
}

lint() {
  npm_tool "$redocly"
  REDOCLY_TELEMETRY=off REDOCLY_SUPPRESS_UPDATE_NOTICE=true \
    "$tools/npm/node_modules/.bin/redocly" lint --config recipes/redocly.yaml {gateway,orders,payments}/openapi.json
}

fuzz() { # fuzz URL EXAMPLES
  local packages=$tools/schemathesis
  [ -d "$packages/${schemathesis/==/-}.dist-info" ] || { rm -rf "$packages"; pip_install "$packages" "$schemathesis"; }
  say "schemathesis against $1, $2 examples per operation and phase"
  # Event streams do not end; their tests are in Rust.
  local exclude=()
  grep -q '/events"' gateway/openapi.json && exclude=(--exclude-path-regex '/events$')
  # In a temporary folder, because it writes files to its working folder.
  (
    export SCHEMATHESIS_HOOKS=$PWD/recipes/fuzz_hooks.py PYTHONPATH=$packages PYTHONDONTWRITEBYTECODE=1
    cd "$folder"
    "$packages/bin/schemathesis" run "$1/openapi.json" --url "$1" --checks all --max-examples "$2" "${exclude[@]}" \
      --request-timeout 40 --max-response-time 35 --generation-database none --suppress-health-check all \
      --continue-on-failure --no-color
  )
}

nothing_was_refused() { # a request rejected by a limit was not tested
  local refused
  refused=$(curl -sf "$url/metrics" | grep '^gozon_http_refused_total' | grep -v ' 0$' || true)
  [ -z "$refused" ] || fail "requests were rejected by a limit: $refused"
}

case ${1:-} in
  postman) postman "${2:?}" ;;
  lint) lint ;;
  fuzz)
    own_stack
    fuzz "$url" "${2:-100}"
    nothing_was_refused
    ;;
  all)
    lint
    own_stack
    # Twice: each run must use its own customer.
    postman "$url"
    postman "$url" >/dev/null
    fuzz "$url" 15
    nothing_was_refused
    ;;
  *) fail "usage: recipes/api.sh postman URL | lint | fuzz [EXAMPLES] | all" ;;
esac

